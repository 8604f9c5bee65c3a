"""docs/pipelines.md: every class of SD and SDXL pipeline, served, refused or not affected.

``python -m tests.pipeline_page`` writes it.
"""

import argparse
import ast
import functools
import importlib
import re
from pathlib import Path
from typing import Any

import diffusers

from pnp_core.pipelines import ASKS, DOUBLES, REFUSED, SERVED, UNAFFECTED, VIEWS, known

PAGE = Path(__file__).parent.parent / "docs/pipelines.md"

TAKES = r"\bUNet2DConditionModel\b|\bunet: OnnxRuntimeModel\b"


@functools.cache
def modules() -> dict[str, str]:
    """Of all pipeline classes that take a UNet2DConditionModel, or one as an ONNX graph."""
    root, found = Path(diffusers.__file__).parent, {}
    for folder in ("pipelines", "modular_pipelines/stable_diffusion_xl"):
        for file in sorted((root / folder).rglob("*.py")):
            source = file.read_text()
            if not re.search(TAKES, source):
                continue
            for node in ast.parse(source).body:
                if isinstance(node, ast.ClassDef) and is_pipeline(node):
                    parts = file.relative_to(root).with_suffix("").parts
                    found[node.name] = ".".join(("diffusers", *parts))
    found["StableDiffusionXLModularPipeline"] = MODULAR
    return found


MODULAR = "diffusers.modular_pipelines.stable_diffusion_xl.modular_pipeline"


def is_pipeline(node: ast.ClassDef) -> bool:
    """Whether this class is a pipeline that is made with such a UNet."""
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and method.name == "__init__":
            taken = [
                f"{a.arg}: {ast.unparse(a.annotation)}" for a in method.args.args if a.annotation
            ]
            return node.name.find("Pipeline") > 0 and bool(re.search(TAKES, " ".join(taken)))
    return False


def class_named(name: str) -> type[Any]:
    """A class of diffusers by its name."""
    cls: type[Any] = getattr(importlib.import_module(modules()[name]), name)
    return cls


HOW = {
    ASKS: "It asks `do_classifier_free_guidance`; plugged, it is told no.",
    DOUBLES: "It doubles its batch; the half under the prompt is run, and returned for both.",
    VIEWS: "It doubles the batch of each view; the half under the prompt is run, and returned for "
    "both. One image a call.",
}
FAMILIES = {
    "stable_diffusion": "Stable Diffusion",
    "stable_diffusion_xl": "Stable Diffusion XL",
    "controlnet": "ControlNet",
    "t2i_adapter": "T2I-Adapter",
    "pag": "Perturbed-attention guidance",
    "animatediff": "AnimateDiff",
    "latent_consistency_models": "Latent consistency models",
    "ledits_pp": "LEDITS++",
    "kolors": "Kolors",
    "deprecated": "Deprecated in diffusers",
    "modular": "Modular",
    "others": "Other families with a UNet of the same class",
}


def page() -> str:
    """docs/pipelines.md."""
    rows: dict[str, list[str]] = {family: [] for family in FAMILIES}
    counts = {"served": 0, "refused": 0, "not affected": 0}
    for name, module in modules().items():
        answer, why = answered(known(class_named(name)))
        counts[answer] += 1
        rows[family_of(module)].append(f"| `{name}` | *{answer}* | {why} |")
    parts = [
        INTRODUCTION.format(
            version=diffusers.__version__, **counts, unaffected=counts["not affected"]
        )
    ]
    for family, title in FAMILIES.items():
        table = ["| class | | how, or why not |", "|---|---|---|", *rows[family]]
        parts.append(f"## {title}\n\n" + "\n".join(table))
    return "\n\n".join(parts) + "\n"


def family_of(module: str) -> str:
    """The section of the page for classes of this module."""
    first, second = module.split(".")[1:3]
    if first == "modular_pipelines":
        return "modular"
    return second if second in FAMILIES else "others"


def answered(name: str | None) -> tuple[str, str]:
    """What the page says of a class that is known by this name."""
    if name in SERVED:
        return "served", HOW[SERVED[name]]
    table = "refused" if name in REFUSED else "not affected"
    why = REFUSED.get(str(name)) or UNAFFECTED[str(name)]
    return table, f"{why[0].upper()}{why[1:]}."


INTRODUCTION = """\
# Which pipelines can have a guide

Every pipeline class of diffusers {version} with a UNet of Stable Diffusion's class, made by
`python -m tests.pipeline_page` from the tables that `plug` goes by
(`pnp_core/pipelines.py`). {served} are *served*, {refused} are *refused*, {unaffected} are *not
affected*.

- *Served*: a plugged call runs one UNet forward a step, of one row a sample (Panorama: one a view;
  ParaDiGMS: of a row for each step that it runs at once), and gives what the stock pipeline gives
  with our own denoiser for its UNet. Each class is tested so, with a tiny random model.
- *Refused*: `plug` says so by name, before anything is changed. Such a pipeline adds forwards,
  computes with the unguided prediction, which a guide does away with, or has another kind of UNet.
- *Not affected*: there is no guidance to replace. `plug` says that too.

A subclass goes as its nearest ancestor here does. A class that has none, a community pipeline say,
is served if it decides as Stable Diffusion does: by a property `do_classifier_free_guidance`, with
an `encode_prompt` and a `guidance_scale`. If its UNet is then run on other rows than one a prompt,
or more than once a step, the call stops with an error that says so.

A guide is told the negative prompt by its text alone. Where a pipeline leaves more than the prompt
out of its unguided prediction (the image of unCLIP or an IP-Adapter, GLIGEN's boxes, a ControlNet
in guess mode), that keeps its effect and is not guided towards.

Whether a guide fits is another matter: it serves the UNets of one architecture, and `plug` compares
them. A UNet with more input channels (inpainting, depth, upscaling) needs a guide of its own; the
layers that GLIGEN adds do not count."""


if __name__ == "__main__":
    argparse.ArgumentParser(
        prog="python -m tests.pipeline_page", description=f"Make docs/{PAGE.name} anew."
    ).parse_args()
    PAGE.write_text(page())
