"""What a flow run looks at before anything heavy begins."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

from ruamel.yaml import YAML

from components import mlflow_place
from components.cli import MAY_PASS
from components.environment import FLOW_RUN, FLOW_RUN_URL
from components.errors import MayPassError
from components.lineage import COMMIT, git_commit, locked_stages
from components.params import Params, load_params
from components.paths import BUNDLE, DISTILLED, EVALUATED, PREPARED
from components.storage import Mirror
from flows.experiment import LOCK
from flows.process import StageFailed, ask
from flows.sharing import dvc_settings
from pnp_core.settings import UNSEEN

Stage = Literal["prepare", "cache", "distill", "halve", "evaluate", "register"]
STAGES: tuple[Stage, ...] = get_args(Stage)  # in the order of the graph
# What a stage reads of those before it. Where nothing is to be trained, the teacher cache may lack.
READS: dict[Stage, tuple[Path, ...]] = {
    "cache": (PREPARED,),
    "distill": (PREPARED,),
    "halve": (DISTILLED,),
    "evaluate": (PREPARED, BUNDLE),
    "register": (PREPARED, BUNDLE, EVALUATED),
}


def check_start(stage: Stage) -> None:
    """Raises StageFailed if a stage that a run starts at lacks what those before it make."""
    for path in READS.get(stage, ()):
        if not path.exists():
            line = f"error: there is no {path}: bring it (dvc pull), or start at an earlier stage"
            raise StageFailed(stage, 1, [line])


def check_left_out(params: str, start_at: Stage) -> None:
    """Compare the settings of the stages before `start_at` with those that dvc.lock has of them.

    What comes out would say that it was made with settings which nothing was made with.

    Args:
        params: the text of the run's params.yaml.
        start_at: stages before this one are left as they are.

    Raises StageFailed for the first that differs.
    """
    values = YAML(typ="safe", pure=True).load(params)
    made = locked_stages(LOCK.read_text(encoding="utf-8")) if LOCK.exists() else {}
    for name, told in made.items():
        stage, _, model = name.partition("@")
        left_out = stage in STAGES[: STAGES.index(start_at)]
        if not left_out or (model and model not in values["models"]):
            continue
        for key, was in told.get("params", {}).get("params.yaml", {}).items():
            if found := _difference(key, _telling(key, was), _telling(key, _value(values, key))):
                place, then, now = found
                line = (
                    f"error: {place} is {now!r}, and {name}, which is left as it is, was run with "
                    f"{then!r}: start at {stage}, or set {place} back"
                )
                raise StageFailed(start_at, 1, [line])


def _telling(section: str, value: Any) -> Any:
    """A section without the settings that change no result."""
    if not isinstance(value, Mapping):
        return value
    silent = {"batch_size"} if section == "cache" else UNSEEN
    return {name: each for name, each in value.items() if name not in silent}


def _value(values: Any, key: str) -> Any:
    """Of params.yaml, at a key with dots; None where there is none."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def _difference(key: str, was: Any, now: Any) -> tuple[str, Any, Any] | None:
    """The first place at or below a key where two values differ, and what they are there."""
    if not (isinstance(was, Mapping) and isinstance(now, Mapping)):
        return None if was == now else (key, was, now)
    below = (_difference(f"{key}.{k}", was.get(k), now.get(k)) for k in {**was, **now})
    return next((found for found in below if found), None)


def check_git() -> None:
    """Raises ValueError outside git, unless DVC is set to do without it."""
    if ask(["git", "rev-parse", "--git-dir"]) is not None:
        return
    if dvc_settings("start").get("core.no_scm", "").lower() != "true":
        raise ValueError(
            f"{Path.cwd()} is no git repository, and DVC versions the pipeline's results with git: "
            "clone the repository, or make this folder one: git init && git add . && git commit -m "
            "start"
        )


@contextmanager
def begin() -> Iterator[Params]:
    """Read and check params.yaml and `storage`; while open, this is one run.

    What params.yaml points at is not looked at: where DVC finds nothing changed, all of it is
    there, and looking takes as long as loading PyTorch. The stages name the commit that is checked
    out now, whatever is by the time they are reached.

    Raises ParamsError, or StageFailed in one line.
    """
    # Prefect reads its environment when it is imported, so only now.
    from prefect.runtime import flow_run
    from prefect.settings import PREFECT_API_URL

    params = load_params(Path("params.yaml"))
    try:
        mlflow_place.resolve(params.tracking.uri)
        if params.storage:
            Mirror(params.storage).check()
        commit = git_commit()
        if commit == "none":
            check_git()
    except (ValueError, OSError) as error:
        code = MAY_PASS if isinstance(error, MayPassError) else 1
        raise StageFailed("start", code, [f"error: {error}"]) from None
    told = {COMMIT: commit}
    if name := flow_run.name:
        told[FLOW_RUN] = str(name)
    if PREFECT_API_URL.value() and (url := flow_run.ui_url):  # a server that stays shows it
        told[FLOW_RUN_URL] = mlflow_place.without_secrets(str(url))  # MLflow and the report have it
    before = dict(os.environ)
    os.environ.update(told)
    try:
        yield params
    finally:
        for name in told:
            os.environ.pop(name, None)
            if name in before:
                os.environ[name] = before[name]
