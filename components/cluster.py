"""Ray: work that outgrows a process. On a laptop `num_workers: 0` does it without.

Ray runs on this machine unless RAY_ADDRESS names a cluster, whose nodes must see this folder under
the same path. Each worker has one thread on a CPU, or one GPU where the cluster has any. What a
cluster has no room for is waited for, in the log, and given up after `cluster.wait_minutes`; a
worker that has not answered for as long is replaced.
"""

import math
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from components.following import Follower, Report, reports_here, telling_losses
from components.liveness import PULSE, Head, Pulse
from components.params import Params
from components.progress import clock

OBJECT_STORE_BYTES = 150 * 2**20  # nothing of size goes through it
SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_TO_ANSWER = 10.0
# A cluster that has just started tells its resources after a moment; a wait is told after it.
SECONDS_UNTOLD = 5.0
SECONDS_BETWEEN_LINES = 30.0
# What a wait for workers that were lost is made of.
GROUP_START_S = 60


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
    is for Ray's own files. Raises ValueError, with the worker's own
    words, if the group fails, and where the cluster has no room for it for too long; MayPassError
    if the cluster goes away.
    """
    if params.cluster.num_workers == 0:
        work(params, report)
        return

    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    directory = directory.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    with _ray(params):
        room = _Room(params, name)
        room.wait()
        head, reports = Head(name), reports_here()
        arguments = {"work": work, "params": params, "root": str(Path.cwd()), "reports": reports}
        trainer = TorchTrainer(
            _on_worker,
            train_loop_config=arguments,
            scaling_config=ScalingConfig(num_workers=room.num_workers, use_gpu=room.has_gpu),
            run_config=RunConfig(
                # Ray would take a second run of the same name for the end of the first.
                name=f"{name}-{time.time_ns():x}",
                storage_path=str(directory / "ray"),
                failure_config=FailureConfig(
                    max_failures=params.cluster.max_failures,
                    controller_failure_limit=math.ceil(room.limit_s / GROUP_START_S),
                ),
                callbacks=[telling_losses(name, room.limit_s, reports)],
            ),
        )

        def look() -> None:
            if head.answers():
                room.tell_shortage()

        try:
            with Follower(reports, report, look):
                trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise ValueError(f"{name}: a Ray worker failed: {_cause(error)}") from error
        except ray.exceptions.RayError as error:
            raise head.gone(error) from error  # what steers the group is lost, and none of its own
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
    ValueError, with the worker's own words, if a task fails, MayPassError if the cluster goes away.
    """
    most = max(map(len, phases))
    if most == 0:
        return

    import ray
    from ray.exceptions import RayError
    from ray.util import ActorPool

    with _ray(params):
        room = _Room(params, name, most=most)
        room.wait()
        head = Head(name)
        worker = ray.remote(concurrency_groups={PULSE: 1})(_TaskWorker).options(
            num_cpus=1,
            num_gpus=int(room.has_gpu),
            max_restarts=params.cluster.max_failures,
            max_task_retries=params.cluster.max_failures,
        )
        workers = [worker.remote(make, params, str(Path.cwd())) for _ in range(room.num_workers)]
        pool = ActorPool(workers)
        pulse = Pulse(workers, room.limit_s, name)
        try:
            for tasks in phases:
                for task in tasks:
                    pool.submit(lambda actor, task: actor.do.remote(task), task)
                while pool.has_next():
                    try:
                        done(pool.get_next_unordered(timeout=SECONDS_BETWEEN_LOOKS))
                    except RayError:
                        raise
                    except TimeoutError:  # nothing is done yet: is there still who could do it?
                        if not head.answers():
                            continue
                        if room.tell_shortage(give_up=True):
                            pulse.forgive()
                        pulse.look()
        except RayError as error:
            if not head.answers():
                raise head.gone(error) from error
            raise ValueError(f"{name}: a Ray worker failed: {_cause(error)}") from error


