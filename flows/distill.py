"""The main flow: train one guide, measure it on the base and on every fine-tune, register it.

Each task brings one stage of dvc.yaml up to date, so a flow run and `dvc repro` lead to the same
versioned result, and either one skips what the other has done. A stage that was killed is started
again and goes on from its last checkpoint; one that explains its failure is not.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec

from prefect import Task, flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun

from components.params import load_params
from components.paths import REPORT
from flows.process import StageFailed, log_without_tracebacks, repro

P = ParamSpec("P")


def was_killed(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
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
def prepare() -> None:
    """Check every image and caption; hold out a part of the prompts."""
    repro("prepare", get_run_logger().info)


@stage("cache")
def cache() -> None:
    """Ask the frozen teacher once for all that training will need of it."""
    repro("cache", get_run_logger().info)


@stage("distill")
def distill() -> None:
    """Train the guide to do in one forward what CFG does in two."""
    repro("distill", get_run_logger().info)


@stage("halve")
def halve() -> None:
    """Halve the number of sampling steps, round after round."""
    repro("halve", get_run_logger().info)


@stage("evaluate-{model}")
def evaluate(model: str) -> None:
    """Measure unguided, CFG and guided sampling side by side on one model."""
    repro(f"evaluate@{model}", get_run_logger().info)


@stage("register")
def register() -> None:
    """Gather the results and register the guide as a model version with its lineage."""
    repro("register", get_run_logger().info)


@flow(name="distill")
def distill_flow() -> None:
    """Distil guidance for the base in params.yaml and see what it does for all its fine-tunes."""
    log_without_tracebacks()
    params = load_params(Path("params.yaml"))

    prepare()
    cache()
    distill()
    halve()
    for model in params.models:  # one at a time: they measure wall time
        evaluate(model)
    register()

    publish_report()


def publish_report() -> None:
    """Show the result table, and where the images are, in Prefect's UI."""
    table = (REPORT / "table.md").read_text()
    grid = (REPORT / "grid.png").absolute()
    create_markdown_artifact(
        f"{table}\n\nImages: `{grid}`\n", key="guide-report", description="Guide against CFG"
    )
