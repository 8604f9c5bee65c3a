"""From journals to MLflow: complete, and once, however often it is tried."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from mlflow.entities import Metric, Param, ViewType
from mlflow.exceptions import MlflowException

from components.places import Tracking
from components.tracking import pipeline as pipelines
from components.tracking.journal import (
    ATTEMPT,
    KEY,
    OWNER,
    PLACE,
    STAGE,
    Journal,
    Owner,
    at_rest,
    is_alive,
    owner,
)
from components.tracking.pipeline import Pipeline
from components.tracking.store import Store, TrackingError, is_absent

METRICS_A_CALL = 1000  # MLflow's limits
PARAMS_A_CALL = 100


class Delivery:
    """Brings one journal's run to MLflow. Raises TrackingError; then try again later."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.was_asked = False  # MLflow, for a run
        self.was_found = False  # a run that was there before
        self._is_open = self._is_new = False
        self._has: dict[str, set[int]] = {}  # metric -> the steps that MLflow has
        self._num_sent = 0  # of the journal's points
        self._parent: str | None = None

    def __call__(self, store: Store) -> None:
        """Send what MLflow does not have of the journal yet; what was sent is not sent again."""
        journal = self._journal
        if not self._is_open:
            self._open(store)
        assert journal.run_id
        points = journal.points[self._num_sent :]
        for name in {name for _, _, values in points for name in values} - self._has.keys():
            self._has[name] = set() if self._is_new else self._steps(store, name)
        metrics = [
            Metric(name, value, at, step)
            for step, at, values in points
            for name, value in values.items()
            if step not in self._has[name]
        ]
        self._is_open = False  # what fails may have been done in part
        for some in in_batches(metrics, METRICS_A_CALL):
            with store.asking("write curves"):
                store.client.log_batch(journal.run_id, metrics=some)
        self._num_sent += len(points)
        if journal.end:
            status, at = journal.end
            with store.asking("end the run"):
                store.client.set_terminated(journal.run_id, status, at)
            if self._parent:
                pipelines.close(store, self._parent, status, at)
        else:
            self._is_open = True

    def _open(self, store: Store) -> None:
        """Find or make the run, and its parent, and see what it has."""
        journal, header = self._journal, self._journal.header
        experiment = store.experiment(header["experiment"])
        pipeline = header.get("pipeline")
        is_child = pipeline is not None and not pipeline["is_itself"]
        self._parent = pipelines.ensure(store, experiment, header) if is_child else None
        run = self._bound(store) or self._found(store, experiment)
        is_new = run is None
        self.was_found |= not is_new and not self.was_asked
        tags = header["tags"] | {ATTEMPT: header["attempt"]}
        if self._parent and pipeline:
            tags[pipelines.PARENT] = self._parent
            if pipeline["part"]:
                tags[pipelines.PART] = pipeline["part"]
        elif pipeline:
            tags |= pipelines.own_tags(header)
        if run is None:
            self.was_asked = True
            with store.asking("begin a run"):
                made = store.client.create_run(
                    experiment,
                    start_time=header["began"],
                    run_name=header.get("name") or header["stage"],
                    tags=tags,
                )
            run = made.info.run_id
        with store.asking("write the run's parameters"):
            has = {} if is_new else store.client.get_run(run).data.params
            params = [
                Param(name, str(value))
                for name, value in header["params"].items()
                if name not in has
            ]
            for some in in_batches(params, PARAMS_A_CALL):
                store.client.log_batch(run, params=some)
            if not is_new and not journal.end:
                if pipeline:
                    for name in (pipelines.PARENT, ATTEMPT) if self._parent else tags:
                        store.client.set_tag(run, name, tags[name])
                store.client.update_run(run, status="RUNNING")
        if self._parent and not journal.end:
            pipelines.reopen(store, self._parent)
        self._has, self._num_sent, self._is_new = {}, 0, is_new
        if journal.run_id != run:
            journal.bind(run)
        self._is_open = True

    def _steps(self, store: Store, name: str) -> set[int]:
        """The steps at which MLflow has the metric."""
        with store.asking("read what curves there are"):
            history = store.client.get_metric_history(self._journal.run_id, name)
        return {point.step for point in history}

    def _bound(self, store: Store) -> str | None:
        """The run that the journal names, if this store has it and it was not deleted."""
        if self._journal.run_id is None:
            return None
        with store.asking("read the run"):
            try:
                run = store.client.get_run(self._journal.run_id)
            except MlflowException as error:
                if not is_absent(error):
                    raise
                return None
        return str(run.info.run_id) if run.info.lifecycle_stage == "active" else None

    def _found(self, store: Store, experiment: str) -> str | None:
        """This attempt's run; else one of the same owner and key that broke off."""
        header = self._journal.header
        with store.asking("look for the run"):
            runs = store.client.search_runs(
                [experiment], f"tags.`{ATTEMPT}` = '{header['attempt']}'", max_results=1
            )
            if runs:
                return str(runs[0].info.run_id)
        if (pipeline := header.get("pipeline")) and pipeline["is_itself"]:
            return pipelines.find(store, experiment, pipeline)
        if pipeline and pipeline["part"]:
            return pipelines.find_part(store, experiment, str(self._parent), pipeline["part"])
        if header["tags"].get(KEY) is None:
            return None
        with store.asking("look for the run"):
            runs = store.client.search_runs(
                [experiment],
                f"tags.`{KEY}` = '{header['tags'][KEY]}' and tags.`{STAGE}` = '{header['stage']}' "
                f"and tags.`{OWNER}` = '{header['tags'][OWNER]}' "
                "and attributes.status != 'FINISHED'",
                run_view_type=ViewType.ACTIVE_ONLY,
            )
            for run in runs:
                if not is_alive(run.data.tags.get(ATTEMPT, "")):
                    store.client.set_tag(run.info.run_id, ATTEMPT, header["attempt"])
                    return str(run.info.run_id)
        return None


