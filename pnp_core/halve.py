"""Stage 2, progressive halving (Salimans & Ho 2022; Meng et al. 2023, section 3.2).

The guide for N steps learns to take in one DDIM step what the guide for 2N takes in two, both on
the same frozen base. CFG is in the first guide already and is never applied again; what that guide
lacks of CFG's strength, the halved ones may get.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from os.path import exists
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from pnp_core.cache import Draws, Latents, TeacherCache
from pnp_core.cache.read import as_float
from pnp_core.calls import checkpointing
from pnp_core.conditions import Conditions
from pnp_core.denoiser import Denoiser, GuidedDenoiser
from pnp_core.distill import draw_guidance_scale
from pnp_core.files import write_directory
from pnp_core.guide import Guide
from pnp_core.schedule import NoiseSchedule, sampling_timesteps, two_step_target
from pnp_core.seeds import step_generator
from pnp_core.settings import HalveConfig as HalveConfig
from pnp_core.settings import halving_rounds as halving_rounds
from pnp_core.shards import Ahead, pinning
from pnp_core.train import (
    RECIPE,
    Report,
    agreed,
    config_hash,
    rank_and_world,
    train,
)

MIDDLE = "a middle between t and s"
"""Beside the recipe of the spacings whose rounds, in an earlier one, halved no step."""


def raised_guidance_scale(w_B: Tensor, gain: float, highest: float) -> Tensor:
    """What the first teacher is asked for: ``w + (gain - 1) u (1 - u / u_max)``, ``u = w - 1``.

    A guide trained by squared error is a mean over what it can't tell apart, so it guides more
    weakly than CFG at the same ``w``. The halved guides make up for it: near ``w = 1`` guidance is
    multiplied by ``gain``. The teacher is asked for no more than ``highest``, which it was trained
    for; up to there this rises with ``w``.
    """
    above_B = w_B - 1
    return w_B + (gain - 1) * above_B * (1 - above_B / (highest - 1))


def halving_target(  # noqa: PLR0913, the quantities of a step, by name
    teacher: Denoiser,
    schedule: NoiseSchedule,
    *,
    z_t: Tensor,
    t_B: Tensor,
    m_B: Tensor,
    s_B: Tensor,
    conditions: Conditions,
) -> Tensor:
    """The eps with which one step ``t -> s`` lands where two teacher steps ``t -> m -> s`` do.

    Where ``s`` has the noise of ``t``, as the last step from timestep 0 may have, every eps does,
    and the teacher's at ``t`` is given.
    """
    eps_t = teacher(z_t, t_B, conditions).float()
    z_m = schedule.ddim_step(z_t, eps_t, t_B, m_B)
    z_s = schedule.ddim_step(z_m, teacher(z_m, m_B, conditions).float(), m_B, s_B)
    eps = two_step_target(schedule, z_t=z_t, z_s=z_s, t_B=t_B, s_B=s_B)
    is_still = schedule.alpha_sigma(t_B, z_t)[0] == schedule.alpha_sigma(s_B, z_t)[0]
    return torch.where(is_still, eps_t, eps)


def middle_times(grid: Tensor, fine: Tensor) -> Tensor:
    """Where the first of the teacher's two steps ends, for each step of the student.

    Args:
        grid: the student's timesteps and -1, ``(num_steps + 1,)``.
        fine: the teacher's, ``(2 num_steps + 1,)``.

    Returns:
        int64, ``(num_steps,)``, at least 0.
    """
    if torch.equal(fine[::2], grid):  # trailing
        return fine[1::2]
    # Leading: the teacher's times line up with the student's at the other end, or nearly so where
    # the steps don't divide the timesteps. Rounded up, as the end is no time to ask the teacher at.
    return (grid[:-1] + grid[1:] + 1) // 2


def truncated_snr_loss(
    schedule: NoiseSchedule, eps: Tensor, target: Tensor, z_t: Tensor, t_B: Tensor
) -> Tensor:
    """``max(x_mse, eps_mse)``, one a sample (Salimans & Ho 2022, section 4).

    The error of x is ``sigma_t / alpha_t`` times that of eps; of one of v, it is ``sigma_t`` times
    that, and of eps ``alpha_t`` times that.
    """
    alpha, sigma = schedule.alpha_sigma(t_B, z_t)
    error = (eps.float() - target.float()).square().mean(dim=(1, 2, 3))
    if schedule.gives_v:
        return error * torch.maximum(alpha, sigma).flatten().square()
    return error * (sigma / alpha).flatten().square().clamp(min=1)


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round of halving.

    Attributes:
        number: from 0.
        num_steps: the student's; the teacher has twice as many.
        gain: what the teacher's guidance is multiplied by, see :func:`raised_guidance_scale`.
        seed: of its batches.
    """

    number: int
    num_steps: int
    gain: float
    seed: int


