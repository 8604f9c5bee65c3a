"""Results as they are made: by card, each row with what made it."""

import gc
import hashlib
import math
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.rows import Group, Row, groups
from benchmarks.gpu.scale import Scale
from benchmarks.record import UNTRAINED, Record, forget, note, record
from pnp_core.files import read_json, write_json

CODE = ("pnp_core", "benchmarks/gpu/rows.py", "benchmarks/cost.py", "benchmarks/train_cost.py")
LONGEST_S = 150  # of a row, so that one that hangs is not the end of the others


class TimeIsUpError(BaseException):
    """Raised in the middle of a row; nothing that guards against errors takes it for one."""


def code_digest() -> str:
    """Identity of the code that is measured."""
    files = [file for part in map(Path, CODE) for file in sorted([part, *part.rglob("*.py")])]
    content = b"".join(file.read_bytes() for file in files if file.is_file())
    return hashlib.sha256(content).hexdigest()[:16]


def made_by() -> Record:
    """What this run is."""
    try:
        found = record(guide=UNTRAINED, precision="bf16")
    except ValueError as error:  # a machine lent for an hour need not have git
        found = {"guide": UNTRAINED, "precision": "bf16", "commit": f"not known ({error})"}
        found["command"] = "python -m benchmarks.gpu --run"
    return {**found, "code": code_digest(), "torch": torch.__version__, "driver": driver()}


def driver() -> str:
    """The GPU driver's version; `not known` where nothing says it."""
    if not torch.cuda.is_available() or not shutil.which("nvidia-smi"):
        return "not known"
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    told = subprocess.run(asked, capture_output=True, text=True)
    return told.stdout.split("\n")[0].strip() or "not known"


def card_of(device: str) -> tuple[str, float]:
    """Its name, and its memory in GB."""
    if device != "cuda":
        return "CPU, toy sizes", 0.0
    properties = torch.cuda.get_device_properties(0)
    return properties.name, properties.total_memory / 1e9


def run(scale: Scale, path: Path, *, minutes: float, done: Callable[[], None]) -> None:
    """Make the rows that ``path`` lacks for this card and code, as far as the time allows.

    Args:
        scale: what to measure.
        path: written after each row.
        minutes: that all of it may take.
        done: called after each row.
    """
    until = time.monotonic() + 60 * minutes
    results: dict[str, Any] = read_json(path) if path.exists() else {}
    card, memory_gb = card_of(scale.device)
    kept = results.setdefault(card, {"memory_gb": memory_gb, "rows": {}})
    this = made_by()

    def put(name: str, row: Row) -> None:
        kept["rows"][name] = {**row, "code": this["code"]}
        forget(kept, name)
        note(kept, name, this)
        write_json(path, results)
        print(f"{name}: {row.get('failed', 'done')}", flush=True)
        done()

    with tempfile.TemporaryDirectory() as scratch:
        for group in groups(scale, Path(scratch)):
            wanted = [n for n in group.names if not is_made(kept["rows"].get(n), this["code"])]
            if wanted and not make(group, wanted, until, put):
                print("the time is up; the same command goes on from here", flush=True)
                return
            clear(scale.device)


def is_made(row: Row | None, code: str) -> bool:
    """Whether there is nothing to do for a row."""
    return row is not None and row["code"] == code and "failed" not in row


def make(group: Group, wanted: list[str], until: float, put: Callable[[str, Row], None]) -> bool:
    """Make these rows of a group. False: the time was up before the last one."""
    calls: Any = {}

    def opened() -> Row:
        calls.update(group.open())
        return {}

    if (row := guarded(opened, until)) is None:
        return False
    for name in wanted:
        # what fails to open fails each of its rows
        made = row if "failed" in row else guarded(calls[name], until)
        if made is None:
            return False
        put(name, made)
    return True


def guarded(measure: Callable[[], Row], until: float) -> Row | None:
    """What it gives; a row that says why it failed; None: the time was up first."""
    started = time.monotonic()
    left = until - started
    if left <= 0:
        return None
    try:
        with alarm(min(left, LONGEST_S)):
            row = measure()
    except TimeIsUpError:
        if time.monotonic() >= until:
            return None
        row = {"failed": f"took more than {LONGEST_S} s"}
    except torch.OutOfMemoryError:
        row = {"failed": "the GPU's memory does not suffice"}
    except Exception as error:  # the other rows are still to be made
        said = " ".join(str(error).split())[:160]
        row = {"failed": f"{type(error).__name__}: {said}"}
    return {**row, "seconds": time.monotonic() - started}


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise TimeIsUpError in the block after so many seconds."""

    def ring(*_: object) -> None:
        raise TimeIsUpError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, math.ceil(seconds * 10) / 10)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def clear(device: str) -> None:
    """Forget what a group had opened."""
    torch._dynamo.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
