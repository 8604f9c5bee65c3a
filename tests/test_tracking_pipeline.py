"""A run of the pipeline in MLflow: the parent of its stages and models, whoever ends it and how."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageColor

from components.params import load_params
from components.tracking import (
    Pipeline,
    Run,
    Store,
    TrackingError,
    TrainingRun,
    current_pipeline,
    finish_pipeline,
)
from components.training import curves
from tests import toy
from tests.cases import IF_CALLS_FAIL, few_of
from tests.stores import ERRORS, TOY, Calls
from tests.test_tracking import ROOT, left, points, runs

pytest_plugins = ["tests.stores"]

WHOLE = Pipeline(id="one", name="pnp-guide, begun today", tags={"mlflow.source.name": "dvc repro"})


def train(stage: str, *, key: str = "key", pipeline: Pipeline = WHOLE) -> None:
    with TrainingRun(TOY, stage, key=key, params={}, pipeline=pipeline) as run:
        run.curve(16, {"loss": 1.0})


def results(name: str = "base", *, pipeline: Pipeline = WHOLE, value: float = 0.5) -> None:
    """The calls of register for one model."""
    with Run(
        Store(TOY), TOY, "evaluate", params={}, name=name, pipeline=replace(pipeline, part=name)
    ) as run:
        run.metrics({"fid": {"guided": value}}, step=8)
        run.metrics({"fid": {"guided": value / 2}}, step=16)


def family() -> tuple[Any, dict[str, Any]]:
    """The one pipeline run, and its children by name."""
    found = runs()
    (whole,) = (run for run in found if run.data.tags["pnp.stage"] == "pipeline")
    children = [run for run in found if run is not whole]
    assert all(run.data.tags["mlflow.parentRunId"] == whole.info.run_id for run in children)
    assert len({run.info.run_name for run in children}) == len(children), "each is there once"
    return whole, {run.info.run_name: run for run in children}


def test_stages_and_models_are_children_of_one_run_that_ends_as_they_do(place: Path) -> None:
    train("distill")
    train("halve")
    with Run(
        Store(TOY), TOY, "register", params={"seed": 0}, pipeline=replace(WHOLE, is_itself=True)
    ) as run:
        results("base")
        results("tuned")
        assert family()[0].info.status == "RUNNING"
        run.rename("pnp-guide v1")
    whole, children = family()
    assert list(children) == ["distill", "halve", "base", "tuned"]
    assert whole.info.run_name == "pnp-guide v1" and whole.data.params == {"seed": "0"}
    assert whole.data.tags["mlflow.source.name"] == "dvc repro"
    assert whole.data.tags["mlflow.user"] and "@" in whole.data.tags["pnp.place"]
    assert {run.info.status for run in (whole, *children.values())} == {"FINISHED"}


def test_the_whole_runs_while_a_part_does(place: Path) -> None:
    with TrainingRun(TOY, "distill", key="key", params={}, pipeline=WHOLE):
        assert family()[0].info.status == "RUNNING"
    assert family()[0].info.status == "FINISHED"
    with (
        pytest.raises(RuntimeError),
        TrainingRun(TOY, "halve", key="key", params={}, pipeline=WHOLE),
    ):
        assert family()[0].info.status == "RUNNING"
        raise RuntimeError
    assert family()[0].info.status == "FAILED"


KILLED = """
import os, signal, sys
from dataclasses import replace
from components.tracking import Pipeline, Run, Store, TrainingRun
from tests.stores import TOY
whole = Pipeline(id="one", name="pnp-guide, begun today")
if sys.argv[1] == "register":
    first = Run(Store(TOY), TOY, "register", params={}, pipeline=replace(whole, is_itself=True))
    part = replace(whole, part="base")
    second = Run(Store(TOY), TOY, "evaluate", params={}, name="base", pipeline=part)
else:
    TrainingRun(TOY, sys.argv[1], key="key", params={}, pipeline=whole).__enter__()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("has_journal", few_of([True, False], False))
