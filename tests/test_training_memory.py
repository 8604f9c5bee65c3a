"""Training in bounded memory: batches in parts, gradient checkpoints, and the same gradients."""

import dataclasses
import re
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from components import cli
from components.device import device, load_for_training
from components.distill import check_memory
from pnp_core.cache import TeacherCache
from pnp_core.calls import checkpointing, now
from pnp_core.denoiser import GuidedDenoiser
from pnp_core.distill import distill, distillation_objective, draw_guidance_scale, drawing
from pnp_core.guide import KINDS, Guide
from pnp_core.halve import halve, halving_objective, rounds_of
from pnp_core.memory import RESERVED_GB, Step, fitting
from pnp_core.seeds import step_generator
from pnp_core.train import (
    State,
    TrainConfig,
    own_part,
    parts_of,
    rank_and_world,
    train,
)
from tests import toy
from tests.cases import few_of
from tests.conftest import roused, save_lora
from tests.test_training import DISTILL, HALVE, TRAIN, Stop, interrupted
from tests.workers import run_workers

Objective = Callable[[int, slice], Tensor]
BATCH = DISTILL.train.batch_size


def objective(
    stage: str, pipe: StableDiffusionPipeline, guide: Guide, cache: TeacherCache
) -> Objective:
    pipe.unet.requires_grad_(False)
    student = GuidedDenoiser(pipe.unet, guide, cache.schedule)
    if stage == "distill":
        return distillation_objective([student], cache, DISTILL, pipe.unet.device)
    teacher = roused(Guide.from_unet(pipe.unet, DISTILL.guide), scale=0.05).requires_grad_(False)
    return halving_objective(
        student,
        GuidedDenoiser(pipe.unet, teacher, cache.schedule),
        cache,
        pipe.scheduler,
        HALVE,
        rounds_of(HALVE)[0],
        pipe.unet.device,
    )


def seeded_guide(pipe: StableDiffusionPipeline, scale: float = 0.1) -> Guide:
    torch.manual_seed(0)
    return roused(Guide.from_unet(pipe.unet, DISTILL.guide), scale=scale)


def gradient(losses: Objective, guide: Guide, config: TrainConfig, step: int = 3) -> Tensor:
    """Of one step's loss, over all workers, flat."""
    state = State(guide, dataclasses.replace(config, max_grad_norm=1e9))
    state.step = step
    parts = parts_of(own_part(config.batch_size), config.micro_batch_size)
    _, total = state.accumulate(losses, parts)
    state.gather(total, rank_and_world()[1])
    gradients = (p.new_zeros(p.shape) if p.grad is None else p.grad for p in state.parameters)
    return torch.cat([g.flatten() for g in gradients]).clone()


def gradients_of(loss: Tensor, guide: Guide) -> tuple[Tensor, ...]:
    """By autograd alone; zeros for what plays no part."""
    trained = [p for p in guide.parameters() if p.requires_grad]
    return torch.autograd.grad(loss, trained, materialize_grads=True)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_parts_are_all_rows_in_order_and_none_is_larger_than_asked_for() -> None:
    for size in (1, 3, 5, 8, 100):
        parts = parts_of(slice(8, 16), size)
        assert [row for part in parts for row in range(part.start, part.stop)] == [*range(8, 16)]
        assert max(part.stop - part.start for part in parts) <= size
    assert parts_of(slice(8, 16), None) == [slice(8, 16)]


@pytest.mark.parametrize("micro_batch_size", few_of([1, 5, 8], 5))
@pytest.mark.parametrize("stage", ["distill", "halve"])
def test_gradients_of_a_batch_in_parts_are_those_of_the_batch(
    stage: str, micro_batch_size: int, pipe: StableDiffusionPipeline, cache: TeacherCache
) -> None:
    guide = roused(Guide.from_unet(pipe.unet, DISTILL.guide))
    losses = objective(stage, pipe, guide, cache)
    at_once = losses(3, slice(0, BATCH)).sum() / BATCH
    expected = torch.cat([g.flatten() for g in gradients_of(at_once, guide)])
    config = dataclasses.replace(TRAIN, micro_batch_size=micro_batch_size)
    assert relative_error(gradient(losses, guide, config), expected) <= 1e-5


