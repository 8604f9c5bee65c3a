"""A command as a child process: its lines go to the log as they come, and a cancel reaches it.

DVC and the stages it starts form a process group of their own. Whatever ends the flow early
(Ctrl-C, a cancel in the UI, a worker that shuts down) stops the whole group before it goes on, and
where the flow is killed the group ends by itself. Whom DVC waits for is told, and not for ever.
"""

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil
from httpx import HTTPError

from components.cli import MAY_PASS
from components.environment import die_with_parent
from components.mlflow_place import without_secrets
from components.params import ParamsError
from components.progress import clock

# What Ctrl-C would do, and how long it may take, before less polite ways. All of it ends within the
# 30 seconds that a Prefect worker grants.
WAYS_TO_STOP = ((signal.SIGINT, 10.0), (signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0))
NUM_LAST_LINES = 10
DVC = (sys.executable, "-m", "dvc")
# DVC holds this while it reads or records, not while a stage runs; in it is its holder's PID.
LOCK = Path(".dvc/tmp/lock")
# While a stage runs, others that want its files are told so, and end.
BUSY = re.compile(r"is busy, it is being blocked by")
HOLDER = re.compile(r"\(PID (\d+)\): (.*)")
SECONDS_BETWEEN_TRIES = 5.0
SECONDS_UNTOLD = 10.0  # a lock is waited for
# What DVC says about git and remotes after a stage; true, and noise in the middle of a pipeline.
CHATTER = re.compile(
    r"Use `dvc push`|(Generating|Updating) lock|To track the changes|\s+git add"
    r"|To enable auto staging|\s+dvc config core.autostage|Data and pipelines are up to date"
)


# What `run` has started and not yet ended; sets are safe to add to from several threads.
_running: "set[subprocess.Popen[str]]" = set()


class StageFailed(RuntimeError):  # noqa: N818, Prefect's log, and the record of faults, show this name
    """A command ended with an error; the message says which one, and why in its own words."""

    def __init__(self, name: str, exit_code: int, last_lines: Sequence[str]) -> None:
        super().__init__(name, exit_code, last_lines)
        self.name, self.exit_code, self.last_lines = name, exit_code, last_lines

    def __str__(self) -> str:
        for whose in ("error: ", "ERROR: "):  # a stage's, DVC's
            said = [line for line in self.last_lines if line.startswith(whose)]
            if said and not said[-1].startswith("ERROR: failed to reproduce"):
                return f"{self.name}: {said[-1].removeprefix(whose)}"
        if self.was_killed:
            return f"{self.name} was killed (exit code {self.exit_code}): is memory short?"
        return "\n".join([f"{self.name} failed (exit code {self.exit_code}):", *self.last_lines])

    __repr__ = __str__  # Prefect logs the repr

    @property
    def holder(self) -> str | None:
        """Who is at the same files in this checkout, if that is why it failed."""
        said = "\n".join(self.last_lines)
        found = HOLDER.search(said) if BUSY.search(said) else None
        return f"PID {found[1]}: {found[2]}" if found else None

    @property
    def was_killed(self) -> bool:
        """True if a signal ended it: nothing is wrong with the stage, and it can go on."""
        return self.exit_code < 0 or 128 < self.exit_code <= 192  # as Python, or a shell, tells it

    @property
    def may_pass(self) -> bool:
        """True if trying again makes sense: it was killed, or says that something is away."""
        return self.was_killed or self.exit_code == MAY_PASS


