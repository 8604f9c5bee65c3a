"""What a run has to tell MLflow, kept on disk line by line, and who it belongs to.

`runs/tracking/<stage>-<attempt>.jsonl` in the checkout. The process that a run lives in holds a
lock on its file, so a file that can be locked is of a run that ended, or was killed.
"""

import fcntl
import getpass
import io
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from components.mlflow_place import checkout
from components.paths import RUNS

KEY, STAGE, OWNER, ATTEMPT, PLACE = "pnp.key", "pnp.stage", "pnp.owner", "pnp.attempt", "pnp.place"
HEADER = {"stage", "attempt", "began", "experiment", "params", "tags"}


@dataclass(frozen=True)
class Owner:
    """Who begins a run. Another checkout, also a copy of this one, is another owner."""

    id: str  # of user and checkout; moves along with the checkout
    user: str
    place: str  # user@host:folder


def journals() -> Path:
    """The folder of this checkout's journals."""
    return checkout() / RUNS / "tracking"


def owner() -> Owner:
    """Who would begin a run here."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        user = str(os.getuid())
    place = f"{user}@{socket.gethostname()}:{checkout()}".replace("'", "_")
    try:
        identity = _identity(journals() / "checkout.json")
    except OSError:  # nothing can be written here: known by its place alone
        identity = str(uuid.uuid5(uuid.NAMESPACE_URL, place))
    return Owner(f"{user}/{identity}".replace("'", "_"), user, place)


def _identity(path: Path) -> str:
    """The checkout's own id. It is kept with the number of its file, which a copy does not have."""
    with suppress(FileNotFoundError, ValueError, KeyError):
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["inode"] == path.stat().st_ino:
            return str(known["id"])
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    with new.open("w") as file:
        identity = uuid.uuid4().hex
        json.dump({"id": identity, "inode": os.fstat(file.fileno()).st_ino}, file)
        file.flush()
        os.fsync(file.fileno())  # else a power cut may leave an empty one
    os.replace(new, path)
    return str(json.loads(path.read_text(encoding="utf-8"))["id"])  # someone may have been quicker


class Journal:
    """The journal of one attempt, locked by this process until it is closed."""

    def __init__(self, path: Path | None) -> None:
        """With no path, it is kept in memory.

        Raises BlockingIOError if the run is alive in another process.
        """
        self.path = path
        self._file = path.open("r+b") if path else io.BytesIO()
        try:
            if path:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            # Where files can't be locked, a run may be alive: it is left alone.
            raise BlockingIOError(str(error)) from None
        self.header: dict[str, Any] = {}
        self.points: list[tuple[int, int, dict[str, float]]] = []  # step, milliseconds, metrics
        self.run_id: str | None = None
        self.end: tuple[str, int] | None = None  # status, milliseconds
        self.is_delivered = False
        self._known: set[tuple[str, int]] = set()
        self._read()

    @classmethod
    def begin(cls, stage: str, header: Mapping[str, Any]) -> Self:
        """A new attempt, in memory if its file can't be written."""
        attempt = uuid.uuid4().hex
        began = {"stage": stage, "attempt": attempt, "began": _now(), **header}
        # Under its name only when it is locked and whole: another run may look at any time.
        path = journals() / f".{stage}-{attempt}.new"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            journal = cls(path)
            journal._add("header", began)
            journal.path = path.rename(path.with_name(f"{stage}-{attempt}.jsonl"))
        except OSError:
            with suppress(OSError):
                path.unlink(missing_ok=True)
            journal = cls(None)
            journal._add("header", began)
        return journal

    def point(self, step: int, metrics: Mapping[str, float]) -> None:
        """A point of each curve; one that an earlier attempt had is not taken again.

        Raises OSError if it can't be written; it is kept in memory then.
        """
        new = {
            name: float(value) for name, value in metrics.items() if (name, step) not in self._known
        }
        if new:
            self._add("point", [step, _now(), new])

    def bind(self, run_id: str) -> None:
        """The run in MLflow that it is delivered to."""
        self._add("run", run_id)

    def finish(self, status: str) -> None:
        """The run has ended, now, with this status of MLflow's."""
        self._add("end", [status, _now()])

    def reopen(self, header: Mapping[str, Any]) -> None:
        """Go on with what broke off, with these entries of its header anew."""
        anew = {**self.header, **header}
        if anew != self.header:
            self._add("header", anew)
        if self.end:
            self._add("end", None)

    def delivered(self) -> None:
        """MLflow has all of it."""
        if not self.is_delivered:
            self._add("delivered", True)

    def close(self) -> None:
        """Let go of the file, and with it of its lock; the file stays."""
        self._file.close()

    def remove(self) -> None:
        """Delete the file, where there is one, and let go of it."""
        if self.path:
            with suppress(OSError):
                self.path.unlink(missing_ok=True)
        self.close()

    def _add(self, kind: str, value: Any) -> None:
        self._take(kind, value)
        if self.path:
            self._file.write(json.dumps({kind: value}).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def _take(self, kind: str, value: Any) -> None:
        self.is_delivered = kind == "delivered"
        match kind:
            case "header":
                self.header = dict(value)
            case "point":
                step, at, metrics = value
                self.points.append((step, at, metrics))
                self._known |= {(name, step) for name in metrics}
            case "run":
                self.run_id = value
            case "end":
                self.end = tuple(value) if value else None

    def _read(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        for line in content.splitlines():
            with suppress(ValueError, TypeError, AttributeError):  # cut off in the middle
                for kind, value in json.loads(line).items():
                    self._take(kind, value)
        if content and not content.endswith(b"\n"):
            self._file.write(b"\n")


def at_rest() -> Iterator[Journal]:
    """The journals here whose process is gone, each locked."""
    for path in sorted(journals().glob("*.jsonl")):
        try:
            journal = Journal(path)
        except (BlockingIOError, FileNotFoundError, PermissionError):
            continue
        if journal.header.keys() >= HEADER:
            yield journal
        else:  # not one of ours
            journal.close()


def is_alive(attempt: str) -> bool:
    """Whether the run of this attempt has a process here, as far as can be told."""
    for path in journals().glob(f"*-{attempt}.jsonl"):
        try:
            Journal(path).close()
        except FileNotFoundError:
            return False
        except OSError:
            return True
    return False


def _now() -> int:
    return time.time_ns() // 1_000_000
