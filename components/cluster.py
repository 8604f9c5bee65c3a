"""Ray: work that outgrows a process. On a laptop `num_workers: 0` does it without.

Ray runs on this machine unless RAY_ADDRESS names a cluster, whose nodes must see this folder under
the same path. Each worker has one thread on a CPU, or one GPU.
"""

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from components.params import Params

Report = Callable[[int, Mapping[str, float]], None]

OBJECT_STORE_BYTES = 150 * 2**20  # nothing of size goes through it
SECONDS_BETWEEN_LOOKS = 0.5


def run_training(
    work: Callable[[Params, Report], None],
    params: Params,
    report: Report,
    *,
    name: str,
    directory: Path,
) -> None:
    """Run `work(params, report)` on as many workers as `params.cluster` says.

    `work` must resume from what an earlier attempt left: a group that loses a worker is started
    again, `max_failures` times. Rank 0's reports arrive at `report` in this process. `directory`
    is for Ray's own files and the reports under way. Raises ValueError, with the worker's own
    words, if the group fails.
    """
    if params.cluster.num_workers == 0:
        work(params, report)
        return

    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    directory = directory.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    reports = directory / "reports.jsonl"
    reports.unlink(missing_ok=True)
    arguments = {"work": work, "params": params, "root": str(Path.cwd()), "reports": str(reports)}
    with _ray(params) as has_gpu:
        trainer = TorchTrainer(
            _on_worker,
            train_loop_config=arguments,
            scaling_config=ScalingConfig(num_workers=params.cluster.num_workers, use_gpu=has_gpu),
            run_config=RunConfig(
                # Ray would take a second run of the same name for the end of the first.
                name=f"{name}-{time.time_ns():x}",
                storage_path=str(directory / "ray"),
                failure_config=FailureConfig(max_failures=params.cluster.max_failures),
            ),
        )
        try:
            with _Follower(reports, report):
                trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise ValueError(f"{name}: a Ray worker failed: {_cause(error)}") from error
        shutil.rmtree(directory / "ray")


def run_tasks(
    make: Callable[[Params], Callable[[str], None]],
    params: Params,
    phases: Sequence[Sequence[str]],
    done: Callable[[str], None],
    *,
    name: str,
) -> None:
    """Do tasks on `params.cluster.num_workers` workers, each with a `make(params)` of its own.

    The tasks of a phase are shared out among the workers; the next phase waits for them all. A task
    must be one that can be done again: a worker that is lost is replaced, and what it was at given
    to the new one, `max_failures` times. `done` hears of each task in this process. Raises
    ValueError, with the worker's own words, if a task fails.
    """
    most = max(map(len, phases))
    if most == 0:
        return

    import ray
    from ray.exceptions import RayError
    from ray.util import ActorPool

    with _ray(params) as has_gpu:
        worker = ray.remote(_TaskWorker).options(
            num_cpus=1,
            num_gpus=int(has_gpu),
            max_restarts=params.cluster.max_failures,
            max_task_retries=params.cluster.max_failures,
        )
        num_workers = min(params.cluster.num_workers, most)
        pool = ActorPool([worker.remote(make, params, str(Path.cwd())) for _ in range(num_workers)])
        try:
            for tasks in phases:
                for task in pool.map_unordered(lambda actor, task: actor.do.remote(task), tasks):
                    done(task)
        except RayError as error:
            raise ValueError(f"{name}: a Ray worker failed: {_cause(error)}") from error


class _TaskWorker:
    """A Ray actor that does tasks one at a time."""

    def __init__(
        self, make: Callable[[Params], Callable[[str], None]], params: Params, root: str
    ) -> None:
        _settle(root)
        self._work = make(params)

    def do(self, task: str) -> str:
        self._work(task)
        return task


@contextmanager
def _ray(params: Params) -> Iterator[bool]:
    """Ray, for a while: here or at RAY_ADDRESS. Yields whether its workers get a GPU each."""
    import ray
    import torch

    has_gpu = torch.cuda.is_available()
    # Workers must find this code, and must not share their threads.
    environment = {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), *filter(None, sys.path)])}
    local: dict[str, Any] = {}
    if "RAY_ADDRESS" not in os.environ:
        local = {
            "num_cpus": max(params.cluster.num_workers, os.cpu_count() or 1),
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
    if not has_gpu:
        environment["OMP_NUM_THREADS"] = "1"
    ray.init(
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": environment},
        **local,
    )
    try:
        yield has_gpu
    finally:
        ray.shutdown()


def _on_worker(arguments: Mapping[str, Any]) -> None:
    """The body of each Ray worker."""
    import ray.train
    import ray.train.torch
    import torch

    _settle(arguments["root"])
    if torch.cuda.is_available():
        torch.cuda.set_device(ray.train.torch.get_device())
    rank = ray.train.get_context().get_world_rank()

    def report(num_images: int, metrics: Mapping[str, float]) -> None:
        if rank == 0:
            with open(arguments["reports"], "a") as file:
                file.write(json.dumps([num_images, dict(metrics)]) + "\n")

    arguments["work"](arguments["params"], report)


def _settle(root: str) -> None:
    """What every worker does first."""
    import torch

    from components.environment import quiet

    quiet()
    os.chdir(root)  # Ray starts workers in a folder of its own
    if not torch.cuda.is_available():
        torch.set_num_threads(1)


class _Follower:
    """Hands on the lines of a growing file while the block runs."""

    def __init__(self, path: Path, report: Report) -> None:
        self._path, self._report = path, report
        self._position = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self._read()

    def _follow(self) -> None:
        while not self._stop.wait(SECONDS_BETWEEN_LOOKS):
            self._read()

    def _read(self) -> None:
        if not self._path.exists():
            return
        with self._path.open() as file:
            file.seek(self._position)
            while (line := file.readline()).endswith("\n"):
                self._position = file.tell()
                num_images, metrics = json.loads(line)
                self._report(num_images, metrics)


def _cause(error: BaseException) -> str:
    """The last line that says something of a Ray error, whose text is a traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
