"""Promotion: a registered guide becomes champion if it passes the rules in params.yaml."""

import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed

from components.params import load_params
from components.promote import REFUSED
from flows.process import StageFailed, log_without_tracebacks, run
from flows.room import room
from flows.watching import saying_why


@task(task_run_name="promote", cache_policy=NO_CACHE)
def promote(options: list[str]) -> int:
    """Decide, and show the decision as an artifact; 0 or, for a refusal, 3.

    Raises StageFailed if nothing could be decided, ParamsError if params.yaml is wrong.
    """
    log = get_run_logger().info
    with (
        room_to_measure(log) if "--reevaluate" in options else nullcontext({}) as environment,
        tempfile.TemporaryDirectory() as folder,
    ):
        page = Path(folder) / "decision.md"
        command = [sys.executable, "-m", "components.promote", *options, "--page", str(page)]
        exit_code = 0
        try:
            run("promote", command, log, environment=environment)
        except StageFailed as error:
            if error.exit_code != REFUSED:
                raise
            exit_code = REFUSED
        create_markdown_artifact(
            page.read_text(encoding="utf-8"),
            key="promotion",
            description="What was decided, and on what",
        )
    return exit_code


def room_to_measure(log: Callable[[str], None]) -> AbstractContextManager[Mapping[str, str]]:
    """The GPUs that a reevaluation uses, as for the stage `evaluate`."""
    cluster = load_params(Path("params.yaml")).cluster
    return room("promote", max(1, cluster.num_workers), cluster.wait_minutes, log)


@flow(name="promote")
def promote_flow(  # noqa: PLR0913, the fields of the form in Prefect's UI
    version: int | None = None,
    *,
    dry_run: bool = False,
    force: bool = False,
    reason: str = "",
    rollback: bool = False,
    reevaluate: bool = False,
    allow_dirty: bool = False,
) -> Any:  # of a state with data, Prefect gives the data
    """Make a registered guide the champion if it passes the rules in params.yaml.

    A refusal is a completed run, named Refused, whose artifact says why; called as a function, it
    returns 3, else 0.

    Args:
        version: of the registered guide; by default the newest.
        dry_run: say what would be decided, and change nothing.
        force: promote whatever the rules say; needs a reason.
        reason: why; kept with the decision.
        rollback: go back to the champion before the present one.
        reevaluate: judge candidate and champion anew, by the present params.yaml.
        allow_dirty: take a guide too that was made by code which is in no commit.
    """
    log_without_tracebacks()
    flags = {
        "--dry-run": dry_run,
        "--force": force,
        "--rollback": rollback,
        "--reevaluate": reevaluate,
        "--allow-dirty": allow_dirty,
    }
    options = [flag for flag, is_set in flags.items() if is_set]
    if version is not None:
        options += ["--version", str(version)]
    if reason:
        options.append(f"--reason={reason}")  # which may begin with a dash
    with saying_why():
        exit_code = promote(options)
    name = "Refused" if exit_code == REFUSED else "Completed"
    return Completed(name=name, data=exit_code)
