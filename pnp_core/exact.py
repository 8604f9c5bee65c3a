"""Exact CFG steps in a guided run: at some steps both predictions are made, as by CFG.

What they differ by there is CFG's guidance, without the guide's error. A part of it is added to the
guide's in the steps that follow.

Shape legend: B batch, C channels, H W size.
"""

from collections.abc import Collection
from typing import Any

from torch import Tensor

from pnp_core.conditions import Conditions
from pnp_core.denoiser import CFGDenoiser, GuidedDenoiser
from pnp_core.schedule import NoiseSchedule

# Fitted to the guidance of the zoo's base at 6 and 13 steps: E154 in docs/LOG.md.
AT_ONCE = 0.7  # where no noise lies between
POWER = 0.6


def spread(num_exact: int, num_steps: int) -> tuple[int, ...]:
    """Steps, from 0: the first one and others evenly after it, or all where there are too few."""
    num_exact = min(num_exact, num_steps)
    return tuple(round(k * num_steps / num_exact) for k in range(num_exact))


class ExactSteps:
    """Which steps of a run are CFG's own, and what the last of them says of those after it.

    A guided step at ``t`` after an exact one at ``s`` gets besides the guide's own
    ``0.7 (SNR_s / SNR_t)^0.6 (w - 1) (eps_c - eps_n)`` of the exact one, ``SNR = alpha^2 /
    sigma^2``. About that part of it leaves the least error, be it one, two or three steps later.

    Args:
        steps: the exact ones, counted from 0. Each object counts one run.
        schedule: of the base.
        quantity: what is predicted: ``epsilon``, ``v_prediction`` or ``sample``.
    """

    def __init__(self, steps: Collection[int], schedule: NoiseSchedule, quantity: str) -> None:
        self.steps, self.schedule, self.quantity = steps, schedule, quantity
        self.number = -1
        self.difference: Tensor | None = None

    def begin(self) -> bool:
        """A step begins; whether it is an exact one."""
        self.number += 1
        return self.number in self.steps

    def keep(self, difference_BCHW: Tensor, t_B: Tensor) -> None:
        """An exact step's prediction under the prompt less that under the negative prompt."""
        self.difference = difference_BCHW.float()
        self.alpha, self.sigma = self.schedule.alpha_sigma(t_B, self.difference)

    def correct(self, predicted_BCHW: Tensor, t_B: Tensor, scale: Tensor | float) -> Tensor:
        """A guided step's prediction with what the last exact one says.

        Args:
            predicted_BCHW: by the guide.
            t_B: its timesteps, or one for all.
            scale: ``w - 1``, times the guide's strength; of all, or ``(B, 1, 1, 1)``.
        """
        if self.difference is None:
            return predicted_BCHW
        alpha, sigma = self.schedule.alpha_sigma(t_B, self.difference)
        ratio = ((self.alpha * sigma) / (self.sigma * alpha)).clamp(max=1)  # of sqrt(SNR)
        part = AT_ONCE * ratio ** (2 * POWER)
        # At one z_t: v = (eps - sigma z_t) / alpha, x = (z_t - sigma eps) / alpha.
        if self.quantity == "v_prediction":
            part = part * self.alpha / alpha
        elif self.quantity == "sample":
            part = part * ratio
        return predicted_BCHW + (scale * part * self.difference).to(predicted_BCHW.dtype)


def exact_steps_with(scheduler: Any, num_exact: int, num_steps: int) -> ExactSteps:
    """Those of a pipeline's run with this scheduler.

    Args:
        scheduler: the pipeline's.
        num_exact: how many there are to be.
        num_steps: of the run.

    Raises:
        ValueError: the scheduler's noise levels can't be read.
    """
    try:
        schedule = NoiseSchedule.from_scheduler(scheduler)
    except ValueError as error:
        raise ValueError(
            "exact_steps need the noise levels of the pipeline's scheduler, which can't be read: "
            f"{error} Or plug the pipeline with exact_steps=0."
        ) from None
    quantity = scheduler.config.get("prediction_type", "epsilon")
    return ExactSteps(spread(num_exact, num_steps), schedule, quantity)


class ExactDenoiser:
    """A guide, but for some exact CFG steps, which correct those after them.

    At ``w <= 1`` there is no guidance. A run of other conditions, or one more after ``num_steps``
    calls, begins anew.

    Args:
        guided: makes the other steps.
        teacher: makes the exact ones.
        steps: the exact ones, from 0.
        num_steps: of a run.
    """

    def __init__(
        self, guided: GuidedDenoiser, teacher: CFGDenoiser, steps: Collection[int], num_steps: int
    ) -> None:
        self.guided, self.teacher = guided, teacher
        self.steps, self.num_steps = steps, num_steps
        self.run: ExactSteps | None = None
        self.conditions: Conditions | None = None

    def __call__(self, z_BCHW: Tensor, t_B: Tensor, conditions: Conditions) -> Tensor:
        """Predicted eps, ``(B, C, H, W)``: two forwards at exact steps, one at the others."""
        run = self.run_of(conditions)
        w_B = conditions.w_B.clamp(min=1)
        if run.begin():
            eps_c, eps_n = self.teacher.pair(z_BCHW, t_B, conditions)
            run.keep(eps_c - eps_n, t_B)
            return self.teacher.guider(eps_c, eps_n, t_B, w_B)
        scale = self.guided.strength * (w_B - 1).view(-1, 1, 1, 1)
        return run.correct(self.guided(z_BCHW, t_B, conditions), t_B, scale)

    def run_of(self, conditions: Conditions) -> ExactSteps:
        """The run under way, or a new one."""
        run = self.run
        if run is None or conditions is not self.conditions or run.number + 1 == self.num_steps:
            schedule = self.teacher.plain.schedule
            quantity = "v_prediction" if schedule.gives_v else "epsilon"
            run = self.run = ExactSteps(self.steps, schedule, quantity)
            self.conditions = conditions
        return run
