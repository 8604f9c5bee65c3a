"""A registered version's README.md, in the form of the Hugging Face hub's model cards."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import ModelCardData

from components.evaluation import Evaluation
from components.headlines import by_model, gain_text
from components.methods import METHODS
from components.verdict import Check, measured

SCORES = {"fid": "FID", "clip_score": "CLIP score"}
LICENCES = ("ATTRIBUTION.md", "LICENSE", "LICENSE.md", "LICENSE.txt", "LICENCE", "LICENCE.md")
PICTURE, DATA_LICENCE = "grid.png", "DATA_LICENCE.md"
CARD = """# {name}

A guide: a small network that takes the place of classifier-free guidance (CFG) in a text-to-image
model. With it a sampling step takes one UNet forward in place of two. It works on the base that it
was trained on and on that base's fine-tunes, which stay as they are.

## Use

```python
from diffusers import AutoPipelineForText2Image
from pnp_core import GuideBundle, plug

pipe = AutoPipelineForText2Image.from_pretrained("{base}")
bundle = GuideBundle.load("path/of/this/folder")
bundle.scheduler_for(8).set(pipe)
plug(pipe, bundle)
image = pipe("a red apple", guidance_scale={first_scale}, num_inference_steps=8).images[0]
```

## Base and training

| | |
|---|---|
{rows}

The guide was distilled from the frozen base's own guidance, then halved to each number of steps
(Hsiao et al., *Plug-and-Play Diffusion Distillation*, CVPR 2024).

## Results

{table}

Unguided / CFG / guided, at the same number of steps, of {num_images} images each at guidance
scale {scale}, judged by {judge}. Scores of another judge can't be
compared with these. *Gain*: of what CFG gains over no guidance, the share that the guide gains;
with × the guide's score over CFG's, where CFG's own gain is inside its interval, or is a loss; with
a sign less CFG's, where that may be zero besides.

![Unguided, CFG and guided of the same prompts and seeds]({picture})

## Verdict

{verdict}

## Limits

- The guide leaves {fvu} of the guidance unexplained (`guidance_fvu`).{trained}
- It was trained for guidance scales {scales} and {num_steps} steps.
- It fits UNets of its base's architecture only, and knows what the base and the data know.

## Licence

{data}
"""


def write_card(  # noqa: PLR0913, what a card tells, by name
    folder: Path,
    *,
    name: str,
    lineage: Mapping[str, str],
    evaluations: Mapping[str, Evaluation],
    checks: Sequence[Check],
    champion: str,
    picture: Path,
    dataset: Path,
) -> None:
    """Write README.md, with its picture and the data's licence beside it.

    Args:
        folder: of the bundle.
        name: of the registered model.
        lineage: what the guide was made of.
        evaluations: by model.
        checks: the verdict.
        champion: who it was compared with, or why with nobody, in a sentence.
        picture: unguided, CFG and guided, side by side.
        dataset: what `prepare` read, beside which its licence lies.
    """
    shutil.copyfile(picture, folder / PICTURE)
    beside = dataset if dataset.is_dir() else dataset.parent
    licence = next((beside / each for each in LICENCES if (beside / each).exists()), None)
    if licence:
        shutil.copyfile(licence, folder / DATA_LICENCE)
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        base_model=lineage["base"],
        tags=["guidance-distillation", "classifier-free-guidance", "text-to-image"],
        license="other",
        license_name="that-of-the-data",
        license_link=DATA_LICENCE if licence else None,
    )
    text = card(name, lineage, evaluations, checks, champion, has_licence=licence is not None)
    (folder / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n\n{text}", encoding="utf-8")


def card(  # noqa: PLR0913, what a card tells
    name: str,
    lineage: Mapping[str, str],
    evaluations: Mapping[str, Evaluation],
    checks: Sequence[Check],
    champion: str,
    *,
    has_licence: bool,
) -> str:
    """The card below its header."""
    first = next(iter(evaluations.values()))
    failed = [check for check in checks if not check.passed]
    holds = f"{len(checks) - len(failed)} of {len(checks)} rules of the gate held when it was made."
    holds = f"{holds} {champion}"
    verdict = "\n".join([holds, "", *(f"- not held: {check}" for check in failed)]).strip()
    data = (
        f"The training data's licences are in [{DATA_LICENCE}]({DATA_LICENCE}); some may ask for "
        "attribution and for the same licence."
        if has_licence
        else "No licence lies beside the training data: ask whoever has it before you pass this on."
    )
    return CARD.format(
        name=name,
        base=lineage["base"],
        first_scale=f"{first.guidance_scale:g}",
        scale=by_model({m: e.guidance_scale for m, e in evaluations.items()}),
        rows=_rows(lineage),
        table=_table(evaluations),
        num_images=by_model({m: e.num_images for m, e in evaluations.items()}),
        judge=first.judges[0],
        picture=PICTURE,
        verdict=verdict,
        fvu=_fvu(evaluations),
        trained=_trained(evaluations),
        scales=lineage["guidance_scale"],
        num_steps=lineage["num_steps"],
        data=data,
    )


def _rows(lineage: Mapping[str, str]) -> str:
    return "\n".join(f"| {key.replace('_', ' ')} | `{value}` |" for key, value in lineage.items())


def _table(evaluations: Mapping[str, Evaluation]) -> str:
    """A row for each model and number of steps."""
    names = list(SCORES.values())
    columns = ["model", "steps", *(f"{name}{what}" for name in names for what in ("", ", gain"))]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for model, evaluation in evaluations.items():
        for num_steps in evaluation.num_steps:
            cells = [model, str(num_steps)]
            for score in SCORES:
                found = [evaluation.cell(method, num_steps) for method in METHODS]
                if not all(cell and score in cell.scores for cell in found):
                    cells += ["not measured", ""]
                    continue
                cells.append(" / ".join(f"{c.scores[score].value:.3g}" for c in found if c))
                cells.append(gain_text(measured(evaluation, score, num_steps)))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _fvu(evaluations: Mapping[str, Evaluation]) -> str:
    found = [evaluation.guidance_fvu.value for evaluation in evaluations.values()]
    return f"{min(found):.2f} to {max(found):.2f}"


def _trained(evaluations: Mapping[str, Evaluation]) -> str:
    """A sentence on models whose `guidance_fvu` is of trained prompts; empty if there are none."""
    models = [name for name, found in evaluations.items() if found.fvu_prompts.get("trained")]
    return f" On {', '.join(models)} of prompts that it was trained on." if models else ""
