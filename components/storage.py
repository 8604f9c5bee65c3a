"""Folders mirrored to where `storage` points."""

import errno
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")

# Seconds to wait after each failed attempt: storage may be away for two minutes.
WAITS = (1, 2, 4, 8, 16, 32, 60)


class Mirror:
    """A folder's copy under `storage` (`s3://bucket/prefix`, or any other place fsspec knows).

    S3 takes its endpoint and keys from the environment (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`…).
    What fails is tried again for two minutes. Then, or at once where trying again can't help,
    OSError says what is wrong.
    """

    def __init__(self, storage: str, name: str = "") -> None:
        import fsspec

        self._files, root = fsspec.core.url_to_fs(storage)
        self._root = f"{root.rstrip('/')}/{name}".rstrip("/")
        self.url = f"{storage.rstrip('/')}/{name}".rstrip("/")

    def names(self) -> set[str]:
        """The files there, by their path below the mirror's root."""
        return self._patiently("list", "", self._names)

    def read(self, name: str) -> bytes:
        """The content of one file. FileNotFoundError if there is none."""
        content: bytes = self._patiently(
            "read", name, lambda: self._files.cat_file(f"{self._root}/{name}")
        )
        return content

    def put(self, path: Path, folder: Path) -> None:
        """Send one file of `folder`."""
        name = path.relative_to(folder).as_posix()
        there = f"{self._root}/{name}"

        def send() -> None:
            self._files.makedirs(there.rpartition("/")[0], exist_ok=True)
            self._files.put_file(str(path), there)

        self._patiently("write", name, send)

    def _names(self) -> set[str]:
        self._files.invalidate_cache()
        if not self._files.exists(self._root):
            return set()
        root = self._files._strip_protocol(self._root)
        return {name[len(root) + 1 :] for name in self._files.find(root)}

    def _patiently(self, verb: str, name: str, action: Callable[[], Result]) -> Result:
        what = f"{verb} {self.url}/{name}".rstrip("/")
        for wait in (*WAITS, None):
            try:
                return action()
            except FileNotFoundError:
                raise FileNotFoundError(f"there is no {self.url}/{name}") from None
            except PermissionError as error:
                raise PermissionError(f"storage: may not {what}: {error}") from error
            except Exception as error:  # each of fsspec's backends has its own
                if getattr(error, "errno", None) == errno.ENOSPC:
                    raise
                if wait is None:
                    raise OSError(
                        f"storage: could not {what} in {sum(WAITS)} seconds: {error}. Is it "
                        "there, and is AWS_ENDPOINT_URL right? The same command goes on from here."
                    ) from error
                print(f"storage: could not {what} ({error}), again in {wait} s", flush=True)
                time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")