@pytest.mark.parametrize("stage", few_of(["distill", "register"], "register"))
def test_nothing_of_a_killed_pipeline_stays_running(
    place: Path, stage: str, has_journal: bool
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, stage], env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == -signal.SIGKILL
    whole, children = family()
    assert whole.info.status == "RUNNING" and len(children) == 1
    if not has_journal:
        for name in left():
            Path("runs/tracking", name).unlink()
    for other in ("distill", "evaluate"):  # the stages that left something
        with TrainingRun(TOY, other, key="another", params={}):
            pass
    mine = [run for run in runs() if run.data.tags.get("mlflow.parentRunId")]
    (whole,) = (run for run in runs() if run.data.tags["pnp.stage"] == "pipeline")
    assert [run.info.status for run in (whole, *mine)] == ["KILLED"] * 2


def test_a_stopped_stage_is_gone_on_with_in_the_pipeline_that_goes_on(place: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        TrainingRun(TOY, "distill", key="key", params={}, pipeline=WHOLE) as run,
    ):
        run.curve(16, {"loss": 1.0})
        raise KeyboardInterrupt
    assert family()[0].info.status == "KILLED"
    other = replace(WHOLE, id="two", name="another")
    with TrainingRun(TOY, "distill", key="key", params={}, pipeline=other) as run:
        run.curve(32, {"loss": 1.0})
    (distill,) = (run for run in runs() if run.info.run_name == "distill")
    (whole,) = (run for run in runs() if run.info.run_name == "another")
    assert distill.data.tags["mlflow.parentRunId"] == whole.info.run_id
    assert points(distill) == [16, 32] and whole.info.status == "FINISHED"


