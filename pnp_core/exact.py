"""Exact CFG steps in a guided run: at some steps both predictions are made, as by CFG.

Shape legend: B batch, C channels, H W size.
"""

from collections.abc import Collection

from torch import Tensor

from pnp_core.conditions import Conditions
from pnp_core.denoiser import CFGDenoiser, GuidedDenoiser


def spread(num_exact: int, num_steps: int) -> tuple[int, ...]:
    """Steps, from 0: the first one and others evenly after it, or all where there are too few."""
    num_exact = min(num_exact, num_steps)
    return tuple(round(k * num_steps / num_exact) for k in range(num_exact))


class ExactSteps:
    """Which steps of a run are CFG's own; counts them.

    Args:
        steps: the exact ones, counted from 0. Each object counts one run.
    """

    def __init__(self, steps: Collection[int]) -> None:
        self.steps = steps
        self.number = -1

    def begin(self) -> bool:
        """A step begins; whether it is an exact one."""
        self.number += 1
        return self.number in self.steps


class ExactDenoiser:
    """A guide, but for some exact CFG steps.

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
        self.run = ExactSteps(steps)
        self.conditions: Conditions | None = None

    def __call__(self, z_BCHW: Tensor, t_B: Tensor, conditions: Conditions) -> Tensor:
        """Predicted eps, ``(B, C, H, W)``: two forwards at exact steps, one at the others."""
        if conditions is not self.conditions or self.run.number + 1 == self.num_steps:
            self.run, self.conditions = ExactSteps(self.steps), conditions
        if self.run.begin():
            return self.teacher(z_BCHW, t_B, conditions.with_scale(conditions.w_B.clamp(min=1)))
        return self.guided(z_BCHW, t_B, conditions)
