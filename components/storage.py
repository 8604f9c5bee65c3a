"""Files and folders: written whole or not at all, and mirrored to where `storage` points."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path that takes `path`'s place if the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a new empty folder that takes `path`'s place if the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    old = temporary.with_suffix(".old")
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            path.rename(old)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path`, sorted and indented, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def read_json(path: Path) -> Any:
    """The value in `path`."""
    return json.loads(path.read_text())


class Mirror:
    """A folder's copy under `storage` (`s3://bucket/prefix`, or any other place fsspec knows).

    S3 takes its endpoint and keys from the environment (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`…).
    """

    def __init__(self, storage: str, name: str) -> None:
        import fsspec

        self._files, root = fsspec.core.url_to_fs(storage)
        self._root = f"{root.rstrip('/')}/{name}"

    def pull(self, folder: Path) -> int:
        """Fetch files that `folder` lacks or has in another size. Returns how many came."""
        num_files = 0
        for name, size in self._sizes().items():
            path = folder / name
            if path.exists() and path.stat().st_size == size:
                continue
            with atomic_file(path) as temporary:
                self._files.get_file(f"{self._root}/{name}", str(temporary))
            num_files += 1
        return num_files

    def put(self, path: Path, folder: Path) -> None:
        """Send one file of `folder`."""
        name = f"{self._root}/{path.relative_to(folder).as_posix()}"
        self._files.makedirs(name.rpartition("/")[0], exist_ok=True)
        self._files.put_file(str(path), name)

    def _sizes(self) -> dict[str, int]:
        """Name below the mirror's root -> bytes."""
        self._files.invalidate_cache()
        if not self._files.exists(self._root):
            return {}
        root = self._files._strip_protocol(self._root)
        found = self._files.find(root, detail=True)
        return {name[len(root) + 1 :]: info["size"] for name, info in found.items()}
