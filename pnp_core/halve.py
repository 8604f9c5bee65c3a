"""Stage 2, progressive halving (Salimans & Ho 2022; Meng et al. 2023, section 3.2).

The guide for N steps learns to take in one DDIM step what the guide for 2N takes in two, both on
the same frozen base. CFG is in the first guide already and is never applied again; what that guide
lacks of CFG's strength, the halved ones may get.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from pnp_core.cache import TeacherCache
from pnp_core.denoiser import Denoiser, GuidedDenoiser
from pnp_core.distill import draw_guidance_scale
from pnp_core.files import write_directory
from pnp_core.guide import Guide
from pnp_core.models import AddedConditions
from pnp_core.schedule import NoiseSchedule, sampling_timesteps, two_step_target
from pnp_core.settings import HalveConfig as HalveConfig
from pnp_core.settings import halving_rounds as halving_rounds
from pnp_core.train import (
    RECIPE,
    Report,
    config_hash,
    rank_and_world,
    step_generator,
    train,
)


def raised_guidance_scale(w_B: Tensor, gain: float, highest: float) -> Tensor:
    """``1 + gain (w - 1)``, no more than ``highest``: what the first teacher is asked for.

    A guide trained by squared error is a mean over what it can't tell apart, so it guides more
    weakly than CFG at the same ``w``. The halved guides make up for it.
    """
    return (1 + gain * (w_B - 1)).clamp(max=highest)


def halving_target(
    teacher: Denoiser,
    schedule: NoiseSchedule,
    *,
    z_t: Tensor,
    t_B: Tensor,
    m_B: Tensor,
    s_B: Tensor,
    c_BLD: Tensor,
    w_B: Tensor,
    n_BLD: Tensor,
    added: AddedConditions | None = None,
) -> Tensor:
    """The eps with which one step ``t -> s`` lands where two teacher steps ``t -> m -> s`` do."""
    z_m = schedule.ddim_step(z_t, teacher(z_t, t_B, c_BLD, w_B, n_BLD, added).float(), t_B, m_B)
    z_s = schedule.ddim_step(z_m, teacher(z_m, m_B, c_BLD, w_B, n_BLD, added).float(), m_B, s_B)
    return two_step_target(schedule, z_t=z_t, z_s=z_s, t_B=t_B, s_B=s_B)


def truncated_snr_loss(
    schedule: NoiseSchedule, eps: Tensor, target: Tensor, z_t: Tensor, t_B: Tensor
) -> Tensor:
    """``max(x_mse, eps_mse)``, one a sample (Salimans & Ho 2022, section 4).

    The error of x is ``sigma_t / alpha_t`` times that of eps.
    """
    alpha, sigma = schedule.alpha_sigma(t_B, z_t)
    error = (eps.float() - target.float()).square().mean(dim=(1, 2, 3))
    return error * (sigma / alpha).flatten().square().clamp(min=1)


def halve(
    unet: UNet2DConditionModel,
    scheduler: Any,
    guide: Guide,
    cache: TeacherCache,
    config: HalveConfig,
    *,
    directory: Path,
    report: Report = lambda num_images, metrics: None,
) -> dict[int, Guide]:
    """Train the guides of every round, each from the one before.

    Args:
        scheduler: the base's; it fixes the timesteps.
        guide: of stage 1; good for ``start_steps``.
        directory: a finished round lies here as ``steps-N`` and is not trained again; so does the
            checkpoint of the round in progress.
        report: images are counted over all rounds; the metrics carry ``num_steps``.

    Returns:
        A guide for each step count, ``start_steps`` included.
    """
    unet.requires_grad_(False).eval()
    device, schedule = unet.device, cache.schedule
    batch_size = config.train.batch_size
    guides = {config.start_steps: guide}
    for number, num_steps in enumerate(halving_rounds(config.start_steps, config.end_steps)):
        teacher_digest = guides[2 * num_steps].weights_digest()
        run_hash = config_hash(config, cache.content_hash, teacher_digest, RECIPE)
        finished = directory / f"steps-{num_steps}-{run_hash}"
        if finished.exists():
            guides[num_steps] = Guide.from_pretrained(finished).to(device)
            continue
        teacher_guide = guides[2 * num_steps].requires_grad_(False).eval()
        student_guide = copy.deepcopy(teacher_guide).requires_grad_(True)
        student_guide.register_to_config(
            num_steps=num_steps, timestep_spacing=config.timestep_spacing
        )
        teacher = GuidedDenoiser(unet, teacher_guide, schedule)
        student = GuidedDenoiser(unet, student_guide, schedule)
        grid = sampling_timesteps(scheduler, num_steps, config.timestep_spacing)
        fine = sampling_timesteps(scheduler, 2 * num_steps, config.timestep_spacing)
        seed = config.train.seed + 1 + number
        gain = config.guidance_gain if number == 0 else 1.0  # the later teachers have it in them

        def loss_fn(
            step: int,
            part: slice,
            seed: int = seed,
            gain: float = gain,
            num_steps: int = num_steps,
            grid: Tensor = grid,
            fine: Tensor = fine,
            teacher: GuidedDenoiser = teacher,
            student: GuidedDenoiser = student,
        ) -> Tensor:
            generator = step_generator(seed, step)
            indices = cache.latent_indices(batch_size=batch_size, seed=seed, step=step)
            w_B = draw_guidance_scale(config.guidance_scale, batch_size, generator)[part]
            interval_B = torch.randint(num_steps, (batch_size,), generator=generator)[part]
            latents = cache.latents(indices, generator, part, device)
            t_B, s_B = grid[interval_B], grid[interval_B + 1]
            m_B = fine[2 * interval_B + 1]
            w_B, t_B = w_B.to(device), t_B.to(device)
            z_t = schedule.add_noise(latents.x, latents.noise, t_B)
            with torch.no_grad():
                target = halving_target(
                    teacher, schedule, z_t=z_t, t_B=t_B, m_B=m_B.to(device), s_B=s_B.to(device),
                    c_BLD=latents.text, n_BLD=latents.negative_text, added=latents.added,
                    w_B=raised_guidance_scale(w_B, gain, config.guidance_scale[1]),
                )  # fmt: skip
            eps = student(z_t, t_B, latents.text, w_B, latents.negative_text, latents.added)
            return truncated_snr_loss(schedule, eps, target, z_t, t_B)

        def name_row(step: int, row: int, seed: int = seed) -> str:
            indices = cache.latent_indices(batch_size=batch_size, seed=seed, step=step)
            return cache.moment_shards.name_row(int(indices[row]))

        def report_round(
            num_images: int,
            metrics: Any,
            number: int = number,
            num_steps: int = num_steps,
        ) -> None:
            report(
                number * config.train.num_images + num_images, {**metrics, "num_steps": num_steps}
            )

        guides[num_steps] = train(
            loss_fn,
            student_guide,
            config.train,
            run_hash=run_hash,
            checkpoint=directory / "checkpoint.pt",
            report=report_round,
            name_row=name_row,
            diverged=100,  # a round starts close to its target
        )
        if rank_and_world()[0] == 0:
            write_directory(finished, guides[num_steps].save_pretrained)
    return guides
