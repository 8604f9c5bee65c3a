"""The main flow: train one guide, measure it on the base and on every fine-tune, register it.

Each task brings one stage of dvc.yaml up to date, so a flow run and `dvc repro` lead to the same
versioned result, and either one skips what the other has done.
"""

from collections.abc import Sequence
from typing import Any

from prefect import flow, get_run_logger
from prefect.runtime import flow_run
from prefect.task_runners import ThreadPoolTaskRunner

from components.overrides import overridden
from components.params import Params, check_files
from flows.artifacts import publish_report
from flows.experiment import PARAMS, experiment
from flows.lost import settle_lost_runs
from flows.process import StageFailed, log_without_tracebacks, stop_all
from flows.room import gpus
from flows.sharing import check_remote, to_commit
from flows.stages import (
    Checkout,
    cache,
    distill,
    evaluate,
    halve,
    look,
    prepare,
    push,
    register,
)
from flows.start import STAGES, Stage, begin, check_left_out, check_start
from flows.watching import saying_why


@flow(name="distill", log_prints=True)
def distill_flow(
    start_at: Stage = "prepare",
    overrides: list[str] = [],  # noqa: B006, Prefect's form wants a list; nothing changes it
) -> None:
    """Distil guidance for the base in params.yaml and see what it does for all its fine-tunes.

    Args:
        start_at: stages before this one are left as they are, such as in a clone that has a guide.
        overrides: other values than those of params.yaml, such as distill.num_images=2000, one
            each. The run is then a DVC experiment of the flow run's name in a workspace of its own;
            params.yaml and the checkout stay as they are.
    """
    log_without_tracebacks()
    log = get_run_logger().info
    settle_lost_runs(log)
    with saying_why():
        if overrides:  # before a workspace is made for them
            check_left_out(overridden(PARAMS, overrides), start_at)
        remote = check_remote()
        with experiment(overrides, flow_run.name or "run", log) as saved_as, begin() as params:
            check_start(start_at)
            check_left_out(PARAMS.read_text(encoding="utf-8"), start_at)
            bring_up_to_date(params, STAGES[STAGES.index(start_at) :])
            publish_report(params, log, saved_as)  # before what a network may fail
            not_sent = send(remote, saved_as) if remote else None
        if not overrides:
            for line in to_commit(remote, is_sent=not_sent is None):
                log(line)
        if not_sent:  # now that an experiment is saved, and all is said
            raise not_sent


def send(remote: str, experiment: str | None) -> StageFailed | None:
    """Push to DVC's remote. Returns what is to be said if that fails, as all else is done."""
    try:
        push(remote)
    except StageFailed as error:
        why = " ".join(str(error).removeprefix("push: ").split())
        before = f"dvc exp apply {experiment}, then " if experiment else ""
        line = (
            f"error: {why}. All else is done, and its files are in DVC's cache here; to send them: "
            f"{before}dvc push --run-cache"
        )
        return StageFailed("push", error.exit_code, [line])
    return None


def bring_up_to_date(params: Params, stages: Sequence[Stage]) -> None:
    """Run what is out of date of these stages, in the order of the graph."""
    names = names_in_dvc(params, stages)
    checkout = look(params, names)
    if checkout.unchanged < set(names):
        check_files(params)
    if checkout.lacks_cache and "cache" in stages:
        get_run_logger().info("The teacher cache is not here, and nothing needs it")
    if "prepare" in stages:
        prepare(checkout)
    if "cache" in stages:
        cache(checkout)
    if "distill" in stages:
        distill(checkout)
    if "halve" in stages:
        halve(checkout)
    if "evaluate" in stages:
        evaluate_all(list(params.models), checkout)
    if "register" in stages:
        register(checkout)


def names_in_dvc(params: Params, stages: Sequence[Stage]) -> tuple[str, ...]:
    """The stages as dvc.yaml has them: one `evaluate` for each model."""
    names: list[str] = []
    for stage in stages:
        names += [f"evaluate@{m}" for m in params.models] if stage == "evaluate" else [stage]
    return tuple(names)


def evaluate_all(models: Sequence[str], checkout: Checkout) -> None:
    """Measure these models side by side, each on a GPU of its own; without GPUs one by one.

    Each measures wall time, which a neighbour on the same hardware would disturb. Ray workers have
    all the GPUs that there are for one model.
    """
    side_by_side = 1 if checkout.num_workers else min(len(gpus()), len(models))
    if side_by_side < 2:
        for model in models:
            evaluate(model, checkout)
        return
    tasks: ThreadPoolTaskRunner[Any] = ThreadPoolTaskRunner(max_workers=side_by_side)
    with tasks as runner:
        futures = [runner.submit(evaluate, {"model": m, "checkout": checkout}) for m in models]
        try:
            for future in futures:
                future.wait()
        except BaseException:
            stop_all()
            raise
    for future in futures:
        future.result()
