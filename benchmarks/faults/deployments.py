"""Prefect's server and worker, killed while a flow runs."""

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.faults.listing import fault
from benchmarks.faults.proxy import free_port, kill_all, server
from benchmarks.faults.workspace import UnexpectedError, Workspace

FLOW = ("python", "-m", "flows", "distill")
PREFECT = (sys.executable, "-m", "prefect")
DEPLOYED = (*PREFECT, "deployment", "run", "distill/local", "--watch")


@contextmanager
def prefect_server(workspace: Workspace) -> Iterator[tuple["subprocess.Popen[bytes]", str]]:
    """A Prefect server on a free port; yields its process and the URL of its API."""
    port = free_port()
    start = (*PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(port))
    with server(workspace, port, *start) as process:
        yield process, f"http://127.0.0.1:{port}/api"


@fault("server", before="evaluate@tuned")
def kill9_of_the_prefect_server(workspace: Workspace) -> None:
    """The Prefect server is killed while a flow runs; without it the same command goes on."""
    with prefect_server(workspace) as (process, url):
        running = workspace.start(*FLOW, PREFECT_API_URL=url)
        workspace.in_the_middle(running, "evaluate@tuned")
        kill_all(process)
        done = workspace.finish(running)
    if done.exit_code != 0:
        workspace.told(done, "error: Prefect's server went away")
    else:
        workspace.said = "the flow runs to its end"
    workspace.recovers(*FLOW)


@fault("server", before="evaluate@tuned")
def kill9_of_the_prefect_worker(workspace: Workspace) -> None:
    """The worker alone is killed while its flow runs; then there is a new one."""
    worker = (*PREFECT, "worker", "start", "--pool", "local")
    with prefect_server(workspace) as (_, url):
        workspace.environment |= {
            "PREFECT_API_URL": url,
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PNP_GUIDE_HOME": str(workspace.folder),
        }
        workspace.recovers(*PREFECT, "work-pool", "create", "local", "--type", "process")
        workspace.recovers(*PREFECT, "--no-prompt", "deploy", "--all")
        first = workspace.start(*worker)
        running = workspace.start(*DEPLOYED)
        made = workspace.folder / "results/sampled/tuned"
        running.wait_for(lambda: list(made.rglob("*.parquet")), "images of evaluate@tuned")
        first.signal(signal.SIGKILL)
        first.end()
        done = workspace.finish(running)  # Prefect ends the run, in a state of its own
        ended = re.search(r"Flow run finished in state '\w+'", done.output)
        if ended is None:
            raise UnexpectedError(f"it is not said how its flow run ended: {done.output[-400:]}")
        second = workspace.start(*worker)
        workspace.recovers(*DEPLOYED)
        second.signal(signal.SIGINT)
        workspace.finish(second)
    workspace.said = f"{ended[0]}; a new worker takes the next"
