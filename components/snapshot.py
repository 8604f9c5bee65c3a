"""What a stage started from: parameters, code and inputs, so that `dvc.lock` can't say another.

DVC reads parameters and hashes inputs when a stage has ended. What was edited meanwhile would be
recorded as what the result was made with. So a stage that DVC runs takes a snapshot when it begins
and ends with an error if what dvc.yaml says that it depends on is no longer the same.
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

PARAMS = Path("params.yaml")
# Content is hashed of so many bytes, smallest files first, and all code is among them. What lies
# beyond (weights, shards) is known by size and time of change: reading 100 GB takes minutes.
MOST_BYTES_HASHED = 256 * 2**20
ABSENT = object()


@dataclass(frozen=True)
class FileState:
    """A file: when and how large it was, and what was in it if that was cheap to say."""

    changed_ns: int
    num_bytes: int
    sha256: str | None


class Snapshot:
    """What one stage of dvc.yaml depends on, as it is now.

    Args:
        stage: name of the stage in dvc.yaml, such as `evaluate@base`.

    Raises:
        ValueError: params.yaml or dvc.yaml can't be read, or the stage is not in it.
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage
        values = _read(PARAMS)
        self._keys, self._deps = _dependencies(stage, values)
        self._values = {key: _value(values, key) for key in self._keys}
        sizes = {path: path.stat().st_size for path in _files(self._deps)}
        self._files: dict[Path, FileState] = {}
        hashed = 0
        for path, size in sorted(sizes.items(), key=lambda item: item[1]):
            hashed += size
            self._files[path] = _state(path, with_content=hashed <= MOST_BYTES_HASHED)

    def differences(self) -> Iterator[str]:
        """What is no longer as it was, in words; nothing if all is."""
        try:
            values = _read(PARAMS)
        except ValueError as error:
            yield str(error)
            return
        for key in self._keys:
            was, now = self._values[key], _value(values, key)
            yield from (f"{PARAMS}: {what}" for what in _changes(key, was, now))
        there = set(_files(self._deps))
        for path in sorted(there | self._files.keys()):
            if path not in there:
                yield f"{path} is gone"
            elif path not in self._files:
                yield f"{path} is new"
            elif not self._is_same(path):
                yield f"{path} has changed"

    def check(self) -> None:
        """Raises ValueError, in one line, if anything is no longer as it was."""
        found = list(self.differences())
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise ValueError(
                f"{self.stage}: what it works from was changed while it ran: {found[0]}{more}. "
                "So nothing is recorded; the same command goes on if that is put back, and begins "
                "anew with what is there now if not"
            )

    def _is_same(self, path: Path) -> bool:
        was = self._files[path]
        now = path.stat()
        if (now.st_mtime_ns, now.st_size) == (was.changed_ns, was.num_bytes):
            return True
        if now.st_size != was.num_bytes or was.sha256 is None:
            return False
        return _state(path, with_content=True).sha256 == was.sha256


_current: Snapshot | None = None


def begin(stage: str | None) -> None:
    """Take the snapshot of the stage that this process is, if it is one that DVC runs."""
    global _current
    _current = Snapshot(stage) if stage else None


def check_unchanged() -> None:
    """Before something is made known: raises ValueError if the stage's snapshot is out of date."""
    if _current:
        _current.check()


def _read(path: Path) -> Mapping[str, Any]:
    try:
        values = YAML(typ="safe", pure=True).load(path)
    except (OSError, YAMLError) as error:
        raise ValueError(f"{path} can't be read: {str(error).splitlines()[0]}") from None
    if not isinstance(values, Mapping):
        raise ValueError(f"{path}: expected `key: value` lines at the top level")
    return values


def _dependencies(stage: str, values: Mapping[str, Any]) -> tuple[list[str], list[Path]]:
    """The keys of params.yaml and the paths that a stage of dvc.yaml names."""
    name, _, key = stage.partition("@")
    stages = _read(Path("dvc.yaml")).get("stages", {})
    if name not in stages:
        raise ValueError(f"dvc.yaml has no stage {name!r}")
    defined = stages[name]
    context = dict(values)
    if "foreach" in defined:  # ${models}: a section of params.yaml
        rows = _value(values, defined["foreach"].removeprefix("${").removesuffix("}"))
        context |= {"key": key, "item": _value(rows, key)}
        defined = defined["do"]

    def filled(text: str) -> str:
        return re.sub(r"\$\{([^}]+)\}", lambda match: str(_value(context, match[1])), text)

    params = [filled(entry) for entry in defined.get("params", [])]
    return params, [Path(filled(entry)) for entry in defined.get("deps", [])]


def _value(values: Any, key: str) -> Any:
    """The value under a dotted key, `a.b` or `a.b[0]`; ABSENT if there is none."""
    for part in re.findall(r"[^.\[\]]+", key):
        if isinstance(values, list) and part.isdigit() and int(part) < len(values):
            values = values[int(part)]
        elif isinstance(values, Mapping) and part in values:
            values = values[part]
        else:
            return ABSENT
    return values


def _changes(key: str, was: Any, now: Any) -> Iterator[str]:
    """`distill.seed was 0, is 1`, for each of the values below `key`."""
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        for name in sorted(was.keys() | now.keys(), key=str):
            yield from _changes(f"{key}.{name}", was.get(name, ABSENT), now.get(name, ABSENT))
    elif was is ABSENT and now is not ABSENT:
        yield f"{key} is new"
    elif now is ABSENT and was is not ABSENT:
        yield f"{key} is gone"
    elif was != now:
        yield f"{key} was {was!r}, is {now!r}"


def _files(paths: list[Path]) -> Iterator[Path]:
    """Every file that these are or hold, but for what Python compiles of them as they are used."""
    for path in paths:
        if path.is_dir():
            for folder, folders, names in os.walk(path):
                folders[:] = [name for name in folders if name != "__pycache__"]
                yield from (Path(folder, name) for name in names)
        elif path.exists():
            yield path


def _state(path: Path, *, with_content: bool) -> FileState:
    about = path.stat()
    content = None
    if with_content:
        with path.open("rb") as file:
            content = file_digest(file, "sha256").hexdigest()
    return FileState(about.st_mtime_ns, about.st_size, content)
