"""Flow runs whose process was killed: Prefect's server goes on calling them running."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.runtime import deployment, flow_run
from prefect.states import Crashed

WHERE = ("pnp.host", "pnp.checkout", "pnp.pid", "pnp.started")


def settle_lost_runs(log: Callable[[str], None]) -> None:
    """Note where this run is; end those of its deployment that were lost in this checkout.

    A run is lost if it noted this machine and checkout and its process is no longer there. Of
    others nothing is known here, and they are left alone. `log` hears of those that were ended.
    Outside a deployment there is nothing to do.
    """
    if deployment.id is None:
        return
    with get_client(sync_client=True) as client:
        client.update_flow_run_labels(flow_run.id, _here())
        running = FlowRunFilter(
            deployment_id=FlowRunFilterDeploymentId(any_=[deployment.id]),
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING])),
        )
        for run in client.read_flow_runs(flow_run_filter=running):
            if str(run.id) != str(flow_run.id) and is_lost(run):
                crashed: State[Any] = Crashed(message="The process that ran it was killed")
                client.set_flow_run_state(run.id, crashed, force=True)
                log(f"Flow run {run.name} had been killed, and is now marked Crashed")


def is_lost(run: FlowRun) -> bool:
    """Whether a run was in this checkout on this machine, and its process is gone."""
    host, checkout, pid, started = (run.labels.get(name) for name in WHERE)
    here = _here()
    if (host, checkout) != (here["pnp.host"], here["pnp.checkout"]):
        return False
    try:
        return bool(psutil.Process(int(str(pid))).create_time() != float(str(started)))
    except psutil.NoSuchProcess:
        return True


def _here() -> dict[str, bool | int | float | str]:
    started = psutil.Process().create_time()
    return {
        "pnp.host": socket.gethostname(),
        "pnp.checkout": str(Path.cwd()),
        "pnp.pid": os.getpid(),
        "pnp.started": started,
    }
