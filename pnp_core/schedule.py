"""Noise schedule, DDIM steps and conversions between what diffusion models predict.

Everything is variance preserving: ``z_t = alpha_t x + sigma_t eps``, ``alpha_t^2 + sigma_t^2 = 1``.

Denoisers give eps. Where the last timestep has no signal, ``alpha_t = 0`` (zero terminal SNR, Lin
et al. 2024), eps is ``z_t`` there and says nothing of ``x``: denoisers of such a schedule give v.
"""

import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pnp_core.model_configs import check_scheduler, predicted

NO_SIGNAL = 1e-6  # alpha_t^2 below this counts as 0; some schedulers have 2**-24 in its place


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """The discrete noise schedule of a base model.

    Attributes:
        alphas_cumprod: float64, shape ``(num_train_timesteps,)``; ``alpha_t^2`` at each timestep.
        final_alpha_cumprod: ``alpha^2`` where the last DDIM step ends.
        prediction_type: what the UNet predicts: ``epsilon``, ``v_prediction`` or ``sample``.
    """

    alphas_cumprod: Tensor
    final_alpha_cumprod: float
    prediction_type: str
    copies: dict[tuple[torch.device, torch.dtype], Tensor] = field(
        default_factory=dict, repr=False, compare=False
    )

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> "NoiseSchedule":
        """Read the schedule of a diffusers scheduler.

        Raises:
            ValueError: the scheduler has no discrete ``alphas_cumprod`` or predicts something else,
                or its base predicts eps where there is no signal.
        """
        if not hasattr(scheduler, "alphas_cumprod"):
            raise ValueError(
                f"{type(scheduler).__name__} has no alphas_cumprod: the base model needs a "
                "discrete variance-preserving scheduler such as DDIMScheduler."
            )
        check_scheduler(scheduler.config)
        prediction_type = predicted(scheduler.config)
        alphas_cumprod = scheduler.alphas_cumprod.cpu().double()
        alphas_cumprod = torch.where(alphas_cumprod < NO_SIGNAL, 0, alphas_cumprod)
        if prediction_type == "epsilon" and not alphas_cumprod.all():
            raise ValueError(
                "The base's scheduler says that it predicts epsilon and that a timestep has no "
                "signal (by its betas), where epsilon says nothing of the image: set "
                "prediction_type and betas to what the base was trained with, in its "
                "scheduler_config.json."
            )
        set_alpha_to_one = scheduler.config.get("set_alpha_to_one", True)
        return cls(
            alphas_cumprod=alphas_cumprod,
            final_alpha_cumprod=1.0 if set_alpha_to_one else float(alphas_cumprod[0]),
            prediction_type=prediction_type,
        )

    @cached_property
    def gives_v(self) -> bool:
        """Whether denoisers give v in place of eps: some timestep has no signal."""
        return not self.alphas_cumprod.all()

    @property
    def num_train_timesteps(self) -> int:
        """How many timesteps the base was trained on."""
        return len(self.alphas_cumprod)

    def differs(self, other: "NoiseSchedule") -> str:
        """In what ``other`` is another schedule; empty if it is the same."""
        pairs = {
            name: (getattr(self, name), getattr(other, name))
            for name in ("num_train_timesteps", "prediction_type", "final_alpha_cumprod")
        }
        if len(self.alphas_cumprod) == len(other.alphas_cumprod):
            at = int((self.alphas_cumprod - other.alphas_cumprod).abs().argmax())
            name = f"alphas_cumprod[{at}]"
            pairs[name] = float(self.alphas_cumprod[at]), float(other.alphas_cumprod[at])
        return ", ".join(f"{k} {a}, not {b}" for k, (a, b) in pairs.items() if a != b)

    def alpha_sigma(self, timestep_B: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """``alpha_t`` and ``sigma_t`` shaped ``(B, 1, 1, 1)``, in the dtype and device of ``like``.

        A timestep below zero stands for the end of the last DDIM step.
        """
        # Looked up where `like` is: to ask a GPU for the timesteps would be to wait for it.
        key = like.device, like.dtype
        table = self.copies.get(key)
        if table is None:
            table = self.copies[key] = self.alphas_sigmas.to(like.dtype).to(like.device)
        shape = (-1,) + (1,) * (like.ndim - 1)
        t_B = timestep_B.to(like.device).long().clamp(min=-1)
        alpha, sigma = table[:, t_B]
        return alpha.reshape(shape), sigma.reshape(shape)

    @cached_property
    def alphas_sigmas(self) -> Tensor:
        """``alpha_t`` and ``sigma_t`` at each timestep and, last, where the last DDIM step ends.

        Float64, shape ``(2, num_train_timesteps + 1)``, on the CPU: not every device has that.
        """
        final = self.alphas_cumprod.new_tensor([self.final_alpha_cumprod])
        alpha2 = torch.cat([self.alphas_cumprod, final])
        return torch.stack([alpha2.sqrt(), (1 - alpha2).sqrt()])

    def add_noise(self, x: Tensor, eps: Tensor, timestep_B: Tensor) -> Tensor:
        """``z_t = alpha_t x + sigma_t eps``."""
        alpha, sigma = self.alpha_sigma(timestep_B, x)
        return alpha * x + sigma * eps

    def to_eps(self, prediction: Tensor, z_t: Tensor, timestep_B: Tensor) -> Tensor:
        """Turn the UNet's prediction at ``z_t`` into eps (Salimans & Ho 2022, appendix D).

        ``v = alpha_t eps - sigma_t x``, hence ``eps = alpha_t v + sigma_t z_t``;
        for an x-prediction ``eps = (z_t - alpha_t x) / sigma_t``.
        Into v where denoisers give v; for an x-prediction ``v = (alpha_t z_t - x) / sigma_t``.
        """
        if self.prediction_type == "epsilon":
            return prediction
        if self.gives_v and self.prediction_type == "v_prediction":
            return prediction
        alpha, sigma = self.alpha_sigma(timestep_B, z_t)
        if self.gives_v:
            return (alpha * z_t - prediction) / sigma
        if self.prediction_type == "v_prediction":
            return alpha * prediction + sigma * z_t
        return (z_t - alpha * prediction) / sigma

    def from_eps(self, eps: Tensor, z_t: Tensor, timestep_B: Tensor) -> Tensor:
        """The inverse of :meth:`to_eps`."""
        if self.prediction_type == "epsilon":
            return eps
        if self.gives_v:
            return (
                eps if self.prediction_type == "v_prediction" else self.to_x(eps, z_t, timestep_B)
            )
        alpha, sigma = self.alpha_sigma(timestep_B, z_t)
        if self.prediction_type == "v_prediction":
            return (eps - sigma * z_t) / alpha
        return (z_t - sigma * eps) / alpha

    def to_x(self, eps: Tensor, z_t: Tensor, timestep_B: Tensor) -> Tensor:
        """``x = (z_t - sigma_t eps) / alpha_t``, or from v ``x = alpha_t z_t - sigma_t v``."""
        alpha, sigma = self.alpha_sigma(timestep_B, z_t)
        if self.gives_v:
            return alpha * z_t - sigma * eps
        return (z_t - sigma * eps) / alpha

    def ddim_step(self, z_t: Tensor, eps: Tensor, t_B: Tensor, s_B: Tensor) -> Tensor:
        """One deterministic DDIM step from timestep ``t`` to ``s`` (Song et al. 2021, eq. 12).

        ``z_s = alpha_s x + sigma_s eps``, with ``x`` the x-prediction at ``t``. Where denoisers
        give v, ``eps`` is that.
        """
        alpha_s, sigma_s = self.alpha_sigma(s_B, z_t)
        x = self.to_x(eps, z_t, t_B)
        if self.gives_v:
            alpha_t, sigma_t = self.alpha_sigma(t_B, z_t)
            eps = alpha_t * eps + sigma_t * z_t
        return alpha_s * x + sigma_s * eps


def sampling_timesteps(scheduler: Any, num_steps: int, spacing: str | None = None) -> Tensor:
    """Timesteps of a DDIM run in sampling order, ending in -1: int64, shape ``(num_steps + 1,)``.

    They are those that ``scheduler`` itself would use as a ``DDIMScheduler`` with this spacing
    (default: its own).
    """
    from diffusers import DDIMScheduler

    overrides = {} if spacing is None else {"timestep_spacing": spacing}
    config = copy.deepcopy(dict(scheduler.config))
    ddim = DDIMScheduler.from_config(config, **overrides)
    if not 1 <= num_steps <= ddim.config.num_train_timesteps:
        raise ValueError(
            f"num_steps is {num_steps}; it must lie in 1..{ddim.config.num_train_timesteps}."
        )
    ddim.set_timesteps(num_steps)
    return torch.cat([ddim.timesteps.long().cpu(), torch.tensor([-1])])


def cfg_target(*, eps_c: Tensor, eps_n: Tensor, guidance_scale_B: Tensor) -> Tensor:
    """Classifier-free guidance, ``eps_w = eps_n + w (eps_c - eps_n)``, one ``w`` a sample.

    ``w`` is diffusers' ``guidance_scale`` (Meng et al. 2023 write ``1 + w`` for it): ``w = 1`` is
    the conditional prediction, ``w = 0`` the one under the negative prompt.
    """
    w = guidance_scale_B.to(eps_c).reshape(-1, *(1,) * (eps_c.ndim - 1))
    return torch.lerp(eps_n, eps_c, w)


def two_step_target(
    schedule: NoiseSchedule, *, z_t: Tensor, z_s: Tensor, t_B: Tensor, s_B: Tensor
) -> Tensor:
    """The eps with which a single DDIM step from ``(z_t, t)`` lands on ``z_s``.

    ``eps* = (z_s - r z_t) / (sigma_s - r sigma_t)``, ``r = alpha_s / alpha_t`` (Salimans & Ho 2022,
    appendix G). Where ``sigma_s = 0`` this is the eps of the teacher's second x-prediction.
    Where denoisers give v, ``v* = (z_s - (alpha_s alpha_t + sigma_s sigma_t) z_t) /
    (sigma_s alpha_t - alpha_s sigma_t)``.
    """
    alpha_t, sigma_t = schedule.alpha_sigma(t_B, z_t)
    alpha_s, sigma_s = schedule.alpha_sigma(s_B, z_t)
    if schedule.gives_v:
        kept = alpha_s * alpha_t + sigma_s * sigma_t
        return (z_s - kept * z_t) / (sigma_s * alpha_t - alpha_s * sigma_t)
    ratio = alpha_s / alpha_t
    return (z_s - ratio * z_t) / (sigma_s - ratio * sigma_t)
