"""One decision at a time, whoever decides and wherever.

MLflow moves an alias without looking. But it gives a registered model's name away only once, so
the lock is a registered model, `<name>-decision-lock`, whose tags say who has it and until when.
"""

import fcntl
import io
import sys
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from mlflow.exceptions import MlflowException

from components.progress import clock
from components.tracking.journal import journals, owner
from components.tracking.store import Store, TrackingError, is_absent

LEASE_S = 600.0  # as long as a decision may take
CLOCKS_DIFFER_S = 60.0  # of two machines, at most
SECONDS_KEPT = 86_400.0  # of a lock that was taken away: longer than anyone thinks it is there
SECONDS_BETWEEN_TRIES = 1.0
TOKEN, PLACE, EXPIRES = "pnp.token", "pnp.place", "pnp.expires"


class DecisionLock:
    """Held while it is open as a context. Raises TrackingError if it can't be had.

    A lock that is left behind is taken over: at once, if its holder's process is known to be gone,
    else when it has expired. It is renamed to a name that only this one lock can get, so of two who
    see the same stale lock one has it, and none takes the lock of the other. What has such a name
    is deleted by a later decision, a day after it expired.
    """

    def __init__(self, store: Store, model: str, *, wait_s: float) -> None:
        self._store, self._model, self._wait_s = store, model, wait_s
        self.name = f"{model}-decision-lock"
        self._expired = f"{self.name}-expired-"
        self._token = uuid.uuid4().hex
        self._began = 0.0
        self._alive = _Alive(self._token)

    def __enter__(self) -> Self:
        self._alive.begin()
        try:
            self._acquire()
        except BaseException:
            self._alive.end(is_over=False)  # it may have been made all the same
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        is_over = False
        try:
            # Once the lease is over, it may be another's by the time that it is deleted.
            if self._left_s() > CLOCKS_DIFFER_S and self._is_mine(self._read()):
                with self._store.asking(f"give back {self.name}", is_repeatable=False):
                    self._store.client.delete_registered_model(self.name)
                is_over = True
                self._remove_expired()
        except TrackingError as failed:
            # What was decided stands, and the lock is taken over by the next.
            print(f"warning: {' '.join(str(failed).split())}", file=sys.stderr, flush=True)
        finally:
            self._alive.end(is_over=is_over)

    def check(self) -> None:
        """See that the lock is still held, and will be for as long as a change takes.

        Raises TrackingError if not; nothing is changed then.
        """
        if self._left_s() < CLOCKS_DIFFER_S or not self._is_mine(self._read()):
            raise TrackingError(
                f"{self._model}: deciding took longer than {clock(LEASE_S)}, and someone else may "
                "decide now. Nothing was changed: run the same command again"
            )

    def _acquire(self) -> None:
        waited_since, is_told = time.monotonic(), False
        while True:
            lock = self._read()
            if lock is None:
                self._create()  # or someone else does: whose it is, is read
                continue
            if self._is_mine(lock):
                return
            if _is_stale(lock):
                self._take_away(lock)
                continue
            waited = time.monotonic() - waited_since
            who = f"{lock.get(PLACE, 'unknown')}, until {_when(lock)} at the latest"
            if waited >= self._wait_s:
                raise TrackingError(
                    f"{self._model}: someone else is deciding ({who}): waited {clock(waited)}; run "
                    f"the same command again. If nobody is, delete the registered model {self.name}"
                )
            if not is_told:
                is_told = True
                print(
                    f"waiting, at most {clock(self._wait_s)}: someone else is deciding on "
                    f"{self._model} ({who})",
                    file=sys.stderr,
                    flush=True,
                )
            time.sleep(SECONDS_BETWEEN_TRIES)

    def _create(self) -> None:
        """Make the lock, if there is none."""
        self._began = time.monotonic()
        tags = {
            TOKEN: self._token,
            PLACE: owner().place,
            EXPIRES: str(time.time() + LEASE_S),
        }
        with self._store.asking(f"make {self.name}"):
            try:
                self._store.client.create_registered_model(
                    self.name,
                    tags,
                    f"Held by whoever is deciding on {self._model}, and deleted after it.",
                )
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise

    def _take_away(self, lock: Mapping[str, str]) -> None:
        """Rename a stale lock, if it is still that one: its name is given away once, too."""
        with self._store.asking(f"take over {self.name}"):
            try:
                self._store.client.rename_registered_model(
                    self.name, f"{self._expired}{lock.get(TOKEN, 'unknown')[:12]}"
                )
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS" and not is_absent(error):
                    raise
        _alive_file(lock.get(TOKEN, "unknown")).unlink(missing_ok=True)

    def _remove_expired(self) -> None:
        """Delete earlier locks that were taken away, once nobody can think that they are there."""
        with self._store.asking(f"remove what is left of {self.name}"):
            for found in self._store.client.search_registered_models(
                f"name LIKE '{self._expired}%'"
            ):
                is_ours = found.name.startswith(self._expired) and EXPIRES in found.tags
                if is_ours and time.time() > _expires(found) + SECONDS_KEPT:
                    self._store.client.delete_registered_model(found.name)

    def _read(self) -> Mapping[str, str] | None:
        """The lock's tags; None if the registry says that there is no lock."""
        with self._store.asking(f"read {self.name}"):
            try:
                found: Any = self._store.client.get_registered_model(self.name)
            except MlflowException as error:
                if not is_absent(error):
                    raise
                return None
            if found.name != self.name:
                raise ValueError(f"it answers with {found.name!r}")
        return {**found.tags, EXPIRES: str(_expires(found))}

    def _is_mine(self, lock: Mapping[str, str] | None) -> bool:
        return lock is not None and lock.get(TOKEN) == self._token

    def _left_s(self) -> float:
        return LEASE_S - (time.monotonic() - self._began)


class _Alive:
    """A file of this checkout that is locked as long as the process is there."""

    def __init__(self, token: str) -> None:
        self._path = _alive_file(token)
        self._file: io.BufferedWriter | None = None

    def begin(self) -> None:
        with suppress(OSError):  # where nothing can be locked, the lock's expiry has to do
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("wb")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def end(self, *, is_over: bool) -> None:
        """Let go of the file. It stays where the lock may: by it the next sees that it is stale."""
        if is_over:
            self._path.unlink(missing_ok=True)
        if self._file:
            self._file.close()


def _alive_file(token: str) -> Path:
    return journals() / f"deciding-{token}"


def _expires(found: Any) -> float:
    """When a lock does, in seconds since 1970: as it says, or as any does that says nothing so."""
    longest = found.creation_timestamp / 1000 + LEASE_S
    with suppress(KeyError, ValueError):
        return min(longest + CLOCKS_DIFFER_S, float(found.tags[EXPIRES]))
    return float(longest)


def _is_stale(lock: Mapping[str, str]) -> bool:
    """Whether its holder can't be deciding any more."""
    if time.time() > float(lock[EXPIRES]) + CLOCKS_DIFFER_S:
        return True
    if lock.get(PLACE) != owner().place:
        return False
    try:
        with _alive_file(lock.get(TOKEN, "")).open("rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # it is alive, or left no file to tell it by
        return False
    return True


def _when(lock: Mapping[str, str]) -> str:
    until = datetime.fromtimestamp(float(lock[EXPIRES]) + CLOCKS_DIFFER_S, UTC)
    return until.astimezone().strftime("%Y-%m-%d %H:%M:%S")
