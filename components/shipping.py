"""Work on Ray nodes that do not see this folder: files travel by way of `storage`.

What a stage reads lies there under its SHA-256, once for everybody. What it makes, and the folder
that its checkpoints are in, lie under a name of this checkout's own until the stage ends.
"""

import fcntl
import hashlib
import os
import socket
import tarfile
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from components.params import Params
from components.progress import clock
from components.storage import Mirror
from pnp_core.files import sha256_file, write_directory, write_text

FILES, WORK = "files", "work"  # below `storage`
WRITER = "writer"  # who has sent checkpoints last
TAR = ".tar"
SECONDS_BETWEEN_LOOKS = 2.0


@dataclass(frozen=True, kw_only=True)
class Shipment:
    """What a stage's workers find in their own folders, and what comes back.

    Attributes:
        storage: where it travels by.
        inputs: the SHA-256 of files by their paths.
        folders: that are there, and may be empty.
        home: of this checkout, whose work is in a folder of this name on every node.
        name: of this checkout and stage.
        kept: the folder of checkpoints, which the workers go on from and send.
        made: the folder that they make.
    """

    storage: str
    inputs: dict[str, str]
    folders: tuple[str, ...]
    home: str
    name: str
    kept: Path | None
    made: Path | None

    def mirror(self, part: str) -> Mirror:
        """A place of this stage's own."""
        return Mirror(self.storage, f"{WORK}/{self.name}/{part}")

    def unpack(self) -> None:
        """On a worker: go to a folder that has the inputs, and no others.

        Ray's own is shared by all who run the same code on a cluster, and outlives them.
        """
        if Path.cwd().name != self.home:
            Path(self.home).mkdir(exist_ok=True)
            os.chdir(self.home)
        with _alone():
            for folder in self.folders:
                Path(folder).mkdir(parents=True, exist_ok=True)
                for path in Path(folder).rglob("*"):
                    if path.is_file() and path.as_posix() not in self.inputs:
                        path.unlink()
            files = Mirror(self.storage, FILES)
            for name, sha256 in self.inputs.items():
                path = Path(name)
                if not (path.exists() and sha256_file(path) == sha256):
                    files.fetch(sha256, path)
                    if sha256_file(path) != sha256:
                        raise ValueError(f"{files.url}/{sha256} is not what was sent as {name}")

    def resume(self, wait_for_all: Callable[[], object]) -> None:
        """On each worker of a group, after `unpack`: all have the last checkpoints, the same.

        The node that sent the last may have later ones, which were not sent before a worker was
        lost: it sends them first. `wait_for_all` returns when every worker has called it.
        """
        assert self.kept
        with _alone():
            if self._is_writer():
                push(self.kept, self.mirror("kept"), {})
                self._mark.unlink()  # once is enough for all workers of this node
        wait_for_all()
        with _alone():
            pull(self.mirror("kept"), self.kept, is_there=True)

    def _is_writer(self) -> bool:
        """Whether nobody has sent checkpoints since this node did."""
        try:
            last = self.mirror("").read(WRITER).decode()
        except FileNotFoundError:
            return False
        return self._mark.exists() and self._mark.read_text(encoding="utf-8") == last

    @property
    def _mark(self) -> Path:
        """On a node that sends: under which name it did."""
        return Path(f".{self.name}-{WRITER}")

    @contextmanager
    def sending(
        self, *, tell: Callable[[str], None], limit_s: float
    ) -> Iterator[Callable[[], None]]:
        """On the worker that writes: checkpoints are sent as they come, and last what is made.

        What could not be sent is sent again with the next look, and `tell` hears of it. Yields what
        raises OSError if nothing could be sent for `limit_s` seconds. Raises OSError at once if
        `storage` may not be written.
        """
        assert self.kept and self.made
        write_text(self._mark, uuid.uuid4().hex)
        self.mirror("").send(self._mark, WRITER)
        sender = _Sender(self.kept, self.mirror("kept"), tell, limit_s)
        with sender:
            yield sender.check
        sender.push()
        send(self.made, self.mirror("made"))

    def bring(self) -> None:
        """Where the stage was started: fetch what was made and kept, and remove it there."""
        assert self.kept and self.made
        pull(self.mirror("kept"), self.kept)
        pull(self.mirror("made"), self.made.parent)
        self.mirror("").forget()


class _Sender:
    """Sends what comes into a folder, in a thread of its own while the block runs."""

    def __init__(
        self, folder: Path, mirror: Mirror, tell: Callable[[str], None], limit_s: float
    ) -> None:
        self._folder, self._mirror, self._tell, self._limit_s = folder, mirror, tell, limit_s
        self._sent: dict[str, int] = {}
        self._failing: tuple[float, Exception] | None = None  # since when, and why
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def push(self) -> None:
        """Send what has come since."""
        push(self._folder, self._mirror, self._sent)

    def check(self) -> None:
        """Raise OSError if sending has failed for the limit."""
        if self._failing and time.monotonic() - self._failing[0] >= self._limit_s:
            raise OSError(
                f"{self._folder}: no checkpoint could be sent for {clock(self._limit_s)}, "
                f"cluster.wait_minutes: {self._failing[1]}. The same command goes on from the last "
                "that was sent, or from later ones on the node that has them"
            ) from self._failing[1]

    def _follow(self) -> None:
        while not self._over.wait(SECONDS_BETWEEN_LOOKS):
            try:
                self.push()
            except Exception as error:  # each of fsspec's backends has its own
                before, now = self._failing, time.monotonic()
                self._failing = before[0] if before else now, error
                if before is None:
                    self._say(f"could not send checkpoints, trying again: {error}")
            else:
                before, self._failing = self._failing, None
                if before is not None:
                    self._say("checkpoints are sent again")

    def _say(self, line: str) -> None:
        with suppress(Exception):  # to go on sending matters more
            self._tell(f"{self._folder}: {line}")


