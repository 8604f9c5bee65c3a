"""A toy checkout to break things in, and what is seen of it: messages, processes, runs, bytes."""

import copy
import hashlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from ruamel.yaml import YAML

from tests.toy import make_repository, toy_params

STAGES = ("prepare", "cache", "distill", "halve", "evaluate@base", "evaluate@tuned", "register")
OUTS = {
    "prepare": ("data/prepared",),
    "cache": ("data/cache",),
    "distill": ("guides/distilled", "runs/distill"),
    "halve": ("guides/bundle", "runs/halve"),
    "evaluate@base": ("results/evaluate/base", "results/sampled/base"),
    "evaluate@tuned": ("results/evaluate/tuned", "results/sampled/tuned"),
    "register": ("results/report",),
}
# What a run that nothing happened to has, byte for byte. Metrics have times in them, and reports
# commits and versions.
COMPARED = ("data/prepared", "data/cache", "guides")
IMAGES = "results/sampled/*/*/*.parquet"
METRICS = "results/evaluate/*/evaluation.json"
TRACEBACK = "Traceback (most recent call last)"
MARK = "PNP_FAULT"  # in the environment of all that a fault starts
PATIENCE_S = 240.0
SECONDS_PAST_CHECKPOINT = 0.5
SECONDS_TO_END = 30.0  # for what a killed process had started


class UnexpectedError(Exception):
    """What came of a fault is not what should."""


def fault_params() -> dict[str, Any]:
    """The toy's parameters, with training long enough to be hit in the middle."""
    params = copy.deepcopy(toy_params())
    params["distill"] |= {"num_images": 640, "checkpoint_every_images": 160}
    params["halve"] |= {"num_images": 320, "checkpoint_every_images": 160}
    params["cache"] |= {"num_trajectory": 160, "shard_size": 8}
    params["cluster"]["wait_minutes"] = 0.2
    return params


class Finished:
    """A command that has ended."""

    def __init__(self, exit_code: int, output: str) -> None:
        self.exit_code, self.output = exit_code, output

    def line(self, pattern: str) -> str | None:
        """The first line of the output in which `pattern` is found."""
        return next((x for x in self.output.splitlines() if re.search(pattern, x)), None)