@pytest.mark.parametrize("kind", few_of(KINDS, "tiny"))
@pytest.mark.parametrize("stage", ["distill", "halve"])
def test_gradients_through_checkpoints_are_those_without(
    stage: str, kind: str, pipe: StableDiffusionPipeline, cache: TeacherCache
) -> None:
    guide = roused(Guide.from_unet(pipe.unet, dataclasses.replace(DISTILL.guide, kind=kind)))
    losses = objective(stage, pipe, guide, cache)
    expected = gradient(losses, guide, TRAIN)
    with checkpointing([pipe.unet], enabled=True):
        assert relative_error(gradient(losses, guide, TRAIN), expected) <= 1e-5
    assert not pipe.unet.is_gradient_checkpointing
    assert now.acting is None


def test_a_block_that_runs_again_in_another_thread_finds_the_guide_at_work(
    pipe: StableDiffusionPipeline, cache: TeacherCache
) -> None:
    """As a GPU's backward does."""
    from concurrent.futures import ThreadPoolExecutor

    guide = roused(Guide.from_unet(pipe.unet, DISTILL.guide))
    losses = objective("distill", pipe, guide, cache)
    expected = gradients_of(losses(3, slice(0, BATCH)).sum(), guide)
    with checkpointing([pipe.unet], enabled=True), ThreadPoolExecutor(1) as other:
        loss = losses(3, slice(0, BATCH)).sum()
        found = other.submit(gradients_of, loss, guide).result()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_checkpoints_keep_less(pipe: StableDiffusionPipeline, cache: TeacherCache) -> None:
    guide = roused(Guide.from_unet(pipe.unet, DISTILL.guide))
    losses = objective("distill", pipe, guide, cache)

    def num_kept() -> int:
        kept = 0

        def pack(x: Tensor) -> Tensor:
            nonlocal kept
            kept += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            losses(0, slice(0, BATCH))
        return kept

    plainly = num_kept()
    with checkpointing([pipe.unet], enabled=True):
        assert num_kept() < 0.7 * plainly


