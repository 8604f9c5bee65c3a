"""Where MLflow's store is, and how it is asked.

An answer is the store's own word. A question that fails in any other way is an error that says what
to do; it is never taken for "there is none".
"""

import logging
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Experiment, LifecycleStage
from mlflow.exceptions import MlflowException

from components.mlflow_place import DATABASE_SERVERS, SERVERS, resolve, without_secrets
from components.places import Tracking
from components.tracking.moved import ARTIFACTS, bring_artifacts_along

# The tag by which MLflow's pages know what an experiment is about, and its value for one that opens
# on its runs; without it, it opens on traces of language models.
KIND, RUNS = "mlflow.experimentKind", "custom_model_development"
MAX_MESSAGE = 300  # characters of a third party's words

# How often MLflow's client tries again, and how long it waits for an answer, in seconds.
PATIENT = (3, 30)
SECONDS_IN_SILENCE = 10.0
DAMAGED = ("file is not a database", "malformed")  # SQLite's words
UPGRADE = "mlflow db upgrade"  # which MLflow asks for where the database is of an older one
IMPATIENT = (0, 10)  # while training waits


class TrackingError(OSError):
    """MLflow could not be asked or refused. The message is one line that says what to do."""


class LostError(TrackingError):
    """What is registered has no files any more, by the word of the place that had them."""


class UnjudgedError(ValueError):
    """What is registered does not say what it was measured to be."""


class Store:
    """One MLflow store, open. Raises TrackingError, before anything is asked, if it can't work."""

    def __init__(self, tracking: Tracking, *, patience: tuple[int, int] = PATIENT) -> None:
        self.uri = store_uri(tracking)
        self.name = without_secrets(self.uri)
        self._patience = patience
        # A database error is ours to tell, in one line; a retry is none.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
        logging.getLogger("urllib3").setLevel(logging.ERROR)
        with self.asking("open the store"):
            if database := database_of(self.uri):
                bring_artifacts_along(database)
            _set_tracking_uri(self.uri)
            self.client = MlflowClient()

    @contextmanager
    def asking(self, what: str, *, is_repeatable: bool = True) -> Iterator[None]:
        """Whatever MLflow or what is below it raises in the block becomes a TrackingError.

        What is not repeatable is sent once, whatever the user's settings say.
        """
        retries, timeout_s = self._patience
        notice = threading.Timer(SECONDS_IN_SILENCE, self._say_waiting, [what])
        notice.daemon = True
        notice.start()
        try:
            with _settings(retries if is_repeatable else 0, timeout_s, force=not is_repeatable):
                yield
        except TrackingError:
            raise
        except Exception as error:  # MLflow's, SQLAlchemy's, botocore's: they share no other base
            raise TrackingError(
                f"MLflow at {self.name}: could not {what}: {_brief(error)}. {self._advice(error)}"
            ) from error
        finally:
            notice.cancel()

    def _say_waiting(self, what: str) -> None:
        retries, timeout_s = self._patience
        said = f"waiting for MLflow at {self.name}: to {what}"
        if self.uri.split(":")[0] in SERVERS:
            said += f"; it is asked {retries + 1} times, {timeout_s} seconds at most each time"
        print(said, file=sys.stderr, flush=True)

    def experiment(self, name: str) -> str:
        """The id of the experiment, made if the store says that there is none."""
        with self.asking(f"read the experiment {name!r}"):
            found = self.client.get_experiment_by_name(name)
        if found is None:
            with self.asking(f"make the experiment {name!r}"):
                try:
                    made = self.client.create_experiment(name, self._artifacts(), tags={KIND: RUNS})
                    return str(made)
                except MlflowException as error:
                    if error.error_code != "RESOURCE_ALREADY_EXISTS":
                        raise
                    found = self.client.get_experiment_by_name(name)  # someone was quicker
        if found.lifecycle_stage != LifecycleStage.ACTIVE:
            raise TrackingError(
                f"MLflow at {self.name}: the experiment {name!r} was deleted: bring it back with "
                f"`mlflow experiments restore --experiment-id {found.experiment_id}`, or name "
                "another as tracking.experiment"
            )
        if KIND not in found.tags:
            with self.asking("say that the experiment is one of runs"):
                self.client.set_experiment_tag(found.experiment_id, KIND, RUNS)
        return str(found.experiment_id)

    def check_artifacts(self, experiment_id: str) -> None:
        """Raises TrackingError if files of this experiment can't be written from here."""
        with self.asking("read where the experiment keeps its files"):
            found: Experiment = self.client.get_experiment(experiment_id)
        place = str(found.artifact_location)
        is_server = self.uri.split(":")[0] in SERVERS
        hint = f"Name another experiment than {found.name!r} as tracking.experiment"
        if place.startswith("mlflow-artifacts:") and not is_server:
            raise TrackingError(
                f"MLflow at {self.name}: the experiment's files are kept by an MLflow server "
                f"({place}). Name that server as tracking.uri. Or: {hint}"
            )
        folder = Path(place.removeprefix("file://"))
        is_local = place.startswith(("/", "file://"))
        if is_local and is_server and not folder.parent.is_dir():
            raise TrackingError(
                f"MLflow at {self.name}: the experiment's files are kept in {folder}, a folder of "
                f"another machine. {hint}"
            )

    def _artifacts(self) -> str | None:
        """Where a new experiment keeps its files: beside the database, or where a server says."""
        if database := database_of(self.uri):
            return str(database.parent / ARTIFACTS)
        if self.uri.split(":")[0].split("+")[0] in DATABASE_SERVERS:
            raise TrackingError(
                f"MLflow at {self.name}: a database server has no place for files. Run `mlflow "
                "server` on it with --artifacts-destination and name that as tracking.uri"
            )
        return None

    def _advice(self, error: Exception) -> str:
        code = getattr(error, "error_code", "")
        if code in ("PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"):
            return (
                "Check MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
                "MLFLOW_TRACKING_TOKEN, and what they may do there"
            )
        if database := database_of(self.uri):
            if any(words in str(error) for words in DAMAGED):
                return f"{database} is damaged: bring a copy of it back"
            if UPGRADE in str(error):
                return f"Copy {database.name} first"
            free = shutil.disk_usage(database.parent).free
            return (
                f"Is {database.parent} writable ({free / 1e6:,.0f} MB are free) and the database "
                "in use by another program? Then run the same command again"
            )
        return "Is it running, and tracking.uri right? Then run the same command again"


