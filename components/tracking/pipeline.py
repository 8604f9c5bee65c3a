"""A run of the pipeline in MLflow: the parent of its stages' and models' runs.

It is no process's own: whoever delivers a run that belongs to it finds or makes it by its id, says
that it is running, and how it ended. Its id is in runs/pipeline.json from its first stage until its
guide is registered, so a run that was stopped is gone on with, through whichever door.
"""

import hashlib
import os
import sys
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow.entities import ViewType

from components.environment import FLOW_RUN, FLOW_RUN_URL
from components.params import Params
from components.paths import RUNS
from components.tracking.journal import ATTEMPT, OWNER, PLACE, STAGE, is_alive
from components.tracking.store import Store
from pnp_core.files import read_json, write_json
from pnp_core.settings import UNSEEN

PIPELINE, PART, PARENT = "pnp.pipeline", "pnp.part", "mlflow.parentRunId"
STAGE_OF_PIPELINES = "pipeline"
NOTE = RUNS / "pipeline.json"
# They change no result.
NO_MATTER: dict[str, bool | set[str]] = {
    **dict.fromkeys(("tracking", "cluster", "promote", "storage"), True),
    **dict.fromkeys(("distill", "halve"), UNSEEN),
}


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Which run of the pipeline a stage belongs to.

    Attributes:
        id: its own.
        name: what MLflow calls it until it has a version.
        tags: from where it was begun.
        is_itself: whether a run is that of the pipeline, rather than one of its children.
        part: of a child that the pipeline has once, whoever began it: its name; else empty.
    """

    id: str
    name: str
    tags: Mapping[str, str] = field(default_factory=dict)
    is_itself: bool = False
    part: str = ""


def current_pipeline(params: Params) -> Pipeline:
    """The one that this process is a part of: what was noted, if its settings are the same."""
    settings = params.model_dump_json(by_alias=True, exclude=NO_MATTER)
    digest = hashlib.sha256(settings.encode()).hexdigest()
    noted: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        noted = read_json(NOTE)
    if noted.get("settings") != digest:
        noted = {"id": uuid.uuid4().hex, "settings": digest, "began": time.strftime("%F %R")}
        with suppress(OSError):  # each stage is a run of its own then
            NOTE.parent.mkdir(parents=True, exist_ok=True)
            write_json(NOTE, noted)
    return Pipeline(
        id=noted["id"],
        name=f"{params.register_.name}, begun {noted['began']}",
        tags=_origin(),
    )


def finish_pipeline() -> None:
    """Its guide is registered: what runs next is another run of the pipeline."""
    with suppress(OSError):
        NOTE.unlink(missing_ok=True)


def find(store: Store, experiment: str, pipeline: Mapping[str, Any]) -> str | None:
    """Its run in MLflow; None if there is none yet."""
    return _with_tags(store, experiment, {PIPELINE: pipeline["id"], STAGE: STAGE_OF_PIPELINES})


def find_part(store: Store, experiment: str, run: str, part: str) -> str | None:
    """The run of one part of it; None if there is none yet."""
    return _with_tags(store, experiment, {PARENT: run, PART: part})


def ensure(store: Store, experiment: str, header: Mapping[str, Any]) -> str:
    """Its run in MLflow, made for the journal of this header if there is none."""
    found = find(store, experiment, header["pipeline"])
    if found is not None:
        return found
    with store.asking("begin the pipeline's run"):
        made = store.client.create_run(
            experiment,
            start_time=header["began"],
            run_name=header["pipeline"]["name"],
            tags=own_tags(header),
        )
    return str(made.info.run_id)


def own_tags(header: Mapping[str, Any]) -> dict[str, str]:
    """The tags of the pipeline's run, from the journal of a run that belongs to it."""
    pipeline = header["pipeline"]
    shared = (OWNER, PLACE, "mlflow.user")
    tags = {name: header["tags"][name] for name in shared if name in header["tags"]}
    return tags | pipeline["tags"] | {PIPELINE: pipeline["id"], STAGE: STAGE_OF_PIPELINES}


def reopen(store: Store, run: str) -> None:
    """A part of it is running."""
    with store.asking("say that the pipeline is running"):
        store.client.update_run(run, status="RUNNING")


def close(store: Store, run: str, status: str, at: int | None = None) -> None:
    """End a run with this status if it is running, and neither a process here nor a part is."""
    with store.asking("say how a run ended"):
        found = store.client.get_run(run)
        if found.info.status != "RUNNING" or is_alive(found.data.tags.get(ATTEMPT, "")):
            return
        parts = store.client.search_runs(
            [found.info.experiment_id],
            f"tags.`{PARENT}` = '{run}' and attributes.status = 'RUNNING'",
            run_view_type=ViewType.ACTIVE_ONLY,
            max_results=1,
        )
        if not parts:
            store.client.set_terminated(run, status, at)


def _with_tags(store: Store, experiment: str, tags: Mapping[str, str]) -> str | None:
    with store.asking("look for the pipeline's run"):
        runs = store.client.search_runs(
            [experiment],
            " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items()),
            run_view_type=ViewType.ACTIVE_ONLY,
            max_results=1,
        )
    return str(runs[0].info.run_id) if runs else None


def _origin() -> dict[str, str]:
    """From where this process was started, as MLflow shows it."""
    tags = {"mlflow.source.type": "LOCAL"}
    if flow_run := os.environ.get(FLOW_RUN):
        tags |= {"mlflow.source.name": "prefect flow distill", "prefect.flow_run": flow_run}
        if url := os.environ.get(FLOW_RUN_URL):
            tags["prefect.flow_run_url"] = url
    elif stage := os.environ.get("DVC_STAGE"):
        tags["mlflow.source.name"] = "dvc repro"
        tags["pnp.dvc_stage"] = stage
    else:
        tags["mlflow.source.name"] = Path(sys.argv[0]).name or "python"
    return tags
