"""The training loop every model of the zoo shares.

bf16 weights (where the hardware has bf16) beside fp32 masters, EMA, a learning rate that warms up
and in the end falls to zero, atomic checkpoints from which the same command resumes, progress with
an ETA. The randomness of a step is a function of (seed, step): a run interrupted and resumed gives
the same weights as one that was not. On a GPU both passes are one CUDA graph: networks
that small would spend most of their time on launching kernels.
"""

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pnp_core.precision import has_bf16


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long and how fast. Exactly one of ``num_steps`` and ``num_minutes`` is set."""

    num_steps: int | None = None
    num_minutes: float | None = None
    batch_size: int = 64
    learning_rate: float = 5e-4
    warmup_steps: int = 200
    decay_share: float = 0.3  # the last part of the run, in which the rate falls to zero
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    clip_norm: float = 1.0
    seed: int = 0
    device: str = "cpu"
    checkpoint_every_s: float = 120.0

    def __post_init__(self) -> None:
        if (self.num_steps is None) == (self.num_minutes is None):
            raise ValueError("give either --steps or --minutes")

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights and activations while training."""
        return torch.bfloat16 if has_bf16(self.device) else torch.float32

    def progress(self, num_steps: int, elapsed_s: float) -> float:
        """Share of the run that is done, in [0, 1]."""
        if self.num_steps is not None:
            return min(1.0, num_steps / self.num_steps)
        assert self.num_minutes is not None
        return min(1.0, elapsed_s / (60 * self.num_minutes))

    def rate(self, num_steps: int, progress: float) -> float:
        """Learning rate after ``num_steps``: warm-up, constant, linear decay to 0."""
        warm = min(1.0, (num_steps + 1) / max(1, self.warmup_steps))
        return self.learning_rate * warm * min(1.0, (1.0 - progress) / self.decay_share)


@dataclass
class Run:
    """What a run has come to."""

    num_steps: int = 0
    num_images: int = 0
    elapsed_s: float = 0.0
    metrics: dict[str, float] | None = None


class ThreadTuner:
    """Chooses between one CPU thread and all of them, by trying the other now and then.

    On a machine that others use too, threads that wait for one another can make a step ten times
    slower than a single thread would be; on a free machine all of them are best.
    """

    def __init__(self, max_threads: int, period_s: float = 20.0) -> None:
        self.choices = sorted({1, max_threads})
        self.period_s = period_s
        self.best = max_threads
        self.best_s = float("inf")
        self.tried_at = time.monotonic()
        self.trying: int | None = None

    def after_step(self, step_s: float) -> None:
        """Take note of a step's seconds, and set the threads of the next."""
        now = time.monotonic()
        if len(self.choices) == 1:
            return
        if self.trying is not None:
            if step_s < self.best_s:
                self.best = self.trying
                self.period_s = 20.0
            else:  # a dear trial is repeated less often
                self.period_s = min(120.0, max(20.0, 15 * step_s))
            self.trying, self.tried_at = None, now
            torch.set_num_threads(self.best)
        elif now - self.tried_at > self.period_s:
            self.best_s = step_s
            self.trying = next(choice for choice in self.choices if choice != self.best)
            torch.set_num_threads(self.trying)


Batch = tuple[Tensor, ...]
DrawFn = Callable[[torch.Generator], Batch]
LossFn = Callable[..., tuple[Tensor, dict[str, Tensor]]]


def step_generator(seed: int, step: int, device: str = "cpu") -> torch.Generator:
    """The only source of randomness in a step."""
    return torch.Generator(device).manual_seed(seed * 1_000_003 + step)


