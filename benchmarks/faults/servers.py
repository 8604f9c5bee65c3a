"""MLflow's server, and Prefect's that is not there: killed, answering with errors."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.faults.listing import fault
from benchmarks.faults.proxy import free_port, kill_all, proxy_to, server
from benchmarks.faults.workspace import UnexpectedError, Workspace

ONE = ("dvc", "repro", "--single-item")
FLOW = ("python", "-m", "flows", "distill")
PROMOTE = ("python", "-m", "components.promote", "--allow-dirty")  # settings are changed here


@fault("server", before="distill")
def prefect_server_not_there(workspace: Workspace) -> None:
    """PREFECT_API_URL points at nothing."""
    url = f"http://127.0.0.1:{free_port()}/api"
    said = "error: no Prefect server answers at PREFECT_API_URL"
    workspace.told(workspace.run(*FLOW, PREFECT_API_URL=url), said)
    workspace.recovers(*ONE, "distill")
    workspace.stages = ("distill",)


@contextmanager
def mlflow_server(
    workspace: Workspace, port: int, database: str = "server.db"
) -> Iterator["subprocess.Popen[bytes]"]:
    """An MLflow server on a database in the workspace; yields its process."""
    mlflow = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
    store = ["--backend-store-uri", f"sqlite:///{workspace.folder / database}"]
    store += ["--artifacts-destination", str(workspace.folder / "mlartifacts-server")]
    if not (workspace.folder / database).exists():
        (workspace.folder / database).write_bytes((workspace.folder / "fresh.db").read_bytes())
    settings = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with server(workspace, port, *mlflow, *store, "--port", str(port), **settings) as process:
        yield process


@fault("tracking", before="distill")
def mlflow_server_not_there(workspace: Workspace) -> None:
    """tracking.uri points at nothing: training goes on, or says so in one line at its start."""
    workspace.set_param("tracking.uri", f"http://127.0.0.1:{free_port()}")
    done = workspace.run(*ONE, "distill")
    if done.exit_code == 0:
        workspace.said = done.line("MLflow") or "trains without"
    else:
        workspace.told(done, "error: .*MLflow")
    workspace.set_param("tracking.uri", None)
    workspace.recovers(*ONE, "distill")
    workspace.stages = ("distill",)


@fault("tracking", before="distill")
def kill9_of_the_mlflow_server(workspace: Workspace) -> None:
    """The MLflow server is killed while distill trains: training does not depend on it."""
    port = free_port()
    workspace.set_param("tracking.uri", f"http://127.0.0.1:{port}")
    with mlflow_server(workspace, port) as process:
        running = workspace.start(*ONE, "distill")
        workspace.in_the_middle(running, "distill")
        workspace.lost_work_s = 0.0
        kill_all(process)
        done = workspace.finish(running)
    if done.exit_code != 0:
        raise UnexpectedError(f"training ends with it: {done.output[-300:]}")
    workspace.said = done.line("MLflow") or "trains to its end"
    workspace.stages = ("distill",)


@fault("tracking", before="distill")
def experiment_deleted(workspace: Workspace) -> None:
    """The experiment was deleted in the UI."""
    code = (
        "from mlflow import MlflowClient; c = MlflowClient('sqlite:///mlflow.db'); "
        "c.delete_experiment(c.create_experiment('toy'))"
    )
    workspace.recovers("python", "-c", code)
    workspace.said = ""
    done = workspace.run(*ONE, "distill")
    if done.exit_code == 0:
        workspace.said = done.line("MLflow|experiment") or "trains without"
    else:
        workspace.told(done, "error: .*deleted")
    restore = code.replace(
        "c.delete_experiment(c.create_experiment('toy'))",
        "c.restore_experiment(c.get_experiment_by_name('toy').experiment_id)",
    )
    workspace.recovers("python", "-c", restore)
    workspace.recovers(*ONE, "distill")
    workspace.stages = ("distill",)


@fault("tracking", before="distill")
def tracking_in_a_file_store(workspace: Workspace) -> None:
    """tracking.uri is a `file:` store, which MLflow no longer has."""
    workspace.set_param("tracking.uri", f"file:{workspace.folder / 'runs-of-mlflow'}")
    done = workspace.run(*ONE, "distill")
    if done.exit_code == 0:
        workspace.said = done.line("MLflow|tracking") or "trains without"
    else:
        workspace.told(done, "error: .*(file|tracking.uri)")
    workspace.set_param("tracking.uri", None)
    workspace.recovers(*ONE, "distill")
    workspace.stages = ("distill",)


def alias_unreadable(workspace: Workspace, status: int) -> None:
    """The registry can't say who is champion; the candidate must not be made it unseen."""
    port = free_port()
    workspace.set_param("promote.guidance_fvu.max_loss", 0.0)
    with mlflow_server(workspace, port) as _, proxy_to(f"http://127.0.0.1:{port}") as proxy:
        workspace.set_param("tracking.uri", proxy.url)
        workspace.recovers("dvc", "repro", "register")
        workspace.recovers(*PROMOTE)
        workspace.said = ""
        worse(workspace)
        workspace.recovers(*ONE, "register")
        workspace.said = ""
        body = b'{"error_code": "TEMPORARILY_UNAVAILABLE", "message": "later"}'
        headers = {"Content-Type": "application/json"}
        proxy.answer = lambda method, path: (
            (status, headers, body) if "alias" in path and method == "GET" else None
        )
        settings = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
        workspace.told(workspace.run(*PROMOTE, **settings), "error: ")
        proxy.answer = lambda *_: None
        done = workspace.run(*PROMOTE)
        if done.exit_code != 3:
            raise UnexpectedError(
                f"the worse guide is not refused afterwards: {done.output[-300:]}"
            )
    workspace.stages = ()


def worse(workspace: Workspace) -> None:
    """Make the results of the next version worse than the champion's."""
    path = workspace.folder / "results/evaluate/base/evaluation.json"
    evaluation = json.loads(path.read_text(encoding="utf-8"))
    evaluation["guidance_fvu"]["value"] += 9
    path.unlink()
    path.write_text(json.dumps(evaluation))


@fault("registry", before="register")
def alias_answers_503(workspace: Workspace) -> None:
    """The registry answers 503 when asked for the champion, and on that call alone."""
    alias_unreadable(workspace, 503)


@fault("registry", before="register")
def alias_answers_403(workspace: Workspace) -> None:
    """The registry answers 403 when asked for the champion, and on that call alone."""
    alias_unreadable(workspace, 403)


@fault("registry")
def champions_files_are_lost(workspace: Workspace) -> None:
    """The champion's files are deleted: a candidate is not compared with nothing."""
    workspace.recovers(*PROMOTE)
    workspace.said = ""
    artifacts = Path(workspace.folder / "mlartifacts")
    lost = list(artifacts.rglob("summary.json"))
    for path in lost:
        path.unlink()
    if not lost:
        raise UnexpectedError("the registry of this checkout keeps its files elsewhere")
    worse(workspace)
    workspace.recovers(*ONE, "register")
    workspace.said = ""
    workspace.told(workspace.run(*PROMOTE), "champion 1: .*no summary.json")
