"""A command as a child process: its lines go to the log as they come, and a cancel reaches it.

DVC and the stages it starts form a process group of their own. Whatever ends the flow early
(Ctrl-C, a cancel in the UI, a worker that shuts down) stops the whole group before it goes on.
"""

import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from components.params import ParamsError

# What Ctrl-C would do, and how long it may take, before less polite ways. All of it ends within the
# 30 seconds that a Prefect worker grants.
WAYS_TO_STOP = ((signal.SIGINT, 10.0), (signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0))
NUM_LAST_LINES = 10
# What DVC says about git and remotes after a stage; true, and noise in the middle of a pipeline.
CHATTER = re.compile(
    r"Use `dvc push`|(Generating|Updating) lock|To track the changes|\s+git add"
    r"|To enable auto staging|\s+dvc config core.autostage|Data and pipelines are up to date"
)


class StageFailed(RuntimeError):
    """A command ended with an error; the message says which one, and why in its own words."""

    def __init__(self, name: str, exit_code: int, last_lines: Sequence[str]) -> None:
        super().__init__(name, exit_code, last_lines)
        self.name, self.exit_code, self.last_lines = name, exit_code, last_lines

    def __str__(self) -> str:
        said = [line for line in self.last_lines if line.startswith("error: ")]
        if said:
            return f"{self.name}: {said[-1].removeprefix('error: ')}"
        if self.was_killed:
            return f"{self.name} was killed (exit code {self.exit_code}): is memory short?"
        return "\n".join([f"{self.name} failed (exit code {self.exit_code}):", *self.last_lines])

    __repr__ = __str__  # Prefect logs the repr

    @property
    def was_killed(self) -> bool:
        """True if a signal ended it: nothing is wrong with the stage, and it can go on."""
        return self.exit_code < 0 or 128 < self.exit_code <= 192  # as Python, or a shell, tells it


def repro(stage: str, log: Callable[[str], None]) -> None:
    """Bring one stage of dvc.yaml up to date; DVC skips it if nothing changed.

    Raises StageFailed.
    """
    dvc = ["dvc", "--wait-for-lock", "repro", "--single-item", stage]
    run(stage, [sys.executable, "-m", *dvc], log)


def run(name: str, command: Sequence[str], log: Callable[[str], None]) -> None:
    """Run `command`, pass its lines to `log`, and leave nothing of it behind.

    Raises StageFailed.
    """
    tools = Path(sys.executable).parent  # the `python` of dvc.yaml is the one that runs this flow
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"},
        start_new_session=True,
    )
    assert process.stdout
    last_lines: deque[str] = deque(maxlen=NUM_LAST_LINES)
    exit_code = 0
    try:
        for line in map(str.rstrip, process.stdout):
            if line and not CHATTER.match(line):
                log(line)
                last_lines.append(line)
                if exited := re.search(r"exited with (-?\d+)$", line):  # DVC's own code is 255
                    exit_code = int(exited[1])
        if process.wait() != 0:
            raise StageFailed(name, exit_code or process.returncode, list(last_lines))
    finally:
        stop(process)


def stop(process: "subprocess.Popen[str]") -> None:
    """End what is left of the process's group: politely first, then for certain."""
    for how, patience in WAYS_TO_STOP:
        deadline = time.monotonic() + patience  # seconds
        try:
            os.killpg(process.pid, how)
            while time.monotonic() < deadline:
                process.poll()
                os.killpg(process.pid, 0)
                time.sleep(0.05)
        except ProcessLookupError:
            return


def log_without_tracebacks() -> None:
    """Let an error that explains itself be one message in Prefect's log.

    `PNP_TRACEBACK=1` shows where it came from.
    """
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(_drop_traceback)


def _drop_traceback(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, StageFailed | ParamsError) and os.environ.get("PNP_TRACEBACK") != "1":
        record.exc_info = None
    return True