class EagerGradients:
    """Forward and backward pass, op by op."""

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        self.model = model
        self.loss_fn = loss_fn

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Leaves the gradients in the model; returns the metrics, the loss among them."""
        self.model.zero_grad(set_to_none=True)
        loss, metrics = self.loss_fn(*batch)
        loss.backward()
        return {"loss": loss.detach(), **metrics}


class GraphedGradients(EagerGradients):
    """The same as one CUDA graph, recorded at the first batch: all others have its shapes."""

    graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """As of ``EagerGradients``."""
        if self.graph is None:
            self.record(batch)
            assert self.graph is not None
        for own, new in zip(self.batch, batch, strict=True):
            own.copy_(new)
        self.graph.replay()
        return self.metrics

    def record(self, batch: Batch) -> None:
        """Record the graph, at this batch."""
        self.batch = tuple(tensor.clone() for tensor in batch)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries choose their kernels before the recording
            for _ in range(3):
                super().__call__(self.batch)
        torch.cuda.current_stream().wait_stream(aside)
        self.model.zero_grad(set_to_none=True)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.metrics = super().__call__(self.batch)


def train(  # noqa: PLR0913 - a loop has a model, data, a loss, a config and a place
    model: nn.Module,
    draw: DrawFn,
    loss_fn: LossFn,
    config: TrainConfig,
    checkpoint: Path,
    *,
    on_checkpoint: Callable[[nn.Module, Run], None] | None = None,
) -> tuple[nn.Module, Run]:
    """Minimise ``loss_fn(*draw(generator))``; returns the EMA model and the run's tally.

    ``draw`` makes a batch, on the config's device and always of the same shapes; ``loss_fn`` has no
    randomness and never waits for the GPU. ``model`` is turned into the config's ``dtype``; bf16
    weights are about twice as fast on a CPU as autocast. The optimiser works on fp32 masters.
    """
    master = copy.deepcopy(model).float()
    ema = copy.deepcopy(master).requires_grad_(False)
    model.to(config.dtype).train()
    trained = [name for name, p in master.named_parameters() if p.requires_grad]
    weights, master_weights, ema_weights = (
        named_tensors(network, trained) for network in (model, master, ema)
    )
    optimizer = torch.optim.AdamW(
        master_weights,
        lr=config.learning_rate,
        betas=(0.9, 0.99),
        weight_decay=config.weight_decay,
        fused=True,
    )
    master_gradients = [torch.zeros_like(weight) for weight in master_weights]
    for weight, gradient in zip(master_weights, master_gradients, strict=True):
        weight.grad = gradient
    run = Run()
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=config.device, weights_only=True)
        master.load_state_dict(state["master"])
        model.load_state_dict(state["master"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        run = Run(**state["run"])
        log(f"resumed {checkpoint} at step {run.num_steps}")

    def save() -> None:
        run.metrics = {key: float(value) for key, value in recent.items()} or run.metrics
        state = {
            "master": master.state_dict(),
            "ema": ema.state_dict(),
            "optimizer": optimizer.state_dict(),
            "run": vars(run),
        }
        partial = checkpoint.with_suffix(".partial")
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, partial)
        os.replace(partial, checkpoint)
        if on_checkpoint is not None:
            on_checkpoint(ema, run)

    on_gpu = config.device == "cuda"
    torch.backends.cudnn.benchmark = on_gpu
    run_passes = (GraphedGradients if on_gpu else EagerGradients)(model, loss_fn)
    tuner = ThreadTuner(1 if on_gpu else torch.get_num_threads())
    clock, saved_at, logged_at = time.monotonic(), time.monotonic(), 0.0
    recent: dict[str, Tensor] = {}
    while (progress := config.progress(run.num_steps, run.elapsed_s)) < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = config.rate(run.num_steps, progress)
        metrics = run_passes(draw(step_generator(config.seed, run.num_steps, config.device)))
        with torch.no_grad():
            gradients = [g for w in weights if (g := w.grad) is not None]
            torch._foreach_copy_(master_gradients, gradients)
        for key, value in metrics.items():
            recent[key] = recent[key].lerp(value, 0.02) if key in recent else value.clone()
        torch.nn.utils.clip_grad_norm_(master_weights, config.clip_norm)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(weights, master_weights)
        run.num_steps += 1
        run.num_images += config.batch_size
        # a short memory at first, so that the average does not drag the start along
        decay = min(config.ema_decay, (1 + run.num_steps) / (10 + run.num_steps))
        with torch.no_grad():
            torch._foreach_lerp_(ema_weights, master_weights, 1 - decay)

        now = time.monotonic()
        tuner.after_step(now - clock)
        run.elapsed_s, clock = run.elapsed_s + now - clock, now
        if now - logged_at > 15:
            logged_at = now
            log_progress(run, config, recent)
        if now - saved_at > config.checkpoint_every_s:
            save()
            saved_at = time.monotonic()
    save()
    log_progress(run, config, recent)
    return ema, run


def named_tensors(model: nn.Module, names: list[str]) -> list[Tensor]:
    """A model's parameters of these names, in this order."""
    parameters = dict(model.named_parameters())
    return [parameters[name] for name in names]


def log_progress(run: Run, config: TrainConfig, metrics: dict[str, Tensor]) -> None:
    """One line: share done, metrics, images a second, time left."""
    progress = max(config.progress(run.num_steps, run.elapsed_s), 1e-9)
    left_s = run.elapsed_s * (1 - progress) / progress
    speed = run.num_images / max(run.elapsed_s, 1e-9)
    shown = " ".join(f"{key} {value:.4f}" for key, value in metrics.items())
    log(
        f"{progress:4.0%} step {run.num_steps} {shown} {speed:.0f} images/s "
        f"{torch.get_num_threads()} threads ETA {int(left_s // 60)}:{int(left_s % 60):02d}"
    )


def log(message: str) -> None:
    """Print a line at once, to stderr."""
    print(message, file=sys.stderr, flush=True)


def add_arguments(parser: argparse.ArgumentParser, *, out: str, minutes: float) -> None:
    """The options every ``python -m zoo.<model>`` takes."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help=f"default: {minutes:g}")
    length.add_argument("--steps", type=int)
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--runs", type=Path, default=Path("zoo/runs"), help="checkpoints")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(default_minutes=minutes)


def config_from(args: argparse.Namespace, **defaults: Any) -> TrainConfig:
    """The options of ``add_arguments`` as a config, with a model's own defaults."""
    if args.threads:
        torch.set_num_threads(args.threads)
    minutes = args.minutes if args.minutes or args.steps else args.default_minutes
    return TrainConfig(
        num_steps=args.steps, num_minutes=minutes, device=args.device, seed=args.seed, **defaults
    )


def write_card(folder: Path, title: str, facts: dict[str, Any]) -> None:
    """``README.md`` beside a model: what made it, and from what."""
    lines = [f"# {title}", "", *(f"- {key}: {value}" for key, value in facts.items()), ""]
    lines += ["The art it was trained on, its authors and licences: `zoo/data/ATTRIBUTION.md`.", ""]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def run_facts(run: Run, config: TrainConfig, **more: Any) -> dict[str, Any]:
    """What a model's card says of its training."""
    command = "python -m " + " ".join([f"zoo.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    return {
        "command": f"`{command}`",
        "steps": f"{run.num_steps:,} of {config.batch_size}",
        "images seen": f"{run.num_images:,}",
        "device": device_name(config.device),
        "time": f"{run.elapsed_s / 60:.1f} min",
        "training metrics": json.dumps({k: round(v, 4) for k, v in (run.metrics or {}).items()}),
        **more,
    }


def device_name(device: str) -> str:
    """The GPU's name, or the CPU with its threads."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"
