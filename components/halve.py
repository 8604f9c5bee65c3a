"""Stage halve: from many sampling steps to few, halving them round by round.

Reads guides/distilled, data/cache and the base's UNet. Writes guides/bundle, a guide for each step
count. Interrupted, it goes on from the round's checkpoint in runs/halve.
"""

from components.cli import main
from components.following import Report
from components.params import Params
from components.paths import BUNDLE, DISTILLED
from components.training import (
    check_precision,
    checkpoint_folder,
    open_cache,
    train_config,
    train_stage,
)
from pnp_core.settings import HalveConfig, halving_rounds


def run(params: Params) -> None:
    """Write guides/bundle. Raises ValueError if cache or guide are not of this base."""
    rounds = halving_rounds(params.halve.start_steps, params.halve.end_steps)
    num_images = len(rounds) * params.halve.num_images
    train_stage("halve", train_rounds, params, num_images=num_images, makes=BUNDLE)


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
    pipeline, _ = load_for_training(params.base, [], in_bf16=in_bf16)
    guides = halve(
        pipeline.unet,
        pipeline.scheduler,
        Guide.from_pretrained(DISTILLED).to(device()),
        open_cache(params, pipeline.scheduler),
        config,
        directory=checkpoint_folder("halve"),
        report=report,
    )
    if rank_and_world()[0] == 0:
        # Each round is trained on the steps of this sampler, and measured with it.
        best = SchedulerChoice(name="DDIMScheduler", timestep_spacing=params.halve.timestep_spacing)
        GuideBundle(guides, dict.fromkeys(guides, best)).save(BUNDLE)


if __name__ == "__main__":
    main(run)
