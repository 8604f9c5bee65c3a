"""A team's servers, each of which dies and comes back while a deployed flow runs."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import s3fs
from mlflow import MlflowClient
from moto.server import ThreadedMotoServer

from tests.commands import dvc
from tests.postgres import Postgres
from tests.stores import Server, free_port
from tests.test_flows import PREFECT, environment_of, running, wait_for
from tests.toy import make_repository, toy_params

pytest_plugins = ["tests.postgres"]

SECONDS_AWAY = 3.0
ENDED = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


class Bucket:
    """An S3 server that goes away and comes back with what it has."""

    def __init__(self) -> None:
        self.port = free_port()

    def start(self) -> None:
        self._server = ThreadedMotoServer("127.0.0.1", self.port, verbose=False)
        self._server.start()

    def kill(self) -> None:
        self._server.stop()


class PrefectServer:
    """Prefect's server, and what is asked of it."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment, self._url = environment, environment["PREFECT_API_URL"]

    def start(self) -> None:
        port = self._url.removesuffix("/api").rpartition(":")[2]
        command = [*PREFECT, "server", "start", "--host", "127.0.0.1", "--port", port]
        self._process = subprocess.Popen(
            command,
            env=self._environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        wait_for(f"{self._url}/health")

    def kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def ask(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self._url}{path}", data=data, headers=headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def outcome(self, run: str, is_lost: Callable[[], bool]) -> dict[str, Any]:
        """The state in which a flow run ends; a lost one is set Crashed, as a person would."""
        deadline = time.monotonic() + 400
        while (state := self.ask(f"/flow_runs/{run}")["state"])["type"] not in ENDED:
            assert time.monotonic() < deadline
            if state["type"] == "RUNNING" and is_lost():
                crashed = {"state": {"type": "CRASHED", "name": "Crashed"}, "force": True}
                self.ask(f"/flow_runs/{run}/set_state", crashed)
            time.sleep(1)
        return dict(state)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    bucket = Bucket()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{bucket.port}")
    bucket.start()
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("bucket")
    yield bucket
    bucket.kill()


@pytest.mark.services
@pytest.mark.timeout(1800)
def test_a_flow_comes_to_its_result_though_each_server_dies_once(
    postgres: Postgres, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself, or in one more run; nothing is registered twice, no curve has a gap."""
    pytest.importorskip("psycopg2", reason="MLflow reaches PostgreSQL by psycopg2-binary")
    params = toy_params() | {"storage": "s3://bucket/storage"}
    params["cache"] |= {"num_trajectory": 160, "shard_size": 8}
    params["distill"]["num_images"] = 640
    make_repository(tmp_path / "repository", params)
    monkeypatch.chdir(tmp_path / "repository")
    mlflow = Server(
        tmp_path, store=f"postgresql+psycopg2://{postgres}/mlflow", artifacts="s3://bucket/mlflow"
    )
    mark = uuid.uuid4().hex  # inherited by all that this test starts
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")} | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api",
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"postgresql+asyncpg://{postgres}/prefect",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PNP_GUIDE_HOME": str(Path.cwd()),
        "MLFLOW_TRACKING_URI": mlflow.uri,
        "PNP_TEST": mark,
        "OMP_NUM_THREADS": "1",
        "DO_NOT_TRACK": "1",
    }

    def call(*arguments: str) -> str:
        done = subprocess.run(
            [*PREFECT, *arguments], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def flows() -> list[psutil.Process]:
        ours = [p for p in psutil.process_iter() if environment_of(p).get("PNP_TEST") == mark]
        return [p for p in ours if "PREFECT__FLOW_RUN_ID" in environment_of(p)]

    def begin() -> str:
        name = uuid.uuid4().hex
        call("deployment", "run", "distill/local", "--flow-run-name", name)
        found = prefect.ask("/flow_runs/filter", {"flow_runs": {"name": {"any_": [name]}}})
        return str(found[0]["id"])

    prefect = PrefectServer(environment)
    bucket_files = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    curves = Path("runs/tracking")
    middles: list[tuple[Any, Callable[[], Any], str]] = [
        (bucket, lambda: bucket_files.glob("bucket/storage/cache/*/*.safetensors"), "shard"),
        (mlflow, lambda: list(Path("runs/distill").glob("*.pt")), "checkpoint of distill"),
        (postgres, lambda: list(curves.glob("halve-*.jsonl")), "curve of halve"),
        (prefect, lambda: list(Path("results/sampled").rglob("*.parquet")), "image"),
    ]
    mlflow.start()
    prefect.start()
    try:
        call("work-pool", "create", "local", "--type", "process")
        call("--no-prompt", "deploy", "--all")
        worker = [*PREFECT, "worker", "start", "--pool", "local"]
        with running(worker, tmp_path / "worker.log", environment):
            run, ended = begin(), list[dict[str, Any]]()

            def again() -> None:
                """If the run has ended, begin another. Each server may end one."""
                nonlocal run
                if prefect.ask(f"/flow_runs/{run}")["state"]["type"] in ENDED - {"COMPLETED"}:
                    ended.append(prefect.outcome(run, lambda: not flows()))
                    assert "Traceback" not in (ended[-1]["message"] or "")
                    assert len(ended) <= len(middles), ended
                    run = begin()

            for server, holds, what in middles:
                deadline = time.monotonic() + 300
                while not holds():
                    assert time.monotonic() < deadline, f"no {what}"
                    again()
                    time.sleep(0.1)
                server.kill()
                time.sleep(SECONDS_AWAY)
                server.start()
            while prefect.outcome(run, lambda: not flows())["type"] != "COMPLETED":
                again()
            call("deployment", "run", "promote/local", "--watch")
        assert "up to date" in dvc("status")
        client = MlflowClient(mlflow.uri)
        assert client.get_model_version_by_alias("pnp-guide", "champion").version == "1"
        assert len(client.search_model_versions("name = 'pnp-guide'")) == 1
        experiments = [e.experiment_id for e in client.search_experiments()]
        runs = client.search_runs(experiments)
        assert {each.info.status for each in runs} == {"FINISHED"}
        (distill,) = (each for each in runs if each.data.tags.get("pnp.stage") == "distill")
        steps = [p.step for p in client.get_metric_history(distill.info.run_id, "distill/loss")]
        assert sorted(steps) == list(range(16, 641, 16))
    finally:
        prefect.kill()
        mlflow.kill()
    left = [p.cmdline() for p in psutil.process_iter() if environment_of(p).get("PNP_TEST") == mark]
    assert not left