def test_memory_settings_change_neither_a_runs_identity_nor_its_checkpoint(
    pipe: StableDiffusionPipeline, cache: TeacherCache, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint.pt"
    with pytest.raises(Stop):
        distill(pipe.unet, cache, DISTILL, checkpoint=checkpoint, report=interrupted(64))
    seen: list[int] = []
    smaller = dataclasses.replace(TRAIN, micro_batch_size=4, gradient_checkpointing=True)
    distill(
        pipe.unet,
        cache,
        dataclasses.replace(DISTILL, train=smaller),
        checkpoint=checkpoint,
        report=lambda num_images, metrics: seen.append(num_images),
    )
    assert seen == [64, 80, 96]


def test_a_run_in_parts_that_was_stopped_goes_on_to_the_same_guide(
    pipe: StableDiffusionPipeline, cache: TeacherCache, tmp_path: Path
) -> None:
    training = dataclasses.replace(
        TRAIN, num_images=48, micro_batch_size=5, gradient_checkpointing=True
    )
    config = dataclasses.replace(DISTILL, train=training)
    whole = distill(pipe.unet, cache, config)
    checkpoint = tmp_path / "checkpoint.pt"
    with pytest.raises(Stop):
        distill(pipe.unet, cache, config, checkpoint=checkpoint, report=interrupted(32))
    resumed = distill(pipe.unet, cache, config, checkpoint=checkpoint)
    assert resumed.weights_digest() == whole.weights_digest()


@pytest.mark.services
def test_halving_in_parts_through_checkpoints_takes_the_same_steps(
    pipe: StableDiffusionPipeline, cache: TeacherCache, tmp_path: Path
) -> None:
    losses: dict[str, list[float]] = {"whole": [], "parts": []}
    short = dataclasses.replace(HALVE.train, num_images=48)
    smaller = dataclasses.replace(short, micro_batch_size=3, gradient_checkpointing=True)
    for name, training in (("whole", short), ("parts", smaller)):
        halve(
            pipe.unet,
            pipe.scheduler,
            seeded_guide(pipe, scale=0.05),
            cache,
            dataclasses.replace(HALVE, train=training, end_steps=4),
            directory=tmp_path / name,
            report=lambda _, metrics, name=name: losses[name].append(metrics["loss"]),
        )
    assert losses["parts"] == pytest.approx(losses["whole"], rel=1e-3)


def gradient_on_worker(rank: int, world: int, folder: Path, toy_folder: Path, cache: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    pipe = StableDiffusionPipeline.from_pretrained(toy_folder, safety_checker=None)
    guide = seeded_guide(pipe)
    losses = objective("distill", pipe, guide, TeacherCache.open(cache))
    config = dataclasses.replace(TRAIN, micro_batch_size=3)
    torch.save(gradient(losses, guide, config), folder / f"gradient-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.services
def test_two_workers_with_batches_in_parts_have_the_gradients_of_one_batch(
    pipe: StableDiffusionPipeline, toy_folder: Path, cache_folder: Path, tmp_path: Path
) -> None:
    guide = seeded_guide(pipe)
    losses = objective("distill", pipe, guide, TeacherCache.open(cache_folder))
    expected = gradient(losses, guide, TRAIN)
    run_workers(gradient_on_worker, 2, tmp_path, toy_folder, cache_folder)
    for rank in range(2):
        assert relative_error(torch.load(tmp_path / f"gradient-{rank}.pt"), expected) <= 1e-5


@pytest.mark.parametrize("order", [range(6), (4, 0, 5, 5, 1, 2)])
def test_batches_read_ahead_are_those_of_the_cache_bit_for_bit(
    order: range | tuple[int, ...], cache: TeacherCache
) -> None:
    config = dataclasses.replace(DISTILL, train=dataclasses.replace(TRAIN, micro_batch_size=3))
    draw = drawing(1, cache, config, torch.device("cpu"))
    for step in order:
        indices = cache.pair_indices(batch_size=BATCH, seed=TRAIN.seed, step=step)
        generator = step_generator(TRAIN.seed, step)
        w_B = draw_guidance_scale(DISTILL.guidance_scale, BATCH, generator)
        for part in parts_of(slice(0, BATCH), 3):
            expected = cache.pairs(indices[part], torch.device("cpu"))
            found = draw(step, part)
            assert torch.equal(found.w_B, w_B[part])
            for ours, theirs in zip(found.pairs, expected, strict=True):
                assert ours is theirs is None or torch.equal(ours, theirs)
                assert ours is None or ours.dtype == theirs.dtype


def test_a_gpu_that_is_too_small_is_told_what_to_lower(pipe: StableDiffusionPipeline) -> None:
    guide = Guide.from_unet(pipe.unet, DISTILL.guide)

    def loss_fn(step: int, part: slice) -> Tensor:
        if step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return sum(p.sum() for p in guide.parameters()) * torch.ones(part.stop - part.start)

    config = dataclasses.replace(TRAIN, micro_batch_size=8)
    expected = r"step 3: .* 8 samples at once: set micro_batch_size to 4 or less or set gradient_"
    with pytest.raises(ValueError, match=expected):
        train(loss_fn, guide, config, run_hash="small")


def test_memory_that_runs_out_in_the_middle_leaves_the_checkpoint_and_the_run_goes_on(
    pipe: StableDiffusionPipeline, cache: TeacherCache, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint.pt"

    def runs_out(num_images: int, metrics: object) -> None:
        if num_images == 64:
            pipe.unet.conv_out.register_forward_pre_hook(no_memory)

    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with pytest.raises(ValueError, match="does not suffice for .* checkpoint is untouched"):
        distill(pipe.unet, cache, DISTILL, checkpoint=checkpoint, report=runs_out)
    pipe.unet.conv_out._forward_pre_hooks.clear()
    seen: list[int] = []
    distill(
        pipe.unet,
        cache,
        DISTILL,
        checkpoint=checkpoint,
        report=lambda num_images, metrics: seen.append(num_images),
    )
    assert seen == [80, 96]


def test_as_many_samples_at_once_as_fit_are_found() -> None:
    class Straight:
        settings = dataclasses.replace(TRAIN, batch_size=64)

        def peak_gb(self, rows: int, *, checkpoints: bool) -> float:
            return 1.5 + (0.1 if checkpoints else 0.37) * rows + 0.02 * (rows > 7)

    step = Straight()
    for memory in (1.0, 1.9, 4.0, 8.5, 30.0):
        for checkpoints in (False, True):
            fit = [
                rows
                for rows in range(1, 65)
                if step.peak_gb(rows, checkpoints=checkpoints) <= memory
            ]
            found = fitting(step, memory + RESERVED_GB, checkpoints=checkpoints)  # type: ignore[arg-type]
            assert min(found, 64) == len(fit)


@pytest.mark.services
def test_settings_that_do_not_fit_the_gpu_are_refused_with_a_micro_batch_that_does(
    pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    step = Step(pipe.unet.config, DISTILL.guide, TRAIN, "meta")
    one, all_rows = (step.peak_gb(rows, checkpoints=False) for rows in (1, BATCH))
    memory_gb = RESERVED_GB + (one + all_rows) / 2
    monkeypatch.setattr("components.device.gpu_memory_gb", lambda: memory_gb)
    with pytest.raises(ValueError, match=r"What fits: micro_batch_size (\d+) ") as refused:
        check_memory(pipe.unet, 0, DISTILL.guide, TRAIN)
    rows = re.search(r"micro_batch_size (\d+)", str(refused.value))
    assert rows is not None
    smaller = dataclasses.replace(TRAIN, micro_batch_size=int(rows[1]))
    check_memory(pipe.unet, 0, DISTILL.guide, smaller)
    assert "by count" in capsys.readouterr().out


def test_without_a_gpu_nothing_is_counted(
    pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("components.device.gpu_memory_gb", lambda: None)
    check_memory(pipe.unet, 0, DISTILL.guide, TRAIN)


def test_a_gpu_whose_driver_is_too_old_is_told_and_not_left_aside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def too_old() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", too_old)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(ValueError, match="driver on your system is too old .* Update the driver"):
        device()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device().type == "cpu"


def test_a_machine_without_a_gpu_computes_on_its_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_there() -> None:
        raise RuntimeError("Found no NVIDIA driver on your system.")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", none_there)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert device().type == "cpu"


def test_training_holds_a_bases_unet_and_none_of_its_other_networks(
    pipe: StableDiffusionPipeline, toy_folder: Path, tmp_path: Path
) -> None:
    save_lora(pipe.unet, tmp_path)
    base, companions = load_for_training(str(toy_folder), [tmp_path], in_bf16=False)
    held = [name for name, part in base.components.items() if isinstance(part, torch.nn.Module)]
    assert held == ["unet"]
    assert len(companions) == 1


def test_a_stage_that_runs_out_of_memory_says_so_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    toy.write_params(tmp_path, toy.toy_params())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "check_files", lambda params: None)

    def stage(params: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(sys.modules["__main__"], "__spec__", ModuleSpec("components.cache", None))
    with pytest.raises(SystemExit) as left:
        cli.main(stage)
    assert left.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the GPU's memory does not suffice (CUDA out of memory): lower ")
    assert "cache.batch_size" in line
