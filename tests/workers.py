"""Processes that train together, as `torchrun` would start them."""

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp


def run_workers(work: Callable[..., None], *arguments: Any, num_workers: int = 2) -> None:
    """Call ``work(rank, *arguments)`` in so many processes, and wait for them.

    They are forked from a process that has imported what takes seconds, once for all tests.
    """
    multiprocessing.set_forkserver_preload([work.__module__, "tests.conftest"])
    mp.start_processes(work, arguments, num_workers, start_method="forkserver")
