"""The training loop that distillation and halving share.

Randomness is a function of (seed, step): batches for step k are the same whatever the number of
workers and however often the run was interrupted. Gradients are summed over workers here, so the
guide needs no distributed wrapper.
"""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pnp_core.checkpoints import read_checkpoint
from pnp_core.cores import num_cores, on_cores
from pnp_core.files import write_state
from pnp_core.losses import Outcome, Recent, check_convergence
from pnp_core.precision import mixed_precision
from pnp_core.settings import UNSEEN
from pnp_core.settings import TrainConfig as TrainConfig
from pnp_core.soap import SOAP

Report = Callable[[int, Mapping[str, float]], None]
"""``report(num_images, metrics)``; called by every worker at the same points."""

Trained = TypeVar("Trained", bound=nn.Module)
"""A guide, or whatever else is trained the same way."""

RECIPE = (
    "SOAP along short sides, relative errors, every other step the base; layers scaled and "
    "shifted, attention mixed; nothing at w = 1 and between equal prompts"
)
"""What guides are and how they are trained, to change with it: work begun by another recipe is not
gone on with."""

STEPS_BEFORE = 4  # over which the loss is taken before training
# Clients of NFS may see a new file up to a minute late.
LOOKS, SECONDS_BETWEEN_LOOKS = 45, 2.0


