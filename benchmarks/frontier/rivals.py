"""Rivals that train nothing: CFG that saves some of its second forwards.

All of them make both predictions at some steps, and at the others the one under the prompt alone;
they differ in what they put in place of the one under the negative prompt there. A denoiser counts
its steps and remembers what it saw: each serves one run of one batch.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pnp_core.conditions import Conditions
from pnp_core.denoiser import CFGDenoiser
from pnp_core.sample import sample

Coefficients = Mapping[int, Tensor]
"""By step, the weights of ``eps_c`` at this and all earlier steps, then of ``eps_n`` at those."""


class PartialCFG:
    """CFG at the steps ``full``, no guidance at the others; at all of them it is CFG.

    Guidance in an interval of noise levels is Kynkäänniemi et al. 2024, *Applying Guidance in a
    Limited Interval Improves Sample and Distribution Quality in Diffusion Models*.
    """

    def __init__(self, teacher: CFGDenoiser, full: Collection[int]) -> None:
        self.teacher, self.full = teacher, full
        self.positives: list[Tensor] = []
        self.negatives: list[Tensor] = []

    def __call__(self, z_BCHW: Tensor, t_B: Tensor, conditions: Conditions) -> Tensor:
        """Guided eps, ``(B, C, H, W)``, in fp32."""
        step = len(self.positives)
        if step in self.full:
            eps_c, eps_n = (eps.float() for eps in self.teacher.pair(z_BCHW, t_B, conditions))
            self.positives.append(eps_c)
        else:
            eps_c = self.teacher.plain(z_BCHW, t_B, conditions).float()
            self.positives.append(eps_c)
            eps_n = self.negative(step)
        self.negatives.append(eps_n)
        return self.teacher.guider(eps_c, eps_n, t_B, conditions.w_B)

    def negative(self, step: int) -> Tensor:
        """What stands for ``eps_n`` at a step where it is not computed."""
        return self.positives[step]


class ReusedGuidance(PartialCFG):
    """The difference of the two predictions is that of the last step where both were made.

    The CFG-Cache of Lv et al. 2024, *FasterCache*, without its weights on low and high frequencies,
    which are chosen for video models.
    """

    def negative(self, step: int) -> Tensor:
        """``eps_c`` less the guidance of the last full step."""
        last = max(known for known in self.full if known < step)
        return self.positives[step] - (self.positives[last] - self.negatives[last])


class LinearAG(PartialCFG):
    """``eps_n`` as a linear combination of earlier predictions, fitted beforehand.

    Castillo et al. 2023, *Adaptive Guidance: Training-free Acceleration of Conditional Diffusion
    Models*, section 5: one coefficient for each earlier prediction, by least squares.
    """

    def __init__(
        self, teacher: CFGDenoiser, full: Collection[int], coefficients: Coefficients
    ) -> None:
        super().__init__(teacher, full)
        self.coefficients = coefficients

    def negative(self, step: int) -> Tensor:
        """The combination of this step; estimates of earlier ones stand in it as they were made."""
        seen = [*self.positives, *self.negatives]
        weights = self.coefficients[step].tolist()
        # No matrix product, which autocast would compute in bf16.
        return sum(
            (w * eps for w, eps in zip(weights, seen, strict=True)), torch.zeros_like(seen[0])
        )


@torch.no_grad()
def fit_linear(
    teacher: CFGDenoiser, scheduler: Any, full: Collection[int], runs: Sequence[dict[str, Any]]
) -> Coefficients:
    """LinearAG's coefficients, by least squares over CFG trajectories.

    Args:
        teacher: runs them, both predictions at every step.
        scheduler: the base's.
        full: the steps whose ``eps_n`` will be computed, and need no coefficients.
        runs: what ``sample`` is told of each batch, all with as many steps.
    """
    recorders = [PartialCFG(teacher, range(run["num_steps"])) for run in runs]
    for recorder, run in zip(recorders, runs, strict=True):
        sample(recorder, scheduler, **run)
    num_steps = runs[0]["num_steps"]
    eps_c, eps_n = (
        torch.stack(
            [
                torch.cat([getattr(recorder, side)[step].flatten() for recorder in recorders])
                for step in range(num_steps)
            ]
        ).double()
        for side in ("positives", "negatives")
    )
    known = eps_n.clone()  # as they will be in use: estimates where they are not computed
    coefficients = {}
    for step in range(num_steps):
        if step in full:
            continue
        seen = torch.cat([eps_c[: step + 1], known[:step]])
        solution = torch.linalg.pinv(seen @ seen.T, hermitian=True) @ (seen @ eps_n[step])
        coefficients[step], known[step] = solution, solution @ seen
    return coefficients
