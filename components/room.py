"""The room that a Ray cluster has for workers: looked for, asked for, waited for."""

import math
import time
from collections.abc import Mapping
from typing import Any

from components.params import Params
from components.progress import clock

SECONDS_BETWEEN_LOOKS = 0.5
# A cluster that has just started tells its resources after a moment; a wait is told after it.
SECONDS_UNTOLD = 5.0
SECONDS_BETWEEN_LINES = 30.0


class Demand:
    """What is asked of a cluster that lacks it: an autoscaler starts nodes for nothing else.

    It is asked for as a placement group, which is the last thing to be had: it is given up when
    this process ends, and takes the place of nobody else's.
    """

    def __init__(self) -> None:
        self._bundles: list[dict[str, float]] = []
        self._group: Any = None
        self._ready: Any = None

    def ask(self, bundles: list[dict[str, float]]) -> None:
        """Ask for these, in place of what was asked for."""
        from ray.util import placement_group

        if bundles != self._bundles:
            self.end()
            self._bundles, self._group = bundles, placement_group(bundles)
            self._ready = self._group.ready()

    def is_met(self, bundles: list[dict[str, float]]) -> bool:
        """Whether these were asked for and are there, held free."""
        import ray

        return bundles == self._bundles and bool(ray.wait([self._ready], timeout=0)[0])

    def end(self) -> None:
        """Ask for nothing, and hold nothing."""
        from ray.util import remove_placement_group

        if self._bundles:
            remove_placement_group(self._group)
            self._bundles = []


class Room:
    """What the cluster has for the workers. With a GPU in it, each of them needs one.

    Without one, too, if `cluster.wait_for_gpus` says so.

    Attributes:
        num_workers: that are asked for, `most` at most.
        has_gpu: whether each has a GPU, known after `wait`.
        limit_s: seconds that a shortage may last.
    """

    def __init__(self, params: Params, name: str, *, most: int | None = None) -> None:
        wanted = params.cluster.num_workers
        self.num_workers = wanted if most is None else min(wanted, most)
        self.has_gpu = False
        self._wants_gpu = params.cluster.wait_for_gpus
        self.limit_s = 60 * params.cluster.wait_minutes
        self._name = name
        self._short_since: float | None = None
        self._told = -math.inf

    def wait(self) -> None:
        """Wait until all workers have room. Raises ValueError after the limit."""
        import ray

        demand = Demand()
        try:
            while True:
                self.has_gpu = self._wants_gpu or ray.cluster_resources().get("GPU", 0) >= 1
                one = {"CPU": 1.0, "GPU": 1.0} if self.has_gpu else {"CPU": 1.0}
                bundles = [one] * self.num_workers
                if demand.is_met(bundles) or not self._short(
                    ray.available_resources(), give_up=True
                ):
                    break
                demand.ask(bundles)
                time.sleep(SECONDS_BETWEEN_LOOKS)
        finally:
            demand.end()
        on = "each with a GPU" if self.has_gpu else "on CPUs: the cluster has no GPU"
        print(f"{self._name}: Ray workers: {self.num_workers}, {on}", flush=True)

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
            what = self._what_to_do(lacking, has)
            raise ValueError(
                f"{line}; waited {clock(waited)}: {what}. The same command goes on from here"
            )
        if waited >= min(SECONDS_UNTOLD, self.limit_s) and (
            now - self._told >= SECONDS_BETWEEN_LINES
        ):
            self._told = now
            print(f"{line}: waiting, {clock(waited)} of {clock(self.limit_s)} at most", flush=True)
        return True

    def _what_to_do(self, lacking: str, has: float) -> str:
        """Where the cluster has so many GPUs or CPUs, whichever is lacking."""
        if lacking != "GPU" or not self._wants_gpu or has >= self.num_workers:
            return "lower cluster.num_workers, add nodes, or raise cluster.wait_minutes"
        came, instead = "too few", "lower cluster.num_workers"
        if not has:
            came, instead = "none", "set it to false to compute on CPUs"
        return (
            f"cluster.wait_for_gpus is true, and {came} came: {instead}, add nodes with GPUs or "
            "see why the autoscaler does not (ray status), or raise cluster.wait_minutes to longer "
            "than such a node takes to start"
        )
