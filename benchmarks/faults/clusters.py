"""Ray clusters that are not there, too small, or lose what they are made of."""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from benchmarks.faults.listing import fault
from benchmarks.faults.processes import interrupted
from benchmarks.faults.proxy import free_port, kill_all, server
from benchmarks.faults.workspace import UnexpectedError, Workspace

ONE = ("dvc", "repro", "--single-item")


@fault("cluster", before="distill")
def no_cluster_at_the_address(workspace: Workspace) -> None:
    """RAY_ADDRESS points at nothing."""
    workspace.set_param("cluster.num_workers", 2)
    address = f"127.0.0.1:{free_port()}"
    done = workspace.run(*ONE, "distill", RAY_ADDRESS=address)
    workspace.told(done, "error: no Ray cluster answers at RAY_ADDRESS")
    workspace.set_param("cluster.num_workers", 0)
    workspace.recovers(*ONE, "distill")
    workspace.stages = ("distill",)


@contextmanager
def ray_head(workspace: Workspace, num_cpus: int) -> Iterator["subprocess.Popen[bytes]"]:
    """A Ray head on a free port, which the workspace's commands then use; ended with the block."""
    port = free_port()
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    options = [f"--num-cpus={num_cpus}", f"--port={port}", "--include-dashboard=false"]
    options += ["--object-store-memory=100000000", "--node-ip-address=127.0.0.1"]
    options += [f"--temp-dir=/tmp/ray-{port}"]
    # Ray has a token only where one lies at home.
    settings = {"RAY_ADDRESS": f"127.0.0.1:{port}", "RAY_AUTH_MODE": "disabled"}
    workspace.environment |= settings
    try:
        with server(workspace, port, *ray, *options) as head:
            time.sleep(3)
            yield head
    finally:
        for name in settings:
            del workspace.environment[name]
        shutil.rmtree(f"/tmp/ray-{port}", ignore_errors=True)


@fault("cluster", before="distill")
def more_workers_than_the_cluster_has(workspace: Workspace) -> None:
    """Two Ray workers are asked for on a cluster with one CPU."""
    workspace.set_param("cluster.num_workers", 2)
    with ray_head(workspace, 1):
        done = workspace.run(*ONE, "distill")
        workspace.told(done, "error: distill: 2 Ray workers need 2 CPUs, the cluster has 1")
        if not done.line("waiting, 0:.. of 0:12 at most"):
            raise UnexpectedError("waits without a word")
    workspace.set_param("cluster.num_workers", 0)
    workspace.recovers(*ONE, "distill")
    workspace.stages = ("distill",)


@fault("cluster", before="cache")
def kill9_of_a_cache_worker(workspace: Workspace) -> None:
    """`kill -9` of one of two Ray workers that build the cache."""
    outlives_a_worker(workspace, "cache", "_TaskWorker")
    workspace.said = "another worker goes on"
    workspace.stages = ("cache",)


@fault("cluster", before="distill")
def kill9_of_a_training_worker(workspace: Workspace) -> None:
    """`kill -9` of one of two Ray workers that train: the group goes on from its checkpoint."""
    outlives_a_worker(workspace, "distill", "RayTrainWorker")
    workspace.said = "the group goes on from its checkpoint"
    workspace.stages = ()  # gradients summed over two workers round otherwise


def outlives_a_worker(workspace: Workspace, stage: str, actor: str) -> None:
    """One of two Ray workers of a stage is killed, and the stage goes on to its end."""
    workspace.set_param("cluster.num_workers", 2)
    workspace.set_param("cluster.max_failures", 2)
    running = workspace.start(*ONE, stage)
    workspace.in_the_middle(running, stage)
    ray_worker(running.pid, actor).kill()
    if (done := workspace.finish(running)).exit_code != 0:
        raise UnexpectedError(f"the loss of a worker is not survived: {done.output[-400:]}")


def ray_worker(pid: int, name: str) -> psutil.Process:
    """A Ray worker below `pid` by the name of its actor."""
    for child in psutil.Process(pid).children(recursive=True):
        if name in " ".join(child.cmdline()):
            return child
    raise UnexpectedError(f"no Ray worker {name}")


def loses_its_head(workspace: Workspace, stage: str) -> None:
    """`kill -9` of the whole head node while a stage is at work; with another one it goes on."""
    with ray_head(workspace, 2) as head:
        running = workspace.start(*ONE, stage)
        workspace.in_the_middle(running, stage)
        kill_all(head)
        said = f"error: {stage}: the head of the Ray cluster, .*, went away"
        workspace.told(workspace.finish(running), said)
    with ray_head(workspace, 2):
        workspace.recovers(*ONE, stage)
    workspace.stages = (stage,)


@fault("cluster", before="cache")
def kill9_of_the_ray_head_in_cache(workspace: Workspace) -> None:
    """`kill -9` of the head of a Ray cluster on which two workers build the cache."""
    workspace.set_param("cluster.num_workers", 2)
    loses_its_head(workspace, "cache")


@fault("cluster", before="distill")
def kill9_of_the_ray_head_in_distill(workspace: Workspace) -> None:
    """`kill -9` of the head of a Ray cluster on which a worker trains."""
    workspace.set_param("cluster.num_workers", 1)  # of two, gradients round otherwise
    loses_its_head(workspace, "distill")


def hangs(workspace: Workspace, stage: str, worker: str) -> None:
    """SIGSTOP of one of two workers, which is noticed within `wait_minutes` and replaced."""
    workspace.set_param("cluster.num_workers", 2)
    workspace.set_param("cluster.max_failures", 2)
    running = workspace.start(*ONE, stage)
    workspace.in_the_middle(running, stage)
    ray_worker(running.pid, worker).suspend()
    done = workspace.finish(running)
    if done.exit_code != 0:
        raise UnexpectedError(f"a worker that hangs is not survived: {done.output[-400:]}")
    workspace.said = done.line("has not answered for") or ""
    if not workspace.said:
        raise UnexpectedError("says nothing of the worker that hangs")


def is_interrupted(workspace: Workspace, stage: str) -> None:
    """Ctrl-C in a stage that runs on Ray."""
    workspace.set_param("cluster.num_workers", 1)  # of two, gradients round otherwise
    interrupted(workspace, stage)


@fault("cluster", before="cache")
def ctrl_c_in_cache_on_ray(workspace: Workspace) -> None:
    """Ctrl-C while a Ray worker builds the cache."""
    is_interrupted(workspace, "cache")


@fault("cluster", before="distill")
def ctrl_c_in_distill_on_ray(workspace: Workspace) -> None:
    """Ctrl-C while a Ray worker trains."""
    is_interrupted(workspace, "distill")


@fault("cluster", before="cache")
def sigstop_of_a_cache_worker(workspace: Workspace) -> None:
    """SIGSTOP of one of two Ray workers that build the cache: another takes its place."""
    hangs(workspace, "cache", "_TaskWorker")
    workspace.stages = ("cache",)


@fault("cluster", before="distill")
def sigstop_of_a_training_worker(workspace: Workspace) -> None:
    """SIGSTOP of one of two Ray workers that train: the group goes on from its checkpoint."""
    hangs(workspace, "distill", "RayTrainWorker")
    workspace.stages = ()  # gradients summed over two workers round otherwise
