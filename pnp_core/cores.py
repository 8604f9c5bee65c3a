"""Work shared out among a CPU's cores, a part of the batch each.

Cores that compute one small layer together wait for one another a third of the time.
"""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from queue import Empty, SimpleQueue
from typing import TypeVar

import torch

Part = TypeVar("Part")
Result = TypeVar("Result")

SECONDS_ASLEEP = 0.5
FEWEST_ROWS = 8  # at fewer samples at once, a core takes longer for each


def num_cores(num_rows: int, device: torch.device) -> int:
    """Into how many parts a batch is best shared out; 1 on a GPU, which takes it as a whole.

    Each part gets as many threads; no core is left without work.
    """
    if device.type != "cpu":
        return 1
    num_threads = torch.get_num_threads()
    most = max(1, min(num_threads, num_rows // FEWEST_ROWS))
    threads_each = -(-num_threads // most)
    return num_threads // threads_each


def share_out(rows: slice, num_parts: int) -> list[slice]:
    """Rows in so many parts, or fewer, that are about as large as one another."""
    size = max(1, -(-(rows.stop - rows.start) // num_parts))
    starts = range(rows.start, rows.stop, size)
    return [slice(start, min(start + size, rows.stop)) for start in starts]


class GivenUp(BaseException):
    """Ends a part whose batch has been interrupted, or of which another part has failed."""


class Now(threading.local):
    """What goes on in this thread."""

    given_up: threading.Event | None = None


now = Now()


def go_on() -> None:
    """Said at each forward: raises :class:`GivenUp` in a part that nobody waits for any more."""
    if now.given_up is not None and now.given_up.is_set():
        raise GivenUp


def side_by_side(
    work: Callable[[Part], Result], parts: Sequence[Part], num_cores: int
) -> list[Result]:
    """``work(part)`` of each part, in their order, so many at once.

    Gradients, inference mode and autocast are on in ``work`` where they are on here. If it raises,
    and at Ctrl-C, the other parts end at their next forward.
    """
    if min(num_cores, len(parts)) <= 1:
        return [work(part) for part in parts]
    num_threads = torch.get_num_threads()
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    mixed, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    given_up, pool = threading.Event(), _pool(num_cores, max(1, num_threads // num_cores))

    def as_here(part: Part) -> Result:
        now.given_up = given_up
        try:
            go_on()
            with (
                torch.inference_mode(inference),
                torch.set_grad_enabled(grad),
                torch.autocast("cpu", dtype=dtype, enabled=mixed),
            ):
                return work(part)
        except BaseException:
            given_up.set()
            raise

    begun: list[Future[Result]] = []
    through: SimpleQueue[Future[Result]] = SimpleQueue()  # only wakes; unlike a lock, at Ctrl-C too

    def wait() -> None:
        while not all(future.done() for future in begun):
            with suppress(Empty):
                through.get(timeout=SECONDS_ASLEEP)

    try:
        for part in parts:
            begun.append(pool.submit(as_here, part))
            begun[-1].add_done_callback(through.put)
        wait()
    finally:
        given_up.set()
        wait()
        torch.set_num_threads(num_threads)  # of threads to come, for which the pool's set it too
    for future in begun:
        error = future.exception()
        if error is not None and not isinstance(error, GivenUp):
            raise error
    return [future.result() for future in begun]


def on_cores(work: Callable[[slice], Result], rows: slice, num_cores: int) -> list[Result]:
    """``work`` of a share of these rows on each core, in their order; see :func:`side_by_side`."""
    return side_by_side(work, share_out(rows, num_cores), num_cores)


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