@pytest.mark.parametrize("way", IF_CALLS_FAIL)
def test_parent_and_children_are_there_once_whichever_call_failed(
    place: Path, calls: Calls, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("components.tracking.runs.FIRST_PAUSE", 0.0)
    calls.error, calls.is_done_first = ERRORS["connection"], way != "not asked"

    def all_of_it(number: int) -> None:
        whole = replace(WHOLE, id=f"number {number}", name=f"number {number}")
        train("distill", key=f"key {number}", pipeline=whole)
        for _ in range(2):  # the same command again
            try:
                with Run(
                    Store(TOY), TOY, "register", params={}, pipeline=replace(whole, is_itself=True)
                ):
                    results(pipeline=whole)
            except TrackingError:
                calls.reset()
            else:
                break

    all_of_it(-1)
    fails = range(0, len(calls.names), 3 if "third" in way else 1)
    for failing in fails:
        calls.reset(failing)
        all_of_it(failing)
        calls.reset()
    found = runs()
    parents = {run.info.run_id: [] for run in found if run.data.tags["pnp.stage"] == "pipeline"}
    for run in found:
        if parent := run.data.tags.get("mlflow.parentRunId"):
            parents[parent].append(run)
    assert len(parents) == len(fails) + 1
    for children in parents.values():
        assert sorted(run.info.run_name for run in children) == ["base", "distill"]
        (base,) = (run for run in children if run.info.run_name == "base")
        assert points(base, "fid/guided") == [8, 16]
    assert {run.info.status for run in found} == {"FINISHED"}


# What is written again


def test_what_a_run_has_is_not_written_again_and_what_changed_is(place: Path) -> None:
    for value in (0.5, 0.5, 0.7):
        results(value=value)
    base = family()[1]["base"]
    history = Store(TOY).client.get_metric_history(base.info.run_id, "fid/guided")
    assert [(p.step, p.value) for p in sorted(history, key=lambda p: (p.step, p.timestamp))] == [
        *((8, 0.5), (8, 0.7), (16, 0.25), (16, 0.35))
    ]
    assert base.data.metrics == {"fid/guided": 0.35}


def test_pictures_of_one_key_are_stepped_and_there_once(place: Path, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "grid.png")
    for _ in range(2):
        with Run(
            Store(TOY), TOY, "register", params={}, pipeline=replace(WHOLE, is_itself=True)
        ) as run:
            for step in (8, 16):
                run.image("base", tmp_path / "grid.png", step=step)
            run.table("results", [{"model": "base", "steps": 8}, {"model": "tuned"}])
    client = Store(TOY).client
    names = [file.path for file in client.list_artifacts(run.id, "images") if ".png" in file.path]
    assert sorted(name.split("+")[:3] for name in names) == [
        ["images/base", "step", "16"],
        ["images/base", "step", "8"],
    ]
    table = json.loads(
        Path(client.download_artifacts(run.id, "results.json", str(tmp_path))).read_text()
    )
    assert table == {"columns": ["model", "steps"], "data": [["base", 8], ["tuned", None]]}


def test_a_picture_that_a_former_attempt_stored_gives_way_to_todays(
    place: Path, tmp_path: Path
) -> None:
    client = Store(TOY).client
    for colour in ("red", "red", "blue"):
        Image.new("RGB", (8, 8), colour).save(tmp_path / "grid.png")
        with Run(
            Store(TOY), TOY, "register", params={}, pipeline=replace(WHOLE, is_itself=True)
        ) as run:
            run.image("base", tmp_path / "grid.png", step=8)
        there = [file.path for file in client.list_artifacts(run.id, "images")]
        assert len(there) == 2, "a picture, and a small one of it"
        (whole,) = (path for path in there if path.endswith(".png"))
        with Image.open(client.download_artifacts(run.id, whole, str(tmp_path))) as shown:
            assert shown.getpixel((0, 0)) == ImageColor.getrgb(colour)


# Which pipeline a stage belongs to


def params_of(place: Path, **changes: Any) -> Any:
    values = toy.toy_params()
    for name, value in changes.items():
        values[name] = {**values[name], **value} if isinstance(value, Mapping) else value
    toy.write_params(place, values)
    return load_params(place / "params.yaml")


def test_stages_of_the_same_settings_are_one_run_until_their_guide_is_registered(
    place: Path,
) -> None:
    first = current_pipeline(params_of(place))
    assert current_pipeline(params_of(place)).id == first.id
    # These change no result.
    assert current_pipeline(params_of(place, tracking={"experiment": "other"})).id == first.id
    assert current_pipeline(params_of(place, halve={"num_images": 32})).id != first.id
    again = current_pipeline(params_of(place))
    finish_pipeline()
    assert len({first.id, again.id, current_pipeline(params_of(place)).id}) == 3


@pytest.mark.parametrize(
    ("variables", "source"),
    [
        ({"DVC_STAGE": "distill"}, "dvc repro"),
        ({"DVC_STAGE": "distill", "PNP_FLOW_RUN": "able-fox"}, "prefect flow distill"),
    ],
)
def test_from_where_a_run_was_begun_is_told(
    place: Path, variables: Mapping[str, str], source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    tags = current_pipeline(params_of(place)).tags
    assert tags["mlflow.source.name"] == source
    assert tags.get("prefect.flow_run") == variables.get("PNP_FLOW_RUN")


def test_each_round_of_halving_has_its_own_curve_from_its_first_image() -> None:
    metrics = {"loss": 0.5, "num_steps": 16.0}
    assert curves("halve", 6000, metrics, 6000) == (6000, {"halve/steps-16/loss": 0.5})
    assert curves("halve", 6032, metrics, 6000) == (32, {"halve/steps-16/loss": 0.5})
    matched = {"loss": 0.5, "num_steps": 4.0, "matched": 32.0}
    assert curves("halve", 12_032, matched, 6000) == (32, {"halve/matched-4/loss": 0.5})
    assert curves("distill", 6032, {"loss": 0.5}, 28000) == (6032, {"distill/loss": 0.5})


def test_an_experiment_opens_on_its_runs_also_one_that_was_made_before(place: Path) -> None:
    store = Store(TOY)
    store.client.create_experiment("old", str(place / "mlartifacts"))
    for name in ("old", "new"):
        found = store.client.get_experiment(store.experiment(name))
        assert found.tags["mlflow.experimentKind"] == "custom_model_development"
