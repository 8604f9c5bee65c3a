"""The rows, in the order of their importance: what is opened once, and what is measured of it."""

import io
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from benchmarks.cost import Forwards, peak_memory
from benchmarks.gpu.scale import Base, Scale
from benchmarks.plan import step_of
from benchmarks.train_cost import (
    Caching,
    caching_config,
    seconds_per_image,
    timed,
    training_config,
)
from components.device import freeze
from pnp_core.cache import TEXT, Example, TeacherCache
from pnp_core.distill import distill
from pnp_core.guide import KINDS
from pnp_core.metrics import median_times, peak_bytes
from pnp_core.precision import hold_in_bf16

BATCHES = (1, 4)
EAGER, COMPILED, GRAPH = "eager", "compiled", "graph"
STEPS_AT_ONCE = 4  # between two looks at the clock, as a sampler waits for the device at the end
SECONDS_OF_STEPS, LEAST_REPEATS = 8, 3  # of a row, as far as the least repeats allow
NUM_IMAGES = 4  # of the cache that is built
TESTS = ("tests/test_host_syncs.py", "tests/test_plug.py")
Row = dict[str, Any]
Call = Callable[[], object]


class Group(NamedTuple):
    """Rows that share what takes long to open."""

    names: tuple[str, ...]
    open: Callable[[], Mapping[str, Callable[[], Row]]]


def groups(scale: Scale, scratch: Path) -> Iterator[Group]:
    """All rows. ``scratch``: a folder for caches."""
    ways = [f"{EAGER} {batch}" for batch in BATCHES]
    ways += [f"{how} {batch}" for batch in BATCHES for how in (COMPILED, GRAPH)]
    for name, base in scale.bases.items():
        names = tuple(f"{name} {way}" for way in ways)
        yield Group(names, partial(steps, name, base, scale))
    for name, base in scale.bases.items():
        names = tuple(f"{name} {what}" for what in ("cache", f"train {EAGER}", f"train {COMPILED}"))
        yield Group(names, partial(training, name, base, scale, scratch / name))
    yield Group(("tests",), lambda: {"tests": tests_on_a_gpu})


def steps(name: str, base: Base, scale: Scale) -> dict[str, Callable[[], Row]]:
    """Rows of one base's steps."""
    opened = Stepping(base, scale)
    return {
        f"{name} {how} {batch}": partial(opened.row, how, batch)
        for how in (EAGER, COMPILED, GRAPH)
        for batch in BATCHES
    }


class Stepping:
    """A UNet, plain and with guides in it, in bf16 and channels_last."""

    def __init__(self, base: Base, scale: Scale) -> None:
        self.scale = scale
        self.forwards = Forwards(base.unet_config, scale.device, torch.bfloat16)
        self.forwards.unet.to(memory_format=torch.channels_last)
        self.students = {kind: self.forwards.guided_by(kind, base.share) for kind in KINDS}
        self.is_compiled = False

    def calls(self, batch_size: int, kinds: tuple[str, ...]) -> dict[str, Call]:
        """A forward of each way to sample; CFG's is of a doubled batch."""
        samples, doubled = (self.forwards.make_inputs(n * batch_size) for n in (1, 2))
        bare = self.forwards.bare
        found: dict[str, Call] = {"plain": partial(bare, *samples), "cfg": partial(bare, *doubled)}
        return found | {kind: partial(self.students[kind], *samples) for kind in kinds}

    def compile(self) -> None:
        """Have the repeated blocks of the plain UNet and of the tiny guide's compiled."""
        if self.is_compiled:
            return
        self.is_compiled = True
        for unet in (self.forwards.unet, self.students["tiny"].plain.unet):
            unet.compile_repeated_blocks(backend=self.scale.backend, fullgraph=True, dynamic=False)

    def peak(self, call: Call) -> int:
        """Bytes of a call beside the weights; on a CPU, where compiled code hides them, of all."""
        on_gpu = self.scale.device == "cuda"
        return peak_bytes(call) if on_gpu else peak_memory(call, self.scale.device)

    @torch.no_grad()
    def row(self, how: str, batch_size: int) -> Row:
        """Milliseconds of a step and GB beside the weights, by way to sample, taken in turns."""
        calls = self.calls(batch_size, KINDS if how == EAGER else ("tiny",))
        if how != EAGER:
            self.compile()
        if how == COMPILED:
            torch._dynamo.reset()  # what other batch sizes had compiled is not to be looked through
        with many_compilations():
            for call in calls.values():
                call()
            memory = {name: self.peak(call) / 1e9 for name, call in calls.items()}
            if how == GRAPH:
                calls = {name: as_graph(call, self.scale.device) for name, call in calls.items()}
            several = [partial(repeated, call, STEPS_AT_ONCE) for call in calls.values()]
            once = sum(map(timed, several))
            repeats = min(self.scale.repeats, max(LEAST_REPEATS, int(SECONDS_OF_STEPS / once)))
            seconds = median_times(several, repeats)
        times = [1e3 * each / STEPS_AT_ONCE for each in seconds]
        return {"ms": dict(zip(calls, times, strict=True)), "memory_gb": memory}


