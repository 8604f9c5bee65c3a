"""Files beside the checkout's own MLflow database that nothing in it names any more."""

import time
from pathlib import Path

from mlflow.entities import ViewType
from mlflow.exceptions import MlflowException

from components.tracking.moved import ARTIFACTS
from components.tracking.store import Store, database_of, is_absent

SECONDS_UNTOUCHED = 86_400.0  # what is younger may be a registration under way
PAGE = 1000


def artifacts_of(store: Store) -> Path | None:
    """The folder of the store's artifacts; None where a server keeps them."""
    database = database_of(store.uri)
    return database.parent / ARTIFACTS if database else None


def unneeded(store: Store) -> list[Path]:
    """Artifacts of runs that were deleted, and of models that no version was made of.

    Whatever belongs to a run that is there, to a version or, with that, to an alias is not among
    them. Raises TrackingError if the store can't tell.
    """
    folder = artifacts_of(store)
    if folder is None or not folder.is_dir():
        return []
    runs, models = _runs(store), _models(store)
    found = []
    for path in sorted(folder.iterdir()):
        if path.name == "models":
            found += [model for model in sorted(path.iterdir()) if model.name not in models]
        elif path.is_dir() and path.name not in runs:
            found.append(path)
    before = time.time() - SECONDS_UNTOUCHED
    return [path for path in found if _last_change(path) < before]


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


def _runs(store: Store) -> set[str]:
    """Every run that was not deleted."""
    with store.asking("read the experiments"):
        experiments = store.client.search_experiments(view_type=ViewType.ALL, max_results=PAGE)
    found: set[str] = set()
    for experiment in experiments:
        token = None
        while True:
            with store.asking("read the runs"):
                page = store.client.search_runs(
                    [experiment.experiment_id],
                    run_view_type=ViewType.ACTIVE_ONLY,
                    max_results=PAGE,
                    page_token=token,
                )
            found |= {run.info.run_id for run in page}
            if not (token := page.token):
                break
    return found


def _models(store: Store) -> set[str]:
    """Every logged model that a version was made of."""
    found: set[str] = set()
    token = None
    while True:
        with store.asking("read the versions"):
            page = store.client.search_model_versions(max_results=PAGE, page_token=token)
        for version in page:
            found.add(str(version.source).rpartition("/")[2])
            if getattr(version, "model_id", None):
                found.add(str(version.model_id))
        if not (token := page.token):
            return found


def _last_change(path: Path) -> float:
    return max(file.stat().st_mtime for file in (path, *path.rglob("*")))
