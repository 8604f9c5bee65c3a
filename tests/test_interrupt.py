"""Ctrl-C before a command is under way."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from components.interrupt import SAID

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "command", [("components.prepare",), ("components.evaluate", "--help"), ("flows", "distill")]
)
def test_ctrl_c_while_modules_are_imported_is_one_line(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    running = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    seen = psutil.Process(running.pid)
    while not any("pydantic_core" in place.path for place in seen.memory_maps()):
        assert running.poll() is None
        time.sleep(0.005)
    running.send_signal(signal.SIGINT)
    assert running.communicate(timeout=60) == (f"{SAID}\n", None)
    assert running.returncode == -signal.SIGINT
