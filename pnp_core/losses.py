"""What the losses of a training tell while it runs: how it goes, and that it can't go on."""

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from pnp_core.settings import TrainConfig


class DivergedError(ValueError):
    """A loss that is not finite, or far above what it was before training."""


def check_convergence(
    step: int, num_images: int, loss: float, loss_before: float, diverged: float
) -> None:
    """Raise DivergedError if the loss is ``diverged`` times what it was before training."""
    if 0 < diverged * loss_before < loss:
        raise DivergedError(
            f"Training stopped at step {step} ({num_images} images): the loss is {loss:.3g}, and "
            f"was {loss_before:.3g} before training. It diverges: lower learning_rate."
        )


class Recent:
    """Losses and speed since they were last reported."""

    def __init__(self, config: TrainConfig, step: int) -> None:
        self.config = config
        self.losses: list[Tensor] = []
        self.since, self.since_step = time.monotonic(), step

    def metrics(self, step: int) -> dict[str, float]:
        """Their means; begins anew."""
        mean = float(torch.stack(self.losses).double().mean())
        now = time.monotonic()
        num_images = (step - self.since_step) * self.config.batch_size
        rate = num_images / max(now - self.since, 1e-9)
        self.losses, self.since, self.since_step = [], now, step
        return {"loss": mean, "images_per_second": rate}


class Outcome:
    """Loss and gradient norm of a step, looked at when the device has gone on to the next.

    To look at once would be to wait for the device at every step.
    """

    def __init__(self, step: int, numbers: Tensor, loss_rows: Tensor) -> None:
        self.step = step
        self.loss_rows = loss_rows
        self.arrived: torch.cuda.Event | None = None
        self.numbers = numbers
        if numbers.is_cuda:
            self.numbers = torch.empty(numbers.shape, pin_memory=True)
            self.numbers.copy_(numbers, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def check(self, config: TrainConfig, part: slice, name_row: Callable[[int, int], str]) -> None:
        """Raise DivergedError, naming step and samples, if they are not finite."""
        if self.arrived is not None:
            self.arrived.synchronize()
        total, grad_norm = self.numbers.tolist()
        if math.isfinite(total) and math.isfinite(grad_norm):
            return
        bad = (~self.loss_rows.isfinite()).nonzero().flatten().tolist()
        named = [name_row(self.step, part.start + row) for row in bad[:3]]
        where = f" It is not finite at {', '.join(named)}" if bad else ""
        more = f" and {len(bad) - 3} more." if len(bad) > 3 else "." if bad else ""
        raise DivergedError(
            f"Training stopped at step {self.step} ({self.step * config.batch_size} images): the "
            f"loss is {total}, the gradient norm {grad_norm}.{where}{more} Lower learning_rate; if "
            "a few samples are named, look at those. The last checkpoint is untouched."
        )
