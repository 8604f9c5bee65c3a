"""Commands that tests call by the dozen, without a process for each."""

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from logging import StreamHandler
from pathlib import Path
from typing import IO

import pytest
from dvc.cli import main as dvc_main


@contextlib.contextmanager
def redirected(file: IO[str]) -> Iterator[None]:
    """What this process and those that it starts print goes to `file`."""
    kept = [os.dup(descriptor) for descriptor in (1, 2)]
    # They have what was standard output as DVC was imported.
    handlers = [h for h in logging.getLogger("dvc").handlers if isinstance(h, StreamHandler)]
    streams = [handler.setStream(file) for handler in handlers]
    try:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            yield
    finally:
        for handler, stream in zip(handlers, streams, strict=True):
            handler.setStream(stream)
        file.flush()
        for descriptor, before in zip((1, 2), kept, strict=True):
            os.dup2(before, descriptor)
            os.close(before)


def dvc(*arguments: str, expected: int = 0) -> str:
    """Run DVC in this process, with this environment's Python; returns what it printed."""
    tools = Path(sys.executable).parent
    with tempfile.TemporaryFile("w+") as file, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("DVC_TEST", "1")  # or it puts the process's first stdout in place of ours
        for name, logger in logging.root.manager.loggerDict.items():
            if name.startswith("dvc") and isinstance(logger, logging.Logger):
                logger.disabled = False  # MLflow's migrations silence all that there are
        with redirected(file):
            code = dvc_main(list(arguments))
        file.seek(0)
        said = file.read()
    assert code == expected, said
    return said
