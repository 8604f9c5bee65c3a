"""Stage distill: train the guide on the frozen base, from the teacher cache.

Reads data/cache and the base's UNet. Writes guides/distilled. Interrupted, it goes on from its
checkpoint in runs/distill.
"""

from components.cli import main
from components.cluster import Report
from components.params import Params, companion_paths, teacher_guider
from components.paths import DISTILLED
from components.training import checkpoint_folder, open_cache, train_config, train_stage
from pnp_core.files import write_directory
from pnp_core.settings import DistillConfig, GuideConfig


def run(params: Params) -> None:
    """Write guides/distilled. Raises ValueError if the cache is not of this base."""
    train_stage("distill", train_guide, params, num_images=params.distill.num_images)


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
    # A full guide starts from the base's weights, which are not to be rounded for it.
    in_bf16 = config.train.precision == "bf16" and config.guide.kind != "full"
    pipeline, companions = load_for_training(params.base, companion_paths(params), in_bf16=in_bf16)
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


if __name__ == "__main__":
    main(run)
