"""MLflow serves training, a run has one owner, and a store belongs to one checkout."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from components.mlflow_place import checkout, without_secrets
from components.places import Tracking
from components.tracking import Registry, Run, Store, TrackingError, TrainingRun
from components.tracking.store import store_uri
from tests.cases import few_of
from tests.stores import ERRORS, NAME, TOY, Calls, folder_of, make_checkout, register

pytest_plugins = ["tests.stores"]

ROOT = Path(__file__).parent.parent
STEPS = (16, 32, 48, 64)
PARAMS = {"distill": {"batch_size": 16}}


def train(
    steps: tuple[int, ...] = STEPS,
    *,
    key: str = "key",
    stage: str = "distill",
    tracking: Tracking = TOY,
    then: Callable[[], None] = lambda: None,
) -> None:
    """A training stage's calls to MLflow."""
    with TrainingRun(tracking, stage, key=key, params=PARAMS) as run:
        for step in steps:
            run.curve(step, {"loss": 1 / step, "grad_norm": 1.0})
        then()


def warned(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The warnings so far; that a busy machine's store is waited for is told too."""
    lines = capsys.readouterr().err.splitlines()
    return [line for line in lines if not line.startswith("waiting for MLflow")]


def interrupt() -> None:
    raise KeyboardInterrupt


def runs(tracking: Tracking = TOY) -> list[Any]:
    store = Store(tracking)
    found = store.client.search_runs(
        [store.experiment(tracking.experiment)], order_by=["attributes.start_time ASC"]
    )
    return list(found)


def points(run: Any, name: str = "loss", tracking: Tracking = TOY) -> list[int]:
    history = Store(tracking).client.get_metric_history(run.info.run_id, name)
    return sorted(point.step for point in history)


def left() -> list[str]:
    """The journals that are kept."""
    return sorted(path.name for path in Path("runs/tracking").glob("*.jsonl"))


# Tracking serves training


@pytest.mark.parametrize("kind", few_of(ERRORS, "connection"))
@pytest.mark.parametrize(
    "is_done_first", few_of([False, True], True), ids=["not asked", "answer lost"]
)
def test_curves_are_complete_and_there_once_whichever_call_failed(
    place: Path, calls: Calls, kind: str, is_done_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("components.tracking.runs.FIRST_PAUSE", 0.0)
    calls.error, calls.is_done_first = ERRORS[kind], is_done_first
    train(key="healthy")
    number = len(calls.names)
    for failing in range(number):
        calls.reset(failing)
        train(key=f"key-{failing}")
        calls.reset()
    train(key="last")
    found = runs()
    assert len(found) == number + 2
    assert all(run.info.status == "FINISHED" for run in found)
    assert all(points(run) == points(run, "grad_norm") == list(STEPS) for run in found)
    assert not left()


def test_curves_of_a_dead_store_are_delivered_by_the_next_run_of_any_stage(
    place: Path, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    def dead(*args: Any) -> Any:
        raise ERRORS["connection"]()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("components.tracking.store.MlflowClient", dead)
        train()
    told = warned(capsys)
    assert len(told) == 1, "said once"
    assert told[0].startswith("warning: MLflow at sqlite") and "the next run delivers" in told[0]
    assert len(left()) == 1 and not runs()

    train(stage="halve", key="another")
    first, second = runs()
    assert first.info.start_time < second.info.start_time
    assert first.data.params == {"distill.batch_size": "16"}
    assert first.info.status == "FINISHED" and points(first) == list(STEPS)
    assert not left()


def test_a_store_that_comes_back_while_training_has_all_at_once(
    place: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("components.tracking.runs.FIRST_PAUSE", 0.0)
    with TrainingRun(TOY, "distill", key="key", params=PARAMS) as run:
        run.curve(16, {"loss": 1.0})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Store, "asking", lambda *args, **named: exec("raise OSError('gone')"))
            run.curve(32, {"loss": 1.0})
            run.curve(48, {"loss": 1.0})
        run.curve(64, {"loss": 1.0})
        (there,) = runs()
        assert points(there) == list(STEPS)
    told = warned(capsys)
    assert len(told) == 2 and told[1] == "warning: MLflow answers again and has all curves"


def test_mlflow_that_failed_is_left_alone_for_a_while(place: Path, calls: Calls) -> None:
    calls.reset(0)
    train(tuple(range(1, 1000)))
    assert calls.names.count("get_experiment_by_name") <= 3


def test_a_deleted_experiment_does_not_end_training(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(TOY)
    experiment = store.experiment("toy")
    store.client.delete_experiment(experiment)
    train()
    told = capsys.readouterr().err
    assert "the experiment 'toy' was deleted: bring it back with" in told
    assert len(told.splitlines()) == 1
    store.client.restore_experiment(experiment)
    train(key="another")
    assert [points(run) for run in runs()] == [list(STEPS)] * 2


@pytest.mark.parametrize(
    "uri", ["file:mlruns", "mlruns", "sqlite:///:memory:", "sqlite:///no/x.db", "sqlite:///a%20.db"]
)
def test_a_store_that_cannot_be_does_not_end_training_and_is_told_at_the_start(
    place: Path, uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = Tracking(uri=uri, experiment="toy")
    train(tracking=wrong)
    (told,) = warned(capsys)
    assert told.startswith("warning: ") and "tracking.uri" in told
    with pytest.raises(TrackingError, match=r"tracking\.uri"):
        Registry(wrong, NAME)
    train(stage="halve")
    assert [points(run) for run in runs()] == [list(STEPS)] * 2, "delivered to the right one"
    assert not Path("no").exists() and not Path("mlruns").exists()


def test_an_earlier_run_that_cannot_be_delivered_stops_no_later_one(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = Tracking(uri=None, experiment="old")
    store = Store(old)
    store.client.delete_experiment(store.experiment("old"))
    train((16,), tracking=old)
    capsys.readouterr()
    train()
    register(0.5)
    told = warned(capsys)
    assert len(told) == 2 and all("an earlier run, kept in" in line for line in told)
    assert [run.info.status for run in runs()] == ["FINISHED"] * 2 and len(left()) == 1


def test_a_server_that_does_not_answer_holds_nothing_up_in_silence(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("components.tracking.store.SECONDS_IN_SILENCE", 0.2)
    with socket.socket() as deaf:  # takes a connection and says nothing
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        tracking = Tracking(uri=f"http://127.0.0.1:{deaf.getsockname()[1]}", experiment="toy")
        store = Store(tracking, patience=(0, 1))
        with pytest.raises(TrackingError, match=r"timeout|timed out"):
            store.experiment("toy")
        assert "waiting for MLflow at http" in capsys.readouterr().err


def test_a_full_disk_of_the_store_does_not_end_training(
    place: Path, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    calls.error = lambda: OSError(28, "No space left on device")
    calls.reset(4)
    train()
    (told, *_) = warned(capsys)
    assert "No space left" in told and "MB are free" in told
    calls.reset()
    train(key="another")
    assert [points(run) for run in runs()] == [list(STEPS)] * 2


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        ("file is not a database", "mlflow.db is damaged: bring a copy of it back"),
        ("database disk image is malformed", "mlflow.db is damaged: bring a copy of it back"),
        ("out-of-date database schema: run 'mlflow db upgrade <url>'", "Copy mlflow.db first"),
        ("database is locked", "in use by another program? Then run the same command again"),
    ],
)
def test_what_can_help_is_advised(place: Path, said: str, advice: str) -> None:
    with pytest.raises(TrackingError) as caught, Store(TOY).asking("read"):
        raise RuntimeError(said)
    assert said in str(caught.value) and str(caught.value).endswith(advice)


def test_where_no_journal_can_be_written_curves_go_to_mlflow_alone(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("runs").write_text("no folder")
    train()
    (run,) = runs()
    assert points(run) == list(STEPS) and run.info.status == "FINISHED"


def test_a_journal_cut_off_in_a_line_is_gone_on_with(place: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train((16, 32), then=interrupt)
    (name,) = left()
    with (Path("runs/tracking") / name).open("a") as file:
        file.write('{"point": [48, 17')
    train((32, 48, 64))
    (run,) = runs()
    assert points(run) == list(STEPS)


@pytest.mark.parametrize("is_done_first", [False, True], ids=["not asked", "answer lost"])
@pytest.mark.parametrize("is_training", few_of([False, True], True))
def test_a_run_that_is_stopped_while_mlflow_begins_it_is_not_left_running(
    place: Path, calls: Calls, is_training: bool, is_done_first: bool
) -> None:
    def begin(key: str) -> TrainingRun | Run:
        if is_training:
            return TrainingRun(TOY, "distill", key=key, params=PARAMS)
        return Run(Store(TOY), TOY, "register", params=PARAMS)

    calls.error, calls.is_done_first = KeyboardInterrupt, is_done_first
    with begin("makes the experiment"):
        pass
    calls.reset()
    with begin("healthy"):
        number = len(calls.names)
    for failing in range(number):
        calls.reset(failing)
        with pytest.raises(KeyboardInterrupt), begin(f"key-{failing}"):
            pass
        calls.reset()
        assert "RUNNING" not in {run.info.status for run in runs()}, failing


# A run has one owner


def test_a_run_that_broke_off_is_gone_on_with_by_its_owner(place: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train((16, 32, 48), then=interrupt)
    (run,) = runs()
    assert run.info.status == "KILLED"
    train((48, 64))  # from its checkpoint at 32
    (run,) = runs()
    assert run.info.status == "FINISHED" and points(run) == list(STEPS)


def test_without_its_journal_too(place: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train((16, 32, 48), then=interrupt)
    (name,) = left()
    (Path("runs/tracking") / name).unlink()
    train((48, 64))
    (run,) = runs()
    assert run.info.status == "FINISHED" and points(run) == list(STEPS)


def test_a_run_that_is_done_is_not_gone_on_with(place: Path) -> None:
    train()
    train()
    assert [points(run) for run in runs()] == [list(STEPS)] * 2


def test_two_checkouts_with_the_same_parameters_have_a_run_each(
    tmp_path: Path, fresh_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = shutil.copy(fresh_database, tmp_path / "shared.db")
    tracking = Tracking(uri=f"sqlite:///{shared}", experiment="toy")
    for name in ("ann", "bob"):
        make_checkout(tmp_path / name, fresh_database, monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            train((16, 32), tracking=tracking, then=interrupt)
    # A copy of a checkout, with its unfinished journal, is another owner as well.
    shutil.copytree(tmp_path / "bob", tmp_path / "copy")
    for name in ("copy", "ann", "bob"):
        monkeypatch.chdir(tmp_path / name)
        train((48,) if name != "copy" else STEPS, tracking=tracking)
    found = runs(tracking)
    assert [run.info.status for run in found] == ["FINISHED"] * 3
    assert sorted(len(points(run, tracking=tracking)) for run in found) == [3, 3, 4]
    assert len({run.data.tags["pnp.owner"] for run in found}) == 3


def test_a_moved_checkout_goes_on_with_its_own(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train((16, 32), then=interrupt)
    place.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    train((48, 64))
    (run,) = runs()
    assert points(run) == list(STEPS)


KILLED = """
import os, signal, sys
from components.places import Tracking
from components.tracking import Run, Store, TrainingRun
tracking = Tracking(uri=None, experiment="toy")
if sys.argv[1] == "register":
    Run(Store(tracking), tracking, "register", params={})
else:
    run = TrainingRun(tracking, sys.argv[1], key="key", params={})
    run.__enter__()
    run.curve(16, {"loss": 1.0})
os.kill(os.getpid(), signal.SIGKILL)
"""


def kill_a_run(stage: str) -> None:
    """Begin a run of `stage` in a process that is then killed."""
    command = [sys.executable, "-c", KILLED, stage]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == -signal.SIGKILL
    assert runs()[-1].info.status == "RUNNING"


@pytest.mark.parametrize("has_journal", few_of([True, False], False))
def test_a_killed_run_does_not_stay_running(place: Path, has_journal: bool) -> None:
    kill_a_run("distill")
    if not has_journal:
        shutil.rmtree("runs/tracking")
    train(key="other parameters")
    killed, other = runs()
    assert (killed.info.status, other.info.status) == ("KILLED", "FINISHED")
    assert points(killed) == [16]
    assert not left()


@pytest.mark.services
def test_a_killed_register_does_not_stay_running(place: Path) -> None:
    kill_a_run("register")
    register(0.5)
    assert [run.info.status for run in runs()] == ["KILLED", "FINISHED"]


def test_a_run_that_is_alive_is_left_alone(place: Path) -> None:
    with TrainingRun(TOY, "distill", key="key", params={}) as alive:
        alive.curve(16, {"loss": 1.0})
        train(key="key")
        train(key="other")
        with Run(Store(TOY), TOY, "distill", params={}):
            assert runs()[0].info.status == "RUNNING"
    assert [run.info.status for run in runs()] == ["FINISHED"] * 4


# Registering once


@pytest.mark.parametrize(
    "is_done_first", few_of([False, True], True), ids=["not asked", "answer lost"]
)
def test_what_failed_while_registering_is_registered_once_by_the_same_command(
    place: Path, calls: Calls, is_done_first: bool
) -> None:
    register(0.0)
    number = len(calls.names)
    calls.is_done_first = is_done_first
    for failing in range(number):
        key = f"key-{failing}"
        calls.reset(failing)
        try:
            register(failing + 1.0, key=key)
        except TrackingError as error:
            assert "\n" not in str(error) and "same command again" in str(error)
        calls.reset()
        version = register(failing + 1.0, key=key)
        assert version == str(failing + 2), "one version for each key"
        assert (
            Registry(TOY, NAME).summary(version)["models"]["base"]["guidance_fvu"]["value"]
            == failing + 1
        )
    assert Registry(TOY, NAME).versions() == list(range(1, number + 2))
    assert all(run.info.status != "RUNNING" for run in runs())


# State belongs to a checkout


@pytest.mark.parametrize(
    "workspace", [".dvc/tmp/exps/standalone/tmp1", ".dvc/tmp/exps/tmp2/sub", ".dvc/tmp/exps/tmp3"]
)
def test_a_dvc_workspace_uses_its_checkouts_store(
    place: Path, workspace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(workspace).mkdir(parents=True)
    monkeypatch.chdir(workspace)
    assert checkout() == place
    register(0.5)
    train()
    monkeypatch.chdir(place)
    shutil.rmtree(".dvc")
    assert Registry(TOY, NAME).summary("1")["models"]
    assert len(runs()) == 2


def test_a_copied_checkout_writes_into_its_own(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(0.5)
    before = snapshot(place)
    shutil.copytree(place, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    register(0.7)
    for version in ("1", "2"):
        assert folder_of(version).is_relative_to(tmp_path / "copy")
    assert snapshot(place) == before


def test_a_moved_checkout_has_its_guides(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(0.5, key="key")
    monkeypatch.chdir(tmp_path)
    place.rename("moved")
    monkeypatch.chdir("moved")
    registry = Registry(TOY, NAME)
    assert registry.summary("1")["models"]["base"]["guidance_fvu"]["value"] == 0.5
    assert registry.find("key") == "1"


def test_files_lie_beside_the_database_that_is_named(
    tmp_path: Path, place: Path, fresh_database: Path
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shutil.copy(fresh_database, shared / "team.db")
    tracking = Tracking(uri=f"sqlite:///{shared}/team.db", experiment="toy")
    register(0.5, tracking=tracking)
    assert folder_of("1", tracking).is_relative_to(shared / "mlartifacts")
    assert not Path("mlartifacts").exists() and not Registry(TOY, NAME).versions()


def test_what_a_shared_database_keeps_elsewhere_stays_there(tmp_path: Path, place: Path) -> None:
    register(0.5)
    shared = tmp_path / "shared"
    shared.mkdir()
    Path("mlflow.db").rename(shared / "team.db")
    tracking = Tracking(uri=f"sqlite:///{shared}/team.db", experiment="toy")
    register(0.7, tracking=tracking)
    assert folder_of("1", tracking).is_relative_to(place / "mlartifacts")
    assert folder_of("2", tracking).is_relative_to(shared / "mlartifacts")


def test_a_relative_database_is_the_checkouts_from_a_workspace_too(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(".dvc/tmp/exps/tmp1").mkdir(parents=True)
    monkeypatch.chdir(".dvc/tmp/exps/tmp1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///own.db")
    assert store_uri(TOY) == f"sqlite:///{place}/own.db"


def test_a_database_server_has_no_place_for_files(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://ann:secret@db/mlflow")
    store = object.__new__(Store)
    store.uri, store.name = store_uri(TOY), without_secrets(store_uri(TOY))
    with pytest.raises(TrackingError, match="--artifacts-destination") as error:
        store._artifacts()
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("location", "message"),
    [("mlflow-artifacts:/1", "are kept by an MLflow server"), ("/nowhere/at/all", None)],
)
def test_an_experiment_whose_files_are_a_servers_is_told_at_the_start(
    place: Path, location: str, message: str | None
) -> None:
    store = Store(TOY)
    store.client.create_experiment("toy", location)
    if message:
        with pytest.raises(TrackingError, match=message):
            Run(store, TOY, "register", params={})
        assert not runs() and not left()
        return
    store.uri = "http://127.0.0.1:1"
    with pytest.raises(TrackingError, match="a folder of another machine"):
        store.check_artifacts(store.experiment("toy"))


def test_secrets_are_not_told(place: Path) -> None:
    with pytest.raises(TrackingError) as error, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "http://ann:secret@127.0.0.1:1/x")
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        Registry(TOY, NAME).champion()
    assert "127.0.0.1:1" in str(error.value) and "secret" not in str(error.value)


def snapshot(folder: Path) -> Mapping[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