def repro(
    stage: str,
    log: Callable[[str], None],
    *,
    allow_missing: bool = False,
    wait_minutes: float = 10.0,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Bring one stage of dvc.yaml up to date; DVC skips it if nothing changed.

    Args:
        stage: its name in dvc.yaml.
        log: is given each line that the stage says.
        allow_missing: nothing has changed where files are merely not here.
        wait_minutes: for another run in this checkout, which is told; then it fails.
        environment: further variables of the stage.

    Raises StageFailed.
    """
    options = ["--allow-missing"] if allow_missing else []
    command = [*DVC, "--wait-for-lock", "repro", "--single-item", *options, stage]
    began = time.monotonic()
    while True:
        try:
            run(stage, command, log, lock_wait_s=60 * wait_minutes, environment=environment)
            return
        except StageFailed as error:
            waited = time.monotonic() - began
            holder = error.holder
            if holder is None:
                raise
            busy = f"another run is at it ({holder})"
            if waited >= 60 * wait_minutes:
                line = f"error: {busy}: waited {clock(waited)}; run the same command when it ends"
                raise StageFailed(stage, 1, [line]) from None
            log(f"{stage}: {busy}: waiting, {clock(waited)} of {clock(60 * wait_minutes)} at most")
            time.sleep(SECONDS_BETWEEN_TRIES)


def run(
    name: str,
    command: Sequence[str],
    log: Callable[[str], None],
    *,
    lock_wait_s: float = 600.0,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run `command`, pass its lines to `log`, and leave nothing of it behind.

    Raises StageFailed, also where a DVC waits for its lock for longer than `lock_wait_s` seconds.
    """
    tools = Path(sys.executable).parent  # the `python` of dvc.yaml is the one that runs this flow
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={
            **os.environ,
            "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
            **(environment or {}),
        },
        start_new_session=True,
        preexec_fn=die_with_parent,
    )
    assert process.stdout
    _running.add(process)
    last_lines: deque[str] = deque(maxlen=NUM_LAST_LINES)
    exit_code = 0
    watch = _LockWatch(name, process, log, lock_wait_s)
    try:
        for line in map(without_secrets, map(str.rstrip, process.stdout)):
            if line and not CHATTER.match(line):
                log(line)
                last_lines.append(line)
                if exited := re.search(r"exited with (-?\d+)$", line):  # DVC's own code is 255
                    exit_code = int(exited[1])
        if process.wait() != 0:
            if watch.verdict:
                raise StageFailed(name, 1, watch.verdict)
            raise StageFailed(name, exit_code or process.returncode, list(last_lines))
    finally:
        watch.end()
        stop(process)
        _running.discard(process)


def stop_all() -> None:
    """End what `run` has started, also in other threads, which then raise StageFailed."""
    for process in list(_running):
        stop(process)


def ask(command: Sequence[str]) -> str | None:
    """What a short command prints; None if it ends with an error."""
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


class _LockWatch:
    """Tells of a DVC that waits for its lock, and ends it after a limit; DVC itself is silent."""

    def __init__(
        self,
        name: str,
        process: "subprocess.Popen[str]",
        log: Callable[[str], None],
        limit_s: float,
    ) -> None:
        self.verdict: list[str] = []  # why it was ended
        self._name, self._process, self._log, self._limit_s = name, process, log, limit_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def end(self) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        since, told = time.monotonic(), False
        while not self._over.wait(1.0):
            holder = lock_holder(self._process.pid)
            waited = time.monotonic() - since
            if holder is None:
                since, told = time.monotonic(), False
            elif waited >= self._limit_s:
                self.verdict = [
                    f"error: DVC's lock is held by {holder}, for {clock(waited)}: end it, and run "
                    "the same command again"
                ]
                stop(self._process)
                return
            elif waited >= SECONDS_UNTOLD and not told:
                told = True
                self._log(
                    f"{self._name}: waiting for DVC's lock, which is held by {holder}, for "
                    f"{clock(self._limit_s)} at most"
                )


def lock_holder(pid: int) -> str | None:
    """Who else holds DVC's lock while the DVC `pid` has nothing running, or None."""
    try:
        holder = psutil.Process(int(LOCK.read_text(encoding="utf-8").split()[0]))
        if holder.pid == pid or psutil.Process(pid).children():
            return None
        if not any(Path(file.path) == LOCK.absolute() for file in holder.open_files()):
            return None  # it was left behind
        return f"PID {holder.pid}: {without_secrets(' '.join(holder.cmdline()))}"
    except (OSError, ValueError, IndexError, psutil.Error):
        return None


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
    if (
        isinstance(error, StageFailed | ParamsError | HTTPError)
        and os.environ.get("PNP_TRACEBACK") != "1"
    ):
        record.exc_info = record.exc_text = None
    return True
