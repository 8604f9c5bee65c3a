"""Ray: work that outgrows a process. On a laptop `num_workers: 0` does it without.

Ray runs on this machine unless `cluster.address` or RAY_ADDRESS names a cluster, whose nodes see
this folder under the same path, or with `cluster.shared_folder: false` have what they need shipped.
Each worker has one thread on a CPU, or one GPU where the cluster has any, or is to get some. What a
cluster has no room for is waited for, in the log, and given up after `cluster.wait_minutes`; a
worker that has not answered for as long is replaced.
"""

import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout, suppress
from pathlib import Path
from stat import S_ISREG
from typing import Any

from components.following import (
    Follower,
    Lines,
    Report,
    loss_of,
    reports_here,
    telling_losses,
)
from components.joining import GROUP_START_S, cause_of, joined
from components.liveness import PULSE, Head, Pulse
from components.params import Params
from components.paths import RUNS
from components.room import Room
from components.shipping import Shipment
from pnp_core.files import write_bytes

SECONDS_BETWEEN_LOOKS = 0.5


def run_training(
    work: Callable[[Params, Report], None],
    params: Params,
    report: Report,
    *,
    name: str,
    shipment: Shipment | None = None,
) -> None:
    """Run `work(params, report)` on as many workers as `params.cluster` says.

    `work` must resume from what an earlier attempt left: a group that loses a worker is started
    again, `max_failures` times. Rank 0's reports arrive at `report` in this process. Ray's
    own files go to `runs/<name>`. `shipment`: the workers do not see this folder. Raises
    ValueError, with the worker's own words, if the group fails, and where the cluster has no room
    for it for too long; MayPassError if the cluster goes away.
    """
    if params.cluster.num_workers == 0:
        work(params, report)
        return

    import ray
    from ray.train import ScalingConfig

    with joined(params, sees_folder=shipment is None):
        room = Room(params, name)
        room.wait()
        head, reports = Head(name), reports_here()
        arguments = {"work": work, "params": params, "place": shipment or Path.cwd()}
        trainer = trainer_class()(
            _on_worker,
            train_loop_config={**arguments, "reports": reports},
            scaling_config=ScalingConfig(num_workers=room.num_workers, use_gpu=room.has_gpu),
            run_config=_run_config(params, room, name, reports, shipment),
        )

        def look() -> None:
            if head.answers():
                room.tell_shortage()

        try:
            with Follower(reports, report, look):
                trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise ValueError(f"{name}: {_failure_of(error, room.limit_s)}") from error
        except ray.exceptions.RayError as error:  # what steers the group is lost
            if not head.answers():
                raise head.gone(error) from error
            raise ValueError(f"{name}: training was lost: {cause_of(error)}") from error
    if shipment:
        shipment.bring()
    else:
        shutil.rmtree(RUNS / name / "ray")


def trainer_class() -> Any:
    """Ray's trainer, which leaves Ctrl-C to this process.

    By its own handler an interrupted stage ends without a word, and after training Ctrl-C does
    nothing, as the handler stays in place.
    """
    from ray.train.torch import TorchTrainer

    class Trainer(TorchTrainer):
        def _register_sigint_handler(self, controller: Any) -> None:
            pass

    return Trainer


def _failure_of(error: Any, limit_s: float) -> str:
    """Why a group is given up: by the words of a worker, or how the last one was lost."""
    failures = getattr(error, "worker_failures", {})
    losses = {rank: loss_of(failure, limit_s) for rank, failure in sorted(failures.items())}
    if not losses or not all(losses.values()):
        return f"a Ray worker failed: {cause_of(error)}"
    rank, what = next(iter(losses.items()))
    return (
        f"Ray worker {rank} {what}, and that is more losses than cluster.max_failures: the same "
        "command goes on from the last checkpoint"
    )


def _run_config(
    params: Params, room: Room, name: str, reports: Any, shipment: Shipment | None
) -> Any:
    """Where a group keeps Ray's own files, how often it is started again, whom it tells."""
    from ray.train import FailureConfig, RunConfig

    directory = (RUNS / name).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    storage_path, files = str(directory / "ray"), None
    if shipment:
        storage_path, files = shipment.mirror("ray").for_arrow()
    return RunConfig(
        # Ray would take a second run of the same name for the end of the first.
        name=f"{name}-{time.time_ns():x}",
        storage_path=storage_path,
        storage_filesystem=files,
        failure_config=FailureConfig(
            max_failures=params.cluster.max_failures,
            controller_failure_limit=math.ceil(room.limit_s / GROUP_START_S),
        ),
        callbacks=[telling_losses(name, room.limit_s, reports)],
    )


