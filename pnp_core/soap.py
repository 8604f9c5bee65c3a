"""SOAP: Adam in the slowly turning eigenbasis of Shampoo's preconditioner (Vyas et al., ICLR 2025).

A guide's projections are narrow matrices, whose gradients have few directions and none along the
axes. In the eigenbases of their moments Adam steps as far along each as it should; finding the
bases costs next to nothing beside the frozen UNet's forward.
"""

from collections.abc import Iterable, Mapping
from itertools import compress
from typing import Any

import torch
from torch import Tensor

MAX_SIDE = 256  # of a matrix, to be turned along it
REFRESH_EVERY = 10  # steps
RIDGE = 1e-4  # of a moment's trace; directions without gradients keep their basis


class SOAP(torch.optim.Optimizer):
    """Adam on gradients that are turned into the eigenbases of their two moments, G G^T and G^T G.

    Args:
        params: convolutions count as matrices ``(out, in * height * width)``. Vectors, be they
            matrices of one row or column, and sides longer than ``max_side`` are not turned; where
            nothing is, this is Adam.
        lr: as Adam's.
        betas: decay of the mean, and of the square and the moments.
        refresh_every: steps between two refreshes of a basis, a power iteration each; the first
            steps each make one.
    """

    def __init__(  # noqa: PLR0913, an optimizer's settings, by name
        self,
        params: Iterable[Tensor],
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        refresh_every: int = REFRESH_EVERY,
        max_side: int = MAX_SIDE,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})
        self.refresh_every = refresh_every
        self.max_side = max_side

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ARG002, torch's interface
        """Update every parameter that has a gradient, in place; ``closure`` is not called."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            turned = [any(sides(p, self.max_side)) for p in params]
            for p in compress(params, turned):
                p.sub_(group["lr"] * self.update(p, group["betas"], group["eps"]))
            if not all(turned):
                self.step_adam([p for p, t in zip(params, turned, strict=True) if not t], group)

    def step_adam(self, params: list[Tensor], group: Mapping[str, Any]) -> None:
        """Adam for what is not turned, all at once: a guide has hundreds of vectors."""
        beta1, beta2 = group["betas"]
        grads = [p.grad for p in params if p.grad is not None]  # as all have
        for p in params:
            if not self.state[p]:
                zeros = {name: torch.zeros_like(p) for name in ("mean", "square")}
                self.state[p] = {"step": 0, **zeros}
            self.state[p]["step"] += 1
        steps = [self.state[p]["step"] for p in params]  # some may have had no gradient at times
        means, squares = ([self.state[p][name] for p in params] for name in ("mean", "square"))
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_lerp_(squares, torch._foreach_mul(grads, grads), 1 - beta2)
        scales = torch._foreach_sqrt(torch._foreach_div(squares, [1 - beta2**n for n in steps]))
        torch._foreach_add_(scales, group["eps"])
        updates = torch._foreach_div(
            torch._foreach_div(means, [1 - beta1**n for n in steps]), scales
        )
        torch._foreach_add_(params, updates, alpha=-group["lr"])

    def update(self, p: Tensor, betas: tuple[float, float], eps: float) -> Tensor:
        """What this step subtracts, over the learning rate; in the shape of ``p``."""
        beta1, beta2 = betas
        assert p.grad is not None
        grad = p.grad.flatten(1)
        state = self.state[p]
        if not state:
            state["step"] = 0
            state["mean"] = torch.zeros_like(grad)
            state["square"] = torch.zeros_like(grad)  # in the eigenbases
            state["moments"] = [grad.new_zeros(n, n) for n in sides(p, self.max_side)]
            state["bases"] = [torch.eye(n).to(grad) for n in sides(p, self.max_side)]
        state["step"] += 1
        step, bases = state["step"], state["bases"]

        # 1. Adam, turned
        state["mean"].lerp_(grad, 1 - beta1)
        state["square"].lerp_(turn(grad, bases).square(), 1 - beta2)
        mean = turn(state["mean"], bases) / (1 - beta1**step)
        square = state["square"] / (1 - beta2**step)
        update = turn(mean / (square.sqrt() + eps), [basis.mT for basis in bases])

        # 2. the bases, which follow the moments
        for moment, rows in zip(state["moments"], (grad, grad.mT), strict=True):
            if moment.numel():
                moment.lerp_(rows @ rows.mT, 1 - beta2)
        if step < self.refresh_every or step % self.refresh_every == 0:
            # Without the ridge, rounding would choose the basis where there are no gradients yet,
            # and one worker would not train the guide that two do.
            state["bases"] = [
                torch.linalg.qr(moment @ basis + RIDGE * moment.trace() * basis).Q
                for moment, basis in zip(state["moments"], bases, strict=True)
            ]
        return update.reshape(p.shape)


def sides(p: Tensor, max_side: int = MAX_SIDE) -> list[int]:
    """Sizes of a parameter's two bases; 0: none."""
    if p.ndim < 2 or not p.numel():
        return [0, 0]
    lengths = p.shape[0], p[0].numel()
    if 1 in lengths:
        return [0, 0]
    return [n if n <= max_side else 0 for n in lengths]


def turn(matrix: Tensor, bases: list[Tensor]) -> Tensor:
    """``left^T matrix right``; an empty basis turns nothing."""
    left, right = bases
    if left.numel():
        matrix = left.mT @ matrix
    return matrix @ right if right.numel() else matrix
