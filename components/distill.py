"""Stage distill: train the guide on the frozen base, from the teacher cache.

Reads data/cache and the base's UNet. Writes guides/distilled. Interrupted, it goes on from its
checkpoint in runs/distill.
"""

from typing import TYPE_CHECKING

from components.cli import main, without_arguments
from components.following import Report
from components.params import Params, companion_paths, teacher_guider
from components.paths import DISTILLED
from components.training import (
    check_precision,
    checkpoint_folder,
    open_cache,
    train_config,
    train_stage,
)
from pnp_core.files import write_directory
from pnp_core.settings import DistillConfig, GuideConfig, TrainConfig

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


def run(params: Params) -> None:
    """Write guides/distilled. Raises ValueError if the cache is not of this base."""
    num_images = params.distill.num_images
    train_stage("distill", train_guide, params, num_images=num_images, makes=DISTILLED)


def train_guide(params: Params, report: Report) -> None:
    """The work of each worker; the first one saves."""
    from components.device import load_for_training
    from pnp_core.distill import distill
    from pnp_core.train import rank_and_world

    config = DistillConfig(
        train=train_config(params.distill),
        guide=GuideConfig(**params.distill.guide.model_dump()),
        guidance_scale=params.distill.guidance_scale,
        guider=teacher_guider(params),
    )
    check_precision("distill", config.train)
    # A full guide starts from the base's weights, which are not to be rounded for it.
    in_bf16 = config.train.precision == "bf16" and config.guide.kind != "full"
    pipeline, companions = load_for_training(params.base, companion_paths(params), in_bf16=in_bf16)
    check_memory(pipeline.unet, len(companions), config.guide, config.train)
    guide = distill(
        pipeline.unet,
        open_cache(params, pipeline.scheduler),
        config,
        companions=companions,
        checkpoint=checkpoint_folder("distill") / "checkpoint.pt",
        report=report,
    )
    if rank_and_world()[0] == 0:
        write_directory(DISTILLED, guide.save_pretrained)


def check_memory(
    unet: "UNet2DConditionModel", num_companions: int, guide: GuideConfig, settings: TrainConfig
) -> None:
    """Raises ValueError, saying what would fit, if a training step does not fit this GPU."""
    from components.device import gpu_memory_gb
    from pnp_core.memory import Step, check_fits, num_bytes
    from pnp_core.train import micro_batches, rank_and_world

    memory = gpu_memory_gb()
    if memory is None:
        return
    rows = max(part.stop - part.start for part in micro_batches(settings))
    step = Step(unet.config, guide, settings, "meta")
    peak_gb = step.peak_gb(rows, checkpoints=settings.gradient_checkpointing)
    others_gb = num_companions * num_bytes(unet) / 1e9
    check_fits("distill", step, peak_gb, memory, others_gb)
    if rank_and_world()[0] == 0:
        print(
            f"distill: a training step takes {peak_gb + others_gb:.1f} GB of the GPU's "
            f"{memory:.1f} GB, by count",
            flush=True,
        )


if __name__ == "__main__":
    without_arguments("distill", __doc__)
    main(run)
