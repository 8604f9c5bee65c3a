"""Stage halve: from many sampling steps to few, halving them round by round.

Reads guides/distilled, data/cache and the UNets of the base and its companions. Writes
guides/bundle, a guide for each step count; those for the fewest are matched in the end, if
`halve.match_steps` says so. Interrupted, it goes on from the checkpoint in runs/halve.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from components.cli import main, without_arguments
from components.following import Report
from components.params import Params, companion_paths, teacher_guider
from components.paths import BUNDLE, DISTILLED
from components.training import (
    check_precision,
    checkpoint_folder,
    open_cache,
    train_config,
    train_stage,
)
from pnp_core.settings import HalveConfig, halving_rounds

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, UNet2DConditionModel

    from pnp_core.cache import TeacherCache
    from pnp_core.guide import Guide
    from pnp_core.match import MatchConfig


def run(params: Params) -> None:
    """Write guides/bundle. Raises ValueError if cache or guide are not of this base."""
    section = params.halve
    rounds = halving_rounds(section.start_steps, section.end_steps)
    num_matched = sum(section.matched.values())
    train_stage(
        "halve",
        train_rounds,
        params,
        num_images=len(rounds) * section.num_images + num_matched,
        num_matched=num_matched,
        makes=BUNDLE,
    )


def train_rounds(params: Params, report: Report) -> None:
    """The work of each worker; the first one saves."""
    from components.device import device, load_for_training
    from pnp_core.bundle import GuideBundle
    from pnp_core.guide import Guide
    from pnp_core.halve import halve
    from pnp_core.scheduling import SchedulerChoice
    from pnp_core.train import rank_and_world

    config = HalveConfig(
        train=train_config(params.halve),
        start_steps=params.halve.start_steps,
        end_steps=params.halve.end_steps,
        guidance_scale=params.distill.guidance_scale,
        guidance_gain=params.halve.guidance_gain,
        timestep_spacing=params.halve.timestep_spacing,
    )
    check_precision("halve", config.train)
    in_bf16 = config.train.precision == "bf16"
    others = companion_paths(params) if params.halve.matched else []
    pipeline, companions = load_for_training(params.base, others, in_bf16=in_bf16)
    first = Guide.from_pretrained(DISTILLED).to(device())
    cache, unet = open_cache(params, pipeline.scheduler), pipeline.unet
    folder = checkpoint_folder("halve")
    guides = halve(unet, pipeline.scheduler, first, cache, config, directory=folder, report=report)
    matched = match_guides(params, guides, pipeline, companions, cache, report)
    if rank_and_world()[0] == 0:
        # Each round is trained on the steps of this sampler, and measured with it.
        best = SchedulerChoice(name="DDIMScheduler", timestep_spacing=params.halve.timestep_spacing)
        GuideBundle({**guides, **matched}, dict.fromkeys(guides, best)).save(BUNDLE)


def match_guides(  # noqa: PLR0913, what there is after halving
    params: Params,
    guides: Mapping[int, "Guide"],
    pipeline: "DiffusionPipeline",
    companions: Mapping[str, "UNet2DConditionModel"],
    cache: "TeacherCache",
    report: Report,
) -> dict[int, "Guide"]:
    """The guides for the fewest steps, matched; images are counted on from those of halving."""
    from pnp_core.match import match

    before = (len(guides) - 1) * params.halve.num_images
    matched: dict[int, Guide] = {}
    for num_steps, num_images in params.halve.matched.items():
        this = match_config(params, num_steps)

        def report_one(
            done: int, metrics: Mapping[str, float], before: int = before, most: int = num_images
        ) -> None:
            report(before + min(done, most), {**metrics, "matched": done})

        matched[num_steps] = match(
            pipeline.unet,
            pipeline.scheduler,
            guides[num_steps],
            guides[params.halve.start_steps],
            cache,
            this,
            companions=companions,
            directory=checkpoint_folder("halve"),
            report=report_one,
        )
        before += num_images
    return matched


def match_config(params: Params, num_steps: int) -> "MatchConfig":
    """How the guide for so many steps is matched."""
    from pnp_core.match import MatchConfig

    section = params.halve
    return MatchConfig(
        train=replace(
            train_config(section),
            num_images=section.matched[num_steps],
            learning_rate=section.match_learning_rate,
        ),
        num_steps=num_steps,
        guidance_scale=params.distill.guidance_scale,
        timestep_spacing=section.timestep_spacing,
        guider=teacher_guider(params),
    )


if __name__ == "__main__":
    without_arguments("halve", __doc__)
    main(run)
