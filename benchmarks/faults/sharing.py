"""Clones, pushes and pulls."""

import shutil

from benchmarks.faults.listing import fault
from benchmarks.faults.workspace import UnexpectedError, Workspace

FLOW = ("python", "-m", "flows", "distill")


def clone(workspace: Workspace, *, pull: bool) -> Workspace:
    """A clone of the workspace beside it, after commit and push, with its environment."""
    remote = workspace.folder.with_name(f"{workspace.folder.name}.remote")
    shutil.rmtree(remote, ignore_errors=True)
    workspace.run("dvc", "remote", "add", "--default", "team", str(remote))
    workspace.run("dvc", "push", "--run-cache")
    workspace.git("add", ".")
    workspace.git("commit", "--quiet", "--message", "result")
    place = workspace.folder.with_name(f"{workspace.folder.name}.clone")
    shutil.rmtree(place, ignore_errors=True)
    workspace.git("clone", "--quiet", str(workspace.folder), str(place))
    shutil.copy(workspace.folder / "fresh.db", place / "mlflow.db")
    cloned = Workspace(place)
    cloned.environment["PNP_FAULT"] = workspace.mark
    if pull:
        cloned.recovers("dvc", "pull")
        cloned.said = ""
    return cloned


def trained(done_output: str) -> bool:
    """Whether DVC ran a stage that makes the guide, by what it printed."""
    return any(f"Running stage '{name}'" in done_output for name in ("cache", "distill", "halve"))


@fault("sharing")
def clone_without_the_teacher_cache(workspace: Workspace) -> None:
    """In a clone after `dvc pull`, a changed evaluation runs, and nothing trains for it."""
    cloned = clone(workspace, pull=True)
    cloned.set_param("evaluate.seed", 1)
    done = cloned.recovers(*FLOW)
    workspace.outputs += cloned.outputs
    if trained(done.output) or "Running stage 'evaluate@base'" not in done.output:
        raise UnexpectedError("the clone does not evaluate, or trains for it")
    workspace.said = done.line("teacher cache is not here") or ""


@fault("sharing")
def clone_that_starts_at_evaluate(workspace: Workspace) -> None:
    """In a clone after `dvc pull`, the flow starts at evaluate."""
    cloned = clone(workspace, pull=True)
    cloned.set_param("evaluate.seed", 1)
    done = cloned.recovers(*FLOW, "--from", "evaluate")
    workspace.outputs += cloned.outputs
    if trained(done.output) or "Stage 'prepare'" in done.output:
        raise UnexpectedError("stages before evaluate are looked at")
    workspace.said = done.line("To share it") or "evaluates"


@fault("sharing")
def clone_with_dvc_alone(workspace: Workspace) -> None:
    """In a clone after `dvc pull`, `dvc repro --allow-missing` evaluates and does not train."""
    cloned = clone(workspace, pull=True)
    cloned.set_param("evaluate.seed", 1)
    done = cloned.recovers("dvc", "repro", "--allow-missing")
    workspace.outputs += cloned.outputs
    if trained(done.output):
        raise UnexpectedError("the clone trains")
    workspace.said = "evaluates and registers"


@fault("sharing")
def remote_that_refuses(workspace: Workspace) -> None:
    """The DVC remote can't be written: the flow says so, and the result stays."""
    remote = workspace.folder.with_name(f"{workspace.folder.name}.blocked")
    remote.mkdir()
    blocked = remote / "files"  # which a look at the start does not find
    blocked.write_text("a file where DVC's folder should be")
    workspace.run("dvc", "remote", "add", "--default", "team", str(remote))
    workspace.told(workspace.run(*FLOW), "error: push: ")
    blocked.unlink()
    workspace.recovers(*FLOW)
    workspace.stages = ("distill", "halve")