@contextmanager
def many_compilations() -> Iterator[None]:
    """Let a function have more compiled versions: a UNet's blocks come in five shapes."""
    with torch._dynamo.config.patch(recompile_limit=64):
        yield


def repeated(call: Call, number: int) -> None:
    """Call it so many times."""
    for _ in range(number):
        call()


def as_graph(call: Call, device: str) -> Call:
    """The same, replayed as a CUDA graph. On a CPU, which has none, the call itself."""
    if device != "cuda":
        return call
    torch.cuda.synchronize()
    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        repeated(call, 3)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def training(name: str, base: Base, scale: Scale, folder: Path) -> dict[str, Callable[[], Row]]:
    """Rows of one base's caching and training."""
    opened = Training(base, scale, folder)
    return {
        f"{name} cache": opened.cache_row,
        f"{name} train {EAGER}": partial(opened.train_row, EAGER),
        f"{name} train {COMPILED}": partial(opened.train_row, COMPILED),
    }


class Training:
    """A whole base and a cache of its own predictions, built as the stage builds it."""

    def __init__(self, base: Base, scale: Scale, folder: Path) -> None:
        self.base, self.scale, self.folder = base, scale, folder
        torch.backends.cuda.matmul.allow_tf32 = True  # as the stages have it
        self.pipe = base.make_pipe(scale.device)
        freeze(self.pipe.unet)
        size = self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor
        config = caching_config(base.params, base.num_pairs)
        self.caching = Caching(self.pipe, random_examples(size), config)
        self.caching.forwards(config.batch_size)  # warms up
        self.caching.build(folder)
        self.is_ready = False

    def cache_row(self) -> Row:
        """Speed of the stage cache."""
        seconds = {kind: median(each) for kind, each in self.caching.built.items()}
        return {
            "pairs_per_second": 1 / seconds["pairs"],
            "images_per_second": 1 / seconds["moments"],
            "prompts_per_second": 1 / seconds[TEXT],
            "efficiency": self.caching.efficiency(),
            "precision": self.base.params.cache.precision,
        }

    def get_ready(self) -> None:
        """The UNet alone on the device, its weights as training holds them."""
        if self.is_ready:
            return
        self.is_ready = True
        for name, part in self.pipe.components.items():
            if isinstance(part, torch.nn.Module) and name != "unet":
                part.to("cpu")
        if self.scale.device == "cuda":
            hold_in_bf16(self.pipe.unet)

    def train_row(self, how: str) -> Row:
        """Samples a second and the peak of memory, weights included, beside what the plan says."""
        self.get_ready()
        if how == COMPILED:
            self.pipe.unet.compile_repeated_blocks(backend=self.scale.backend, dynamic=False)
        section, batch_size = self.base.params.distill, self.base.batch_size
        config = training_config(self.base.params, num_images=1)
        settings = replace(
            config.train,
            num_images=10_000 * batch_size,  # the clock ends it, before convergence is looked at
            batch_size=batch_size,
            report_every_images=batch_size,
            learning_rate=1e-6,  # random weights have nothing to teach
            micro_batch_size=section.micro_batch_size,
            gradient_checkpointing=section.gradient_checkpointing,
        )
        cache = TeacherCache.open(self.folder)
        seconds: list[float] = []

        def run() -> None:
            seconds.append(
                seconds_per_image(
                    lambda report: distill(
                        self.pipe.unet, cache, replace(config, train=settings), report=report
                    ),
                    at_most=self.scale.seconds,
                )
            )

        with many_compilations():
            peak = peak_memory(run, self.scale.device)
        rows = section.micro_batch_size or batch_size
        planned = step_of(self.base.unet_config, self.base.params, "meta")
        return {
            "samples_per_second": 1 / seconds[0],
            "peak_gb": peak / 1e9,
            "planned_gb": planned.peak_gb(rows, checkpoints=section.gradient_checkpointing),
            "batch_size": batch_size,
            "micro_batch_size": rows,
            "gradient_checkpointing": section.gradient_checkpointing,
        }


def random_examples(size: int) -> list[Example]:
    """Noise with prompts."""
    generator = np.random.default_rng(0)
    made = []
    for number in range(NUM_IMAGES):
        file = io.BytesIO()
        pixels = generator.integers(0, 255, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "BMP")
        made.append(Example(image=file.getvalue(), prompt=f"picture {number}"))
    return made


def tests_on_a_gpu() -> Row:
    """The tests marked `gpu` of offloading and of waits: how many pass, fail and are skipped.

    Raises:
        ValueError: pytest could not run them.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-m", "gpu", f"--junit-xml={report}", *TESTS],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if not report.exists():
            raise ValueError(f"pytest could not run: {done.stdout[-500:]}")
        cases = ElementTree.parse(report).findall(".//testcase")
    skipped = [each for each in cases if each.find("skipped") is not None]
    bad = [each for each in cases if any(each.find(k) is not None for k in ("failure", "error"))]
    return {
        "passed": len(cases) - len(skipped) - len(bad),
        "skipped": len(skipped),
        "not_passed": sorted(str(each.get("name")) for each in bad),
    }
