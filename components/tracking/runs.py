"""One MLflow run for each stage that has something to say. Only the driving process writes."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Self

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from components.mlflow_place import without_secrets
from components.places import Tracking
from components.tracking.delivery import METRICS_A_CALL, Delivery, begin, in_batches, settle
from components.tracking.pipeline import Pipeline
from components.tracking.store import IMPATIENT, Store

if TYPE_CHECKING:
    from PIL import Image

# Seconds for which MLflow is left alone after it failed while training, doubled each time.
FIRST_PAUSE, LONGEST_PAUSE = 30.0, 600.0
TABLES = "mlflow.loggedArtifacts"  # the run's tag that says which of its files are tables
FILES_AN_IMAGE = 2  # of MLflow's: the picture, and a small one of it


class TrainingRun:
    """The curves of a training stage: on disk first, in MLflow when and if that answers.

    Nothing that MLflow does ends the training. A run of the same `key` that broke off here is gone
    on with. What could not be delivered is by the next run of any stage.
    """

    def __init__(
        self,
        tracking: Tracking,
        stage: str,
        *,
        key: str,
        params: Mapping[str, Any],
        pipeline: Pipeline | None = None,
    ) -> None:
        self._tracking, self._stage = tracking, stage
        self._journal = begin(tracking, stage, key=key, params=flat(params), pipeline=pipeline)
        self._delivery = Delivery(self._journal)
        self._store: Store | None = None
        self._pause, self._not_before = FIRST_PAUSE, 0.0
        self._said: str | None = None
        self._is_settled = False

    def __enter__(self) -> Self:
        try:
            self._deliver()
        except BaseException as error:  # stopped while MLflow made the run, which then is ended
            self.__exit__(type(error))
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        status = status_of(kind)
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

    It is never gone on with: one that broke off is ended by the next. But the run of a pipeline,
    and that of one of its parts, is written to again, and what it has is not repeated.
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
        pipeline: Pipeline | None = None,
    ) -> None:
        self._store = store
        self.experiment = store.experiment(experiment or tracking.experiment)
        store.check_artifacts(self.experiment)
        self._journal = begin(
            tracking,
            stage,
            params=flat(params),
            name=name,
            experiment=experiment,
            tags=tags,
            pipeline=pipeline,
        )
        self._delivery = Delivery(self._journal)
        try:
            self._delivery(store)
            assert self._journal.run_id
            self.id = self._journal.run_id
            settle_or_warn(store, stage, self.experiment)
        except OSError:
            if self._delivery.was_asked:  # MLflow may have the run: the next one ends it
                self._journal.finish("FAILED")
                self._journal.close()
            else:
                self._journal.remove()
            raise
        except BaseException as error:  # stopped, and MLflow answers
            self.__exit__(type(error))
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        status = status_of(kind)
        try:
            self._journal.finish(status)
            self._delivery(self._store)
            self._journal.remove()
        except OSError:
            if kind is None:
                raise  # else what went wrong first is told; the next run ends this one
        finally:
            self._journal.close()

    def metrics(
        self, values: Mapping[str, Any], *, step: int = 0, model_id: str | None = None
    ) -> None:
        """Numbers at a step, nested ones under names with `/`; None is left out."""
        now = time.time_ns() // 1_000_000
        numbers = [
            Metric(name, float(value), now, step=step, model_id=model_id)
            for name, value in flat(values, between="/").items()
            if isinstance(value, int | float)
        ]
        with self._store.asking("write the results"):
            if self._delivery.was_found and model_id is None:
                numbers = [metric for metric in numbers if not self._has(metric)]
            for some in in_batches(numbers, METRICS_A_CALL):
                self._store.client.log_batch(self.id, metrics=some)

    def _has(self, metric: Metric) -> bool:
        """Whether this is the last value that MLflow has at this step."""
        history = self._store.client.get_metric_history(self.id, metric.key)
        known = [(point.timestamp, point.value) for point in history if point.step == metric.step]
        return bool(known) and max(known)[1] == metric.value

    def rename(self, name: str) -> None:
        """Call the run something else. Raises TrackingError."""
        with self._store.asking("name the run"):
            self._store.client.update_run(self.id, name=name)

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags of the run. Raises TrackingError."""
        with self._store.asking("write the run's tags"):
            for name, value in values.items():
                self._store.client.set_tag(self.id, name, value)

    def image(self, key: str, path: Path, *, step: int = 0) -> None:
        """Show the PNG at `path` in the run's gallery as `key`, at a step of the slider.

        Another picture that a former attempt stored there is deleted.
        """
        picture = _opened(path)
        client = self._store.client
        with self._store.asking(f"store the image {key}"):
            there = []
            if self._delivery.was_found:
                start = f"images/{key.replace('/', '~')}+step+{step}+"
                files = client.list_artifacts(self.id, "images")
                there = [file.path for file in files if file.path.startswith(start)]
                if self._shows(there, picture):
                    return
            client.log_image(self.id, picture, key=key, step=step)
            if there:
                folder = get_artifact_repository(client.get_run(self.id).info.artifact_uri)
                for stale in there:
                    folder.delete_artifacts(stale)

    def _shows(self, files: Sequence[str], picture: "Image.Image") -> bool:
        """Whether these files of a gallery's picture are of this one."""
        whole = [file for file in files if file.endswith(".png")]  # the small one is lossy
        if (len(files), len(whole)) != (FILES_AN_IMAGE, 1):  # left by one that was stopped
            return False
        with TemporaryDirectory() as folder:
            stored = _opened(self._store.client.download_artifacts(self.id, whole[0], folder))
        return (stored.size, stored.tobytes()) == (picture.size, picture.tobytes())

    def file(self, path: Path, folder: str | None = None) -> None:
        """Store a file among the run's artifacts, under its own name. Raises TrackingError."""
        with self._store.asking(f"store {path.name}"):
            self._store.client.log_artifact(self.id, str(path), folder)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Store rows as `name`.json, a column for every key; None where a row lacks one."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        data = [[row.get(column) for column in columns] for row in rows]
        shown = [{"path": f"{name}.json", "type": "table"}]
        with self._store.asking(f"store the table {name}"):
            # MLflow's own call appends to a table that is there already.
            tags = self._store.client.get_run(self.id).data.tags
            shown += [t for t in json.loads(tags.get(TABLES, "[]")) if t not in shown]
            content = json.dumps({"columns": columns, "data": data})
            self._store.client.log_text(self.id, content, f"{name}.json")
            self._store.client.set_tag(self.id, TABLES, json.dumps(shown))

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


def _opened(path: str | Path) -> "Image.Image":
    """The pixels of an image file, RGB."""
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")


def status_of(error: type[BaseException] | None) -> str:
    """How MLflow calls a run that ended with this error, or without one."""
    if error is None:
        return "FINISHED"
    return "FAILED" if issubclass(error, Exception) else "KILLED"


def settle_or_warn(store: Store, stage: str | None = None, experiment: str | None = None) -> None:
    """`settle`; what fails of it does not stop the run that is beginning."""
    try:
        settle(store, stage, experiment)
    except OSError as error:
        warn(str(error))


def warn(text: str) -> None:
    """Print a warning as one line on stderr."""
    said = " ".join(without_secrets(text).split())
    print(f"warning: {said}", file=sys.stderr, flush=True)


def flat(values: Mapping[str, Any], prefix: str = "", *, between: str = ".") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`; None is left out."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}{between}", between=between)
        elif value is not None:
            found[f"{prefix}{key}"] = value
    return found
