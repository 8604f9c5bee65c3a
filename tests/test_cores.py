"""A batch shared out among a CPU's cores gives what it gives as a whole."""

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from pnp_core import cores
from pnp_core.cache import Example, TeacherCache
from pnp_core.conditions import AddedConditions, Conditions
from pnp_core.cores import num_cores, share_out, side_by_side
from pnp_core.denoiser import GuidedDenoiser, PlainDenoiser
from pnp_core.guide import KINDS, Guide, GuideConfig
from pnp_core.guiders import GUIDERS, Guider, GuiderConfig
from pnp_core.schedule import NoiseSchedule
from pnp_core.settings import CFG
from pnp_core.train import State, micro_batches
from tests.cases import few_of
from tests.conftest import roused
from tests.test_cache import builder
from tests.test_training import TRAIN
from tests.test_training_memory import BATCH, gradients_of, objective, seeded_guide

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Three cores, for which a sample each is enough."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    monkeypatch.setattr(cores, "FEWEST_ROWS", 1)
    yield
    torch.set_num_threads(before)


def conditions_of(batch: int, seed: int = 0, num_negatives: int = 1) -> Conditions:
    generator = torch.Generator().manual_seed(seed)
    c, n = (torch.randn(rows, 7, 32, generator=generator) for rows in (batch, num_negatives))
    return Conditions(c_BLD=c, n_BLD=n, w_B=torch.linspace(2, 7, batch))


