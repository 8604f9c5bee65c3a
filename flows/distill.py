"""The main flow: train one guide, measure it on the base and on every fine-tune, register it.

Each task brings one stage of dvc.yaml up to date, so a flow run and `dvc repro` lead to the same
versioned result, and either one skips what the other has done. A stage that was killed is started
again and goes on from its last checkpoint; one that explains its failure is not.
"""

from collections.abc import Callable
from typing import Any, ParamSpec

from prefect import Task, flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun

from components.params import Params
from components.paths import REPORT
from flows.lost import settle_lost_runs
from flows.process import DVC, StageFailed, log_without_tracebacks, repro, run
from flows.sharing import dvc_remote, needs_no_cache, to_commit
from flows.start import STAGES, Stage, begin
from flows.watching import saying_why

P = ParamSpec("P")


def was_killed(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:  # noqa: ARG001, Prefect's interface
    """Whether another attempt makes sense."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, StageFailed) and error.was_killed


def stage(run_name: str) -> Callable[[Callable[P, None]], Task[P, None]]:
    """A task that runs one stage. What is up to date is for DVC to decide, not for Prefect."""
    return task(
        task_run_name=run_name,
        cache_policy=NO_CACHE,
        retries=2,
        retry_delay_seconds=5,
        retry_condition_fn=was_killed,
    )


@stage("prepare")
def prepare(wait_minutes: float) -> None:
    """Check every image and caption; hold out a part of the prompts."""
    repro("prepare", get_run_logger().info, wait_minutes=wait_minutes)


@stage("cache")
def cache(wait_minutes: float, *, allow_missing: bool = False) -> None:
    """Ask the frozen teacher once for all that training will need of it."""
    log = get_run_logger().info
    repro("cache", log, allow_missing=allow_missing, wait_minutes=wait_minutes)


@stage("distill")
def distill(wait_minutes: float, *, allow_missing: bool = False) -> None:
    """Train the guide to do in one forward what CFG does in two."""
    log = get_run_logger().info
    repro("distill", log, allow_missing=allow_missing, wait_minutes=wait_minutes)


@stage("halve")
def halve(wait_minutes: float, *, allow_missing: bool = False) -> None:
    """Halve the number of sampling steps, round after round."""
    log = get_run_logger().info
    repro("halve", log, allow_missing=allow_missing, wait_minutes=wait_minutes)


@stage("evaluate-{model}")
def evaluate(model: str, wait_minutes: float) -> None:
    """Measure unguided, CFG and guided sampling side by side on one model."""
    repro(f"evaluate@{model}", get_run_logger().info, wait_minutes=wait_minutes)


@stage("register")
def register(wait_minutes: float) -> None:
    """Gather the results and register the guide as a model version with its lineage."""
    repro("register", get_run_logger().info, wait_minutes=wait_minutes)


@task(task_run_name="push", cache_policy=NO_CACHE)
def push(remote: str) -> None:
    """Send data, guides, results and what DVC knows of earlier runs to the DVC remote."""
    log = get_run_logger().info
    run("push", [*DVC, "push", "--run-cache", "--remote", remote], log)


@flow(name="distill")
def distill_flow(start_at: Stage = "prepare") -> None:
    """Distil guidance for the base in params.yaml and see what it does for all its fine-tunes.

    Args:
        start_at: stages before this one are left as they are, such as in a clone that has a guide.
    """
    log_without_tracebacks()
    for name in settle_lost_runs():
        get_run_logger().info(f"Flow run {name} had been killed, and is now marked Crashed")
    with saying_why(), begin() as params:
        bring_up_to_date(params, STAGES[STAGES.index(start_at) :])
        if remote := dvc_remote():
            push(remote)
        publish_report()
        for line in to_commit(remote):
            get_run_logger().info(line)


def bring_up_to_date(params: Params, stages: tuple[Stage, ...]) -> None:
    """Run what is out of date of these stages, in the order of the graph."""
    wait_minutes = params.cluster.wait_minutes
    # After `git clone` and `dvc pull` there is no teacher cache, and nothing to train on it.
    allow_missing = needs_no_cache()
    if allow_missing and "cache" in stages:
        get_run_logger().info("The teacher cache is not here, and nothing needs it")
    if "prepare" in stages:
        prepare(wait_minutes)
    if "cache" in stages:
        cache(wait_minutes, allow_missing=allow_missing)
    if "distill" in stages:
        distill(wait_minutes, allow_missing=allow_missing)
    if "halve" in stages:
        halve(wait_minutes, allow_missing=allow_missing)
    if "evaluate" in stages:
        for model in params.models:  # one at a time: they measure wall time
            evaluate(model, wait_minutes)
    if "register" in stages:
        register(wait_minutes)


def publish_report() -> None:
    """Show the result table, and where the images are, in Prefect's UI."""
    table = (REPORT / "table.md").read_text()
    grid = (REPORT / "grid.png").absolute()
    create_markdown_artifact(
        f"{table}\n\nImages: `{grid}`\n", key="guide-report", description="Guide against CFG"
    )