class _Room:
    """What the cluster has for the workers. With a GPU in it, each of them needs one.

    Attributes:
        num_workers: that are asked for, `most` at most.
        has_gpu: whether each has a GPU, known after `wait`.
        limit_s: seconds that a shortage may last.
    """

    def __init__(self, params: Params, name: str, *, most: int | None = None) -> None:
        wanted = params.cluster.num_workers
        self.num_workers = wanted if most is None else min(wanted, most)
        self.has_gpu = False
        self.limit_s = 60 * params.cluster.wait_minutes
        self._name = name
        self._short_since: float | None = None
        self._told = -math.inf

    def wait(self) -> None:
        """Wait until all workers have room. Raises ValueError after the limit."""
        import ray

        while True:
            there = ray.cluster_resources()
            self.has_gpu = there.get("GPU", 0) >= 1
            if not self._short(ray.available_resources(), give_up=True):
                return
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def tell_shortage(self, *, give_up: bool = False) -> bool:
        """Say so if nodes were lost that workers need. Raises ValueError after the limit."""
        import ray

        return self._short(ray.cluster_resources(), give_up=give_up)

    def _short(self, there: Mapping[str, float], *, give_up: bool) -> bool:
        import ray

        kinds = ("GPU", "CPU") if self.has_gpu else ("CPU",)
        lacking = next((kind for kind in kinds if there.get(kind, 0) < self.num_workers), None)
        now = time.monotonic()
        if lacking is None:
            self._short_since, self._told = None, -math.inf
            return False
        self._short_since = now if self._short_since is None else self._short_since
        waited = now - self._short_since
        has, free = ray.cluster_resources().get(lacking, 0), there.get(lacking, 0)
        line = (
            f"{self._name}: {self.num_workers} Ray workers need {self.num_workers} {lacking}s, the "
            f"cluster has {has:g}, {free:g} of them free"
        )
        if give_up and waited >= self.limit_s:
            raise ValueError(
                f"{line}; waited {clock(waited)}: lower cluster.num_workers, add nodes, or raise "
                "cluster.wait_minutes. The same command goes on from here"
            )
        if waited >= min(SECONDS_UNTOLD, self.limit_s) and (
            now - self._told >= SECONDS_BETWEEN_LINES
        ):
            self._told = now
            print(f"{line}: waiting, {clock(waited)} of {clock(self.limit_s)} at most", flush=True)
        return True


class _TaskWorker:
    """A Ray actor that does tasks one at a time."""

    def __init__(
        self, make: Callable[[Params], Callable[[str], None]], params: Params, root: str
    ) -> None:
        _settle(root)
        self._make, self._params = make, params
        self._work: Callable[[str], None] | None = None

    def do(self, task: str) -> str:
        if self._work is None:  # not sooner: a worker that loads a model must answer too
            self._work = self._make(self._params)
        self._work(task)
        return task

    def ping(self) -> None:
        """Answered beside the work."""


@contextmanager
def _ray(params: Params) -> Iterator[None]:
    """Ray, for a while: here or at RAY_ADDRESS. Raises ValueError if nobody answers there."""
    import ray

    # Workers must find this code.
    environment = {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), *filter(None, sys.path)])}
    environment["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(GROUP_START_S)
    environment["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(60 * params.cluster.wait_minutes)
    address = os.environ.get("RAY_ADDRESS")
    local: dict[str, Any] = {}
    if not address:
        local = {
            "num_cpus": max(params.cluster.num_workers, os.cpu_count() or 1),
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
    at_sigterm = signal.getsignal(signal.SIGTERM)
    if address:
        _knock(address)
    try:
        ray.init(
            log_to_driver=False,
            logging_level="ERROR",
            runtime_env={"env_vars": environment},
            **local,
        )
    except ConnectionError as error:
        raise ValueError(
            f"the Ray cluster at RAY_ADDRESS={address} does not let us in: {_cause(error)}. If it "
            "has a token, set RAY_AUTH_MODE=token, and the token as RAY_AUTH_TOKEN or in "
            "~/.ray/auth_token; its version must be this one's"
        ) from error
    if at_sigterm is not None:
        signal.signal(signal.SIGTERM, at_sigterm)  # Ray has put its own in place
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Raises ValueError if nobody listens at `host:port`; Ray would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return  # `auto`, which Ray knows
    try:
        place = host.strip("[]"), int(port)
        socket.create_connection(place, timeout=SECONDS_TO_ANSWER).close()
    except OSError as error:
        raise ValueError(
            f"no Ray cluster answers at RAY_ADDRESS={address}: {error}. Start it, or unset "
            "RAY_ADDRESS to run Ray on this machine"
        ) from error


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
            ray.get(arguments["reports"].add.remote((num_images, dict(metrics))))

    arguments["work"](arguments["params"], report)


def _settle(root: str) -> None:
    """What every worker does first."""
    import torch

    from components.environment import quiet

    quiet()
    os.chdir(root)  # Ray starts workers in a folder of its own
    if not torch.cuda.is_available():
        torch.set_num_threads(1)


def _cause(error: BaseException) -> str:
    """The last line that says something of a Ray error, whose text is a traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
