"""MLflow stores for tests: fresh ones at once, calls that fail, a real server behind a proxy."""

import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED, TEMPORARILY_UNAVAILABLE

from components.evaluation import FORMAT, Evaluation
from components.places import Tracking
from components.tracking import Registry, Run, Store
from pnp_core.files import write_json
from tests.evaluations import evaluation

TOY = Tracking(uri=None, experiment="toy")
NAME = "pnp-guide"

# What a server, something before it, or a network answers instead of an answer.
ERRORS: Mapping[str, Callable[[], Exception]] = {
    "503": lambda: MlflowException("503: try later", TEMPORARILY_UNAVAILABLE),
    "403": lambda: MlflowException("403: you may not", PERMISSION_DENIED),
    "connection": lambda: MlflowException("API request failed with exception: refused"),
    "timeout": lambda: TimeoutError("timed out"),
}


@pytest.fixture(scope="session")
def fresh_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite store with nothing in it: MLflow takes seconds to make one."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    Store(Tracking(uri=f"sqlite:///{path}", experiment="toy")).client.search_experiments()
    return path


@pytest.fixture
def place(tmp_path: Path, fresh_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout, and the working directory, with a store that has nothing in it."""
    return make_checkout(tmp_path / "checkout", fresh_database, monkeypatch)


def copy_checkout(made: Path, place: Path) -> None:
    """Take over all that is in a checkout: its store, with its own paths, and its files."""
    shutil.copytree(made, place, ignore=shutil.ignore_patterns("mlflow.db"), dirs_exist_ok=True)
    with closing(sqlite3.connect(made / "mlflow.db")) as database:
        script = "\n".join(database.iterdump()).replace(str(made), str(place))
    (place / "mlflow.db").unlink()
    with closing(sqlite3.connect(place / "mlflow.db")) as database:
        database.executescript(script)


def make_checkout(folder: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder.mkdir()
    shutil.copy(database, folder / "mlflow.db")
    monkeypatch.chdir(folder)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"):
        monkeypatch.delenv(name, raising=False)
    return folder


def results(*evaluations: Evaluation) -> dict[str, Any]:
    """What a version keeps of its evaluations, by model."""
    return {each.model: {"format": FORMAT, **asdict(each)} for each in evaluations}


def register(  # noqa: PLR0913, a version's parts
    fvu: float = 0.5,
    *,
    tracking: Tracking = TOY,
    name: str = "",
    key: str = "",
    commit: str = "c0ffee",
    models: Mapping[str, Any] | None = None,
    **numbers: Any,
) -> str:
    """Register a guide that is only its summary, of such an evaluation; returns the version."""
    models = models or results(evaluation(guidance_fvu=fvu, **numbers))
    key = key or sha256(str((models, commit)).encode()).hexdigest()
    folder = Path("guide")
    write_json(folder / "summary.json", {"lineage": {"git_commit": commit}, "models": models})
    registry = Registry(tracking, name or NAME)
    if (version := registry.find(key)) is not None:
        return version
    with Run(registry.store, tracking, "register", params={}) as run:
        return registry.register(run, folder, key=key, metrics={}, tags={}, description="")


def folder_of(version: str, tracking: Tracking = TOY) -> Path:
    """Where a store on this disk has a version's files."""
    with Registry(tracking, NAME).folder(version) as folder:
        return folder


class Calls:
    """Counts the calls to MLflow and lets one of them fail."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.fails_at: int | None = None
        self.error: Callable[[], BaseException] = ERRORS["503"]
        self.is_done_first = False  # the answer is lost, not the question

    def around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **named: Any) -> Any:
            self.names.append(name)
            fails = len(self.names) - 1 == self.fails_at
            if fails and not self.is_done_first:
                raise self.error()
            answer = call(*args, **named)
            if fails:
                raise self.error()
            return answer

        return counted

    def reset(self, fails_at: int | None = None) -> None:
        self.names.clear()
        self.fails_at = fails_at


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Every call that the code makes to MLflow from here on."""
    calls = Calls()

    class Counted:
        def __init__(self) -> None:
            self._client = MlflowClient()

        def __getattr__(self, name: str) -> Any:
            return calls.around(name, getattr(self._client, name))

    monkeypatch.setattr("components.tracking.store.MlflowClient", Counted)
    for name in ("download_artifacts", "list_artifacts"):
        monkeypatch.setattr(
            mlflow.artifacts, name, calls.around(name, getattr(mlflow.artifacts, name))
        )
    return calls


# A real server


def free_port() -> int:
    with socket.socket() as candidate:
        candidate.bind(("127.0.0.1", 0))
        return int(candidate.getsockname()[1])


class Server:
    """`mlflow server` on 127.0.0.1, which can be killed and started again.

    Args:
        folder: of its log, and of what is kept where nothing else is said.
        store: URI of its database.
        artifacts: where its files go.
    """

    def __init__(
        self, folder: Path, *, store: str | None = None, artifacts: str | None = None
    ) -> None:
        self.folder, self.port = folder, free_port()
        self._store = store or f"sqlite:///{folder}/mlflow.db"
        self._artifacts = artifacts or str(folder / "artifacts")
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", self._store]
        command += ["--artifacts-destination", self._artifacts]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")} | {
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DO_NOT_TRACK": "1",
        }
        with (self.folder / "server.log").open("a") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                    return
            except OSError:
                assert time.monotonic() < deadline and self._process.poll() is None
                time.sleep(0.2)

    def kill(self) -> None:
        """As when its machine goes away."""
        if self._process:
            os.killpg(self._process.pid, 9)
            self._process.wait()
            self._process = None


@contextmanager
def proxy(target: str) -> Iterator[tuple[str, dict[str, int]]]:
    """A proxy before `target`: yields its URI and the status to answer for a part of a path.

    A negative status is answered after the request was passed on: the answer is lost.
    """
    answers: dict[str, int] = {}

    class Handler(BaseHTTPRequestHandler):
        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status = next((s for part, s in answers.items() if part in self.path), 0)
            if status <= 0:
                names = ("Content-Type", "Authorization")
                headers = {n: self.headers[n] for n in names if n in self.headers}
                request = urllib.request.Request(
                    target + self.path, data=body or None, headers=headers, method=self.command
                )
                try:
                    with urllib.request.urlopen(request, timeout=60) as answer:
                        code, kind, content = answer.status, answer.headers, answer.read()
                except urllib.error.HTTPError as error:
                    code, kind, content = error.code, error.headers, error.read()
            if status:
                code, kind, content = abs(status), {"Content-Type": "text/html"}, b"<html>no</html>"
            self.send_response(code)
            self.send_header("Content-Type", str(kind.get("Content-Type", "text/plain")))
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", answers
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