def store_uri(tracking: Tracking) -> str:
    """The store's URI. Raises TrackingError if MLflow can't keep its state there."""
    try:
        return resolve(tracking.uri)
    except ValueError as error:
        raise TrackingError(str(error)) from None


def database_of(uri: str) -> Path | None:
    """The file of an SQLite store."""
    match = re.fullmatch(r"sqlite[^:]*:///([^?]+)(\?.*)?", uri)
    return Path(match[1]) if match else None


def _set_tracking_uri(uri: str) -> None:
    """MLflow writes it into the environment too, where it would pass for what the user named."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    if before is None:
        os.environ.pop("MLFLOW_TRACKING_URI", None)
    else:
        os.environ["MLFLOW_TRACKING_URI"] = before


def is_absent(error: MlflowException) -> bool:
    """Whether the store itself says that there is no such thing."""
    return bool(error.error_code == "RESOURCE_DOES_NOT_EXIST")


def _brief(error: Exception) -> str:
    """The part of an error's text that says something, in one line."""
    text = " ".join(without_secrets(str(error)).split())
    text = re.split(r" \[SQL:| \(Background on this error|\. Response body: '<", text)[0]
    if cause := re.search(r"Caused by \w+\([\"'](?:\w+\(.*?\): )?(.*?)[\"']\)", text):
        text = cause[1]  # of urllib3's, which repeats the whole request before it
    text = text.rstrip(". ") or type(error).__name__
    return text if len(text) <= MAX_MESSAGE else text[:MAX_MESSAGE] + "…"


@contextmanager
def _settings(retries: int, timeout_s: int, *, force: bool) -> Iterator[None]:
    """MLflow's client takes its patience from the environment. What the user set wins.

    With `force`, not where it is about trying again.
    """
    values = {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries),
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout_s),
    }
    before = {name: os.environ.get(name) for name in values}
    os.environ.update({n: v for n, v in values.items() if before[n] is None})
    if force:
        os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = str(retries)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
