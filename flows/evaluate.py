"""Measuring without training: a new fine-tune, and the champion again."""

import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from json import dumps
from pathlib import Path

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run

from components.curves import headline
from components.evaluation import Evaluation
from components.fetch import NO_CHAMPION
from components.inputs import check_model
from components.likeness import differences
from components.params import ParamsError, check_files, check_model_name, load_params
from components.paths import BUNDLE, EVALUATED
from flows.artifacts import publish_metrics
from flows.distill import evaluate_all, names_in_dvc
from flows.experiment import PARAMS, experiment, workspace
from flows.lost import settle_lost_runs
from flows.process import StageFailed, log_without_tracebacks, run
from flows.stages import evaluate, look
from flows.start import begin
from flows.watching import saying_why
from pnp_core.files import read_json

SUMMARY = "summary.json"


def check_given(path: str, reference: str) -> None:
    """Raise ParamsError if there is no such model or folder, before a workspace is made."""
    try:
        check_model(path, load_params(PARAMS).base)
    except ValueError as error:
        raise ParamsError(f"path: {error}") from None
    if not Path(reference).exists():
        raise ParamsError(f"reference: there is no {reference}")


@flow(name="evaluate-finetune", log_prints=True)
def evaluate_finetune_flow(path: str, reference: str, name: str = "") -> None:
    """Measure the guide in this checkout on one more fine-tune, or base of the same architecture.

    params.yaml and the checkout stay as they are: the run is a DVC experiment of the flow run's
    name. Nothing is trained or registered.

    Args:
        path: the model: a pipeline folder, a folder with unet/, a .safetensors file, a LoRA folder.
        reference: real images in the model's style: a parquet file, or a folder of them.
        name: its row in the results; by default the last part of its path.
    """
    log_without_tracebacks()
    log = get_run_logger().info
    settle_lost_runs(log)
    name = name or name_of(path)
    with saying_why():
        if name in load_params(PARAMS).models:
            raise ParamsError(f"name: params.yaml has a model {name} already: give it another name")
        if not BUNDLE.exists():
            line = f"error: there is no guide in {BUNDLE}: run distill first, or dvc pull"
            raise StageFailed("start", 1, [line])
        given = {"path": _placed(path), "reference": _placed(reference)}
        check_given(**given)
        overrides = row_of(name, given)
        with experiment(overrides, flow_run.name or "run", log), begin() as params:
            check_files(params)
            evaluate(name, look(params, (f"evaluate@{name}",)))
            publish_metrics(name, EVALUATED / name)


def name_of(path: str) -> str:
    """The row of a model that was given no name; a version such as v1.5 is part of it."""
    name = Path(path).name.removesuffix(".safetensors")
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-_")


def row_of(name: str, values: Mapping[str, str]) -> list[str]:
    """The overrides that add a model. Raises ParamsError if none can have this name."""
    check_model_name(name)
    # In quotes, as a path may look like something else to YAML.
    return [f"models.{name}.{key}={dumps(value)}" for key, value in values.items()]


@flow(name="reevaluate", log_prints=True)
def reevaluate_flow() -> None:
    """Measure the champion again, by the code and params.yaml of this checkout.

    Shows each number beside the one that it was registered with, if that was measured alike.
    Nothing is registered or promoted, and the checkout stays as it is. Without a champion there is
    nothing to do.
    """
    log_without_tracebacks()
    log = get_run_logger().info
    settle_lost_runs(log)
    with (
        saying_why(),
        workspace(
            PARAMS.read_text(encoding="utf-8"), f"{flow_run.name}: the champion again", log
        ) as place,
        begin() as params,
    ):
        if not fetch_champion():
            place.is_done = True
            return
        check_files(params)
        models = list(params.models)
        evaluate_all(models, look(params, names_in_dvc(params, ["evaluate"])))
        before = registered()
        for model in models:
            publish_metrics(model, EVALUATED / model)
            compare(model, before.get(model), EVALUATED / model)
        place.is_done = True


@task(task_run_name="fetch", cache_policy=NO_CACHE)
def fetch_champion() -> bool:
    """Put the champion's files in the place of the guide; False if there is no champion."""
    command = [sys.executable, "-m", "components.fetch", "--version", "champion", "--to"]
    try:
        run("fetch", [*command, str(BUNDLE)], get_run_logger().info)
    except StageFailed as error:
        if error.exit_code != NO_CHAMPION:
            raise
        return False
    return True


def registered() -> Mapping[str, Evaluation]:
    """By model what the champion's summary has; nothing of another format.

    A guide that was made elsewhere has no summary.
    """
    path = BUNDLE / SUMMARY
    models = read_json(path)["models"] if path.exists() else {}
    found = {}
    for model, evaluation in models.items():
        with suppress(ValueError):
            found[model] = Evaluation.from_json(evaluation, where=SUMMARY)
    return found


def compare(model: str, before: Evaluation | None, folder: Path) -> None:
    """Show what a model's numbers were when the champion was registered, and are.

    What was measured otherwise then is left out, and said to be.
    """
    now = Evaluation.load(folder)
    apart = differences(now, before) if before else []
    known = headline(before) if before and not apart else {}
    description = f"The champion on {model}, then and now"
    if apart:
        description = (
            f"The champion on {model} now. When it was registered it was measured otherwise, so "
            f"those numbers are left out: {'; '.join(apart)}"
        )
        print(description)
    rows = [
        {
            "metric": name,
            "registered": f"{known[name]:.4g}" if name in known else "",
            "now": f"{value:.4g}",
        }
        for name, value in headline(now).items()
    ]
    key = f"champion-{re.sub(r'[^a-z0-9]+', '-', model.lower())}"
    create_table_artifact(rows, key=key, description=description)


def _placed(path: str) -> str:
    """A path as the workspace finds it: what is not in this checkout by its whole path."""
    place = Path(path).expanduser()
    inside = not place.is_absolute() and ".." not in place.parts
    return str(place if inside else place.resolve())
