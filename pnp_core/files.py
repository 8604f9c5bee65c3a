"""Files and folders that are written whole or not at all.

What is written gets another name first, is flushed to the disk, and is then renamed. Neither a
process that is killed nor a power cut leaves half of it, and what was there before is lost to
neither. A folder takes another's place in two renames; between them the old one lies beside it as
``.<name>.old``, and :func:`recover` puts it back. What is being written lies in
``.<name>.<id>.new``, which its writer locks: one that can be locked was left by a killed writer.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from torch import Tensor

# What file systems say that can't flush a folder's names.
CANNOT_FLUSH = (errno.EINVAL, errno.ENOTSUP)
NEW = re.compile(r"\..+\.[0-9a-f]{8}\.new")


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_once(path: Path, sha256: str, fetch: Callable[[], None], lock: Path) -> bool:
    """Have a file of this content: one of a machine's processes fetches it, the others wait.

    Args:
        path: where it is to be.
        sha256: of its content.
        fetch: writes ``path``, whole, in place of what is there.
        lock: a folder for this alone.

    Returns:
        Whether it is there; else what came has another content.
    """
    lock.mkdir(parents=True, exist_ok=True)
    with alone_in(lock):
        if is_new := not path.exists():
            fetch()
    is_whole = sha256_file(path) == sha256  # not in the lock: it takes all processes a while
    if is_whole or is_new:
        return is_whole
    with alone_in(lock):
        if sha256_file(path) != sha256:  # an earlier one, or damaged on this disk
            fetch()
        return sha256_file(path) == sha256


class WriteError(OSError):
    """Something could not be written. The message says what and why, and what is there now."""


def check_writable(folder: Path) -> None:
    """Raise ValueError if no file can be made in a folder."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"nothing can be written in {folder}: {error.strerror}") from None


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path that takes ``path``'s place if the block ends well.

    Raises:
        OSError: writing failed, whichever library wrote; ``path`` is named, and what is there now.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    is_replaced = False
    try:
        with _place_beside(path) as folder:
            new = folder / path.name
            yield new
            flush(new)
            os.replace(new, path)
            is_replaced = True
            flush(path.parent)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise could_not_write(path, error, is_replaced=is_replaced) from error


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a new empty folder that takes ``path``'s place if the block ends well.

    Raises:
        OSError: the folder could not be put in place; ``path`` is named, and what is there now.
            Errors of the block itself pass as they are.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    recover(path)
    with _place_beside(path) as new:
        yield new
        replace_folder(new, path)


@contextmanager
def _place_beside(path: Path) -> Iterator[Path]:
    """A new folder beside ``path``, locked by this process; removed at the end if still there."""
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.new")
    with alone_in(path.parent):  # else it could be taken for an abandoned one before the lock
        new.mkdir()
        descriptor = os.open(new, os.O_RDONLY)
        _lock(descriptor)
    try:
        yield new
    finally:
        shutil.rmtree(new, ignore_errors=True)
        os.close(descriptor)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """While open, no other process is in such a block of the same ``folder``.

    So none is between two renames there, or begins to write. Where the file system has no locks,
    nothing is promised.
    """
    if NEW.fullmatch(folder.name):  # its writer is alone there, and has locked it
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock an open folder; False if another process has it, or if it can't be told."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def replace_folder(new: Path, path: Path) -> None:
    """Put the folder ``new`` in place of ``path``; if that fails, the old one is put back.

    Raises:
        OSError: it failed; ``path`` is named, and what is there now.
    """
    old, is_replaced = old_of(path), False
    try:
        for file in new.rglob("*"):
            if file.suffix == ".safetensors":
                let_read(file)
            flush(file)
        flush(new)
        flush(path.parent)
        with alone_in(path.parent):
            try:
                if path.exists():
                    os.replace(path, old)
                os.replace(new, path)
                is_replaced = True
            except BaseException:
                if old.exists() and not path.exists():
                    os.replace(old, path)
                raise
        flush(path.parent)
    except OSError as error:
        raise could_not_write(path, error, is_replaced=is_replaced) from error
    remove(old)  # only now that the new one is sure to be there


def recover(path: Path) -> bool:
    """Put the folder ``path`` back if it was being replaced when a process or the power died.

    Returns:
        Whether it was put back. Where the new one had come into place, the old one is removed.
    """
    old = old_of(path)
    if not old.exists():
        return False
    with alone_in(path.parent):  # else whoever replaces it now would be disturbed
        if path.exists():
            remove(old)
            return False
        if not old.exists():
            return False
        os.replace(old, path)
    flush(path.parent)
    return True