def begin(  # noqa: PLR0913, what MLflow asks for
    tracking: Tracking,
    stage: str,
    *,
    params: Mapping[str, Any],
    key: str | None = None,
    name: str | None = None,
    experiment: str | None = None,
    tags: Mapping[str, str] | None = None,
    pipeline: Pipeline | None = None,
) -> Journal:
    """The journal of a new run; with a `key`, of the one here that broke off, if there is one."""
    me = owner()
    belongs = {"pipeline": asdict(pipeline)} if pipeline else {}
    experiment = experiment or tracking.experiment
    mine: Journal | None = None
    for journal in at_rest():
        header = journal.header
        same = (
            header["stage"] == stage
            and header["experiment"] == experiment
            and header["tags"].get(KEY) == key
            and header["tags"][OWNER] == me.id
            and (journal.end is None or journal.end[0] != "FINISHED")
        )
        if mine is None and key is not None and same:
            mine = journal
        else:
            journal.close()
    if mine:
        mine.reopen(belongs)
        return mine
    own = {STAGE: stage, OWNER: me.id, PLACE: me.place, "mlflow.user": me.user}
    if key is not None:
        own[KEY] = key
    header = {"experiment": experiment, "params": dict(params), "tags": {**own, **(tags or {})}}
    return Journal.begin(stage, header | {"name": name} | belongs)


def settle(store: Store, stage: str | None = None, experiment: str | None = None) -> None:
    """Deliver what earlier runs of this checkout left, and end those whose process is gone.

    With an `experiment`, also runs of `stage` and of the pipeline in it that were begun here and of
    which MLflow alone knows. Raises TrackingError, when all else is done, for the first that could
    not be.
    """
    me = owner()
    failed: TrackingError | None = None
    for journal in at_rest():
        try:
            if _is_mine(journal, me):
                _settle(journal, store, stage)
        except OSError as error:
            failed = failed or TrackingError(f"an earlier run, kept in {journal.path}: {error}")
        finally:
            journal.close()
    if experiment is not None:
        for whose in (stage, pipelines.STAGE_OF_PIPELINES):
            with store.asking("look for runs whose process is gone"):
                runs = store.client.search_runs(
                    [experiment],
                    f"tags.`{PLACE}` = '{me.place}' and tags.`{STAGE}` = '{whose}' "
                    "and attributes.status = 'RUNNING'",
                    run_view_type=ViewType.ACTIVE_ONLY,
                )
            for run in runs:
                pipelines.close(store, run.info.run_id, "KILLED")
                if parent := run.data.tags.get(pipelines.PARENT):
                    pipelines.close(store, parent, "KILLED")
    if failed:
        raise failed


def _settle(journal: Journal, store: Store, stage: str | None) -> None:
    """One run of which no process is left. It stays here if it can still be gone on with."""
    if journal.end is None:
        journal.finish("KILLED")
    if not journal.is_delivered:
        Delivery(journal)(store)
        journal.delivered()
    assert journal.end
    if journal.end[0] == "FINISHED" or journal.header["stage"] == stage:
        journal.remove()


def _is_mine(journal: Journal, me: Owner) -> bool:
    """Begun here, by id or place, or in a folder of this machine that is gone, and was moved here.

    What was copied here is its owner's to deliver and to end.
    """
    tags = journal.header["tags"]
    who, _, folder = str(tags[PLACE]).partition(":")
    is_moved = who == me.place.partition(":")[0] and not Path(folder).exists()
    return bool(tags[OWNER] == me.id or tags[PLACE] == me.place or is_moved)


Item = TypeVar("Item")


def in_batches(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    """The items in order, in lists of at most `size`."""
    for start in range(0, len(items), size):
        yield list(items[start : start + size])