class Running:
    """A command under way, in a process group of its own."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self.process, self._log = process, log
        self.pid = process.pid

    @property
    def output(self) -> str:
        """All it has printed so far, stdout and stderr together."""
        return self._log.read_text(errors="replace")

    def wait_for(self, holds: Callable[[], Any], what: str) -> None:
        """Wait until `holds()`. Raises UnexpectedError if the command ends before."""
        deadline = time.monotonic() + PATIENCE_S
        while not holds():
            if self.process.poll() is not None:
                raise UnexpectedError(f"ended before {what}: {self.output[-500:]}")
            if time.monotonic() > deadline:
                raise UnexpectedError(f"no {what} within {PATIENCE_S:.0f} s")
            time.sleep(0.01)

    def child(self, *words: str) -> psutil.Process:
        """The process below this one whose command line has all `words`, and no shell's."""
        for child in psutil.Process(self.pid).children(recursive=True):
            command = child.cmdline()
            if all(word in command for word in words):
                return child
        raise UnexpectedError(f"no process {' '.join(words)}")

    def has_loaded(self, module: str, library: str) -> bool:
        """Whether the process of a `python -m module` below this one has loaded that library."""
        try:
            maps = self.child(module).memory_maps()
        except (UnexpectedError, psutil.Error):
            return False
        return any(library in place.path for place in maps)

    def signal(self, how: signal.Signals, *, group: bool = False) -> None:
        """Send a signal to the command, or to its process group."""
        (os.killpg if group else os.kill)(self.pid, how)

    def end(self) -> Finished:
        """Wait until it ends."""
        try:
            self.process.wait(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise UnexpectedError(f"does not end within {PATIENCE_S:.0f} s") from None
        return Finished(self.process.returncode, self.output)


class Workspace:
    """A checkout in which everything has been made, or everything before a stage."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = uuid.uuid4().hex
        self.outputs: list[str] = []
        self.said = ""  # the line that told the fault
        self.lost_work_s = 0.0
        self.stages: tuple[str, ...] = ()  # whose outputs must be as in the reference
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PREFECT_", "AWS_", "MLFLOW_", "RAY_", "PYTHONPATH", "DVC_"))
        } | {
            MARK: self.mark,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PREFECT_HOME": str(folder / ".prefect"),
            "DO_NOT_TRACK": "1",
            "OMP_NUM_THREADS": "1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    # Making it

    @classmethod
    def reference(cls, folder: Path) -> "Workspace":
        """A checkout in which the pipeline has run, undisturbed."""
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            make_repository(folder, fault_params())
            made = cls(folder)
            # MLflow takes its time over a new database.
            fresh = "from mlflow import MlflowClient as C; C('sqlite:///fresh.db')"
            made.run(sys.executable, "-c", f"{fresh}.search_experiments()")
            done = made.run("dvc", "repro")
            if done.exit_code != 0:
                raise UnexpectedError(f"the pipeline itself fails: {done.output[-2000:]}")
            (folder / "complete").touch()
        return cls(folder)

    def copy_before(self, stage: str | None, folder: Path) -> "Workspace":
        """A copy without what `stage` and those after it have made; None: with everything."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.folder, folder, symlinks=True)
        copied = Workspace(folder)
        if stage:
            copied.stages = STAGES[STAGES.index(stage) :]
            for name in copied.stages:
                for out in OUTS[name]:
                    shutil.rmtree(folder / out, ignore_errors=True)
            lock = folder / "dvc.lock"
            content = YAML(typ="safe").load(lock)
            content["stages"] = {
                name: made for name, made in content["stages"].items() if name not in copied.stages
            }
            with lock.open("w") as file:
                YAML().dump(content, file)
            shutil.rmtree(folder / ".dvc/cache/runs", ignore_errors=True)
            shutil.copy(folder / "fresh.db", folder / "mlflow.db")
            shutil.rmtree(folder / "mlartifacts", ignore_errors=True)
        return copied

    # Using it

    def start(self, *command: str, **environment: str) -> Running:
        """Start a command in the workspace."""
        log = self.folder.with_name(f"{self.folder.name}.{uuid.uuid4().hex[:6]}.log")
        with log.open("wb") as file:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=self.environment | environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # A benchmark in the background ignores Ctrl-C, and so would all that it starts.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )
        return Running(process, log)

    def finish(self, running: Running) -> Finished:
        """Wait for a started command, and keep what it said."""
        done = running.end()
        self.outputs.append(done.output)
        return done

    def run(self, *command: str, **environment: str) -> Finished:
        """Run a command in the workspace to its end."""
        return self.finish(self.start(*command, **environment))

    def told(self, done: Finished, pattern: str) -> None:
        """Raises UnexpectedError unless the command failed and said `pattern` in a line."""
        if done.exit_code == 0:
            raise UnexpectedError(f"silent: ends with 0, and says {done.output[-300:]!r}")
        line = done.line(pattern)
        if line is None:
            raise UnexpectedError(f"says nothing of {pattern!r}, but {done.output[-500:]!r}")
        self.said = self.said or re.sub(r"^.*?(error: |\| ERROR +\| )", "", line).strip()

    def recovers(self, *command: str, **environment: str) -> Finished:
        """Run a command that must do what it is for. Raises UnexpectedError if not."""
        done = self.run(*command, **environment)
        if done.exit_code != 0:
            raise UnexpectedError(f"{' '.join(command)} does not go on: {done.output[-500:]!r}")
        self.said = self.said or "recovers"
        return done

    def kill_in(self, stage: str, how: signal.Signals) -> Finished:
        """Start `dvc repro` of a stage, and send its process a signal in the middle."""
        running = self.start("dvc", "repro", "--single-item", stage)
        self.in_the_middle(running, stage)
        running.child(f"components.{stage.partition('@')[0]}").send_signal(how)
        return self.finish(running)

    def in_the_middle(self, running: Running, stage: str) -> None:
        """Wait until a stage has something to lose; notes what it would lose now."""
        name = stage.partition("@")[0]
        durable = {
            "prepare": lambda: running.has_loaded("components.prepare", "arrow"),
            "cache": lambda: len(list((self.folder / "data/cache").glob("*.safetensors"))) >= 4,
            "distill": lambda: list((self.folder / "runs/distill").glob("*.pt")),
            "halve": lambda: list((self.folder / "runs/halve").glob("*.pt")),
            "evaluate": lambda: "images, 100%" in running.output,
            "register": lambda: running.has_loaded("components.register", "_sqlite3"),  # MLflow
        }[name]
        running.wait_for(durable, f"work of {stage}")
        if name in ("distill", "halve"):
            time.sleep(SECONDS_PAST_CHECKPOINT)
        kept = [self.folder / "data/cache", self.folder / "runs"]
        times = [p.stat().st_mtime for folder in kept for p in folder.rglob("*") if p.is_file()]
        since = max(times, default=0.0)
        began = running.child(f"components.{name}").create_time()
        self.lost_work_s = max(0.0, time.time() - max(since, began))

    # Changing it

    def set_param(self, dotted: str, value: Any) -> None:
        """Set an entry of params.yaml, `section.key`; comments in the file are lost."""
        path = self.folder / "params.yaml"
        values = YAML(typ="safe").load(path)
        *sections, key = dotted.split(".")
        place = values
        for section in sections:
            place = place[section]
        place[key] = value
        with path.open("w") as file:
            YAML().dump(values, file)

    def git(self, *arguments: str) -> str:
        """What git prints in the checkout. Raises CalledProcessError where it fails."""
        command = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost", *arguments]
        done = subprocess.run(command, cwd=self.folder, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    # Looking at it

    def orphans(self) -> list[str]:
        """What this workspace's commands have left running, after some patience."""
        deadline = time.monotonic() + SECONDS_TO_END
        while (left := list(self._processes())) and time.monotonic() < deadline:
            time.sleep(0.2)
        return left

    def _processes(self) -> Iterator[str]:
        for process in psutil.process_iter():
            try:
                ours = process.environ().get(MARK) == self.mark
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    yield " ".join(process.cmdline())[:120]
            except psutil.Error:
                continue

    def kill_everything(self) -> None:
        """SIGKILL to every process that carries the workspace's mark in its environment."""
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark:
                    process.kill()
            except psutil.Error:
                continue

    def runs_left_running(self) -> int:
        """MLflow runs of this workspace that nobody works on and that say otherwise."""
        database = self.folder / "mlflow.db"
        if not database.exists():
            return 0
        with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
            query = "SELECT COUNT(*) FROM runs WHERE status = 'RUNNING'"
            return int(connection.execute(query).fetchone()[0])

    def differs_from(self, reference: "Workspace") -> list[str]:
        """Files of the stages that this workspace made that are not those of the reference."""
        ours, theirs = self._digests(), reference._digests()
        folders = tuple(out for stage in self.stages for out in OUTS[stage])
        return [
            name
            for name in sorted(ours.keys() | theirs.keys())
            if name.startswith(folders) and ours.get(name) != theirs.get(name)
        ]

    def _digests(self) -> dict[str, str]:
        digests = {}
        files = [p for name in COMPARED for p in (self.folder / name).rglob("*") if p.is_file()]
        for path in [*files, *self.folder.glob(IMAGES)]:
            digests[self._name(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
        for path in self.folder.glob(METRICS):
            metrics = json.loads(path.read_text(encoding="utf-8"))
            del metrics["cost"]  # times
            digests[self._name(path)] = json.dumps(metrics, sort_keys=True)
        return digests

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()