def rounds_of(config: HalveConfig) -> list[Round]:
    """The rounds, in order. The first alone has the gain: the later teachers have it in them."""
    return [
        Round(
            number=number,
            num_steps=num_steps,
            gain=config.guidance_gain if number == 0 else 1.0,
            seed=config.train.seed + 1 + number,
        )
        for number, num_steps in enumerate(halving_rounds(config.start_steps, config.end_steps))
    ]


class Batch(NamedTuple):
    """A step's global batch of latents, on the CPU."""

    indices: Tensor
    w_B: Tensor
    number_B: Tensor  # of the sampler's step, from 0
    draws: Draws


def draw_batch(  # noqa: PLR0913, what there is to draw, then by name how many and which
    cache: TeacherCache,
    generator: torch.Generator,
    guidance_scale: tuple[float, float],
    *,
    num_steps: int,
    batch_size: int,
    seed: int,
    step: int,
) -> Batch:
    """What a step of training sees that has a sampler's steps and no pairs."""
    indices = cache.latent_indices(batch_size=batch_size, seed=seed, step=step)
    w_B = draw_guidance_scale(guidance_scale, batch_size, generator)
    number_B = torch.randint(num_steps, (batch_size,), generator=generator)
    return Batch(indices, w_B, number_B, cache.draws(indices, generator))


def halving_objective(  # noqa: PLR0913, a round's two guides, its data and its settings
    student: Denoiser,
    teacher: Denoiser,
    cache: TeacherCache,
    scheduler: Any,
    config: HalveConfig,
    this: Round,
    device: torch.device,
) -> Callable[[int, slice], Tensor]:
    """What :func:`pnp_core.train.train` minimises in a round: a step's distance from two."""
    schedule, batch_size = cache.schedule, config.train.batch_size
    grid = sampling_timesteps(scheduler, this.num_steps, config.timestep_spacing)
    fine = sampling_timesteps(scheduler, 2 * this.num_steps, config.timestep_spacing)
    middle = middle_times(grid, fine)

    @lru_cache(maxsize=2)  # a batch may come in parts, and the next step's among them
    def drawn(step: int) -> Batch:
        return draw_batch(
            cache, step_generator(this.seed, step), config.guidance_scale,
            num_steps=this.num_steps, batch_size=batch_size, seed=this.seed, step=step,
        )  # fmt: skip

    def read(step: int, part: slice) -> tuple[Latents, list[Tensor]]:
        indices, w_B, interval_B, draws = drawn(step)
        w_B, interval_B = w_B[part], interval_B[part]
        times = grid[interval_B], middle[interval_B], grid[interval_B + 1]
        pin = pinning(device)
        return cache.latents(indices, draws, part).map(pin), [pin(x) for x in (w_B, *times)]

    ahead = Ahead(read)

    def loss_fn(step: int, part: slice) -> Tensor:
        stored, numbers = ahead(step, part)
        latents = stored.map(lambda x: as_float(x, device))
        w_B, t_B, m_B, s_B = (as_float(x, device) for x in numbers)
        z_t = schedule.add_noise(latents.x, latents.noise, t_B)
        conditions = latents.conditions(w_B)
        raised = raised_guidance_scale(w_B, this.gain, config.guidance_scale[1])
        with torch.no_grad():
            target = halving_target(
                teacher, schedule, z_t=z_t, t_B=t_B, m_B=m_B, s_B=s_B,
                conditions=conditions.with_scale(raised),
            )  # fmt: skip
        eps = student(z_t, t_B, conditions)
        return truncated_snr_loss(schedule, eps, target, z_t, t_B)

    return loss_fn


