"""Is a guide for each step count better than one guide that is told the step count?

    python -m benchmarks.halving --run
    python -m benchmarks.halving --json

`--run` needs what `dvc repro` leaves. The one guide starts from the distilled guide, reads the step
count beside t and w, and learns all counts at once, each from the next larger one (as shortcut
models do: Frans et al., ICLR 2025); its teacher is a frozen copy, renewed once for each count. It
sees as many images as all rounds of `halve` together. Both are measured by the relative error of
the final latents to CFG's with the largest step count, over held-out prompts.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.command import command_parser, run_command
from benchmarks.quality import methods_on, models_of
from benchmarks.record import digest, header, note, precision_on, record
from components.device import device, load_base
from components.params import Params
from components.paths import BUNDLE, CACHE
from components.progress import Progress
from components.sampling import Sampler, choose_tasks
from components.training import train_config
from pnp_core.bundle import GuideBundle
from pnp_core.cache import TeacherCache
from pnp_core.conditions import Conditions
from pnp_core.denoiser import CFGDenoiser, Denoiser, GuidedDenoiser
from pnp_core.files import write_json, write_text
from pnp_core.guide import Guide
from pnp_core.guide.embeddings import EMBEDDING_DIM, frequencies, sinusoidal
from pnp_core.guide.kind import Kind, Prepared
from pnp_core.guide.tiny import PreparedTiny, TinyGuide
from pnp_core.halve import HalveConfig, halving_objective, rounds_of
from pnp_core.identity import base_identity
from pnp_core.model_files import weights_hash
from pnp_core.sample import sample
from pnp_core.seeds import step_generator
from pnp_core.train import train

RESULTS = Path("benchmarks/results/halving.json")
NUM_PROMPTS = 48
STEPS_SCALE = 100  # log2 of 1 to 1000 steps covers about the range of phases that t does
LABELS = {
    "unhalved": "the guide before halving",
    "each": "a guide for each count",
    "one": "one guide, told the count",
    "cfg": "CFG",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class CountedConditions(Conditions):
    """Conditions of a run that takes so many steps."""

    num_steps: int


class ToldSteps(Kind):
    """A tiny guide whose conditioning vector is told log2 of the number of steps as well."""

    def __init__(self, net: TinyGuide) -> None:
        super().__init__()
        self.net = net
        first = net.embed[0]
        assert isinstance(first, nn.Linear)
        self.steps = nn.Linear(EMBEDDING_DIM, first.out_features, bias=False)
        nn.init.zeros_(self.steps.weight)

    def prepare(self, conditions: Conditions, strength: float) -> Prepared:
        """As a tiny guide, with an embedding of the run's step count beside that of its scales."""
        assert isinstance(conditions, CountedConditions)
        prepared = PreparedTiny(self.net, conditions, strength)
        log2_steps_1 = torch.tensor([conditions.num_steps], device=conditions.w_B.device).log2()
        told_1E = sinusoidal(STEPS_SCALE * log2_steps_1, frequencies(log2_steps_1.device))
        prepared.of_w_BM = prepared.of_w_BM + self.steps(told_1E.to(self.steps.weight.dtype))
        return prepared


class OneGuide:
    """A guided forward of a guide that is told the number of steps."""

    def __init__(self, guided: GuidedDenoiser, num_steps: int) -> None:
        self.guided = guided
        self.num_steps = num_steps
        self.given: Conditions | None = None
        self.counted: CountedConditions | None = None

    def __call__(self, z_BCHW: Tensor, t_B: Tensor, conditions: Conditions) -> Tensor:
        """Guided eps, `(B, C, H, W)`, with conditions that carry the step count."""
        if self.counted is None or self.given is not conditions:
            self.given = conditions
            self.counted = CountedConditions(**vars(conditions), num_steps=self.num_steps)
        return self.guided(z_BCHW, t_B, self.counted)


def one_guide(distilled: Guide) -> Guide:
    """A copy that does the same until it is trained."""
    guide = copy.deepcopy(distilled).requires_grad_(True)
    assert isinstance(guide.net, TinyGuide)
    guide.net = ToldSteps(guide.net).to(guide.device)
    return guide


def halve_config(params: Params) -> HalveConfig:
    """Of stage halve, as one training that is as long as all its rounds."""
    section = params.halve
    train = train_config(section)
    config = HalveConfig(
        train=train,
        start_steps=section.start_steps,
        end_steps=section.end_steps,
        guidance_scale=params.distill.guidance_scale,
        guidance_gain=section.guidance_gain,
        timestep_spacing=section.timestep_spacing,
    )
    num_images = len(rounds_of(config)) * section.num_images
    return replace(config, train=replace(train, num_images=num_images))


