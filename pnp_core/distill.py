"""Stage 1, CFG distillation: one guided forward learns to give what CFG gives in two.

The teacher's ``eps_c`` and ``eps_n`` come from the cache; CFG is linear in them, so a cached pair
serves every guidance scale. Gradients flow through the frozen UNet from the first layer that reads
the text on, and for a full guide, which steers the decoder alone, through the decoder only.

Where the cache has companions, fine-tunes of the base, every other step is the base's and they take
turns in the rest: one guide for all of them does better on fine-tunes that it never saw, too.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from pnp_core.cache import TeacherCache
from pnp_core.cache.read import Pairs, as_float
from pnp_core.calls import checkpointing
from pnp_core.denoiser import Denoiser, GuidedDenoiser
from pnp_core.guide import Guide
from pnp_core.guiders import Guider
from pnp_core.seeds import step_generator
from pnp_core.settings import DistillConfig as DistillConfig
from pnp_core.shards import Ahead, pinning
from pnp_core.train import RECIPE, Report, config_hash, train

FLOOR = 0.1  # of the mean guidance, added to a sample's own: some have next to none


def draw_guidance_scale(
    guidance_scale: tuple[float, float], batch_size: int, generator: torch.Generator
) -> Tensor:
    """Guidance scales of a batch, ``(batch_size,)``, uniform from low to high."""
    low, high = guidance_scale
    return low + (high - low) * torch.rand(batch_size, generator=generator)


def distillation_loss(
    student: Tensor, target: Tensor, guidance: Tensor, guidance_scale_B: Tensor, power: float
) -> Tensor:
    """Squared error of eps, one a sample, over that of no guide, about: the share not explained.

    No guide is off by ``(w - 1) (eps_c - eps_n)``. Were errors not relative to this, the largest
    ``w`` and the first steps of sampling, where guidance is strongest, would have all the say.

    Args:
        student: the student's eps, ``(B, C, H, W)``.
        target: the teacher's guided eps, ``(B, C, H, W)``.
        guidance: ``eps_c - eps_n``, ``(B, C, H, W)``.
        guidance_scale_B: at which ``target`` was guided.
        power: mean square of the guidance over all samples; those with far less count less.
    """
    error = (student.float() - target.float()).square().mean(dim=(1, 2, 3))
    own = guidance.float().square().mean(dim=(1, 2, 3)) + FLOOR * power
    return error / (own * (guidance_scale_B.to(error) - 1).clamp(min=1).square())


def guidance_power(cache: TeacherCache, seed: int, num_pairs: int = 1024) -> float:
    """Mean square of ``eps_c - eps_n`` over the first pairs that training will see.

    Raises:
        ValueError: they are all zero.
    """
    indices = cache.pair_indices(batch_size=num_pairs, seed=seed, step=0)
    rows = cache.pair_rows(indices)
    power = float((rows["eps_c"].float() - rows["eps_n"].float()).square().mean())
    if power == 0:
        raise ValueError(
            "The teacher predicts the same with and without the prompt: there is no guidance to "
            "distil. Was the base trained with its text, and are there prompts in the data?"
        )
    return power


def turn_of(step: int, num_teachers: int) -> tuple[int, int]:
    """Whose step it is, the base's (0) or a companion's, and how many it has had before."""
    if num_teachers == 1:
        return 0, step
    turn, is_companions = divmod(step, 2)
    if not is_companions:
        return 0, turn
    before, companion = divmod(turn, num_teachers - 1)
    return 1 + companion, before


def distillation_objective(
    students: Sequence[Denoiser],
    cache: TeacherCache,
    config: DistillConfig,
    device: torch.device,
) -> Callable[[int, slice], Tensor]:
    """What :func:`pnp_core.train.train` minimises: a student's distance from its cached teacher.

    In units of the guidance itself: no guide is near 1, CFG is 0.

    Args:
        students: of the base, and of each companion whose pairs are to be used.
        cache: gives the teachers' pairs.
        config: the batch size, the seed, the guider and the range of guidance scales.
        device: where the students are.
    """
    power = guidance_power(cache, config.train.seed)
    draw = drawing(len(students), cache, config, device)

    def loss_fn(step: int, part: slice) -> Tensor:
        teacher, pairs, w_B, eps_w = draw(step, part)
        eps = students[teacher](pairs.z_t, pairs.timestep, pairs.conditions(w_B))
        return distillation_loss(eps, eps_w, pairs.eps_c - pairs.eps_n, w_B, power)

    return loss_fn


class Drawn(NamedTuple):
    """What a step of training, or a part of it, sees."""

    teacher: int  # whose step it is: 0 the base's
    pairs: Pairs
    w_B: Tensor
    eps_w: Tensor  # guided, (B, C, H, W)


def drawing(
    num_teachers: int, cache: TeacherCache, config: DistillConfig, device: torch.device
) -> Callable[[int, slice], Drawn]:
    """What a step of training sees, by its number and the part of its batch.

    The next step's is read in the background.
    """
    batch_size, seed = config.train.batch_size, config.train.seed
    guider = Guider(config.guider, cache.schedule.num_train_timesteps)

    def read(step: int, part: slice) -> tuple[int, Pairs, Tensor]:
        teacher, number = turn_of(step, num_teachers)
        indices = cache.pair_indices(batch_size=batch_size, seed=seed, step=number, teacher=teacher)
        w_B = draw_guidance_scale(config.guidance_scale, batch_size, step_generator(seed, step))
        pin = pinning(device)
        return teacher, cache.stored_pairs(indices[part]).map(pin), pin(w_B[part])

    ahead = Ahead(read)

    def draw(step: int, part: slice) -> Drawn:
        teacher, stored, w_B = ahead(step, part)
        pairs, w_B = stored.map(lambda x: as_float(x, device)), as_float(w_B, device)
        eps_w = guider(pairs.eps_c, pairs.eps_n, pairs.timestep, w_B)
        return Drawn(teacher, pairs, w_B, eps_w)

    return draw


def check_companions(given: Sequence[str], cache: TeacherCache) -> None:
    """Raise ValueError if these are not the cache's further teachers, in its order."""
    if list(given) != list(cache.companions):
        ours, theirs = (
            ", ".join(i[:12] for i in ids) or "none" for ids in (given, cache.companions)
        )
        raise ValueError(
            f"The cache was made with other companions of the base ({theirs}) than are given "
            f"({ours}): build the cache again."
        )


