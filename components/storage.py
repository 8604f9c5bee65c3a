"""Folders mirrored to where `storage` points, and shards of teacher caches kept there."""

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from components.errors import MISTAKES, NO_BUCKET, MayPassError, causes_of
from components.mlflow_place import secrets_of
from pnp_core.files import atomic_file

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

    from pnp_core.shards import Shard

Result = TypeVar("Result")

# Seconds to wait after each failed attempt: storage may be away for two minutes.
WAITS = (1, 2, 4, 8, 16, 32, 60)
CHECKED_AT_ONCE = 8  # shards, each in a thread: one connection alone is slow
HEADER_BYTES = 8192  # of a shard, at most: its few tensors' shapes, and its key
NOTHING_KEPT = {"memory", "http", "https", "data", "github"}  # of what fsspec knows


class Mirror:
    """A folder's copy under `storage` (`s3://bucket/prefix`, or any other place fsspec knows).

    S3 takes its endpoint and keys from the environment (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`…).
    What fails is tried again for two minutes. Then, or at once where trying again can't help,
    OSError says what is wrong. A bucket, or a folder that `storage` names, is never made.

    Raises:
        ValueError: `storage` names no kind of place that is known here.
    """

    def __init__(self, storage: str, name: str = "") -> None:
        import fsspec
        from fsspec.implementations.local import LocalFileSystem

        if secrets_of(storage):  # and it is not to be read in a log
            raise ValueError("params.yaml: storage has a user in it: keys are the environment's")
        try:
            self._files, root = fsspec.core.url_to_fs(storage)
        except (ImportError, ValueError) as error:
            raise ValueError(f"params.yaml: storage: {storage}: {error}") from None
        self._is_local = isinstance(self._files, LocalFileSystem)
        # What must be there already: the folder itself, or the bucket.
        self._place = root.rstrip("/") if self._is_local else root.partition("/")[0]
        protocols = (
            {self._files.protocol}
            if isinstance(self._files.protocol, str)
            else set(self._files.protocol)
        )
        if protocols & NOTHING_KEPT or not self._place:
            raise ValueError(
                f"params.yaml: storage: {storage} is no place where files are kept: write "
                "s3://bucket/prefix, or a folder"
            )
        self._root = f"{root.rstrip('/')}/{name}".rstrip("/")
        self.url = f"{storage.rstrip('/')}/{name}".rstrip("/")

    def check(self) -> None:
        """Raises OSError if the bucket or folder isn't there, or can't be looked at."""

        def is_folder() -> bool:
            try:
                return bool(self._files.info(self._place)["type"] == "directory")
            except PermissionError:
                self._is_empty(self._root)  # keys for a prefix may list it, and not see the bucket
                return True

        if not self._patiently("look at", "", is_folder, is_place=True):
            raise OSError(f"storage: {self._place} is a file: name a folder")

    def names(self) -> set[str]:
        """The files there, by their path below the mirror's root."""
        return set(self.sizes())

    def sizes(self) -> dict[str, int]:
        """The files there by their path below the mirror's root, and what they take in bytes."""
        found = self._patiently("list", "", lambda: self._found(self._root))
        start = len(self._files._strip_protocol(self._root)) + 1
        return {name[start:]: int(about["size"]) for name, about in found.items()}

    def num_bytes(self) -> int:
        """That all files there take."""
        return sum(self.sizes().values())

    def read(self, name: str) -> bytes:
        """The content of one file. FileNotFoundError if there is none."""
        content: bytes = self._patiently(
            "read", name, lambda: self._files.cat_file(f"{self._root}/{name}")
        )
        return content

    def begin(self, name: str, num_bytes: int) -> bytes:
        """The first bytes of one file, at most so many. FileNotFoundError if there is none."""
        there = f"{self._root}/{name}"
        content: bytes = self._patiently(
            "read", name, lambda: self._files.cat_file(there, start=0, end=num_bytes)
        )
        return content

    def checksum(self, name: str) -> str:
        """SHA-256 of one file, read piece by piece. FileNotFoundError if there is none."""

        def digest() -> str:
            with self._files.open(f"{self._root}/{name}", "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()

        return self._patiently("read", name, digest)

    def fetch(self, name: str, path: Path) -> None:
        """One file, to `path`. FileNotFoundError if there is none."""
        there = f"{self._root}/{name}"
        try:
            with atomic_file(path) as new:
                self._patiently("read", name, lambda: self._files.get_file(there, str(new)))
        except OSError as error:
            if isinstance(error.__cause__, FileNotFoundError | MayPassError):
                raise error.__cause__ from None  # it is not writing that failed
            raise

    def put(self, path: Path, folder: Path) -> None:
        """Send one file of `folder`."""
        self.send(path, path.relative_to(folder).as_posix())

    def send(self, path: Path, name: str) -> None:
        """Send a file, to be called `name` there."""
        self._patiently("write", name, lambda: self._put(path, name), is_place=True)

    def _put(self, path: Path, name: str) -> None:
        there = f"{self._root}/{name}"
        if not self._is_local:  # of a bucket, S3 shows a file whole or not at all
            self._files.put_file(str(path), there)
            return
        self._files.info(self._place)
        with atomic_file(Path(there)) as new:
            shutil.copyfile(path, new)

    def copy(self, name: str, other: "Mirror", new: str) -> None:
        """Copy one file to another mirror, not by way of here. FileNotFoundError if there is none.

        `new`: what it is called there.
        """
        there = f"{self._root}/{name}"

        def copy() -> None:
            if not self._is_local:
                self._files.cp_file(there, f"{other._root}/{new}")
                return
            try:
                other._put(Path(there), new)
            except OSError:
                if os.path.exists(there):
                    raise
                raise FileNotFoundError(there) from None  # deleted meanwhile

        self._patiently("copy", name, copy)

    def remove(self, name: str) -> None:
        """Delete one file, if it is there."""
        with suppress(FileNotFoundError):
            self._patiently("delete", name, lambda: self._files.rm_file(f"{self._root}/{name}"))

    def forget(self) -> None:
        """Delete all that is there."""
        if self.names():
            self._patiently("delete", "", lambda: self._files.rm(self._root, recursive=True))

    def for_arrow(self) -> "tuple[str, FileSystem]":
        """Path and file system, as PyArrow and Ray have them."""
        from pyarrow.fs import FSSpecHandler, PyFileSystem

        return self._root, PyFileSystem(FSSpecHandler(self._files))

    def _found(self, root: str) -> Mapping[str, Mapping[str, Any]]:
        """What is known of each file there."""
        self._files.invalidate_cache()
        try:
            found: Mapping[str, Mapping[str, Any]] = self._files.find(root, detail=True)
        except FileNotFoundError as error:
            if NO_BUCKET in causes_of(error):
                raise
            return {}
        except PermissionError:
            # Where nothing is, s3fs looks for a file of that name, which keys for a prefix may not.
            if not self._is_empty(root):
                raise
            return {}
        return found

    def _is_empty(self, root: str) -> bool:
        """Whether nothing is listed there. Raises as listing does."""
        self._files.invalidate_cache()
        try:
            return not self._files.ls(root, detail=False)
        except FileNotFoundError as error:
            if NO_BUCKET in causes_of(error):
                raise
            return True

    def _patiently(
        self, verb: str, name: str, action: Callable[[], Result], *, is_place: bool = False
    ) -> Result:
        """Do `action`. `is_place`: what it may not find is the bucket or folder, not a file."""
        what = f"{verb} {self.url}/{name}".rstrip("/")
        began = time.monotonic()  # each attempt takes a while too
        for wait in (*WAITS, None):
            try:
                return action()
            except FileNotFoundError as error:
                if is_place or NO_BUCKET in causes_of(error):
                    raise OSError(self._no_place()) from None
                raise FileNotFoundError(f"there is no {self.url}/{name}") from None
            except PermissionError as error:
                raise PermissionError(
                    f"storage: may not {what}: {error}. Are the keys (AWS_ACCESS_KEY_ID, "
                    "AWS_PROFILE…) known there, not expired, and allowed to?"
                ) from error
            except Exception as error:  # each of fsspec's backends has its own
                if getattr(error, "errno", None) == errno.ENOSPC:
                    raise
                if causes_of(error) & MISTAKES:
                    raise OSError(
                        f"storage: can't {what}: {error}. Correct `storage` in params.yaml, or the "
                        "AWS_* variables and files that keys, region and endpoint come from"
                    ) from error
                if wait is None:
                    seconds = time.monotonic() - began
                    raise MayPassError(
                        f"storage: could not {what} in {seconds:.0f} seconds: {error}. Is it "
                        "there, and is AWS_ENDPOINT_URL right? The same command goes on from here."
                    ) from error
                print(f"storage: could not {what} ({error}), again in {wait} s", flush=True)
                time.sleep(wait)
                self._files.invalidate_cache()  # another machine may have replaced what it lists
        raise AssertionError("the last attempt returns or raises")

    def _no_place(self) -> str:
        kind = "folder" if self._is_local else "bucket"
        return (
            f"storage: there is no {kind} {self._place}: correct `storage` in params.yaml, or make "
            f"the {kind}, which is never made for you"
        )


class ShardStore:
    """Where the shards of one teacher cache are kept, each under its name and SHA-256.

    So no machine overwrites a shard that another's index is of: GPUs differ in rounding. For
    training it is a :class:`pnp_core.shards.ShardSource`.

    Args:
        storage: as in :class:`Mirror`.
        name: of the cache's folder there.
        num_bytes: what each shard's tensors take: a file of less is damaged.
    """

    remedy = (
        "`python -m components.cache` makes it anew, and the same command goes on from here; where "
        "another kind of GPU makes it, training begins anew"
    )

    def __init__(
        self, storage: str, name: str = "", num_bytes: Mapping[str, int] | None = None
    ) -> None:
        self.mirror = Mirror(storage, name)
        self.url = self.mirror.url
        self.num_bytes = num_bytes or {}
        parent, _, self._name = name.rpartition("/")
        self._caches = Mirror(storage, parent)

    def shards(self) -> set[tuple[str, str]]:
        """Name and SHA-256 of the shards that are there and not too short."""
        sizes = self.mirror.sizes()
        whole = (self._parsed(file) for file in sizes if not self._is_short(file, sizes))
        return {(name, sha256) for name, sha256 in whole if sha256}

    def checksums(self) -> dict[str, str]:
        """SHA-256 by name: of a shard that two machines made at once, all take the same."""
        return dict(sorted(self.shards(), reverse=True))

    def take(
        self, keys: Mapping[str, str], shared: Callable[[Any, Mapping[str, str]], Set[str]]
    ) -> set[str]:
        """Copy shards that are in caches beside this one, such as a smaller one, if they are whole.

        `keys`: of the shards that are wanted, by name; what :class:`CacheBuilder` writes into them.
        `shared`: by what a cache's index says, the names of those that it may have.
        Returns the names of those that were there.
        """
        sizes = self._caches.sizes()
        there: dict[str, list[tuple[str, str, str]]] = {}  # by cache
        for path in sizes:
            folder, _, file = path.rpartition("/")
            name, sha256 = self._parsed(file)
            is_whole = sizes[path] >= self.num_bytes.get(name, 0)
            if sha256 and name in keys and folder != self._name and is_whole:
                there.setdefault(folder, []).append((name, sha256, path))

        def names(folder: str) -> Set[str]:
            """A cache of many shards has one index; one that is not complete has none."""
            with suppress(FileNotFoundError, ValueError):
                if (index := f"{folder}/index.json") in sizes:
                    return shared(json.loads(self._caches.read(index)), keys)
            return keys.keys()

        def is_taken(name: str) -> bool:
            for sha256, path in sorted(found[name]):
                with suppress(FileNotFoundError):  # forgotten meanwhile
                    if _key_of(self._caches.begin(path, HEADER_BYTES)) != keys[name]:
                        continue
                    if self._caches.checksum(path) == sha256:
                        self._caches.copy(path, self.mirror, self.file(name, sha256))
                        return True
            return False

        with ThreadPoolExecutor(CHECKED_AT_ONCE) as pool:
            found: dict[str, list[tuple[str, str]]] = {}
            for shards, may_be in zip(there.values(), pool.map(names, there), strict=True):
                for name, sha256, path in shards:
                    if name in may_be:
                        found.setdefault(name, []).append((sha256, path))
            taken = zip(found, pool.map(is_taken, found), strict=True)
            return {name for name, is_there in taken if is_there}

    def damaged(self, *, look_inside: bool) -> list[str]:
        """Files that are too short; those of another content too, if all are read."""
        sizes = self.mirror.sizes()
        files = sorted(file for file in sizes if self._parsed(file)[1])

        def is_damaged(file: str) -> bool:
            if self._is_short(file, sizes):
                return True
            with suppress(FileNotFoundError):  # another machine has forgotten it meanwhile
                return look_inside and self.mirror.checksum(file) != self._parsed(file)[1]
            return False

        with ThreadPoolExecutor(CHECKED_AT_ONCE) as pool:
            return [f for f, bad in zip(files, pool.map(is_damaged, files), strict=True) if bad]

    def _is_short(self, file: str, sizes: Mapping[str, int]) -> bool:
        return sizes[file] < self.num_bytes.get(self._parsed(file)[0], 0)

    @staticmethod
    def file(name: str, sha256: str) -> str:
        """What a shard is called there."""
        return f"{name}.{sha256}.safetensors"

    @staticmethod
    def _parsed(file: str) -> tuple[str, str]:
        """Name and SHA-256 of a shard; without the latter, it is none."""
        name, _, rest = file.partition(".")
        sha256, _, suffix = rest.partition(".")
        return name, sha256 if suffix == "safetensors" else ""

    def place(self, shard: "Shard") -> str:
        """URL of a shard's file."""
        return f"{self.url}/{self.file(shard.name, shard.sha256)}"

    def read(self, shard: "Shard") -> bytes:
        """What its file holds. FileNotFoundError if there is none."""
        return self.mirror.read(self.file(shard.name, shard.sha256))

    def fetch(self, shard: "Shard", path: Path) -> None:
        """The same, to a file, piece by piece."""
        self.mirror.fetch(self.file(shard.name, shard.sha256), path)


def _key_of(begin: bytes) -> str | None:
    """The key in the metadata of a shard, by how its file begins; None if there is none."""
    with suppress(ValueError, AttributeError):
        header = json.loads(begin[8 : 8 + int.from_bytes(begin[:8], "little")])
        key = header.get("__metadata__", {}).get("key")
        return key if isinstance(key, str) else None
    return None
