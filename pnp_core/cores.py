"""Work shared out among a CPU's cores, a part of the batch each.

Cores that compute one small layer together wait for one another a third of the time.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

Part = TypeVar("Part")
Result = TypeVar("Result")

FEWEST_ROWS = 8  # at fewer samples at once, a core takes longer for each


def num_cores(num_rows: int, device: torch.device) -> int:
    """Into how many parts a batch is best shared out; 1 on a GPU, which takes it as a whole."""
    if device.type != "cpu":
        return 1
    return max(1, min(torch.get_num_threads(), num_rows // FEWEST_ROWS))


def share_out(rows: slice, num_parts: int) -> list[slice]:
    """Rows in so many parts, or fewer, that are about as large as one another."""
    size = max(1, -(-(rows.stop - rows.start) // num_parts))
    starts = range(rows.start, rows.stop, size)
    return [slice(start, min(start + size, rows.stop)) for start in starts]


def side_by_side(
    work: Callable[[Part], Result], parts: Sequence[Part], num_cores: int
) -> list[Result]:
    """``work(part)`` of each part, in their order, so many at once.

    Gradients, inference mode and autocast are on in ``work`` where they are on here. What it
    raises is raised when all that has begun is through.
    """
    if min(num_cores, len(parts)) <= 1:
        return [work(part) for part in parts]
    threads_each = max(1, torch.get_num_threads() // num_cores)
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    mixed, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def as_here(part: Part) -> Result:
        with (
            torch.inference_mode(inference),
            torch.set_grad_enabled(grad),
            torch.autocast("cpu", dtype=dtype, enabled=mixed),
        ):
            return work(part)

    begun = [_pool(num_cores, threads_each).submit(as_here, part) for part in parts]
    try:
        return [future.result() for future in begun]
    finally:
        for future in begun:
            if not future.cancel():
                future.exception()


@cache
def _pool(num_cores: int, threads_each: int) -> ThreadPoolExecutor:
    """Threads for as long as the process lives: new ones would get memory of their own anew."""
    return ThreadPoolExecutor(
        num_cores, thread_name_prefix="cores", initializer=_settle, initargs=(threads_each,)
    )


def _settle(num_threads: int) -> None:
    """Have PyTorch compute on so many threads in this one."""
    torch.get_num_threads()  # else PyTorch sets a number of its own at the first operation
    torch.set_num_threads(num_threads)


if hasattr(os, "register_at_fork"):  # threads do not go with a forked process
    os.register_at_fork(after_in_child=_pool.cache_clear)
