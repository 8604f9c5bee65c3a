"""Whether a Ray cluster and its workers are still there, asked while work is under way.

Ray waits for a head that was killed, and for a worker that hangs, for minutes, and says nothing.
"""

import socket
import time
from collections.abc import Sequence
from typing import Any

from components.errors import MayPassError
from components.progress import clock

SECONDS_TO_ANSWER = 5.0
SECONDS_WITHOUT_HEAD = 10.0
SECONDS_TO_START = 60.0  # of a worker: to load what it computes with
PULSE = "pulse"  # a worker's `ping` is a call of this concurrency group, so that work is no matter


class Head:
    """The head of the cluster that this process has joined.

    Args:
        name: of the stage.
    """

    def __init__(self, name: str) -> None:
        import ray

        # Of a Ray client, the head's port is the client server's business.
        self._is_near = not ray.util.client.ray.is_connected()
        host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
        self._place = host.strip("[]"), int(port)
        self._name = name
        self._silent_since: float | None = None

    def answers(self) -> bool:
        """Whether somebody listens there. Raises MayPassError if nobody has for 10 seconds."""
        if not self._is_near:
            return True
        try:
            socket.create_connection(self._place, timeout=SECONDS_TO_ANSWER).close()
        except OSError as error:
            now = time.monotonic()
            self._silent_since = now if self._silent_since is None else self._silent_since
            if now - self._silent_since >= SECONDS_WITHOUT_HEAD:
                raise self.gone(error) from None
            return False
        self._silent_since = None
        return True

    def gone(self, error: BaseException) -> MayPassError:
        """What is said when it is."""
        host, port = self._place
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return MayPassError(
            f"{self._name}: the head of the Ray cluster, {host}:{port}, went away ({reason}). The "
            "same command goes on from here when it is back, or without RAY_ADDRESS"
        )


class Pulse:
    """Has Ray replace workers that do not answer: stopped, swapped out, on a machine that hangs.

    Args:
        workers: actors whose method `ping` answers at once.
        limit_s: for how long one may be silent.
        name: of the stage.
    """

    def __init__(self, workers: Sequence[Any], limit_s: float, name: str) -> None:
        self._workers, self._limit_s, self._name = workers, limit_s, name
        # The question, since when it waits, and for how long it may.
        self._asked: dict[int, tuple[Any, float, float]] = {}

    def look(self) -> None:
        """Ask each worker again that has answered, and end those that have not for too long.

        One that starts, or starts again, has a minute more.
        """
        import ray

        now = time.monotonic()
        for number, worker in enumerate(self._workers):
            if number not in self._asked:
                self._ask(number, worker, now, is_starting=True)
            question, since, limit_s = self._asked[number]
            if ray.wait([question], timeout=0)[0]:
                self._ask(number, worker, now)
            elif now - since >= limit_s:
                print(
                    f"{self._name}: Ray worker {number} has not answered for "
                    f"{clock(now - since)}: ended, and another takes its place",
                    flush=True,
                )
                ray.kill(worker, no_restart=False)
                self._ask(number, worker, now, is_starting=True)

    def forgive(self) -> None:
        """Workers that have no place to run can't answer: count their silence from now on."""
        now = time.monotonic()
        self._asked = {
            number: (question, now, limit_s)
            for number, (question, _, limit_s) in self._asked.items()
        }

    def _ask(self, number: int, worker: Any, now: float, *, is_starting: bool = False) -> None:
        question = worker.ping.options(concurrency_group=PULSE).remote()
        limit_s = self._limit_s + (SECONDS_TO_START if is_starting else 0)
        self._asked[number] = (question, now, limit_s)
