"""Processes of one machine that are killed or interrupted, and disks that are full."""

import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from benchmarks.faults.listing import fault
from benchmarks.faults.workspace import UnexpectedError, Workspace

ONE = ("dvc", "repro", "--single-item")
FLOW = ("python", "-m", "flows", "distill")


def dies_in(workspace: Workspace, stage: str, how: signal.Signals, says: str) -> None:
    """A stage gets a signal in the middle; the same command goes on."""
    workspace.told(workspace.kill_in(stage, how), says)
    workspace.recovers(*ONE, stage)
    workspace.stages = (stage,)


KILLED = r"exited with -9"
NO_ROOM = r"error: .*(No space left|to write, but the disk|Could not write)"
BLOCK = 4096  # bytes that tmpfs takes at a time
STOPPED = r"^stopped; the same command goes on from here"


@fault("kill", before="cache")
def kill9_in_cache(workspace: Workspace) -> None:
    """`kill -9` of the stage cache while it computes."""
    dies_in(workspace, "cache", signal.SIGKILL, KILLED)


@fault("kill", before="distill")
def kill9_in_distill(workspace: Workspace) -> None:
    """`kill -9` of the stage distill after a checkpoint."""
    dies_in(workspace, "distill", signal.SIGKILL, KILLED)


@fault("kill", before="halve")
def kill9_in_halve(workspace: Workspace) -> None:
    """`kill -9` of the stage halve after a checkpoint."""
    dies_in(workspace, "halve", signal.SIGKILL, KILLED)


@fault("kill", before="evaluate@base")
def kill9_in_evaluate(workspace: Workspace) -> None:
    """`kill -9` of the stage evaluate while it measures."""
    dies_in(workspace, "evaluate@base", signal.SIGKILL, KILLED)


@fault("kill", before="register")
def kill9_in_register(workspace: Workspace) -> None:
    """`kill -9` of the stage register."""
    dies_in(workspace, "register", signal.SIGKILL, KILLED)


@fault("kill", before="cache")
def sigterm_in_cache(workspace: Workspace) -> None:
    """SIGTERM to the stage cache while it computes."""
    dies_in(workspace, "cache", signal.SIGTERM, STOPPED)


@fault("kill", before="distill")
def sigterm_in_distill(workspace: Workspace) -> None:
    """SIGTERM to the stage distill after a checkpoint."""
    dies_in(workspace, "distill", signal.SIGTERM, STOPPED)


@fault("kill", before="halve")
def sigterm_twice_in_halve(workspace: Workspace) -> None:
    """SIGTERM to the stage halve, and another while it ends."""
    running = workspace.start(*ONE, "halve")
    workspace.in_the_middle(running, "halve")
    stage = running.child("components.halve")
    stage.terminate()
    time.sleep(0.05)
    stage.terminate()
    workspace.told(workspace.finish(running), STOPPED)
    workspace.recovers(*ONE, "halve")
    workspace.stages = ("halve",)


def interrupted(workspace: Workspace, stage: str) -> None:
    """Ctrl-C in a stage: the whole group gets SIGINT."""
    running = workspace.start(*ONE, stage)
    workspace.in_the_middle(running, stage)
    running.child(f"components.{stage.partition('@')[0]}")
    running.signal(signal.SIGINT, group=True)
    workspace.told(workspace.finish(running), "^interrupted; the same command goes on from here")
    workspace.recovers(*ONE, stage)
    workspace.stages = (stage,)


@fault("kill", before="cache")
def ctrl_c_in_cache(workspace: Workspace) -> None:
    """Ctrl-C while cache computes."""
    interrupted(workspace, "cache")


@fault("kill", before="distill")
def ctrl_c_in_distill(workspace: Workspace) -> None:
    """Ctrl-C while distill trains."""
    interrupted(workspace, "distill")


@fault("kill", before="halve")
def ctrl_c_in_halve(workspace: Workspace) -> None:
    """Ctrl-C while halve trains."""
    interrupted(workspace, "halve")


@fault("kill", before="evaluate@base")
def ctrl_c_in_evaluate(workspace: Workspace) -> None:
    """Ctrl-C while a model is measured."""
    interrupted(workspace, "evaluate@base")


@fault("kill", before="prepare")
def ctrl_c_in_prepare(workspace: Workspace) -> None:
    """Ctrl-C while prepare reads the data."""
    interrupted(workspace, "prepare")


@fault("kill", before="register")
def ctrl_c_in_register(workspace: Workspace) -> None:
    """Ctrl-C while register is at MLflow."""
    interrupted(workspace, "register")


