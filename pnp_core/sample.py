"""Deterministic sampling of any denoiser, in batches."""

import copy
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from pnp_core.conditions import Conditions
from pnp_core.denoiser import Denoiser
from pnp_core.schedule import NoiseSchedule, sampling_timesteps

# By name, what diffusers makes the steps with; DDIM's are this library's own.
SOLVERS: dict[str, Any] = {
    "ddim": None,
    "dpmsolver++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
    "unipc": (UniPCMultistepScheduler, {}),
}

# More activations than this leave a CPU's cache, and one image takes half as long again.
DECODED_AT_ONCE = 32


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
    solver: str = "ddim",
) -> Tensor:
    """From ``z_T`` to ``z_0``: DDIM (eta 0) as diffusers' ``DDIMScheduler``, or another solver.

    Args:
        denoiser: gives eps at each step.
        scheduler: the base's; it gives the noise schedule and, by default, the spacing.
        z_T: initial noise, ``(B, C, H, W)``.
        conditions: of the batch.
        num_steps: how many steps, one call of ``denoiser`` each.
        timestep_spacing: as diffusers names it; default: the scheduler's.
        solver: ``ddim``, or of second order, by diffusers: ``dpmsolver++`` (Lu et al. 2022, its
            multistep form 2M) or ``unipc`` (Zhao et al. 2023).

    Raises:
        ValueError: there is no solver of this name, or it can't take so many steps.
    """
    if solver not in SOLVERS:
        raise ValueError(f"There is no solver {solver!r}; the solvers are {', '.join(SOLVERS)}.")
    schedule = NoiseSchedule.from_scheduler(scheduler)
    grid = sampling_timesteps(scheduler, num_steps, timestep_spacing)
    if SOLVERS[solver] is not None:
        steps = solver_steps(scheduler, solver, num_steps, timestep_spacing)
        z = z_T
        for t in steps.timesteps:
            eps = denoiser(z, t.expand(len(z)).to(z.device), conditions).to(z.dtype)
            z = steps.step(eps, t, z, return_dict=False)[0]
        return z
    batch = z_T.shape[0]
    z = z_T
    for t_B, s_B in pairwise(grid.to(z.device)[:, None].expand(-1, batch)):
        eps = denoiser(z, t_B, conditions).to(z.dtype)
        z = schedule.ddim_step(z, eps, t_B, s_B)
    return z


def solver_steps(scheduler: Any, solver: str, num_steps: int, spacing: str | None) -> Any:
    """The scheduler of this solver, by diffusers, for a run: on the base's schedule."""
    kind, options = SOLVERS[solver]
    told = "v_prediction" if NoiseSchedule.from_scheduler(scheduler).gives_v else "epsilon"
    overrides = dict(options, solver_order=2, prediction_type=told)
    if spacing is not None:
        overrides["timestep_spacing"] = spacing
    steps = kind.from_config(copy.deepcopy(dict(scheduler.config)), **overrides)
    steps.set_timesteps(num_steps)
    steps.set_begin_index(0)  # else it looks up each timestep, which makes a GPU's host wait
    return steps


@torch.no_grad()
def decode(pipe: DiffusionPipeline, z_BCHW: Tensor) -> np.ndarray:
    """Latents to images: uint8, ``(B, height, width, 3)``."""
    vae = pipe.vae
    parts = []
    for z in (z_BCHW / vae.config.scaling_factor).to(vae.device, vae.dtype).split(DECODED_AT_ONCE):
        image = (vae.decode(z).sample.float() / 2 + 0.5).clamp(0, 1) * 255
        parts.append(image.round().byte().permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(parts)
