"""Tracking and promotion on a real MLflow server, which dies, and behind a proxy that refuses."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.entities import ViewType

from components import promote
from components.params import Params, Register
from components.places import Tracking
from components.tracking import Registry, Run, Store, TrackingError, TrainingRun
from tests import test_promote
from tests.stores import NAME, Server, make_checkout, proxy, register

pytest_plugins = ["tests.postgres", "tests.stores"]
pytestmark = pytest.mark.services

PARTS = ("registered-models/alias", "registered-models/get", "model-versions/search", "runs/create")


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    store = None
    if request.param == "postgres":
        pytest.importorskip("psycopg2", reason="MLflow reaches PostgreSQL by psycopg2-binary")
        store = f"postgresql+psycopg2://{request.getfixturevalue('postgres')}/mlflow"
    server = Server(tmp_path_factory.mktemp("server"), store=store)
    server.start()
    yield server
    server.kill()


@pytest.fixture(autouse=True)
def here(tmp_path: Path, fresh_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return make_checkout(tmp_path / "checkout", fresh_database, monkeypatch)


def params(tracking: Tracking, name: str) -> Params:
    return test_promote.params(tracking).model_copy(update={"register_": Register(name=name)})


def on(server: Server, experiment: str = "toy") -> Tracking:
    return Tracking(uri=server.uri, experiment=experiment)


@pytest.mark.parametrize("status", [503, 403, 500, 404])
def test_a_worse_guide_is_not_promoted_whatever_is_refused(
    server: Server, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.stores.NAME", name := f"guide-{status}")
    tracking = on(server)
    for fvu in (0.5, 0.7):
        register(fvu, tracking=tracking)
    promote.run(params(tracking, name), "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with proxy(server.uri) as (uri, answers):
        behind = Tracking(uri=uri, experiment="toy")
        for part in PARTS:
            answers.clear()
            answers[part] = status
            with pytest.raises(TrackingError, match="MLflow at http"):
                promote.run(params(behind, name))
            assert Registry(tracking, name).champion() == "1"
        answers.clear()
        with pytest.raises(SystemExit) as left:
            promote.run(params(behind, name))
        assert left.value.code == 3


def test_a_lost_answer_does_not_register_twice(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.stores.NAME", name := "lost-answer")
    with proxy(server.uri) as (uri, answers):
        answers["model-versions/create"] = -503
        behind = Tracking(uri=uri, experiment="toy")
        assert register(0.5, tracking=behind) == "1"
        assert register(0.5, tracking=behind) == "1"
    registry = Registry(on(server), name)
    assert registry.versions() == [1]
    assert registry.summary("1")["models"]["base"]["guidance_fvu"]["value"] == 0.5


def test_files_that_the_server_lost_are_said_to_be_lost(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.stores.NAME", name := "lost-files")
    register(0.5, tracking=on(server))
    registry = Registry(on(server), name)
    version = registry.store.client.get_model_version_download_uri(name, "1")
    below = version.removeprefix("mlflow-artifacts:/")
    (server.folder / "artifacts" / below / "summary.json").unlink()
    with pytest.raises(TrackingError, match="its files are lost"):
        registry.summary("1")
    assert registry.find("key-0.5") is None, "so that it can be registered again"


def test_curves_are_complete_and_there_once_after_the_server_died(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("components.tracking.runs.FIRST_PAUSE", 0.0)
    (tmp_path / "server").mkdir()
    server = Server(tmp_path / "server")
    server.start()
    try:
        with TrainingRun(on(server), "distill", key="key", params={"seed": 0}) as run:
            run.curve(16, {"loss": 1.0})
            server.kill()
            run.curve(32, {"loss": 0.5})
            run.curve(48, {"loss": 0.4})
        told = capsys.readouterr().err.splitlines()
        assert told and all(line.startswith("warning: MLflow at http") for line in told)
        server.start()
        with TrainingRun(on(server), "halve", key="key", params={}):
            pass
        store = Store(on(server))
        runs = store.client.search_runs([store.experiment("toy")], run_view_type=ViewType.ALL)
        assert sorted(run.data.tags["pnp.stage"] for run in runs) == ["distill", "halve"]
        assert all(run.info.status == "FINISHED" for run in runs)
        (distill,) = (run for run in runs if run.data.tags["pnp.stage"] == "distill")
        history = store.client.get_metric_history(distill.info.run_id, "loss")
        assert sorted((p.step, p.value) for p in history) == [(16, 1.0), (32, 0.5), (48, 0.4)]
    finally:
        server.kill()


def test_a_server_that_dies_while_registering_ends_it_in_one_line_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (tmp_path / "server").mkdir()
    server = Server(tmp_path / "server")
    server.start()
    try:
        uploads = Run.metrics

        def dies(run: Run, *args: object, **named: object) -> None:
            server.kill()
            uploads(run, *args, **named)  # type: ignore[arg-type]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Run, "metrics", dies)
            with pytest.raises(TrackingError, match="Then run the same command again"):
                register(0.5, tracking=on(server))
        server.start()
        assert register(0.5, tracking=on(server)) == "1"
        assert Registry(on(server), NAME).versions() == [1]
        store = Store(on(server))
        runs = store.client.search_runs([store.experiment("toy")])
        assert sorted(run.info.status for run in runs) == ["FAILED", "FINISHED"]
    finally:
        server.kill()


def test_two_people_with_the_same_parameters_have_a_run_each(
    server: Server, tmp_path: Path, fresh_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking = on(server, "two-people")
    for name in ("ann", "bob"):
        make_checkout(tmp_path / name, fresh_database, monkeypatch)
        with (
            pytest.raises(RuntimeError),
            TrainingRun(tracking, "distill", key="same", params={}) as run,
        ):
            run.curve(16, {"loss": 1.0})
            raise RuntimeError
    for name in ("ann", "bob"):
        monkeypatch.chdir(tmp_path / name)
        with TrainingRun(tracking, "distill", key="same", params={}) as run:
            run.curve(32, {"loss": 1.0})
    store = Store(tracking)
    runs = store.client.search_runs([store.experiment("two-people")])
    assert [run.info.status for run in runs] == ["FINISHED"] * 2
    for run in runs:
        history = store.client.get_metric_history(run.info.run_id, "loss")
        assert sorted(point.step for point in history) == [16, 32]