def distill(  # noqa: PLR0913, what a run needs, then by name what it may have
    unet: UNet2DConditionModel,
    cache: TeacherCache,
    config: DistillConfig,
    *,
    companions: Mapping[str, UNet2DConditionModel] | None = None,
    checkpoint: Path | None = None,
    report: Report = lambda *_: None,
) -> Guide:
    """Train a guide on a frozen base from cached teacher pairs.

    Args:
        unet: the base; it is not changed. Its device is where training runs.
        cache: the teacher's pairs, of this base.
        config: how to guide and train.
        companions: the cache's further teachers by identity, in its order.
        checkpoint: resumes from this file, and saves to it.
        report: called with the number of images so far and metrics.

    Returns:
        The guide, with its averaged weights.

    Raises:
        ValueError: other companions than the cache's; a loss that diverges or is not finite.
    """
    companions, training = companions or {}, config.train
    check_companions(list(companions), cache)
    teachers = (unet, *companions.values())
    for teacher in teachers:
        teacher.requires_grad_(False).eval()
    torch.manual_seed(training.seed)
    guide = Guide.from_unet(
        unet,
        config.guide,
        base_hash=cache.base_hash,
        prediction_type=cache.schedule.prediction_type,
        guidance_scale_range=list(config.guidance_scale),
    )
    students = [GuidedDenoiser(teacher, guide, cache.schedule) for teacher in teachers]

    def name_row(step: int, row: int) -> str:
        teacher, number = turn_of(step, len(teachers))
        indices = cache.pair_indices(
            batch_size=training.batch_size, seed=training.seed, step=number, teacher=teacher
        )
        return cache.name_pair(int(indices[row]))

    with checkpointing(teachers, training.gradient_checkpointing):
        return train(
            distillation_objective(students, cache, config, unet.device),
            guide,
            training,
            run_hash=config_hash(config, cache.content_hash, RECIPE),
            checkpoint=checkpoint,
            report=report,
            name_row=name_row,
            diverged=5,
            in_threads=True,
        )
