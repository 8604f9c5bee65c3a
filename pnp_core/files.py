"""Writing whole files or none, and knowing whether a file is what it was."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path that takes ``path``'s place if the block ends well.

    Raises:
        OSError: writing failed, whichever library wrote; ``path`` is named and is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        os.replace(partial, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(path.parent).free
        raise OSError(
            f"Could not write {path}: {error} ({free / 1e6:,.0f} MB are free there). What was "
            "there before is untouched."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` in one atomic step."""
    with replacing(path) as partial:
        partial.write_text(text)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file in one atomic step."""
    with replacing(path) as partial:
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata=metadata)
        let_read(partial)


def let_read(path: Path) -> None:
    """Give a file the permissions that new files have: safetensors keeps it to its owner."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def write_state(path: Path, state: Any) -> None:
    """Write what ``torch.load`` reads in one atomic step."""
    with replacing(path) as partial:
        torch.save(state, partial)


def write_directory(path: Path, fill: Callable[[Path], None]) -> None:
    """Let ``fill`` write a folder, then put it in place of ``path``."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.new")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        fill(partial)
        for file in partial.rglob("*.safetensors"):
            let_read(file)
        if path.exists():
            os.replace(path, old)
        os.replace(partial, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise OSError(
            f"Could not write {path}: {error}. What was there before is untouched."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
