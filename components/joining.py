"""Joining a Ray cluster, or starting Ray here, with the code and variables that workers need."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psutil

from components.params import Params

CODE = Path(__file__).parent.parent
OBJECT_STORE_BYTES = 150 * 2**20  # nothing of size goes through it
SECONDS_TO_ANSWER = 10.0
# Joins the cluster at its argument, which takes a node seconds. On one that is none, Ray waits
# for more than a minute, and aborts the process.
SECONDS_TO_JOIN = 45
JOIN = "import sys, ray; ray.init(sys.argv[1], log_to_driver=False); ray.shutdown()"
# What a wait for workers that were lost is made of.
GROUP_START_S = 60
# For the others to leave a group that has lost one, who can't; Ray would grant half a minute.
GROUP_END_S = 5


@contextmanager
def _code() -> Iterator[str]:
    """A folder of the code alone, which Ray brings to nodes that do not see this one."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("components", "pnp_core"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(CODE / name, Path(folder) / name, ignore=ignored)
        yield folder


@contextmanager
def joined(params: Params, *, sees_folder: bool) -> Iterator[None]:
    """Ray, for a while: on the cluster that is named, else here.

    Args:
        params: `cluster.address`; without it, RAY_ADDRESS names a cluster.
        sees_folder: whether workers find the code under the path that it has here.

    Raises:
        ValueError: nobody answers there, or does not let us in.
    """
    import ray

    named = "cluster.address" if params.cluster.address else "RAY_ADDRESS"
    address = params.cluster.address or os.environ.get("RAY_ADDRESS")
    environment = {
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(GROUP_START_S),
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(60 * params.cluster.wait_minutes),
        "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": str(GROUP_END_S),
    }
    local: dict[str, Any] = {}
    if not address:
        local = {
            "num_cpus": max(params.cluster.num_workers, os.cpu_count() or 1),
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
    at_sigterm = signal.getsignal(signal.SIGTERM)
    if address:
        _knock(address, named)
        _check_node(address, named)
    with nullcontext() if sees_folder else _code() as code:
        runtime: dict[str, Any] = {"env_vars": environment}
        if code:
            runtime["working_dir"] = code
        else:
            environment["PYTHONPATH"] = os.pathsep.join([str(Path.cwd()), *filter(None, sys.path)])
        try:
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level="ERROR",
                runtime_env=runtime,
                **local,
            )
        except ConnectionError as error:
            if address == "auto":
                raise ValueError(
                    f"{named}=auto: no Ray cluster runs on this machine. Start it, or unset {named}"
                ) from error
            raise ValueError(
                f"the Ray cluster at {named}={address} does not let us in: {cause_of(error)}. If "
                "it has a token, set RAY_AUTH_MODE=token, and the token as RAY_AUTH_TOKEN or in "
                "~/.ray/auth_token; its version must be this one's"
            ) from error
    if at_sigterm is not None:
        signal.signal(signal.SIGTERM, at_sigterm)  # Ray has put its own in place
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str, named: str) -> None:
    """Raises ValueError if nobody listens at `host:port`; Ray would try for minutes."""
    if address in ("auto", "local"):
        return  # which Ray knows
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()) or "/" in host:
        raise ValueError(
            f"{named}={address} is no address of a Ray cluster: write host:port of its head, whose "
            "port is 6379 unless it was started with another"
        )
    try:
        place = host.strip("[]"), int(port)
        socket.create_connection(place, timeout=SECONDS_TO_ANSWER).close()
    except OSError as error:
        raise ValueError(
            f"no Ray cluster answers at {named}={address}: {error}. Start it, or unset {named} to "
            "run Ray on this machine"
        ) from error


def _check_node(address: str, named: str) -> None:
    """Raises ValueError if this machine is no node of the cluster at `host:port`."""
    if not (port := address.rpartition(":")[2]).isdigit() or address.startswith("ray://"):
        return
    for process in psutil.process_iter(["name", "cmdline"]):
        words = process.info["cmdline"] or ()
        if process.info["name"] == "raylet" and any(word.endswith(f":{port}") for word in words):
            return
    # It may be in another container beside this one.
    probe = [sys.executable, "-c", JOIN, address]
    try:
        done = subprocess.run(probe, capture_output=True, timeout=SECONDS_TO_JOIN)
        is_node = done.returncode >= 0
    except subprocess.TimeoutExpired:
        is_node = False
    if not is_node:
        raise ValueError(
            f"this machine is no node of the Ray cluster at {named}={address}, as whoever starts "
            f"work on it must be: `ray start --address={address} --num-cpus=0` makes it one"
        )


def cause_of(error: BaseException) -> str:
    """The last line that says something of a Ray error, whose text is a traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
