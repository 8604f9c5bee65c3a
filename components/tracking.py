"""MLflow: one run for each stage that has something to say, and the registry of guides.

Only the driving process writes; workers report through it. The default store is `mlflow.db` in the
working directory, its artifacts in `mlartifacts/`.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, ViewType
from mlflow.exceptions import MlflowException

from components.params import Tracking

CHAMPION = "champion"


def connect(tracking: Tracking) -> tuple[MlflowClient, str]:
    """A client and the id of the experiment, made if need be.

    Raises ValueError if the store can't be reached.
    """
    local = f"sqlite:///{Path('mlflow.db').absolute()}"
    uri = tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or local
    mlflow.set_tracking_uri(uri)
    client = MlflowClient()
    try:
        experiment = client.get_experiment_by_name(tracking.experiment)
        if experiment:
            return client, str(experiment.experiment_id)
        # A server hands out artifact locations; a database of our own keeps them beside it.
        artifacts = str(Path("mlartifacts").absolute()) if uri.startswith("sqlite:") else None
        made = client.create_experiment(tracking.experiment, artifact_location=artifacts)
        return client, str(made)
    except MlflowException as error:
        raise ValueError(f"MLflow at {uri}: {error}") from None


class Run:
    """A stage's MLflow run. Closed by `with`; a run of the same `key` that broke off is resumed."""

    def __init__(
        self, tracking: Tracking, stage: str, *, key: str, params: Mapping[str, Any]
    ) -> None:
        self._client, experiment = connect(tracking)
        unfinished = self._client.search_runs(
            [experiment],
            f"tags.`pnp.key` = '{key}' and attributes.status != 'FINISHED'",
            run_view_type=ViewType.ACTIVE_ONLY,
            max_results=1,
        )
        if unfinished:
            self.id = unfinished[0].info.run_id
            self._client.update_run(self.id, status="RUNNING")
        else:
            tags = {"pnp.key": key, "pnp.stage": stage}
            self.id = self._client.create_run(experiment, run_name=stage, tags=tags).info.run_id
            for name, value in _flat(params).items():
                self._client.log_param(self.id, name, value)
        self.experiment = experiment
        self._logged: dict[str, int] = {}  # metric -> the last step it has

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._client.set_terminated(self.id, "FAILED" if kind else "FINISHED")

    def curve(self, num_images: int, metrics: Mapping[str, float]) -> None:
        """A point of each curve. A point that an earlier attempt logged is not logged again."""
        now, points = int(time.time() * 1000), []
        for name, value in metrics.items():
            if name not in self._logged:
                history = self._client.get_metric_history(self.id, name)
                self._logged[name] = max((point.step for point in history), default=-1)
            if num_images > self._logged[name]:
                points.append(Metric(name, float(value), now, num_images))
                self._logged[name] = num_images
        if points:
            self._client.log_batch(self.id, metrics=points)

    def metrics(self, values: Mapping[str, Any], *, model_id: str | None = None) -> None:
        """Numbers without a step, nested ones under dotted names; None is left out."""
        for name, value in _flat(values).items():
            if isinstance(value, int | float):
                self._client.log_metric(self.id, name, float(value), step=0, model_id=model_id)

    def tags(self, values: Mapping[str, str]) -> None:
        for name, value in values.items():
            self._client.set_tag(self.id, name, value)

    def image(self, key: str, path: Path) -> None:
        """Show the PNG at `path` in the run's gallery as `key`."""
        from PIL import Image

        with Image.open(path) as image:
            self._client.log_image(self.id, image.convert("RGB"), key=key, step=0)

    def file(self, path: Path) -> None:
        self._client.log_artifact(self.id, str(path))

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        table = {column: [row.get(column) for row in rows] for column in columns}
        self._client.log_table(self.id, table, f"{name}.json")

    def dataset(self, name: str, *, digest: str, path: Path) -> None:
        """The data that this run is based on, by its DVC hash."""
        data = Dataset(
            name=name,
            digest=digest[:36],
            source_type="dvc",
            source=json.dumps({"path": path.as_posix(), "hash": digest}),
        )
        tags = [InputTag("mlflow.data.context", "training")]
        self._client.log_inputs(self.id, [DatasetInput(data, tags)])

    def register(
        self,
        name: str,
        folder: Path,
        *,
        metrics: Mapping[str, Any],
        tags: Mapping[str, str],
        description: str,
    ) -> str:
        """Register the files in `folder` as a new version of model `name`; returns the version.

        Its page and the run's show the `description`, in Markdown.
        `mlflow.artifacts.download_artifacts("models:/<name>@champion")` gives the folder back:
        plain files, nothing to unpickle.
        """
        model = self._client.create_logged_model(
            self.experiment, name=name, source_run_id=self.id, tags=dict(tags), model_type="guide"
        )
        self._client.log_model_artifacts(model.model_id, str(folder))
        self._client.finalize_logged_model(model.model_id, "READY")
        self._client.set_tag(self.id, "mlflow.note.content", description)
        self.metrics(metrics, model_id=model.model_id)
        with suppress(MlflowException):  # it is there already
            self._client.create_registered_model(name)
        made = self._client.create_model_version(
            name,
            source=f"models:/{model.model_id}",
            run_id=self.id,
            tags=dict(tags),
            model_id=model.model_id,
            description=description,
        )
        return str(made.version)


class Registry:
    """Versions of one registered model."""

    def __init__(self, tracking: Tracking, name: str) -> None:
        self._client, _ = connect(tracking)
        self.name = name

    def newest(self) -> str | None:
        """The newest version, or None if there is none."""
        versions = self._client.search_model_versions(f"name = '{self.name}'")
        return str(max(int(version.version) for version in versions)) if versions else None

    def champion(self) -> str | None:
        """The version with the alias, or None if none has it."""
        try:
            found = self._client.get_model_version_by_alias(self.name, CHAMPION)
        except MlflowException:  # which says so of a missing alias with an odd error code
            return None
        return str(found.version)

    def folder(self, version: str) -> Path:
        """A local copy of the version's files. Raises ValueError if there is no such version."""
        try:
            uri = f"models:/{self.name}/{version}"
            return Path(mlflow.artifacts.download_artifacts(uri))
        except MlflowException as error:
            raise ValueError(f"{self.name} has no usable version {version}: {error}") from None

    def crown(self, version: str) -> None:
        """Give the alias to `version`."""
        self._client.set_registered_model_alias(self.name, CHAMPION, version)

    def note(self, version: str, key: str, value: str) -> None:
        self._client.set_model_version_tag(self.name, version, key, value)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            flat[f"{prefix}{key}"] = value
    return flat
