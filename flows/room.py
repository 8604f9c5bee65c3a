"""GPUs of this machine: who uses which, so that nobody trains or measures beside another run.

On a server the global concurrency limit `pnp-guide-gpu-<host>` guards them and shows who waits; the
flow makes it. Which of them is free is told by a lock on this machine, which ends with its process.
"""

import fcntl
import os
import random
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency
from prefect.runtime import deployment

from components.progress import clock
from flows.process import StageFailed, ask

SECONDS_BETWEEN_LOOKS = 2.0


def gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in map(str.strip, visible.split(",")) if name not in ("", "-1")]
    if not shutil.which("nvidia-smi"):
        return []
    told = ask(["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"])
    return told.split() if told else []


@contextmanager
def room(
    stage: str, count: int, wait_minutes: float, log: Callable[[str], None]
) -> Iterator[Mapping[str, str]]:
    """While open, `count` GPUs (at most all) are this stage's; yields the environment that says so.

    Without GPUs nothing is guarded. Raises StageFailed, in one line, if they stay taken for
    `wait_minutes`.
    """
    there = gpus()
    if not there:
        yield {}
        return
    count = min(count, len(there))
    deadline = time.monotonic() + 60 * wait_minutes
    with ExitStack() as held:
        try:
            held.enter_context(_limit(len(there), count, 60 * wait_minutes))
        except TimeoutError:
            raise _taken(stage, wait_minutes) from None
        told = False
        while (taken := _take(there, count, held)) is None:
            if time.monotonic() > deadline:
                raise _taken(stage, wait_minutes)
            if not told:
                log(f"{stage}: waiting for a GPU, {clock(60 * wait_minutes)} at most")
                told = True
            time.sleep(SECONDS_BETWEEN_LOOKS * random.uniform(0.5, 1.5))
        yield {"CUDA_VISIBLE_DEVICES": ",".join(taken)}


def _limit(total: int, count: int, timeout_s: float) -> Any:
    """The server's guard; nothing where no server outlives this run."""
    if deployment.id is None:
        return nullcontext()
    name = f"pnp-guide-gpu-{socket.gethostname()}"
    with get_client(sync_client=True) as client:
        client.upsert_global_concurrency_limit_by_name(name, total)
    # A server that is away for a while does not end what runs.
    return concurrency(
        name, occupy=count, timeout_seconds=timeout_s, raise_on_lease_renewal_failure=False
    )


def _take(there: Sequence[str], count: int, held: ExitStack) -> list[str] | None:
    """Lock so many GPUs, or none: two runs that each keep a part would wait for one another.

    The locks go with `held`.
    """
    with ExitStack() as locks:
        taken: list[str] = []
        for name in there:
            if len(taken) < count and (lock := _lock(name)) is not None:
                locks.callback(os.close, lock)
                taken.append(name)
        if len(taken) < count:
            return None
        held.enter_context(locks.pop_all())
    return taken


def _lock(name: str) -> int | None:
    """The lock of one GPU, if nobody has it."""
    path = Path(tempfile.gettempdir(), f"pnp-guide-gpu-{name}.lock")
    with suppress(FileExistsError):  # it may be another user's, who lets us read it
        made = os.open(path, os.O_CREAT | os.O_EXCL)
        os.fchmod(made, 0o644)
        os.close(made)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _taken(stage: str, wait_minutes: float) -> StageFailed:
    line = (
        f"error: the GPUs of this machine are taken; waited {clock(60 * wait_minutes)}: run the "
        "same command when they are free, or raise cluster.wait_minutes"
    )
    return StageFailed(stage, 1, [line])
