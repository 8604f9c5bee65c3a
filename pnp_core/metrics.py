"""What needs no reference images: agreement with CFG, and cost."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pnp_core.conditions import Conditions
from pnp_core.denoiser import CFGDenoiser, Denoiser


@torch.no_grad()
def guidance_fvu_terms(
    guided: Denoiser,
    teacher: CFGDenoiser,
    *,
    z_t: Tensor,
    t_B: Tensor,
    conditions: Conditions,
) -> tuple[float, float]:
    """Numerator and denominator of ``guidance_fvu``; add them up over batches, then divide.

    ``||eps_guide - eps_w||^2 / ||eps_c - eps_w||^2``: the share of guidance left unexplained.
    1 is no guide at all, 0 is CFG itself.
    """
    eps_c, eps_n = teacher.pair(z_t, t_B, conditions)
    eps_w = teacher.guider(eps_c.float(), eps_n.float(), t_B, conditions.w_B)
    eps = guided(z_t, t_B, conditions).float()
    return float((eps - eps_w).square().sum()), float((eps_c.float() - eps_w).square().sum())


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
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 1):
        for times, call in zip(seconds, (function, reference), strict=True):
            synchronize()
            start = time.perf_counter()
            call()
            synchronize()
            times.append(time.perf_counter() - start)
    own, theirs = (float(np.median(times[1:])) for times in seconds)  # the first warms up
    return own / theirs, own, theirs


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