@pytest.mark.parametrize(("start", "stop"), [(0, 32), (5, 12), (8, 9), (0, 64)])
@pytest.mark.parametrize("num_parts", [1, 2, 3, 5, 64])
def test_shares_are_all_rows_in_order_and_of_like_size(
    start: int, stop: int, num_parts: int
) -> None:
    parts = share_out(slice(start, stop), num_parts)
    assert [row for part in parts for row in range(part.start, part.stop)] == [*range(start, stop)]
    assert len(parts) <= num_parts
    largest = max(part.stop - part.start for part in parts)
    assert largest == -(-(stop - start) // num_parts)


@pytest.mark.parametrize(
    ("threads", "rows", "device", "expected"),
    [
        (1, 64, CPU, 1),
        (2, 64, CPU, 2),
        (16, 64, CPU, 8),  # a core is slow at fewer than eight samples
        (16, 7, CPU, 1),
        (6, 32, CPU, 3),  # of two threads: four would leave two cores without work
        (7, 32, CPU, 3),
        (12, 64, CPU, 6),
        (16, 64, GPU, 1),
    ],
)
def test_a_batch_has_as_many_shares_as_are_worth_it(
    monkeypatch: pytest.MonkeyPatch, threads: int, rows: int, device: torch.device, expected: int
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert num_cores(rows, device) == expected


@pytest.mark.usefixtures("three_threads")
def test_parts_run_at_the_same_time_and_results_are_in_their_order() -> None:
    all_there = threading.Barrier(3, timeout=60)

    def work(part: int) -> tuple[int, int]:
        if part < 3:
            all_there.wait()
        return part, torch.get_num_threads()

    assert side_by_side(work, range(7), 3) == [(part, 1) for part in range(7)]
    assert torch.get_num_threads() == 3
    of_later_threads: list[int] = []
    later = threading.Thread(target=lambda: of_later_threads.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert of_later_threads == [3]


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("mixed", [True, False])
def test_work_is_computed_as_it_would_be_here(mode: type, mixed: bool) -> None:
    x = torch.ones(4, 4, requires_grad=True)

    def work(_: int) -> tuple[bool, bool, torch.dtype]:
        y = x @ x
        return y.requires_grad, y.is_inference(), y.dtype

    with mode(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
        assert side_by_side(work, range(3), 3) == [work(0)] * 3


@pytest.mark.usefixtures("three_threads")
def test_an_error_is_told_when_what_has_begun_is_through_and_nothing_more_begins() -> None:
    all_there, through = threading.Barrier(3, timeout=60), []

    def work(part: int) -> None:
        all_there.wait()
        if part == 1:
            raise ValueError("part 1 is bad")
        threading.Event().wait(0.2)
        through.append(part)

    with pytest.raises(ValueError, match="part 1 is bad"):
        side_by_side(work, range(9), 3)
    assert sorted(through) == [0, 2]
    assert side_by_side(lambda part: part, range(3), 3) == [0, 1, 2]


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("why", ["an error", "Ctrl-C"])
def test_forwards_of_other_parts_end_when_one_fails_or_at_an_interrupt(
    pipe: StableDiffusionPipeline, why: str
) -> None:
    denoiser = PlainDenoiser(pipe.unet, NoiseSchedule.from_scheduler(pipe.scheduler))
    z, t_B, until = torch.zeros(1, 4, 8, 8), torch.tensor([500]), time.monotonic() + 60
    all_there, ended = threading.Barrier(3, timeout=60), []

    @torch.no_grad()
    def work(part: int) -> None:
        all_there.wait()
        if part == 1 and why == "an error":
            raise ValueError("part 1 is bad")
        if part == 1:
            os.kill(os.getpid(), signal.SIGINT)  # the main thread is told
        try:
            while time.monotonic() < until:
                denoiser(z, t_B, conditions_of(1))
        finally:
            ended.append(part)

    # which a process that runs tests for another may have set to be ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(ValueError if why == "an error" else KeyboardInterrupt):
            side_by_side(work, range(3), 3)
    finally:
        signal.signal(signal.SIGINT, before)
    assert {0, 2} <= set(ended)
    assert time.monotonic() < until


@pytest.mark.usefixtures("three_threads")
def test_a_forked_process_has_threads_of_its_own() -> None:
    side_by_side(str, range(3), 3)
    child = os.fork()
    if child == 0:
        os._exit(0 if side_by_side(str, range(3), 3) == ["0", "1", "2"] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("stage", ["distill", "halve"])
@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_gradients_of_a_batch_on_several_cores_are_those_of_the_batch(
    stage: str, micro_batch_size: int | None, pipe: StableDiffusionPipeline, cache: TeacherCache
) -> None:
    guide = seeded_guide(pipe)
    losses = objective(stage, pipe, guide, cache)
    expected = gradients_of(losses(3, slice(0, BATCH)).sum() / BATCH, guide)
    config = dataclasses.replace(TRAIN, micro_batch_size=micro_batch_size)
    state = State(guide, config, in_threads=True)
    state.step = 3
    parts = micro_batches(config)
    assert state.num_cores == 3
    found: list[Tensor] = []
    for _ in range(2):
        rows, total = state.accumulate(losses, parts)
        torch.testing.assert_close(rows, losses(3, slice(0, BATCH)).detach())
        torch.testing.assert_close(total, rows.sum() / BATCH)
        each = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in state.parameters]
        found.append(torch.cat([g.flatten() for g in each]))
    whole = torch.cat([g.flatten() for g in expected])
    assert float((found[0] - whole).norm() / whole.norm()) <= 1e-5
    assert torch.equal(*found)  # whichever part was through first


@pytest.mark.parametrize("kind", few_of(KINDS, "tiny"))
def test_one_denoiser_in_several_threads_gives_each_what_it_gives_alone(
    pipe: StableDiffusionPipeline, kind: str
) -> None:
    guide = roused(Guide.from_unet(pipe.unet, GuideConfig(kind=kind, max_parameters_ratio=0.2)))
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    denoiser = GuidedDenoiser(pipe.unet, guide, schedule)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def run(seed: int) -> list[Tensor]:
        conditions = conditions_of(2, seed)
        return [denoiser(z, torch.full((2,), t), conditions) for t in (900, 500, 100)]

    for _ in range(5):
        for seed, found in enumerate(side_by_side(run, range(4), 4)):
            for ours, alone in zip(found, run(seed), strict=True):
                torch.testing.assert_close(ours, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_negatives", [1, 6])
def test_a_part_of_the_conditions_is_that_of_its_samples(num_negatives: int) -> None:
    whole = conditions_of(6, num_negatives=num_negatives)
    numbers = torch.arange(6.0)[:, None]
    added = AddedConditions(numbers, 10 + numbers, 20 + numbers)
    part = dataclasses.replace(whole, added=added).part(slice(2, 5))
    assert torch.equal(part.c_BLD, whole.c_BLD[2:5])
    assert torch.equal(part.w_B, whole.w_B[2:5])
    assert torch.equal(part.each_negative, whole.each_negative[2:5])
    assert part.added is not None
    assert [x.flatten().tolist() for x in part.added] == [[2, 3, 4], [12, 13, 14], [22, 23, 24]]


@pytest.mark.usefixtures("three_threads")
def test_cached_pairs_of_several_cores_are_those_of_one(
    pipe: StableDiffusionPipeline,
    examples: list[Example],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensors = []
    for name in ("several", "one"):
        made = builder(pipe, examples, tmp_path / name)
        made.directory.mkdir()
        for shard in (name for phase in made.plan.phases for name in phase):
            made.build(shard)
        made.finish()
        cache = TeacherCache.open(tmp_path / name)
        tensors.append(cache.pairs(torch.arange(cache.num_pairs), CPU))
        monkeypatch.setattr(cores, "FEWEST_ROWS", 10**6)
    for several, one in zip(*tensors, strict=True):
        if several is not None:
            torch.testing.assert_close(several, one, atol=2e-3, rtol=2e-3)  # kept in half precision


@pytest.mark.usefixtures("three_threads")
def test_of_micro_batches_no_more_rows_are_computed_at_once_than_one_has(
    pipe: StableDiffusionPipeline,
) -> None:
    guide = seeded_guide(pipe)
    at_work, most, lock = 0, 0, threading.Lock()

    def losses(step: int, part: slice) -> Tensor:
        nonlocal at_work, most
        rows = part.stop - part.start
        with lock:
            at_work += rows
            most = max(most, at_work)
        threading.Event().wait(0.05)
        with lock:
            at_work -= rows
        return sum(p.sum() for p in guide.parameters()) * torch.ones(rows)

    config = dataclasses.replace(TRAIN, micro_batch_size=5)
    State(guide, config, in_threads=True).accumulate(losses, micro_batches(config))
    assert 2 < most <= 5


@pytest.mark.parametrize("name", [name for name in GUIDERS if name != CFG])
def test_one_guider_in_several_threads_gives_each_what_it_gives_alone(name: str) -> None:
    guider = Guider(GuiderConfig(name=name))
    eps_c, eps_n = torch.randn(2, 6, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def run(part: int) -> Tensor:
        t_B, w_B = torch.full((6,), 900 - 200 * part), torch.full((6,), 2.0 + part)
        return torch.stack([guider(eps_c, eps_n, t_B, w_B) for _ in range(20)])

    for part, found in enumerate(side_by_side(run, range(4), 4)):
        torch.testing.assert_close(found, run(part))
