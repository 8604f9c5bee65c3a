"""Luo et al. 2023, *LCM-LoRA: A Universal Stable-Diffusion Acceleration Module*.

A low-rank change of the weights (as in `lora`) is trained to be consistent: its x-prediction at a
state is to be the one at the state that one step of the guided teacher leads to. It samples in few
steps with diffusers' ``LCMScheduler``, which adds noise between them.
"""

from typing import Any

import torch
from diffusers import LCMScheduler
from torch import Tensor

from benchmarks.peers.lora import LowRankPeer
from pnp_core.conditions import Conditions
from pnp_core.denoiser import Denoiser
from pnp_core.distill import Drawn
from pnp_core.schedule import NoiseSchedule

NUM_SOLVER_STEPS = 50  # of the teacher's DDIM, along the whole schedule
SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0
HUBER = 0.001


def consistency(schedule: NoiseSchedule, eps: Tensor, z_t: Tensor, t_B: Tensor) -> Tensor:
    """``f = c_skip z_t + c_out x`` (Song et al. 2023, eq. 5): at ``t = 0`` it is ``z`` itself."""
    scaled = TIMESTEP_SCALING * t_B.to(z_t).reshape(-1, *(1,) * (z_t.ndim - 1))
    c_skip = SIGMA_DATA**2 / (scaled.square() + SIGMA_DATA**2)
    c_out = scaled / (scaled.square() + SIGMA_DATA**2).sqrt()
    return c_skip * z_t + c_out * schedule.to_x(eps.to(z_t), z_t, t_B)


class ConsistencyLoRA(LowRankPeer):
    """Not told ``w``: as the official script, it learns the mean over those that training draws."""

    share = 0.01

    def strength(self, w_B: Tensor) -> Tensor:
        """All of the change, whatever the scale."""
        return torch.ones_like(w_B)

    def losses(self, student: Denoiser, drawn: Drawn, schedule: NoiseSchedule) -> Tensor:
        """Pseudo-Huber distance of two x-predictions, one a sample."""
        pairs = drawn.pairs
        z_t, t_B, conditions = pairs.z_t.float(), pairs.timestep, pairs.conditions(drawn.w_B)
        s_B = (t_B - schedule.num_train_timesteps // NUM_SOLVER_STEPS).clamp(min=0)
        z_s = schedule.ddim_step(z_t, drawn.eps_w.float(), t_B, s_B)
        with torch.no_grad():
            there = student(z_s, s_B, conditions).float()
            target = consistency(schedule, there, z_s, s_B)
        here = student(z_t, t_B, conditions).float()
        error = consistency(schedule, here, z_t, t_B) - target
        return ((error.square() + HUBER**2).sqrt() - HUBER).mean(dim=(1, 2, 3))


class LargeConsistencyLoRA(ConsistencyLoRA):
    """The same with eight times as many parameters."""

    share = 0.08


@torch.no_grad()
def sample_consistent(  # noqa: PLR0913, the quantities of a run, by name
    denoiser: Denoiser,
    scheduler: Any,
    *,
    z_T: Tensor,
    conditions: Conditions,
    num_steps: int,
    generators: list[torch.Generator],
) -> Tensor:
    """Multistep consistency sampling as ``LCMScheduler`` does it, from ``z_T`` to ``z_0``.

    Args:
        denoiser: a consistency LoRA's.
        scheduler: the base's; it gives the noise schedule.
        z_T: initial noise, ``(B, C, H, W)``.
        conditions: of the batch.
        num_steps: how many steps, one call of ``denoiser`` each.
        generators: of the noise between steps, one an image.
    """
    stock = LCMScheduler.from_config(scheduler.config, prediction_type="epsilon")
    stock.set_timesteps(num_steps, device=z_T.device)
    z = z_T
    for t in stock.timesteps:
        eps = denoiser(z, t.expand(len(z)), conditions).to(z.dtype)
        z, last = stock.step(eps, t, z, generator=generators, return_dict=False)
    return last