def config_hash(config: Any, *more: str, without: Set[str] = UNSEEN) -> str:
    """A short hash of a dataclass config and further strings, for matching checkpoints.

    Fields of the names in ``without`` are left out.
    """

    def identity(items: list[tuple[str, Any]]) -> dict[str, Any]:
        return {name: value for name, value in items if name not in without}

    settings = dataclasses.asdict(config, dict_factory=identity)
    text = json.dumps([settings, *more], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def rank_and_world() -> tuple[int, int]:
    """This worker's number and how many there are; ``(0, 1)`` outside torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def of_all_workers(number: int, device: torch.device) -> list[int]:
    """The number that each worker has, by rank. ``device``: of this worker."""
    _, world = rank_and_world()
    if world == 1:
        return [number]
    own = torch.tensor([number], device=device)
    of_all = [torch.empty_like(own) for _ in range(world)]
    dist.all_gather(of_all, own)
    return [int(value) for value in of_all]


def agreed(look: Callable[[], int], what: str, device: torch.device) -> int:
    """What ``look`` gives for all workers, which look again for a while if they differ.

    Args:
        look: looks at a folder that they share.
        what: it looks at, for the message.
        device: of this worker.

    Raises:
        ValueError: they still differ.
    """
    for number in range(LOOKS):
        if number:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        seen = of_all_workers(look(), device)
        if len(set(seen)) == 1:
            return seen[0]
    raise ValueError(
        f"The workers see different things as {what}: {seen} by rank. They must see the same files "
        "in their folder: mount one folder on all nodes, or have files sent "
        "(cluster.shared_folder: false). The same command goes on from the last checkpoint."
    )


def train(  # noqa: PLR0913, what to train, then by name how to follow and resume it
    loss_fn: Callable[[int, slice], Tensor],
    guide: Trained,
    config: TrainConfig,
    *,
    run_hash: str,
    checkpoint: Path | None = None,
    report: Report = lambda *_: None,
    name_row: Callable[[int, int], str] = lambda _, row: f"row {row} of its batch",
    diverged: float = math.inf,
    in_threads: bool = False,
) -> Trained:
    """Train ``guide`` in place and return it with its averaged (EMA) weights.

    Args:
        loss_fn: ``loss_fn(step, part)``: losses ``(rows,)`` of rows ``part`` of its global batch.
        guide: any module; only parameters that require gradients are trained.
        config: batch size, steps, learning rate and the like.
        run_hash: identity of the run; a checkpoint with another one is ignored.
        checkpoint: file to resume from and to save to (worker 0 writes, atomically).
        report: called by every worker at the same points.
        name_row: ``name_row(step, row)``: where a row of a global batch came from, for messages.
        diverged: from a quarter of the run on, stop at this many times the loss before training.
        in_threads: ``loss_fn`` may run in threads: a CPU's cores then get a part of a batch each.

    Raises:
        ValueError: a loss that diverges (DivergedError), too little memory, a bad checkpoint.
    """
    rank, world = rank_and_world()
    state = State(guide, config, in_threads=in_threads)
    part, parts = own_part(config.batch_size), micro_batches(config)
    losses = in_precision(loss_fn, state.device.type, config.precision)
    with torch.no_grad():
        loss_before = state.untrained_loss(losses, parts)
    state.resume(checkpoint, run_hash)
    guide.train()
    recent = Recent(config, state.step)
    under_way: Outcome | None = None
    while state.step < config.num_steps:
        loss_rows, total = state.accumulate(losses, parts)
        total, grad_norm = state.gather(total, world)
        if under_way is not None:
            under_way.check(config, part, name_row)
        under_way = Outcome(state.step, torch.stack([total, grad_norm]), loss_rows)
        state.update()
        recent.losses.append(total)
        done = state.step * config.batch_size
        is_last = state.step == config.num_steps
        if is_last or crossed(done, config.batch_size, config.report_every_images):
            under_way.check(config, part, name_row)
            metrics = recent.metrics(state.step)
            report(done, {**metrics, "grad_norm": float(grad_norm), "learning_rate": state.rate})
            if 4 * done >= config.num_images:
                check_convergence(state.step, done, metrics["loss"], loss_before, diverged)
        is_due = is_last or crossed(done, config.batch_size, config.checkpoint_every_images)
        if is_due and checkpoint is not None and rank == 0:
            under_way.check(config, part, name_row)
            state.save(checkpoint, run_hash)
    state.average()
    return guide.eval()


def own_part(batch_size: int) -> slice:
    """This worker's rows of a global batch.

    Raises:
        ValueError: the batch can't be shared out equally.
    """
    rank, world = rank_and_world()
    if batch_size % world:
        raise ValueError(f"batch_size {batch_size} is not a multiple of the {world} workers.")
    rows = batch_size // world
    return slice(rank * rows, (rank + 1) * rows)


def micro_batches(config: TrainConfig) -> list[slice]:
    """This worker's rows in parts that memory holds at once; raises as :func:`own_part`."""
    return parts_of(own_part(config.batch_size), config.micro_batch_size)


def parts_of(rows: slice, size: int | None) -> list[slice]:
    """Rows in parts of ``size``, the last one smaller; None: in one."""
    size = size or rows.stop - rows.start
    return [
        slice(start, min(start + size, rows.stop)) for start in range(rows.start, rows.stop, size)
    ]


def in_precision(
    loss_fn: Callable[[int, slice], Tensor], device_type: str, precision: str
) -> Callable[[int, slice], Tensor]:
    """``loss_fn``, computed in the run's precision."""

    def losses(step: int, part: slice) -> Tensor:
        with mixed_precision(device_type, precision):
            return loss_fn(step, part)

    return losses


@contextmanager
def told_what_to_lower(config: TrainConfig, step: int, part: slice) -> Iterator[None]:
    """Raise ValueError where a GPU's memory does not suffice for these rows of a step at once."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        num_rows = part.stop - part.start
        remedies = [f"set micro_batch_size to {num_rows // 2} or less"] if num_rows > 1 else []
        if not config.gradient_checkpointing:
            remedies.append("set gradient_checkpointing to true")
        raise ValueError(
            f"Training stopped at step {step}: the GPU's memory does not suffice for {num_rows} "
            f"samples at once: {' or '.join(remedies) or 'it takes a larger one'}. The last "
            "checkpoint is untouched, and the same command goes on from it."
        ) from error


class State:
    """What training changes: parameters, their average, the optimizer, the number of steps."""

    def __init__(self, guide: nn.Module, config: TrainConfig, *, in_threads: bool = False) -> None:
        self.config = config
        self.parameters: list[Tensor] = [p for p in guide.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        first = micro_batches(config)[0]
        self.num_cores = num_cores(first.stop - first.start, self.device) if in_threads else 1
        self.optimizer = SOAP(self.parameters, lr=config.learning_rate)
        self.ema = [p.detach().clone() for p in self.parameters]
        self.decay = 0.5 ** (config.batch_size / config.ema_halflife_images)
        self.step = 0

    @property
    def rate(self) -> float:
        """The learning rate of the last step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def resume(self, checkpoint: Path | None, run_hash: str) -> None:
        """Go on where this run was saved, if it was; all workers at the same step.

        Raises:
            ValueError: the file is damaged, or workers don't see the same one.
        """
        if checkpoint is None:
            return
        state: dict[str, Any] = {}

        def look() -> int:
            state.clear()
            state.update(read_checkpoint(checkpoint, self.device))
            return state["step"] if state.get("run_hash") == run_hash else 0

        if agreed(look, f"the step of {checkpoint}", self.device) == 0:
            if rank_and_world()[0] == 0 and 0 < state.get("step", 0) < self.config.num_steps:
                print(
                    f"{checkpoint} is of another run (by settings, data or version), at step "
                    f"{state['step']}: not gone on with, and replaced by the next checkpoint",
                    flush=True,
                )
            return
        with torch.no_grad():
            for p, saved in zip(self.parameters, state["parameters"], strict=True):
                p.copy_(saved)
            for average, saved in zip(self.ema, state["ema"], strict=True):
                average.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def save(self, checkpoint: Path, run_hash: str) -> None:
        """Write all of it, atomically."""
        write_state(
            checkpoint,
            {
                "run_hash": run_hash,
                "step": self.step,
                "parameters": [p.detach() for p in self.parameters],
                "ema": self.ema,
                "optimizer": self.optimizer.state_dict(),
            },
        )

    def untrained_loss(
        self, losses: Callable[[int, slice], Tensor], parts: Sequence[slice]
    ) -> float:
        """The mean loss of the first steps' batches, over all workers."""
        totals = []
        for step in range(STEPS_BEFORE):

            def of_rows(rows: slice, step: int = step) -> Tensor:
                with told_what_to_lower(self.config, step, rows):
                    return losses(step, rows).float().sum()

            for part in parts:
                totals += on_cores(of_rows, part, self.num_cores)
        total = torch.stack(totals).sum()
        if rank_and_world()[1] > 1:
            dist.all_reduce(total)
        return float(total) / (STEPS_BEFORE * self.config.batch_size)

    def accumulate(
        self, losses: Callable[[int, slice], Tensor], parts: Sequence[slice]
    ) -> tuple[Tensor, Tensor]:
        """Gradients of this step's loss over these parts of its batch, one after another.

        Returns:
            The losses of the rows, and the sum of them over the size of the global batch.

        Raises:
            ValueError: the GPU's memory does not suffice for one of the parts.
        """

        def of_rows(rows: slice) -> tuple[Tensor, Tensor, Sequence[Tensor | None]]:
            with told_what_to_lower(self.config, self.step, rows):
                loss_rows = losses(self.step, rows)
                loss = loss_rows.float().sum() / self.config.batch_size
                if self.num_cores == 1:
                    loss.backward()
                    return loss_rows.detach(), loss.detach(), ()
                # not into `grad`, in whatever order cores are through
                gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
            return loss_rows.detach(), loss.detach(), gradients

        self.optimizer.zero_grad(set_to_none=True)
        rows, totals = [], []
        for part in parts:
            for loss_rows, loss, gradients in on_cores(of_rows, part, self.num_cores):
                rows.append(loss_rows)
                totals.append(loss)
                for parameter, gradient in zip(self.parameters, gradients, strict=False):
                    if gradient is not None:
                        so_far = parameter.grad
                        parameter.grad = gradient if so_far is None else so_far + gradient
        return torch.cat(rows), torch.stack(totals).sum()

    def gather(self, total: Tensor, world: int) -> tuple[Tensor, Tensor]:
        """Gradients over all workers, clipped; their loss, and the norm before."""
        if world > 1:
            total = summed_over_workers(total, self.parameters)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        return total, norm

    def update(self) -> None:
        """One step of the optimizer, and of the average."""
        config = self.config
        factor = learning_rate_factor(config, self.step * config.batch_size)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * factor
        self.optimizer.step()
        with torch.no_grad():
            # A young average follows the weights closely, so that it forgets where it began.
            decay = min(self.decay, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(self.ema, self.parameters, 1 - decay)
        self.step += 1

    def average(self) -> None:
        """Put the average in the parameters' place."""
        with torch.no_grad():
            for p, average in zip(self.parameters, self.ema, strict=True):
                p.copy_(average)


def summed_over_workers(loss: Tensor, parameters: list[Tensor]) -> Tensor:
    """Sum gradients over the workers, in place, and the loss, which is returned."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([loss.flatten(), *(g.flatten() for g in gradients)])
    dist.all_reduce(flat)
    total, *summed = flat.split([1, *(p.numel() for p in parameters)])
    for p, gradient in zip(parameters, summed, strict=True):
        if p.grad is not None:  # else no worker has one: they do the same in a step
            p.grad = gradient.view_as(p)
    return total[0]


def crossed(num_images: int, batch_size: int, every: int) -> bool:
    """Whether the last batch passed a multiple of ``every`` images."""
    return num_images // every > (num_images - batch_size) // every


def learning_rate_factor(config: TrainConfig, num_images: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    if num_images < config.warmup_images:
        return (num_images + config.batch_size) / (config.warmup_images + config.batch_size)
    progress = (num_images - config.warmup_images) / (config.num_images - config.warmup_images)
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
