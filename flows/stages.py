"""The stages of dvc.yaml as Prefect tasks, and what is known of the checkout before they run.

Each task brings one stage up to date. A stage that was killed, or that something was away for, is
started again and goes on from its last checkpoint; one that explains its failure is not.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec

from prefect import Task, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun

from components.params import Params
from components.paths import CACHE
from flows.artifacts import progress_bar
from flows.process import DVC, StageFailed, ask, repro, run
from flows.room import room

P = ParamSpec("P")
ONLY_THE_CACHE = (
    {"changed deps": {CACHE.as_posix(): "deleted"}},
    {"changed outs": {CACHE.as_posix(): "deleted"}},
)


@dataclass(frozen=True, kw_only=True)
class Checkout:
    """What was seen of the checkout as a run began.

    Attributes:
        wait_minutes: how long to wait for another run, or a GPU.
        num_workers: Ray workers of the stages that train.
        unchanged: stages of dvc.yaml that neither they nor any before them changed.
        lacks_cache: the teacher cache is not here, and nothing is to be trained on it.
    """

    wait_minutes: float
    num_workers: int = 0
    unchanged: frozenset[str] = frozenset()
    lacks_cache: bool = False

    def bring_up_to_date(self, stage: str, *, uses_gpus: int = 0) -> None:
        """Run one stage if it, or one before it, has changed. Raises StageFailed."""
        log = get_run_logger().info
        if stage in self.unchanged:
            log(f"Stage '{stage}' didn't change, skipping")
            return
        with (
            room(stage, uses_gpus, self.wait_minutes, log) as environment,
            progress_bar(stage, log) as watch,
        ):
            repro(
                stage,
                watch,
                allow_missing=self.lacks_cache and stage in ("cache", "distill", "halve"),
                wait_minutes=self.wait_minutes,
                environment=environment,
            )


def look(params: Params, names: tuple[str, ...]) -> Checkout:
    """See what has changed, by asking DVC once for the stages `names`, which are in order.

    Where DVC can't tell, each stage asks anew.
    """
    told = ask([*DVC, "status", "--json", *names])
    changes = json.loads(told) if told else dict.fromkeys(names, [])
    lacks_cache = False
    if told and not (CACHE / "index.json").exists():
        trained = [c for name in ("distill", "halve") for c in changes.get(name, [])]
        lacks_cache = all(change in ONLY_THE_CACHE for change in trained)
    if lacks_cache:
        changes = {
            name: found
            for name, found in changes.items()
            if not all(change in ONLY_THE_CACHE for change in found)
        }
    first = next((n for n, name in enumerate(names) if name in changes), len(names))
    return Checkout(
        wait_minutes=params.cluster.wait_minutes,
        num_workers=params.cluster.num_workers,
        unchanged=frozenset(names[:first]),
        lacks_cache=lacks_cache,
    )


def may_pass(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:  # noqa: ARG001, Prefect's interface
    """Whether another attempt makes sense."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, StageFailed) and error.may_pass


def stage(run_name: str) -> Callable[[Callable[P, None]], Task[P, None]]:
    """A task that runs one stage. What is up to date is for DVC to decide, not for Prefect."""
    return task(
        task_run_name=run_name,
        cache_policy=NO_CACHE,
        retries=2,
        retry_delay_seconds=[5, 60],
        retry_condition_fn=may_pass,
    )


@stage("prepare")
def prepare(checkout: Checkout) -> None:
    """Check every image and caption; hold out a part of the prompts."""
    checkout.bring_up_to_date("prepare")


@stage("cache")
def cache(checkout: Checkout) -> None:
    """Ask the frozen teacher once for all that training will need of it."""
    checkout.bring_up_to_date("cache", uses_gpus=max(1, checkout.num_workers))


@stage("distill")
def distill(checkout: Checkout) -> None:
    """Train the guide to do in one forward what CFG does in two."""
    checkout.bring_up_to_date("distill", uses_gpus=max(1, checkout.num_workers))


@stage("halve")
def halve(checkout: Checkout) -> None:
    """Halve the number of sampling steps, round after round."""
    checkout.bring_up_to_date("halve", uses_gpus=max(1, checkout.num_workers))


@stage("evaluate-{model}")
def evaluate(model: str, checkout: Checkout) -> None:
    """Measure unguided, CFG and guided sampling side by side on one model."""
    checkout.bring_up_to_date(f"evaluate@{model}", uses_gpus=max(1, checkout.num_workers))


@stage("register")
def register(checkout: Checkout) -> None:
    """Gather the results and register the guide as a model version with its lineage."""
    checkout.bring_up_to_date("register")


def has_failed(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:  # noqa: ARG001, Prefect's interface
    """Whether it was not cancelled: DVC does not tell what may pass from what may not."""
    return isinstance(state.result(raise_on_failure=False), StageFailed)


@task(
    task_run_name="push",
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=[5, 60],
    retry_condition_fn=has_failed,
)
def push(remote: str) -> None:
    """Send data, guides, results and what DVC knows of earlier runs to the DVC remote."""
    log = get_run_logger().info
    run("push", [*DVC, "push", "--run-cache", "--remote", remote], log)