def recover_all(parent: Path) -> list[Path]:
    """:func:`recover` every folder in ``parent``; those that were put back.

    What killed processes had begun to write there is removed.
    """
    if not parent.is_dir():
        return []
    names = sorted(os.listdir(parent))
    for name in filter(NEW.fullmatch, names):
        _remove_abandoned(parent / name)
    olds = [name for name in names if name.startswith(".") and name.endswith(".old")]
    return [path for name in olds if recover(path := parent / name[1 : -len(".old")])]


def _remove_abandoned(new: Path) -> None:
    """Remove what a process had begun to write, if that has ended."""
    with alone_in(new.parent):
        try:
            descriptor = os.open(new, os.O_RDONLY)
        except OSError:
            return  # it was finished just now
        try:
            if _lock(descriptor):
                remove(new)
        finally:
            os.close(descriptor)


def old_of(path: Path) -> Path:
    """Where a folder lies while another takes its place."""
    return path.with_name(f".{path.name}.old")


def could_not_write(path: Path, error: Exception, *, is_replaced: bool) -> WriteError:
    """The error that says what failed and what is at ``path`` now."""
    old = old_of(path)
    if is_replaced:
        state = "The new one is there, but a power cut may still take it."
    elif path.exists():
        state = "What was there before is untouched."
    elif old.exists():
        state = f"What was there before is whole, in {old}, and the next run puts it back."
    else:
        state = "There was nothing before."
    free = shutil.disk_usage(path.parent).free
    failed = WriteError(
        f"Could not write {path}: {error} ({free / 1e6:,.0f} MB are free there). {state}"
    )
    failed.errno = getattr(error, "errno", None)
    return failed


def flush(path: Path) -> None:
    """Have the disk hold a file's content, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in CANNOT_FLUSH):
            raise
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a folder, or a link to one, as far as that can be done."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def let_read(path: Path) -> None:
    """Give a file the permissions that new files have: safetensors keeps it to its owner."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def read_json(path: Path) -> Any:
    """The value in ``path``.

    Raises:
        ValueError: it is no JSON, or only a part of it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): bring it back, or delete it and run what makes it"
        ) from None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``, as a model's configs are.

    Raises:
        ValueError: it is none.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged (it holds a {type(value).__name__}): get it again.")
    return value


@contextmanager
def opened_weights(path: Path) -> Iterator[Any]:
    """A .safetensors file, open to be read as NumPy's arrays.

    Raises:
        ValueError: it is none, or not whole.
    """
    try:
        file = safe_open(path, "np")
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or only partly downloaded ({error}): get it again."
        ) from None
    with file:
        yield file


@contextmanager
def loading_from(what: str) -> Iterator[None]:
    """Have what a library says of damaged files name them, without advice for programmers.

    Raises:
        ValueError: the block failed on what is in the files.
    """
    try:
        yield
    except (OSError, MemoryError, ImportError):  # of a disk, a hub or this machine
        raise
    except Exception as error:  # libraries have many for a value that they did not expect
        # PyTorch's, of a GPU and of a CPU
        if type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error):
            raise
        raise ValueError(f"{what} is damaged ({in_short(error)}): get it again.") from error


def in_short(error: Exception) -> str:
    """What a library says is wrong with files, without its advice for programmers."""
    text = " ".join(str(error).split()).partition(" If you want to instead")[0].rstrip(".")
    return re.sub(r"^Cannot load .*?because ", "", text) or type(error).__name__


def write_json(path: Path, value: Any) -> None:
    """Write ``value``, sorted and indented, in one atomic step."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write ``text`` in one atomic step."""
    with atomic_file(path) as new:
        new.write_text(text, encoding="utf-8")


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` in one atomic step."""
    with atomic_file(path) as new:
        new.write_bytes(content)


def write_tensors(path: Path, tensors: "Mapping[str, Tensor]", metadata: dict[str, str]) -> None:
    """Write a safetensors file in one atomic step."""
    from safetensors.torch import save_file

    with atomic_file(path) as new:
        save_file({k: v.contiguous() for k, v in tensors.items()}, new, metadata=metadata)
        let_read(new)


def write_state(path: Path, state: Any) -> None:
    """Write what ``torch.load`` reads in one atomic step."""
    import torch

    with atomic_file(path) as new:
        torch.save(state, new)


def write_directory(path: Path, fill: Callable[[Path], None]) -> None:
    """Let ``fill`` write a folder, then put it in place of ``path``.

    Raises:
        OSError: writing failed, whichever library wrote; ``path`` is named, and what is there now.
    """
    with atomic_folder(path) as new:
        try:
            fill(new)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise could_not_write(path, error, is_replaced=False) from error