@fault("kill", before="prepare")
def ctrl_c_while_a_stage_imports(workspace: Workspace) -> None:
    """Ctrl-C in the first second, while a stage imports its modules."""
    running = workspace.start(*ONE, "prepare")
    running.wait_for(lambda: running.has_loaded("components.prepare", "pydantic_core"), "imports")
    running.signal(signal.SIGINT, group=True)
    workspace.told(workspace.finish(running), "^interrupted; the same command goes on from here")
    workspace.recovers(*ONE, "prepare")
    workspace.stages = ("prepare",)


@fault("kill", before="distill")
def kill9_of_dvc(workspace: Workspace) -> None:
    """`kill -9` of DVC: the stage that it runs ends too, and a new run can start at once."""
    running = workspace.start(*ONE, "distill")
    workspace.in_the_middle(running, "distill")
    stage = running.child("components.distill")
    running.signal(signal.SIGKILL)
    workspace.finish(running)
    if stage in psutil.wait_procs([stage], timeout=30)[1]:
        raise UnexpectedError("the stage runs on")
    workspace.said = running.output.splitlines()[-1]
    workspace.recovers(*ONE, "distill")
    workspace.stages = ("distill",)


@fault("kill", before="evaluate@tuned")
def kill9_of_the_flow(workspace: Workspace) -> None:
    """`kill -9` of the flow's process: what it started ends too."""
    running = workspace.start(*FLOW)
    workspace.in_the_middle(running, "evaluate@tuned")
    below = psutil.Process(running.pid).children(recursive=True)
    stages = [p for p in below if "uvicorn" not in " ".join(p.cmdline())]
    running.signal(signal.SIGKILL)
    workspace.finish(running)
    if psutil.wait_procs(stages, timeout=30)[1]:
        raise UnexpectedError("the stage runs on")
    workspace.said = "what it had started ends by itself"
    workspace.recovers(*FLOW)


@fault("kill", before="evaluate@tuned")
def sigterm_to_the_flow(workspace: Workspace) -> None:
    """SIGTERM to the flow's process, as a service manager sends it."""
    running = workspace.start(*FLOW)
    workspace.in_the_middle(running, "evaluate@tuned")
    running.signal(signal.SIGTERM)
    workspace.told(workspace.finish(running), "the same command goes on from here")
    workspace.recovers(*FLOW)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """`folder` on a disk of its own of so many bytes. Needs the right to mount."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    subprocess.run(mount, check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def full_disk(workspace: Workspace, stage: str, folder: str, size: str) -> None:
    """A stage writes to a disk that is too small; with room the same command goes on."""
    place = workspace.folder / folder
    shutil.rmtree(place, ignore_errors=True)
    with small_disk(place, size):
        workspace.told(workspace.run(*ONE, stage), NO_ROOM)
    shutil.rmtree(place, ignore_errors=True)
    workspace.recovers(*ONE, stage)
    workspace.stages = (stage,)


@fault("full disk", before="prepare")
def full_disk_in_prepare(workspace: Workspace) -> None:
    """The disk of data/ is full."""
    full_disk(workspace, "prepare", "data", "16k")


@fault("full disk", before="cache")
def full_disk_in_cache(workspace: Workspace) -> None:
    """The disk of data/cache can't hold the cache."""
    full_disk(workspace, "cache", "data/cache", "16k")


@fault("full disk", before="distill")
def full_disk_in_distill(workspace: Workspace) -> None:
    """The disk of runs/, with the checkpoints, is full."""
    full_disk(workspace, "distill", "runs", "64k")


@fault("full disk", before="evaluate@base")
def full_disk_in_evaluate(workspace: Workspace) -> None:
    """The disk of results/ is full."""
    full_disk(workspace, "evaluate@base", "results", "16k")


@fault("full disk", before="halve")
def full_disk_in_halve(workspace: Workspace) -> None:
    """The disk of runs/halve, with the checkpoints, is full."""
    full_disk(workspace, "halve", "runs/halve", "64k")


@fault("full disk", before="register")
def full_disk_in_register(workspace: Workspace) -> None:
    """The disk of results/ has what the stages before have written, and no room for the report."""
    place, aside = workspace.folder / "results", workspace.folder / "results.aside"
    used = sum(BLOCK * (1 + path.lstat().st_size // BLOCK) for path in place.rglob("*"))
    place.rename(aside)
    with small_disk(place, str(used + 4 * BLOCK)):
        shutil.copytree(aside, place, symlinks=True, dirs_exist_ok=True)
        workspace.told(workspace.run(*ONE, "register"), NO_ROOM)
    place.rmdir()
    aside.rename(place)
    workspace.recovers(*ONE, "register")
    workspace.stages = ("register",)
