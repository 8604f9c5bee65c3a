"""What workers of a training group report, heard in the process that started them."""

import io
import signal
import threading
from collections.abc import Callable, Mapping
from typing import Any

from components.errors import MayPassError
from components.progress import clock

Report = Callable[[int, Mapping[str, float]], None]
SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_TO_ANSWER = 10.0
INTERRUPT = signal.SIGUSR1  # of what this process waits for


class Reports:
    """What is to be heard of in the process that started the workers; an actor beside it."""

    def __init__(self) -> None:
        self._all: list[tuple[int, dict[str, float]] | str] = []

    def add(self, report: tuple[int, dict[str, float]] | str) -> None:
        """A point of the curves, or a line of the log."""
        self._all.append(report)

    def since(self, count: int) -> list[tuple[int, dict[str, float]] | str]:
        """All but the first `count`."""
        return self._all[count:]


def reports_here() -> Any:
    """An actor for reports, on this node: where that is lost, all is."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Reports).options(num_cpus=0, scheduling_strategy=here).remote()


class Lines(io.TextIOBase):
    """In place of a worker's standard output: hands on the lines that are printed there."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell, self._begun = tell, ""

    def write(self, text: str) -> int:
        """Print a part of a line, or several."""
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            self._tell(line)
        return len(text)


class Follower:
    """Hands on reports while the block runs, and takes a `look` as often.

    MayPassError of a `look` is raised in the block, whatever that waits for.
    """

    def __init__(self, reports: Any, report: Report, look: Callable[[], None]) -> None:
        self._reports, self._report, self._look = reports, report, look
        self._count = 0
        self._error: MayPassError | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> None:
        self._before = signal.signal(INTERRUPT, self._raise)
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        signal.signal(INTERRUPT, self._before)
        if self._error is None:
            self._read()

    def _follow(self) -> None:
        while not self._stop.wait(SECONDS_BETWEEN_LOOKS):
            try:
                self._look()
            except MayPassError as error:
                self._error = error
                signal.pthread_kill(threading.main_thread().ident or 0, INTERRUPT)
                return
            self._read()

    def _raise(self, *_: object) -> None:
        if self._error and not self._stop.is_set():
            raise self._error

    def _read(self) -> None:
        import ray
        from ray.exceptions import RayError

        try:
            reports = ray.get(self._reports.since.remote(self._count), timeout=SECONDS_TO_ANSWER)
        except RayError:  # the cluster goes, which `look` tells
            return
        self._count += len(reports)
        for report in reports:
            if isinstance(report, str):
                print(report, flush=True)
            else:
                self._report(*report)


def loss_of(error: BaseException, limit_s: float) -> str | None:
    """How a worker was lost, in words; None of one that has said itself what is wrong.

    `limit_s`: seconds for which one may be silent.
    """
    match type(error).__name__:
        case "WorkerHealthCheckTimeoutError":
            return f"has not answered for {clock(limit_s)}"
        case "WorkerHealthCheckFailedError" | "RayActorError" | "ActorDiedError":
            return "was lost"
    return None


def telling_losses(name: str, limit_s: float, reports: Any) -> Any:
    """A callback of Ray Train that reports which workers a group has lost, and to what."""
    from ray.train import UserCallback

    class TellsLosses(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: Any) -> None:  # noqa: ARG002, Ray's interface
            for rank, error in sorted(worker_exceptions.items()):
                if what := loss_of(error, limit_s):
                    line = f"{name}: Ray worker {rank} {what}: all go on from a checkpoint"
                    reports.add.remote(line)

    return TellsLosses()
