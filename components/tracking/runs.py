"""One MLflow run for each stage that has something to say. Only the driving process writes."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric

from components.params import Tracking
from components.tracking.delivery import METRICS_A_CALL, Delivery, begin, in_batches, settle
from components.tracking.store import IMPATIENT, Store

# Seconds for which MLflow is left alone after it failed while training, doubled each time.
FIRST_PAUSE, LONGEST_PAUSE = 30.0, 600.0


class TrainingRun:
    """The curves of a training stage: on disk first, in MLflow when and if that answers.

    Nothing that MLflow does ends the training. A run of the same `key` that broke off here is gone
    on with. What could not be delivered is by the next run of any stage.
    """

    def __init__(
        self, tracking: Tracking, stage: str, *, key: str, params: Mapping[str, Any]
    ) -> None:
        self._tracking, self._stage = tracking, stage
        self._journal = begin(tracking, stage, key=key, params=flat(params))
        self._delivery = Delivery(self._journal)
        self._store: Store | None = None
        self._pause, self._not_before = FIRST_PAUSE, 0.0
        self._said: str | None = None
        self._is_settled = False

    def __enter__(self) -> Self:
        self._deliver()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        status = (
            "FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED"
        )
        self._write(lambda: self._journal.finish(status))
        self._not_before = 0.0
        if self._deliver():
            self._write(self._journal.delivered)
            if status == "FINISHED":
                self._journal.remove()
        self._journal.close()

    def curve(self, num_images: int, metrics: Mapping[str, float]) -> None:
        """A point of each curve. A point that an earlier attempt logged is not logged again."""
        self._write(lambda: self._journal.point(num_images, metrics))
        self._deliver()

    def _write(self, write: Any) -> None:
        try:
            write()
        except OSError as error:
            self._say(f"the curves can't be kept in {self._journal.path}: {error}")

    def _deliver(self) -> bool:
        """Whether MLflow has all there is."""
        if time.monotonic() < self._not_before:
            return False
        try:
            self._store = self._store or Store(self._tracking, patience=IMPATIENT)
            self._delivery(self._store)
            if not self._is_settled:
                self._is_settled = True
                experiment = self._store.experiment(self._tracking.experiment)
                settle_or_warn(self._store, self._stage, experiment)
        except OSError as error:
            self._not_before = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
            self._say(f"{error}; the curves are in runs/tracking, and the next run delivers them")
            return False
        if self._said:
            self._say("MLflow answers again and has all curves")
            self._said, self._pause = None, FIRST_PAUSE
        return True

    def _say(self, text: str) -> None:
        """Once, until something else is to say."""
        if text != self._said:
            self._said = text
            warn(text)


class Run:
    """A run whose results are MLflow's: what can't be written there raises TrackingError.

    It is never gone on with: one that broke off is ended by the next.
    """

    def __init__(  # noqa: PLR0913, a run's parts
        self,
        store: Store,
        tracking: Tracking,
        stage: str,
        *,
        params: Mapping[str, Any],
        name: str | None = None,
        experiment: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        self._store = store
        self.experiment = store.experiment(experiment or tracking.experiment)
        store.check_artifacts(self.experiment)
        self._journal = begin(
            tracking, stage, params=flat(params), name=name, experiment=experiment, tags=tags
        )
        self._delivery = Delivery(self._journal)
        try:
            self._delivery(store)
        except OSError:
            if self._delivery.was_asked:  # MLflow may have the run: the next one ends it
                self._journal.finish("FAILED")
                self._journal.close()
            else:
                self._journal.remove()
            raise
        assert self._journal.run_id
        self.id = self._journal.run_id
        settle_or_warn(store, stage, self.experiment)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        status = (
            "FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED"
        )
        try:
            self._journal.finish(status)
            self._delivery(self._store)
            self._journal.remove()
        except OSError:
            if kind is None:
                raise  # else what went wrong first is told; the next run ends this one
        finally:
            self._journal.close()

    def metrics(self, values: Mapping[str, Any], *, model_id: str | None = None) -> None:
        """Numbers without a step, nested ones under dotted names; None is left out."""
        now = time.time_ns() // 1_000_000
        numbers = [
            Metric(name, float(value), now, step=0, model_id=model_id)
            for name, value in flat(values).items()
            if isinstance(value, int | float)
        ]
        with self._store.asking("write the results"):
            for some in in_batches(numbers, METRICS_A_CALL):
                self._store.client.log_batch(self.id, metrics=some)

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags of the run. Raises TrackingError."""
        with self._store.asking("write the run's tags"):
            for name, value in values.items():
                self._store.client.set_tag(self.id, name, value)

    def image(self, key: str, path: Path) -> None:
        """Show the PNG at `path` in the run's gallery as `key`."""
        from PIL import Image

        with Image.open(path) as image:
            picture = image.convert("RGB")
        with self._store.asking(f"store the image {key}"):
            self._store.client.log_image(self.id, picture, key=key, step=0)

    def file(self, path: Path) -> None:
        """Store a file among the run's artifacts, under its own name. Raises TrackingError."""
        with self._store.asking(f"store {path.name}"):
            self._store.client.log_artifact(self.id, str(path))

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Store rows as `name`.json, a column for every key; None where a row lacks one."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        table = {column: [row.get(column) for row in rows] for column in columns}
        with self._store.asking(f"store the table {name}"):
            self._store.client.log_table(self.id, table, f"{name}.json")

    def dataset(self, name: str, *, digest: str, path: Path) -> None:
        """The data that this run is based on, by its DVC hash."""
        data = Dataset(
            name=name,
            digest=digest[:36],
            source_type="dvc",
            source=json.dumps({"path": path.as_posix(), "hash": digest}),
        )
        tags = [InputTag("mlflow.data.context", "training")]
        with self._store.asking("write what data the run is of"):
            self._store.client.log_inputs(self.id, [DatasetInput(data, tags)])


def settle_or_warn(store: Store, stage: str | None = None, experiment: str | None = None) -> None:
    """`settle`; what fails of it does not stop the run that is beginning."""
    try:
        settle(store, stage, experiment)
    except OSError as error:
        warn(str(error))


def warn(text: str) -> None:
    """Print a warning as one line on stderr."""
    print(f"warning: {' '.join(text.split())}", file=sys.stderr, flush=True)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`; None is left out."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        elif value is not None:
            found[f"{prefix}{key}"] = value
    return found
