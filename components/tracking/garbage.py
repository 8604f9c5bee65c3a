"""Files beside the checkout's own MLflow database that it needs no more."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlflow.entities import ViewType
from mlflow.exceptions import MlflowException

from components.tracking.journal import KEY
from components.tracking.moved import ARTIFACTS
from components.tracking.store import Store, database_of, is_absent

SECONDS_UNTOUCHED = 86_400.0  # what is younger may be a registration under way


def artifacts_of(store: Store) -> Path | None:
    """The folder of the store's artifacts; None where a server keeps them."""
    database = database_of(store.uri)
    return database.parent / ARTIFACTS if database else None


def unneeded(store: Store) -> list[Path]:
    """Artifacts of runs that were deleted, and of our models that no version was ever made of.

    Only what the store itself says so of is among them: a file that it does not know may be of
    another store, or of this one before its database was lost. Raises TrackingError if it can't
    tell.
    """
    folder = artifacts_of(store)
    if folder is None or not folder.is_dir():
        return []
    with store.asking("read the experiments"):
        found = _all(lambda at: store.client.search_experiments(ViewType.ALL, page_token=at))
    experiments = [experiment.experiment_id for experiment in found]
    names = [*_deleted_runs(store, experiments), *_models_of_no_version(store, experiments)]
    before = time.time() - SECONDS_UNTOUCHED
    paths = sorted(path for name in names if (path := folder / name).is_dir())
    return [path for path in paths if last_change(path) < before]


def locks_of_aliases(store: Store, name: str) -> dict[str, str]:
    """By alias of a registered model, the hash of the dvc.lock that its version was made with.

    Raises TrackingError if the store can't tell.
    """
    with store.asking(f"read the aliases of {name}"):
        try:
            aliases = store.client.get_registered_model(name).aliases
        except MlflowException as error:
            if not is_absent(error):
                raise
            return {}
        versions = {a: store.client.get_model_version(name, v) for a, v in aliases.items()}
    return {alias: str(version.tags.get("lock_hash")) for alias, version in versions.items()}


def _deleted_runs(store: Store, experiments: list[str]) -> list[str]:
    def page(at: str | None) -> Any:
        return store.client.search_runs(
            experiments, run_view_type=ViewType.DELETED_ONLY, page_token=at
        )

    with store.asking("read which runs were deleted"):
        return [run.info.run_id for run in _all(page)]


def _models_of_no_version(store: Store, experiments: list[str]) -> list[str]:
    """Uploads of guides that broke off.

    Not among them is one whose run finished: a version was made of it. If it is not here, it was
    deleted, or is in another registry and may be champion there.
    """
    with store.asking("read the models, versions and runs"):
        models = _all(lambda at: store.client.search_logged_models(experiments, page_token=at))
        versions = _all(lambda at: store.client.search_model_versions(page_token=at))
        runs = _all(
            lambda at: store.client.search_runs(
                experiments, "attributes.status = 'FINISHED'", ViewType.ALL, page_token=at
            )
        )
    used = {str(version.source).rpartition("/")[2] for version in versions}
    used |= {str(version.model_id) for version in versions}
    finished = {run.info.run_id for run in runs}
    ours = [model for model in models if KEY in model.tags and model.source_run_id not in finished]
    return [f"models/{model.model_id}" for model in ours if model.model_id not in used]


def _all(page_at: Callable[[str | None], Any]) -> list[Any]:
    """What all pages of an answer hold."""
    found: list[Any] = []
    token = None
    while True:
        page = page_at(token)
        found += page
        if not (token := page.token):
            return found


def last_change(path: Path) -> float:
    """When the file or folder, or anything in it, was last changed; seconds since 1970."""
    return max(file.stat().st_mtime for file in (path, *path.rglob("*")))