def run_tasks(  # noqa: PLR0913, what to do, then by name for whom and where
    make: Callable[[Params], Callable[[str], None]],
    params: Params,
    phases: Sequence[Sequence[str]],
    done: Callable[[str], None],
    *,
    name: str,
    shipment: Shipment | None = None,
) -> bool:
    """Do tasks on `params.cluster.num_workers` workers, each with a `make(params)` of its own.

    The tasks of a phase are shared out among the workers; the next phase waits for them all. A task
    must be one that can be done again: a worker that is lost is replaced, and what it was at given
    to the new one, `max_failures` times. `done` hears of each task in this process. `shipment`: the
    workers do not see this folder, and what they make in its folder `made` comes back. Returns
    whether each had a GPU. Raises ValueError, with the worker's own words, if a task fails,
    MayPassError if the cluster goes away.
    """
    most = max(map(len, phases))
    if most == 0:
        return False

    import ray
    from ray.exceptions import RayError
    from ray.util import ActorPool

    with joined(params, sees_folder=shipment is None):
        room = Room(params, name, most=most)
        room.wait()
        head = Head(name)
        worker = ray.remote(concurrency_groups={PULSE: 1})(_TaskWorker).options(
            num_cpus=1,
            num_gpus=int(room.has_gpu),
            max_restarts=params.cluster.max_failures,
            max_task_retries=params.cluster.max_failures,
        )
        place = shipment or Path.cwd()
        workers = [worker.remote(make, params, place) for _ in range(room.num_workers)]
        pool = ActorPool(workers)
        pulse = Pulse(workers, room.limit_s, name)
        try:
            for tasks in phases:
                for task in tasks:
                    pool.submit(lambda actor, task: actor.do.remote(task), task)
                while pool.has_next():
                    task, made = _next_of(pool, head, room, pulse)
                    for path, content in made.items():
                        write_bytes(path, content)
                    done(task)
        except RayError as error:
            if not head.answers():
                raise head.gone(error) from error
            raise ValueError(f"{name}: a Ray worker failed: {cause_of(error)}") from error
    return room.has_gpu


def _next_of(pool: Any, head: Head, room: Room, pulse: Pulse) -> tuple[str, dict[Path, bytes]]:
    """The next task that is done, and what it made. Looks meanwhile whether anybody is at work."""
    from ray.exceptions import RayError

    while True:
        try:
            done: tuple[str, dict[Path, bytes]]
            done = pool.get_next_unordered(timeout=SECONDS_BETWEEN_LOOKS)
            return done
        except RayError:
            raise
        except TimeoutError:
            if not head.answers():
                continue
            if room.tell_shortage(give_up=True):
                pulse.forgive()
            pulse.look()


class _TaskWorker:
    """A Ray actor that does tasks one at a time."""

    def __init__(
        self,
        make: Callable[[Params], Callable[[str], None]],
        params: Params,
        place: Path | Shipment,
    ) -> None:
        self._returns = place.made if isinstance(place, Shipment) else None
        self._make, self._params, self._place = make, params, place
        self._work: Callable[[str], None] | None = None

    def do(self, task: str) -> tuple[str, dict[Path, bytes]]:
        if self._work is None:  # not sooner: a worker that fetches and loads must answer too
            _settle(self._place)
            self._work = self._make(self._params)
        before = self._made()
        self._work(task)
        made = [path for path, changed in self._made().items() if before.get(path) != changed]
        return task, {path: path.read_bytes() for path in made}

    def _made(self) -> dict[Path, int]:
        """The files that are to come back, and when they were written.

        What another worker of this node is writing is in a hidden folder, and may go any moment.
        """
        made: dict[Path, int] = {}
        for path in self._returns.rglob("*") if self._returns else ():
            if not any(part.startswith(".") for part in path.parts):
                with suppress(FileNotFoundError):
                    about = path.stat()
                    if S_ISREG(about.st_mode):
                        made[path] = about.st_mtime_ns
        return made

    def ping(self) -> None:
        """Answered beside the work."""


def _on_worker(arguments: Mapping[str, Any]) -> None:
    """The body of each Ray worker."""
    import ray.train
    import ray.train.torch
    import torch

    place = arguments["place"]
    _settle(place)
    if torch.cuda.is_available():
        torch.cuda.set_device(ray.train.torch.get_device())
    rank = ray.train.get_context().get_world_rank()
    params = arguments["params"]

    def tell(report: tuple[int, dict[str, float]] | str) -> None:
        ray.get(arguments["reports"].add.remote(report))

    sending: AbstractContextManager[Callable[[], None]] = nullcontext(lambda: None)
    if isinstance(place, Shipment):
        place.resume(torch.distributed.barrier)
        if rank == 0:
            sending = place.sending(tell=tell, limit_s=60 * params.cluster.wait_minutes)
    # Of what all workers print, once is enough; Ray keeps it to itself.
    printing = redirect_stdout(Lines(tell)) if rank == 0 else nullcontext()
    with sending as check, printing:

        def report(num_images: int, metrics: Mapping[str, float]) -> None:
            if rank == 0:
                check()
                tell((num_images, dict(metrics)))

        arguments["work"](params, report)


def _settle(place: Path | Shipment) -> None:
    """What every worker does first: go to the folder of the work, or make it here."""
    import torch

    from components.environment import keep_freed_memory, quiet

    quiet()
    keep_freed_memory()
    if isinstance(place, Shipment):
        place.unpack()
    else:
        os.chdir(place)  # Ray starts workers in a folder of its own
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