@contextmanager
def _alone() -> Iterator[None]:
    """Workers of a node share the folder, and come into it one after another."""
    with open(".unpacking", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def pack(
    params: Params,
    needs: Sequence[Path],
    *,
    stage: str,
    kept: Path | None = None,
    made: Path | None = None,
) -> Shipment | None:
    """Send to `storage` what workers need; None where they see this folder, or there are none.

    Checkpoints that are here are sent where `storage` has none.

    Raises:
        ValueError: what they need lies outside of this folder, or is a folder without files.
    """
    if params.cluster.shared_folder or not params.cluster.num_workers:
        return None
    assert params.storage
    files = Mirror(params.storage, FILES)
    there, inputs = files.names(), {}
    # The configs of a single file lie beside it, in a folder of its name.
    beside = [need.with_suffix("") for need in needs if need.is_file()]
    needs = [*needs, *(folder for folder in beside if folder.is_dir())]
    for need in needs:
        paths = [need] if need.is_file() else sorted(_files_in(need))
        if need.is_dir() and not paths and need != Path(params.companions):  # which may be empty
            raise ValueError(f"{need} has no files, and workers need them")
        for path in paths:
            name = _inside(path)
            inputs[name] = sha256_file(path)
            if inputs[name] not in there:
                files.send(path, inputs[name])
    place = f"{socket.gethostname()}:{Path.cwd()}"
    home = hashlib.sha256(place.encode()).hexdigest()[:16]
    shipment = Shipment(
        storage=params.storage,
        inputs=inputs,
        folders=tuple(_inside(need) for need in needs if need.is_dir()),
        home=home,
        name=f"{home}-{stage}",
        kept=kept,
        made=made,
    )
    if kept and kept.is_dir():
        mirror = shipment.mirror("kept")
        if not mirror.names():
            push(kept, mirror, {})
    return shipment


def _files_in(folder: Path) -> Iterator[Path]:
    """All files below a folder, in linked folders too."""
    for place, _, names in os.walk(folder, followlinks=True):
        yield from (Path(place, name) for name in names if Path(place, name).is_file())


def _inside(path: Path) -> str:
    """`path` from here. Raises ValueError if it leads elsewhere."""
    try:
        return path.absolute().relative_to(Path.cwd()).as_posix()
    except ValueError:
        raise ValueError(
            f"{path} lies outside of this folder, and with `cluster.shared_folder: false` workers "
            "find files by their place in it: move or copy it here"
        ) from None


def push(folder: Path, mirror: Mirror, sent: dict[str, int]) -> None:
    """Send what has changed of a folder since it was `sent`: files, and folders as a whole."""
    there = {path.name: path for path in folder.glob("[!.]*") if path.name != "ray"}
    for name, path in there.items():
        changed = None
        with suppress(FileNotFoundError):  # gone meanwhile
            changed = path.stat().st_mtime_ns
        if changed is not None and sent.get(name) != changed:
            send(path, mirror)
            sent[name] = changed


def send(path: Path, mirror: Mirror) -> None:
    """Send a file, or a folder in one piece, so that no half of it is ever there."""
    if path.is_file():
        mirror.send(path, path.name)
        return
    with tempfile.NamedTemporaryFile() as file:
        with tarfile.open(file.name, "w") as tar:
            tar.add(path, ".")
        mirror.send(Path(file.name), path.name + TAR)


def pull(mirror: Mirror, folder: Path, *, is_there: bool = False) -> None:
    """Fetch into a folder what was sent of one.

    `is_there`: the folder is then the same: files that were not sent, of an earlier run, are
    deleted. Folders in it are of one content, and not fetched twice.
    """
    names = mirror.names()
    if is_there and folder.is_dir():
        for path in folder.iterdir():
            if path.is_file() and path.name not in names:
                path.unlink()
    for name in sorted(names):
        if not name.endswith(TAR):
            mirror.fetch(name, folder / name)
            continue
        if is_there and (folder / name.removesuffix(TAR)).exists():
            continue
        with tempfile.TemporaryDirectory() as aside:
            packed = Path(aside) / name
            mirror.fetch(name, packed)
            with tarfile.open(packed) as tar:
                write_directory(folder / name.removesuffix(TAR), partial(unpack, tar))


def unpack(tar: tarfile.TarFile, folder: Path) -> None:
    """Files and folders of a tar into a folder.

    Raises ValueError, before anything is written, if there is something else in it, or a place that
    is not in the folder. The filters of `tarfile` that do this came with Python 3.11.4.
    """
    for member in tar:
        place = PurePosixPath(member.name)
        if not (member.isfile() or member.isdir()) or place.is_absolute() or ".." in place.parts:
            raise ValueError(f"{member.name} is not a file or folder of its own")
    tar.extractall(folder)