def train_one_guide(params: Params, distilled: Guide) -> Guide:
    """One guide for all counts.

    In phase k the counts down to the k-th are learnt, in turns drawn at random: each has a
    teacher by then.
    """
    pipe = load_base(params.base)
    unet, config = pipe.unet, halve_config(params)
    cache = TeacherCache.open(CACHE, base=base_identity(params.base))
    guide = one_guide(distilled.to(unet.device))
    frozen = copy.deepcopy(guide).requires_grad_(False).eval()
    student, renewed, first = (
        GuidedDenoiser(unet, each, cache.schedule)
        for each in (guide, frozen, copy.deepcopy(frozen))
    )
    # one stream of data for all counts; not the one that turns are drawn from
    rounds = [replace(each, seed=config.train.seed + 1) for each in rounds_of(config)]
    objectives = [
        halving_objective(
            OneGuide(student, this.num_steps),
            OneGuide(renewed if this.number else first, 2 * this.num_steps),
            cache, pipe.scheduler, config, this, unet.device,
        )
        for this in rounds
    ]  # fmt: skip
    phase_steps = max(1, config.train.num_steps // len(rounds))

    def loss_fn(step: int, part: slice) -> Tensor:
        if step > 0 and step % phase_steps == 0:
            frozen.load_state_dict(guide.state_dict())
        num_known = min(step // phase_steps + 1, len(rounds))
        generator = step_generator(config.train.seed, step)
        turn = int(torch.randint(num_known, (1,), generator=generator))
        return objectives[turn](step, part)

    progress = Progress("one guide", config.train.num_images, "images")
    return train(
        loss_fn,
        guide,
        config.train,
        run_hash="",
        report=lambda done, metrics: progress(done, f"loss {metrics['loss']:.4f}"),
    )


def run(params: Params) -> None:
    """Train the one guide and measure."""
    bundle = GuideBundle.load(BUNDLE)
    start = bundle.num_steps[-1]
    one = train_one_guide(params, bundle.guides[start])
    counts = [each.num_steps for each in rounds_of(halve_config(params))]
    models: dict[str, Any] = {}
    for model, row in models_of(params).items():
        methods = methods_on(row, params, {})
        models[model] = errors(methods, bundle, one, counts)
        print(f"{model}: {models[model]}", flush=True)
    setting = {
        "guidance_scale": params.evaluate.guidance_scale,
        "reference_steps": start,
        "images_seen": len(counts) * params.halve.num_images,
        "base_hash": weights_hash(params.base)[:16],
    }
    results = {"setting": setting, "models": models}
    trained, sampled = (
        precision_on(device().type, each.precision) for each in (params.halve, params.evaluate)
    )
    precision = f"{trained} in training, {sampled} in sampling"
    guide = f"{digest(bundle)}, the one guide {one.weights_digest()[:16]}"
    note(results, "all", record(guide=guide, precision=precision))
    write_json(RESULTS, results)
    write_text(RESULTS.with_suffix(".md"), as_markdown(results))


def errors(
    methods: Sampler, bundle: GuideBundle, one: Guide, counts: list[int]
) -> dict[str, dict[str, float]]:
    """Relative errors on one model, by label and number of steps."""
    tasks = choose_tasks(methods.config)
    inputs = methods.inputs([task for task in tasks if task.is_heldout][:NUM_PROMPTS])
    unet, schedule, start = methods.pipe.unet, methods.schedule, bundle.num_steps[-1]

    def latents(denoiser: Denoiser, num_steps: int) -> Tensor:
        with methods.computing():
            return sample(
                denoiser,
                methods.pipe.scheduler,
                num_steps=num_steps,
                timestep_spacing=methods.spacing,
                **inputs,
            )

    reference = latents(CFGDenoiser(unet, schedule), start)
    found: dict[str, dict[str, float]] = {label: {} for label in LABELS}
    for num_steps in counts:
        denoisers: dict[str, Denoiser] = {
            "unhalved": GuidedDenoiser(unet, bundle.guides[start], schedule),
            "each": GuidedDenoiser(unet, bundle.guides[num_steps], schedule),
            "one": OneGuide(GuidedDenoiser(unet, one, schedule), num_steps),
            "cfg": CFGDenoiser(unet, schedule),
        }
        for label, denoiser in denoisers.items():
            error = (latents(denoiser, num_steps) - reference).square().mean()
            found[label][str(num_steps)] = float(error / reference.square().mean())
    return found


def as_markdown(results: Mapping[str, Any]) -> str:
    """The results as a page: relative errors by model and way, a column a step count."""
    setting, models = results["setting"], results["models"]
    counts = sorted(next(iter(models.values()))["cfg"], key=int, reverse=True)
    titles = ["model", "", *(f"{n} steps" for n in counts)]
    lines = [
        header(results, ["all"]),
        "",
        f"Relative error of the final latents to CFG's with {setting['reference_steps']} steps, "
        f"guidance scale {setting['guidance_scale']:g}, held-out prompts; "
        f"{setting['images_seen']:,} images seen in halving.",
        "",
        f"| {' | '.join(titles)} |",
        "|---" * len(titles) + "|",
    ]
    for model, rows in sorted(models.items()):
        for name, label in LABELS.items():
            cells = [f"{rows[name][n]:.4f}" for n in counts]
            lines.append(f"| {' | '.join([model, label, *cells])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command."""
    run_command(
        command_parser("halving", __doc__),
        RESULTS,
        lambda params, _: run(params),
        table=as_markdown,
        figures=lambda results: dict(results["models"]),
    )


if __name__ == "__main__":
    main()