def halve(  # noqa: PLR0913, a base, its guide, data and settings, then a place
    unet: UNet2DConditionModel,
    scheduler: Any,
    guide: Guide,
    cache: TeacherCache,
    config: HalveConfig,
    *,
    directory: Path,
    report: Report = lambda *_: None,
) -> dict[int, Guide]:
    """Train the guides of every round, each from the one before.

    Args:
        unet: the base, which is frozen here; its device is where training runs.
        scheduler: the base's; it fixes the timesteps.
        guide: of stage 1; good for ``start_steps``.
        cache: the teacher's pairs, of this base.
        config: the rounds and how to train each.
        directory: a finished round lies here as ``steps-N`` and is not trained again; so does the
            checkpoint of the round in progress.
        report: images are counted over all rounds; the metrics carry ``num_steps``.

    Returns:
        A guide for each step count, ``start_steps`` included.

    Raises:
        ValueError: the guide was made for another base or range of ``w``; workers see different
            files; a loss that diverges or is not finite.
    """
    check_guide(guide, cache, config)
    unet.requires_grad_(False).eval()
    guides = {config.start_steps: guide}
    for this in rounds_of(config):
        teacher = guides[2 * this.num_steps]
        run_hash = round_hash(this, config, cache, teacher)
        finished = directory / f"steps-{this.num_steps}-{run_hash}"
        if agreed(partial(exists, finished), str(finished), unet.device):
            guides[this.num_steps] = Guide.from_pretrained(finished).to(unet.device)
            continue

        def report_round(num_images: int, metrics: Any, this: Round = this) -> None:
            before = this.number * config.train.num_images
            # the last step of a round may go beyond it
            seen = min(num_images, config.train.num_images)
            report(before + seen, {**metrics, "num_steps": this.num_steps})

        guides[this.num_steps] = train_round(
            unet,
            scheduler,
            teacher.requires_grad_(False).eval(),
            cache,
            config,
            this,
            run_hash=run_hash,
            checkpoint=directory / "checkpoint.pt",
            report=report_round,
        )
        if rank_and_world()[0] == 0:
            write_directory(finished, guides[this.num_steps].save_pretrained)
    return guides


def check_guide(guide: Guide, cache: TeacherCache, config: HalveConfig) -> None:
    """Raise ValueError if a guide says that it was made for another base, or other ``w``."""
    made_for, low_high = guide.config, list(config.guidance_scale)
    wanted = {
        "base_hash": (made_for.base_hash or cache.base_hash, cache.base_hash),
        "prediction_type": (made_for.prediction_type, cache.schedule.prediction_type),
        "guidance_scale_range": (list(made_for.guidance_scale_range), low_high),
    }
    for name, (its, ours) in wanted.items():
        if its != ours:
            raise ValueError(
                f"The guide to be halved was made for another base or range of w: its {name} is "
                f"{its}, not {ours}. Distil one for what there is now (the stage distill)."
            )


def round_hash(this: Round, config: HalveConfig, cache: TeacherCache, teacher: Guide) -> str:
    """Identity of a round: what it is trained by, whichever rounds come before and after."""
    return config_hash(
        config.train,
        f"{this.num_steps} steps, gain {this.gain}, seed {this.seed}",
        f"w in {list(config.guidance_scale)}, {config.timestep_spacing}",
        cache.content_hash,
        teacher.weights_digest(),
        RECIPE if config.timestep_spacing == "trailing" else f"{RECIPE}; {MIDDLE}",
    )


def train_round(  # noqa: PLR0913, what halve() has, and what differs from round to round
    unet: UNet2DConditionModel,
    scheduler: Any,
    teacher: Guide,
    cache: TeacherCache,
    config: HalveConfig,
    this: Round,
    *,
    run_hash: str,
    checkpoint: Path,
    report: Report,
) -> Guide:
    """Train one round's guide, from its teacher on."""
    student = copy.deepcopy(teacher).requires_grad_(True)
    student.register_to_config(num_steps=this.num_steps, timestep_spacing=config.timestep_spacing)
    own, theirs = (GuidedDenoiser(unet, guide, cache.schedule) for guide in (student, teacher))

    def name_row(step: int, row: int) -> str:
        batch_size = config.train.batch_size
        return cache.name_latent(batch_size=batch_size, seed=this.seed, step=step, row=row)

    with checkpointing([unet], config.train.gradient_checkpointing):
        return train(
            halving_objective(own, theirs, cache, scheduler, config, this, unet.device),
            student,
            config.train,
            run_hash=run_hash,
            checkpoint=checkpoint,
            report=report,
            name_row=name_row,
            diverged=100,  # a round starts close to its target
            in_threads=True,
        )
