"""What needs no reference images: agreement with CFG, and cost."""

import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from pnp_core.conditions import Conditions
from pnp_core.denoiser import CFGDenoiser, Denoiser


class FvuTerms(NamedTuple):
    """Of each sample: numerator and denominator of ``guidance_fvu``, and the teacher's eps."""

    unexplained_B: Tensor
    total_B: Tensor
    eps_w: Tensor


@torch.no_grad()
def guidance_fvu_terms(
    guided: Denoiser,
    teacher: CFGDenoiser,
    *,
    z_t: Tensor,
    t_B: Tensor,
    conditions: Conditions,
) -> FvuTerms:
    """The terms of ``guidance_fvu``; add them up over samples, then divide.

    ``||eps_guide - eps_w||^2 / ||eps_c - eps_w||^2``: the share of guidance left unexplained.
    1 is no guide at all, 0 is CFG itself. The teacher is asked once: its ``eps_w`` comes along.
    """
    eps_c, eps_n = teacher.pair(z_t, t_B, conditions)
    eps_w = teacher.guider(eps_c.float(), eps_n.float(), t_B, conditions.w_B)
    eps = guided(z_t, t_B, conditions).float()

    def squares(x: Tensor) -> Tensor:
        return x.square().flatten(1).sum(dim=1)

    return FvuTerms(squares(eps - eps_w), squares(eps_c.float() - eps_w), eps_w)


def psnr(images: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of uint8 images, in dB, one an image."""
    error = (images.astype(np.float64) - references.astype(np.float64)) ** 2
    mse = error.reshape(len(images), -1).mean(axis=1)
    return np.asarray(10 * np.log10(255**2 / np.maximum(mse, 1e-4)))


def count_flops(function: Callable[[], object]) -> int:
    """Floating-point operations of one call, counted by PyTorch (matrix products, convolutions)."""
    with FlopCounterMode(display=False) as counter:
        function()
    return int(counter.get_total_flops())


def time_ratio(
    function: Callable[[], object], reference: Callable[[], object], repeats: int = 10
) -> tuple[float, float, float]:
    """Median wall times of two calls, taken in turns: (ratio, seconds, reference's seconds)."""
    own, theirs = median_times((function, reference), repeats)
    return own / theirs, own, theirs


def median_times(calls: Sequence[Callable[[], object]], repeats: int = 10) -> list[float]:
    """Median wall times of calls in seconds, taken in turns, after one of each to warm up."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats + 1):
        for times, call in zip(seconds, calls, strict=True):
            synchronize()
            start = time.perf_counter()
            call()
            synchronize()
            times.append(time.perf_counter() - start)
    return [float(np.median(times[1:])) for times in seconds]


def peak_bytes(function: Callable[[], object]) -> int:
    """The most memory that a call's own tensors take at a time, weights not counted.

    On a GPU as PyTorch's allocator counts it; on a CPU the sum of tensors that are alive, without
    what a kernel takes for itself.
    """
    if torch.cuda.is_available():
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        synchronize()
        return int(torch.cuda.max_memory_allocated()) - before
    with _Alive() as alive:
        function()
    return alive.peak


class _Alive(TorchDispatchMode):
    """Counts the bytes of tensors that operations give, from when they are made until freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._counted: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self._count(x.untyped_storage(), given)
        return result

    def _count(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in given or key in self._counted:
            return  # a view
        self._counted.add(key)
        self.now += num_bytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, num_bytes)

    def _free(self, key: int, num_bytes: int) -> None:
        self._counted.discard(key)
        self.now -= num_bytes


@contextmanager
def one_thread() -> Iterator[None]:
    """While open, PyTorch computes on one CPU thread."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def synchronize() -> None:
    """Wait until the GPU has done all it was given, so that a clock read next is right."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
