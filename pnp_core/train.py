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
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pnp_core.files import write_state
from pnp_core.precision import mixed_precision
from pnp_core.settings import TrainConfig as TrainConfig
from pnp_core.soap import SOAP

Report = Callable[[int, Mapping[str, float]], None]
"""``report(num_images, metrics)``; called by every worker at the same points."""

Trained = TypeVar("Trained", bound=nn.Module)
"""A guide, or whatever else is trained the same way."""

RECIPE = (
    "SOAP along short sides, relative errors, every other step the base; layers scaled and "
    "shifted, attention mixed"
)
"""What guides are and how they are trained, to change with it: work begun by another recipe is not
gone on with."""

STEPS_BEFORE = 4  # over which the loss is taken before training


def config_hash(config: Any, *more: str) -> str:
    """A short hash of a dataclass config and further strings, for matching checkpoints."""
    text = json.dumps([dataclasses.asdict(config), *more], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def rank_and_world() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step."""
    digest = hashlib.sha256(f"{seed}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def train(
    loss_fn: Callable[[int, slice], Tensor],
    guide: Trained,
    config: TrainConfig,
    *,
    run_hash: str,
    checkpoint: Path | None = None,
    report: Report = lambda num_images, metrics: None,
    name_row: Callable[[int, int], str] = lambda step, row: f"row {row} of its batch",
    diverged: float = math.inf,
) -> Trained:
    """Train ``guide`` in place and return it with its averaged (EMA) weights.

    Args:
        loss_fn: ``loss_fn(step, part)``: losses of the rows ``part`` of step ``step``'s global
            batch, shape ``(rows,)``.
        run_hash: identity of the run; a checkpoint with another one is ignored.
        checkpoint: file to resume from and to save to (worker 0 writes, atomically).
        name_row: ``name_row(step, row)``: where a row of a global batch came from, for messages.
        diverged: from a quarter of the run on, stop when the loss is this many times that of the
            guide before training.

    Raises:
        ValueError: the loss is no longer finite, or far above what it was; the message names step
            and samples.
    """
    rank, world = rank_and_world()
    if config.batch_size % world:
        raise ValueError(
            f"batch_size {config.batch_size} is not a multiple of the {world} workers."
        )
    rows = config.batch_size // world
    part = slice(rank * rows, (rank + 1) * rows)
    parameters: list[Tensor] = [p for p in guide.parameters() if p.requires_grad]
    device = parameters[0].device
    autocast = partial(mixed_precision, device.type, config.precision)
    optimizer = SOAP(parameters, lr=config.learning_rate)
    ema = [p.detach().clone() for p in parameters]
    decay = 0.5 ** (config.batch_size / config.ema_halflife_images)
    step = 0
    with torch.no_grad(), autocast():
        before = torch.stack([loss_fn(k, part).float().sum() for k in range(STEPS_BEFORE)]).sum()
    if world > 1:
        dist.all_reduce(before)
    loss_before = float(before) / (STEPS_BEFORE * config.batch_size)

    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        if state["run_hash"] == run_hash:
            with torch.no_grad():
                for p, average, saved, saved_ema in zip(
                    parameters, ema, state["parameters"], state["ema"], strict=True
                ):
                    p.copy_(saved)
                    average.copy_(saved_ema)
            optimizer.load_state_dict(state["optimizer"])
            step = state["step"]

    def save() -> None:
        if checkpoint is not None and rank == 0:
            write_state(
                checkpoint,
                {
                    "run_hash": run_hash,
                    "step": step,
                    "parameters": [p.detach() for p in parameters],
                    "ema": ema,
                    "optimizer": optimizer.state_dict(),
                },
            )

    guide.train()
    losses: list[float] = []
    grad_norm = torch.zeros(())
    since, since_step = time.monotonic(), step
    while step < config.num_steps:
        num_images = step * config.batch_size
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * learning_rate_factor(config, num_images)
        with autocast():
            loss_rows = loss_fn(step, part)
        loss = loss_rows.float().sum() / config.batch_size
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        total = loss.detach().clone()
        if world > 1:
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            flat = torch.cat([total.flatten(), *(g.flatten() for g in gradients)])
            dist.all_reduce(flat)
            total, *summed = flat.split([1, *(p.numel() for p in parameters)])
            for p, gradient in zip(parameters, summed, strict=True):
                p.grad = gradient.view_as(p)
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        if not (total.isfinite() and grad_norm.isfinite()):
            bad = (~loss_rows.isfinite()).nonzero().flatten().tolist()
            named = [name_row(step, part.start + row) for row in bad[:3]]
            where = f" It is not finite at {', '.join(named)}" if bad else ""
            more = f" and {len(bad) - 3} more." if len(bad) > 3 else "." if bad else ""
            raise ValueError(
                f"Training stopped at step {step} ({num_images} images): the loss is "
                f"{float(total)}, the gradient norm {float(grad_norm)}.{where}{more} Lower "
                "learning_rate; if a few samples are named, look at those. The last checkpoint is "
                "untouched."
            )
        optimizer.step()
        with torch.no_grad():
            # A young average follows the weights closely, so that it forgets where it began.
            d = min(decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(ema, parameters, 1 - d)
        losses.append(float(total))
        step += 1
        done = step * config.batch_size
        if crossed(done, config.batch_size, config.report_every_images) or step == config.num_steps:
            now = time.monotonic()
            rate = (step - since_step) * config.batch_size / max(now - since, 1e-9)
            report(
                done,
                {
                    "loss": sum(losses) / len(losses),
                    "grad_norm": float(grad_norm),
                    "learning_rate": optimizer.param_groups[0]["lr"],
                    "images_per_second": rate,
                },
            )
            is_young = 4 * done < config.num_images
            if not is_young and 0 < diverged * loss_before < sum(losses) / len(losses):
                raise ValueError(
                    f"Training stopped at step {step} ({done} images): the loss is "
                    f"{sum(losses) / len(losses):.3g}, and was {loss_before:.3g} before training. "
                    "It diverges: lower learning_rate."
                )
            losses, since, since_step = [], now, step
        if crossed(done, config.batch_size, config.checkpoint_every_images):
            save()
    save()
    with torch.no_grad():
        for p, average in zip(parameters, ema, strict=True):
            p.copy_(average)
    return guide.eval()


def crossed(num_images: int, batch_size: int, every: int) -> bool:
    """Whether the last batch passed a multiple of ``every`` images."""
    return num_images // every > (num_images - batch_size) // every


def learning_rate_factor(config: TrainConfig, num_images: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    if num_images < config.warmup_images:
        return (num_images + config.batch_size) / (config.warmup_images + config.batch_size)
    progress = (num_images - config.warmup_images) / max(
        config.num_images - config.warmup_images, 1
    )
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
