"""Versions of one registered model, its champion, and who was it before."""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException

from components.mlflow_place import without_secrets
from components.places import Tracking
from components.tracking.decisions import (
    NOBODY,
    REFUSED,
    ROLLED_BACK,
    Decision,
    record,
    recorded,
)
from components.tracking.journal import KEY
from components.tracking.lock import DecisionLock
from components.tracking.runs import Run, settle_or_warn
from components.tracking.store import (
    LostError,
    Store,
    TrackingError,
    UnjudgedError,
    database_of,
    is_absent,
)

# Without it a browser that was never told otherwise shows MLflow's pages for language models.
TRAINING = "workflowType=machine_learning"
CHAMPION = "champion"
PREVIOUS = "previous"
SUMMARY = "summary.json"
ON_THIS_DISK = ("/", "file://")  # how URIs of such files begin
# Of what a version was made of: its run and its files say all of it, and the list of versions is
# as high as these are many.
TAGS_OF_VERSION = ("git_commit", "lock_hash", "num_steps", "guidance_scale", KEY)


class Registry:
    """One registered model. Raises TrackingError for whatever the store could not answer."""

    def __init__(self, tracking: Tracking, name: str) -> None:
        self._tracking, self.name = tracking, name
        self.store = Store(tracking)
        self._client = self.store.client
        self._lock: DecisionLock | None = None

    def settle(self) -> None:
        """End what earlier runs of this checkout left unfinished."""
        settle_or_warn(self.store)

    def versions(self) -> list[int]:
        """All versions, in order; empty if the registry says that it has none."""
        with self.store.asking(f"read the versions of {self.name}"):
            found: list[int] = []
            token = None
            while True:
                page = self._client.search_model_versions(f"name = '{self.name}'", page_token=token)
                found += [int(version.version) for version in page]
                if not (token := page.token):
                    break
        if not found:
            self._model()  # an empty answer is not taken from something that is no registry
        return sorted(found)

    def newest(self) -> str | None:
        """The newest version, or None if the registry says that it has none."""
        versions = self.versions()
        return str(versions[-1]) if versions else None

    def champion(self) -> str | None:
        """The champion, or None if the registry, asked in two ways, has none."""
        return self.named(CHAMPION)

    def previous(self) -> str | None:
        """Who was champion before, or None if the registry, asked in two ways, has none."""
        return self.named(PREVIOUS)

    def named(self, alias: str) -> str | None:
        """The version with the alias, or None if the registry, asked in two ways, has none."""
        model = self._model()
        listed = model.aliases.get(alias) if model else None
        with self.store.asking(f"read who the {alias} of {self.name} is"):
            try:
                named = self._client.get_model_version_by_alias(self.name, alias).version
            except MlflowException as error:
                # This is how MLflow says that an alias is missing.
                odd = error.error_code == "INVALID_PARAMETER_VALUE" and "not found" in str(error)
                if not (odd or is_absent(error)):
                    raise
                named = None
        if str(listed) != str(named):
            raise TrackingError(
                f"MLflow at {self.store.name}: its two answers to who the {alias} of "
                f"{self.name} is differ: {listed or NOBODY} and {named or NOBODY}. Run the same "
                "command again"
            )
        return None if named is None else str(named)

    def find(self, key: str) -> str | None:
        """The first version that was registered with `key` and still has its files."""
        with self.store.asking(f"look for the version of {self.name} with these files"):
            found = self._client.search_model_versions(
                f"name = '{self.name}' and tags.`{KEY}` = '{key}'"
            )
        for version in sorted(int(version.version) for version in found):
            if not self._is_lost(self._location(str(version))):
                return str(version)
        return None

    @contextmanager
    def folder(self, version: str) -> Iterator[Path]:
        """The version's files: the store's own if it is on this disk, else a copy while it is open.

        Raises ValueError if there is no such version, LostError if its files are lost.
        """
        uri = self._usable(version)
        with tempfile.TemporaryDirectory() as temporary:
            into = None if uri.startswith(ON_THIS_DISK) else temporary
            with self.store.asking(f"download {self.name} version {version}"):
                files = mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=into)
            yield Path(files)

    def check_files(self, version: str) -> None:
        """See that the version has its files. Raises as `folder` does."""
        self._usable(version)

    def summary(self, version: str) -> dict[str, Any]:
        """What the version was measured to be: its summary.json, with `lineage` and `models`.

        Raises as `folder` does, and UnjudgedError for a version that does not say.
        """
        uri = self._usable(version)
        with self.store.asking(f"read {self.name} version {version}"):
            there = {Path(f.path).name for f in mlflow.artifacts.list_artifacts(artifact_uri=uri)}
        if SUMMARY not in there:
            raise UnjudgedError(
                f"{self.name} version {version} has no {SUMMARY}: it was not registered by the "
                "stage register, and nothing says what it was measured to be"
            )
        with tempfile.TemporaryDirectory() as temporary:
            with self.store.asking(f"read {self.name} version {version}"):
                file = mlflow.artifacts.download_artifacts(
                    artifact_uri=f"{uri}/{SUMMARY}", dst_path=temporary
                )
            try:
                found = json.loads(Path(file).read_text(encoding="utf-8"))
                lineage, models = found.get("lineage", {}), found["models"]
                return {**found, "lineage": dict(lineage), "models": dict(models)}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UnjudgedError(
                    f"{without_secrets(uri)}/{SUMMARY} can't be read ({error}): register the guide "
                    "again"
                ) from None

    def register(  # noqa: PLR0913, a decision's parts
        self,
        run: Run,
        folder: Path,
        *,
        key: str,
        metrics: Mapping[str, Any],
        tags: Mapping[str, str],
        description: str,
    ) -> str:
        """Register the files in `folder` as a new version; returns it.

        Look for one of the same `key` before (`find`): this never does it twice by itself. Its page
        and the run's show the `description`, in Markdown. The files are plain ones, with nothing to
        unpickle.
        """
        own = {**tags, KEY: key}
        with self.store.asking(f"upload the files of {self.name}"):
            model = self._client.create_logged_model(
                run.experiment, name=self.name, source_run_id=run.id, tags=own, model_type="guide"
            )
            self._client.log_model_artifacts(model.model_id, str(folder))
            self._client.finalize_logged_model(model.model_id, "READY")
            self._client.set_tag(run.id, "mlflow.note.content", description)
        run.metrics(metrics, model_id=model.model_id)
        if self._model() is None:
            with self.store.asking(f"make the registered model {self.name}"):
                try:
                    self._client.create_registered_model(self.name)
                except MlflowException as error:
                    if error.error_code != "RESOURCE_ALREADY_EXISTS":  # someone was quicker
                        raise
        try:
            # Sent once: an answer that is lost does not mean that it was not done.
            with self.store.asking(f"register a version of {self.name}", is_repeatable=False):
                made = self._client.create_model_version(
                    self.name,
                    source=f"models:/{model.model_id}",
                    run_id=run.id,
                    tags={name: own[name] for name in TAGS_OF_VERSION if name in own},
                    model_id=model.model_id,
                    description=description,
                )
        except TrackingError:
            if (version := self.find(key)) is None:
                raise
            return version
        return str(made.version)

    def address(self, version: str) -> str | None:
        """The page of the run that made the version; None where no server shows one."""
        if not self.store.uri.startswith(("http://", "https://")):
            return None
        with self.store.asking(f"read what run made {self.name} version {version}"):
            run = self._client.get_run(self._client.get_model_version(self.name, version).run_id)
        server = without_secrets(self.store.uri).rstrip("/")
        page = f"{server}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
        return f"{page}?{TRAINING}"

    def run_name(self, version: str) -> str:
        """What the run that made the version is called."""
        return f"{self.name} v{version}"

    def finish_run(self, version: str, page: Path, folder: str) -> None:
        """End the run that made the version, with its name and its page, if that broke off.

        Call `settle` before, which may say of it that it failed.
        """
        with self.store.asking(f"finish the run of {self.name} version {version}"):
            made = self._client.get_model_version(self.name, version).run_id
            try:
                run = self._client.get_run(made).info
            except MlflowException as error:
                if not is_absent(error):
                    raise
                return
            if run.status == "FINISHED" or run.lifecycle_stage != "active":
                return
            self._client.log_artifact(run.run_id, str(page), folder)
            self._client.update_run(run.run_id, name=self.run_name(version))
            self._client.set_terminated(run.run_id, "FINISHED")

    def run_file(self, version: str, path: str, folder: Path) -> Path | None:
        """A file of the run that made the version, brought into `folder`; None if it has none."""
        with self.store.asking(f"read {path} of the run of {self.name} version {version}"):
            run = self._client.get_model_version(self.name, version).run_id
            there = self._client.list_artifacts(run, str(Path(path).parent))
            if path not in {file.path for file in there}:
                return None
            return Path(self._client.download_artifacts(run, path, str(folder)))

    @contextmanager
    def deciding(self, *, wait_s: float) -> Iterator[None]:
        """While it is open, nobody else decides: read and judge in it what `decide` is told.

        Raises TrackingError where someone else is at it for longer than `wait_s`.
        """
        with DecisionLock(self.store, self.name, wait_s=wait_s) as lock:
            self._lock = lock
            try:
                yield
            finally:
                self._lock = None

    def decide(self, decision: Decision, *, files: Sequence[Path] = ()) -> None:
        """Record the decision and, where it is to move the alias, move it and see that it moved.

        Args:
            decision: what was decided, while `deciding`.
            files: what it is based on, kept with the record.

        Raises TrackingError if the champion is no longer the one that the candidate was compared
        with, or if the registry does not do as told; the record says so.
        """
        assert self._lock, "decide in a block of deciding()"
        with record(self.store, self._tracking, self.name, decision, files):
            if decision.verdict != REFUSED:
                self._crown(decision, self._lock)

    def decisions(self) -> list[Decision]:
        """All decisions, the oldest first."""
        return recorded(self.store, self.name)

    def _crown(self, decision: Decision, lock: DecisionLock) -> None:
        """Move `champion`, and `previous` to who had it before."""
        version, before = decision.candidate, decision.champion
        if (now := self.champion()) != before:
            raise TrackingError(
                f"{self.name}: version {now or NOBODY} became {CHAMPION} while version {version} "
                f"was compared with {before or NOBODY}. Nothing was changed: run the same "
                "command again"
            )
        self.check_files(version)  # else `previous` would move for a version that is gone
        moves = [(PREVIOUS, before), (CHAMPION, version)]
        if decision.verdict == ROLLED_BACK:
            moves.reverse()  # so that the one that is gone back to has an alias all the time
        for alias, to in moves:
            if to is not None:
                lock.check()
                with self.store.asking(f"make version {to} of {self.name} its {alias}"):
                    self._client.set_registered_model_alias(self.name, alias, to)
        if (now := self.champion()) != version:
            raise TrackingError(
                f"{self.name}: the {CHAMPION} was set to version {version}, and is "
                f"{now or NOBODY}: someone else moved it at the same time. See python -m "
                "components.promote --log, then run the same command again"
            )

    def _model(self) -> Any:
        """The registered model, or None if the registry says that there is none."""
        with self.store.asking(f"read the registered model {self.name}"):
            try:
                model = self._client.get_registered_model(self.name)
            except MlflowException as error:
                if not is_absent(error):
                    raise
                return None
            if model.name != self.name:
                raise ValueError(f"it answers with {model.name!r}")
        return model

    def _location(self, version: str) -> str:
        """The URI of the version's files. Raises ValueError if there is no such version."""
        with self.store.asking(f"read where {self.name} version {version} is"):
            try:
                return str(self._client.get_model_version_download_uri(self.name, version))
            except MlflowException as error:
                if not is_absent(error):
                    raise
        there = ", ".join(map(str, self.versions())) or NOBODY
        raise ValueError(
            f"{self.name} has no usable version {version} in MLflow at {self.store.name}; "
            f"its versions are: {there}"
        )

    def _usable(self, version: str) -> str:
        """The URI of the version's files, which are there."""
        uri = self._location(version)
        if self._is_lost(uri):
            raise LostError(
                f"{self.name} version {version} is registered, but its files are lost: there is "
                f"nothing at {without_secrets(uri)}. Bring them back, or register the guide again: "
                "dvc repro --force --single-item register"
            )
        return uri

    def _is_lost(self, uri: str) -> bool:
        """Whether the place that should have the files can be read and has none.

        Raises TrackingError if it can't be told.
        """
        if not uri.startswith(ON_THIS_DISK):
            with self.store.asking(f"look into {without_secrets(uri)}"):
                return not mlflow.artifacts.list_artifacts(artifact_uri=uri)
        path = Path(uri.removeprefix("file://"))
        if path.is_dir():
            return not any(path.iterdir())
        database = database_of(self.store.uri)
        beside = database is not None and path.is_relative_to(database.parent)
        if beside or any(parent.is_dir() for parent in path.parents[:3]):
            return True
        raise TrackingError(
            f"{self.name}: its files should be at {path}, and nothing of that is there: was the "
            f"checkout moved without them, or is a disk missing? They belong beside "
            f"{database or self.store.name}"
        )
