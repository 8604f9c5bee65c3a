"""Deterministic DDIM sampling of any denoiser, in batches."""

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from pnp_core.conditions import Conditions
from pnp_core.denoiser import Denoiser
from pnp_core.schedule import NoiseSchedule, sampling_timesteps


def initial_noise(shape: tuple[int, ...], seeds: list[int]) -> Tensor:
    """``z_T``, one seed an image: ``(len(seeds), *shape)``."""
    return torch.stack(
        [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )


@torch.no_grad()
def sample(  # noqa: PLR0913, the quantities of a run, by name
    denoiser: Denoiser,
    scheduler: Any,
    *,
    z_T: Tensor,
    conditions: Conditions,
    num_steps: int,
    timestep_spacing: str | None = None,
) -> Tensor:
    """Run DDIM (eta 0) from ``z_T`` to ``z_0``, as diffusers' ``DDIMScheduler`` does.

    Args:
        denoiser: gives eps at each step.
        scheduler: the base's; it gives the noise schedule and, by default, the spacing.
        z_T: initial noise, ``(B, C, H, W)``.
        conditions: of the batch.
        num_steps: how many steps, one call of ``denoiser`` each.
        timestep_spacing: as diffusers names it; default: the scheduler's.
    """
    schedule = NoiseSchedule.from_scheduler(scheduler)
    grid = sampling_timesteps(scheduler, num_steps, timestep_spacing)
    batch = z_T.shape[0]
    z = z_T
    for t_B, s_B in pairwise(grid.to(z.device)[:, None].expand(-1, batch)):
        eps = denoiser(z, t_B, conditions).to(z.dtype)
        z = schedule.ddim_step(z, eps, t_B, s_B)
    return z


@torch.no_grad()
def decode(pipe: DiffusionPipeline, z_BCHW: Tensor) -> np.ndarray:
    """Latents to images: uint8, ``(B, height, width, 3)``."""
    vae = pipe.vae
    image = vae.decode((z_BCHW / vae.config.scaling_factor).to(vae.device, vae.dtype)).sample
    image = (image.float() / 2 + 0.5).clamp(0, 1) * 255
    result: np.ndarray = image.round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return result
