"""Distillation and halving: what moves, what is learnt, and that a run can stop anywhere."""

import copy
import dataclasses
import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from threading import Timer
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from pnp_core.bundle import GuideBundle
from pnp_core.cache import CacheBuilder, Example, TeacherCache, build_cache
from pnp_core.conditions import Conditions
from pnp_core.denoiser import CFGDenoiser, GuidedDenoiser, PlainDenoiser
from pnp_core.distill import FLOOR, DistillConfig, distill, distillation_loss, turn_of
from pnp_core.guide import Guide, GuideConfig
from pnp_core.halve import (
    HalveConfig,
    halve,
    halving_objective,
    halving_rounds,
    halving_target,
    raised_guidance_scale,
    rounds_of,
    truncated_snr_loss,
)
from pnp_core.match import MatchConfig, match
from pnp_core.plug import plug, unplug
from pnp_core.schedule import NoiseSchedule, cfg_target
from pnp_core.train import TrainConfig, config_hash, train
from tests.cases import few_of
from tests.conftest import BASE, CACHE_CONFIG, changed, roused
from tests.toy import ddim
from tests.workers import run_workers

TRAIN = TrainConfig(
    num_images=96,
    batch_size=16,
    learning_rate=3e-3,
    ema_halflife_images=32,
    precision="fp32",
    report_every_images=16,
    checkpoint_every_images=16,
)
DISTILL = DistillConfig(train=TRAIN, guide=GuideConfig(max_parameters_ratio=0.2))
# A round starts from a good guide, which a learning rate of distillation's size would spoil.
HALVE_TRAIN = dataclasses.replace(TRAIN, learning_rate=3e-4)
HALVE = HalveConfig(train=HALVE_TRAIN, start_steps=8, end_steps=2)


class Stop(Exception):
    """As if the process had been killed."""


@pytest.mark.parametrize("precision", few_of(["fp32", "bf16"], "fp32"))
def test_distillation_moves_the_guide_only_and_lowers_the_loss(
    pipe: StableDiffusionPipeline,
    cache: TeacherCache,
    precision: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pnp_core.precision.has_bf16", lambda device_type: True)
    before = copy.deepcopy(pipe.unet.state_dict())
    losses: list[float] = []
    training = dataclasses.replace(TRAIN, num_images=800, precision=precision)
    config = dataclasses.replace(DISTILL, train=training)
    guide = distill(
        pipe.unet, cache, config, report=lambda done, metrics: losses.append(metrics["loss"])
    )
    assert all(torch.equal(v, before[k]) for k, v in pipe.unet.state_dict().items())
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    assert guide.config.base_hash == "base"
    assert not guide.training


@pytest.mark.parametrize("num_companions", [0, 1, 4])
def test_every_other_step_is_the_bases_and_companions_share_the_rest(num_companions: int) -> None:
    num_steps = 2 * max(1, num_companions) * 3
    had: dict[int, list[int]] = {}
    for step in range(num_steps):
        teacher, number = turn_of(step, 1 + num_companions)
        had.setdefault(teacher, []).append(number)
    assert set(had) == set(range(1 + num_companions))
    assert all(numbers == list(range(len(numbers))) for numbers in had.values())
    of_base, *of_companions = (len(numbers) for _, numbers in sorted(had.items()))
    assert of_base == sum(of_companions) or not of_companions
    assert set(of_companions) <= {3}


def test_the_loss_is_the_share_of_each_samples_own_guidance_that_is_missing() -> None:
    torch.manual_seed(0)
    eps_n, direction = torch.randn(2, 4, 8, 4, 4).unbind()
    guidance = direction * torch.tensor([0.01, 0.1, 1.0, 10.0]).reshape(-1, 1, 1, 1)
    w = torch.tensor([2.0, 3.0, 5.0, 8.0])
    target = cfg_target(eps_c=eps_n + guidance, eps_n=eps_n, guidance_scale_B=w)
    for share in (0.0, 0.5, 1.0):
        student = torch.lerp(target, eps_n + guidance, share)
        loss = distillation_loss(student, target, guidance, w, power=1e-6)
        torch.testing.assert_close(loss, torch.full((4,), share**2), atol=1e-3, rtol=1e-2)
    own = guidance.square().mean(dim=(1, 2, 3))
    loss = distillation_loss(eps_n + guidance, target, guidance, w, power=1.0)
    torch.testing.assert_close(loss, own / (own + FLOOR))


@pytest.mark.services
def test_companions_bring_a_guide_closer_to_their_own_guidance(
    pipe: StableDiffusionPipeline, examples: list[Example], tmp_path: Path
) -> None:
    other = changed(pipe.unet, scale=0.05)
    config = dataclasses.replace(CACHE_CONFIG, num_forward=0, num_trajectory=200)
    builder = CacheBuilder(
        pipe,
        examples,
        config,
        tmp_path,
        base=BASE,
        data_hash="data",
        companions={"other": other},
    )
    build_cache(builder)
    cache = TeacherCache.open(tmp_path)
    training = dataclasses.replace(DISTILL, train=dataclasses.replace(TRAIN, num_images=400))
    taught = distill(pipe.unet, cache, training, companions={"other": other})
    cache.companions = []  # as if there were the base's pairs alone
    untaught = distill(pipe.unet, cache, training)

    held = cache.pairs(torch.arange(100, 200), torch.device("cpu"))
    w = torch.full((100,), 4.0)
    target = cfg_target(eps_c=held.eps_c, eps_n=held.eps_n, guidance_scale_B=w)

    def error(guide: Guide) -> float:
        student = GuidedDenoiser(other, guide, cache.schedule)
        with torch.no_grad():
            eps = student(held.z_t, held.timestep, held.conditions(w))
        return float((eps - target).square().mean())

    assert error(taught) < 0.9 * error(untaught)


def test_companions_that_the_cache_does_not_know_are_refused(
    pipe: StableDiffusionPipeline, cache: TeacherCache
) -> None:
    with pytest.raises(ValueError, match=r"other companions of the base \(none\) .* \(other\)"):
        distill(pipe.unet, cache, DISTILL, companions={"other": pipe.unet})


def interrupted(report_at: int):  # type: ignore[no-untyped-def]
    def report(num_images: int, metrics: object) -> None:
        if num_images == report_at:
            raise Stop

    return report


def test_a_run_that_was_stopped_goes_on_to_the_same_guide(
    pipe: StableDiffusionPipeline, cache: TeacherCache, tmp_path: Path
) -> None:
    whole = distill(pipe.unet, cache, DISTILL)
    checkpoint = tmp_path / "checkpoint.pt"
    with pytest.raises(Stop):
        distill(pipe.unet, cache, DISTILL, checkpoint=checkpoint, report=interrupted(64))
    seen: list[int] = []
    resumed = distill(
        pipe.unet,
        cache,
        DISTILL,
        checkpoint=checkpoint,
        report=lambda num_images, metrics: seen.append(num_images),
    )
    assert seen == [64, 80, 96]
    assert resumed.weights_digest() == whole.weights_digest()


def test_a_checkpoint_of_another_configuration_is_ignored(
    pipe: StableDiffusionPipeline, cache: TeacherCache, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint.pt"
    distill(pipe.unet, cache, DISTILL, checkpoint=checkpoint)
    other = dataclasses.replace(DISTILL, guidance_scale=(1.0, 3.0))
    fresh = distill(pipe.unet, cache, other)
    beside = distill(pipe.unet, cache, other, checkpoint=checkpoint)
    assert fresh.weights_digest() == beside.weights_digest()


@pytest.mark.services
def test_a_checkpoint_of_another_recipe_is_ignored(
    pipe: StableDiffusionPipeline,
    cache: TeacherCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A finished run's too: after an upgrade, it must not pass for the new training's result."""
    checkpoint = tmp_path / "checkpoint.pt"

    def num_reports() -> int:
        reports: list[int] = []
        distill(
            pipe.unet,
            cache,
            DISTILL,
            checkpoint=checkpoint,
            report=lambda num_images, metrics: reports.append(num_images),
        )
        return len(reports)

    assert num_reports() == 6
    assert num_reports() == 0
    monkeypatch.setattr("pnp_core.distill.RECIPE", "another")
    assert num_reports() == 6


def train_line(checkpoint: Path, seed: int = 0, **options: Any) -> tuple[list[int], list[float]]:
    """When a linear model that learns noise, in ten steps of 8, was reported, and its weights."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)

    def loss_fn(step: int, part: slice) -> torch.Tensor:
        x, y = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(step))[:, part]
        return (model(x) - y).square().mean(1)

    reports: list[int] = []

    def report(done: int, metrics: Mapping[str, float]) -> None:
        reports.append(done)
        if done == stop_at:
            raise Stop

    stop_at = options.pop("stop_at", None)
    often = {"report_every_images": 8, "checkpoint_every_images": 16, **options}
    config = dataclasses.replace(TRAIN, num_images=80, batch_size=8, seed=seed, **often)
    with suppress(Stop):
        train(
            loss_fn, model, config,
            run_hash=config_hash(config), checkpoint=checkpoint, report=report,
        )  # fmt: skip
    return reports, [float(x) for x in model.weight.flatten()]


@pytest.mark.parametrize("changes", [{"report_every_images": 40}, {"checkpoint_every_images": 8}])
def test_how_often_a_run_reports_and_saves_is_no_part_of_it(
    tmp_path: Path, changes: dict[str, int]
) -> None:
    _, whole = train_line(tmp_path / "whole.pt")
    train_line(tmp_path / "checkpoint.pt", stop_at=56)
    reports, weights = train_line(tmp_path / "checkpoint.pt", **changes)
    assert reports == [done for done in (56, 64, 72, 80) if not done % changes.get(
        "report_every_images", 8
    )]  # fmt: skip
    assert weights == whole


def test_a_checkpoint_that_is_not_gone_on_with_is_told_with_its_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "checkpoint.pt"
    train_line(checkpoint, stop_at=56)
    train_line(checkpoint)
    assert capsys.readouterr().out == ""
    train_line(checkpoint, seed=1, stop_at=56)  # of a finished run, which nobody goes on with
    assert capsys.readouterr().out == ""
    train_line(checkpoint, seed=2)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{checkpoint} is of another run (by settings, data or version), at ")
    assert "at step 6: not gone on with" in line


@pytest.mark.parametrize("content", [b"", b"cut short", None])
def test_a_damaged_checkpoint_is_named_with_what_to_do(
    tmp_path: Path, content: bytes | None
) -> None:
    checkpoint = tmp_path / "checkpoint.pt"
    train_line(checkpoint)
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged .*: delete it, and training"):
        train_line(checkpoint)


def resume_on_worker(rank: int, folder: Path, seen_after_s: float | None) -> None:
    """The second worker does not see the checkpoint, or late."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    own = folder / ("checkpoint.pt" if rank == 0 else "late.pt")
    if rank == 1 and seen_after_s is not None:
        Timer(seen_after_s, shutil.copy, (folder / "checkpoint.pt", own)).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pnp_core.train.SECONDS_BETWEEN_LOOKS", 0.2)
        patch.setattr("pnp_core.train.LOOKS", 60 if seen_after_s is not None else 2)
        try:
            said = json.dumps(train_line(own))
        except ValueError as error:
            said = str(error)
    (folder / f"said-{rank}").write_text(said)
    torch.distributed.destroy_process_group()


@pytest.mark.services
def test_workers_that_see_different_checkpoints_wait_until_they_agree_or_give_up(
    tmp_path: Path,
) -> None:
    _, whole = train_line(tmp_path / "whole.pt")
    train_line(tmp_path / "checkpoint.pt", stop_at=56)
    for case, seen_after_s in (("never", None), ("late", 1.0)):
        folder = tmp_path / case
        folder.mkdir()
        shutil.copy(tmp_path / "checkpoint.pt", folder)
        run_workers(resume_on_worker, folder, seen_after_s)
        said = [(folder / f"said-{rank}").read_text() for rank in (0, 1)]
        if seen_after_s is None:
            assert all("The workers see different things as the step of" in text for text in said)
            assert all(": [6, 0] by rank" in text for text in said)
            continue
        for reports, weights in map(json.loads, said):
            assert reports == [56, 64, 72, 80]
            torch.testing.assert_close(weights, whole, rtol=0, atol=1e-6)


def train_on_worker(rank: int, world: int, folder: Path, toy_folder: Path, cache: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous-{world}", rank=rank, world_size=world
    )
    pipe = StableDiffusionPipeline.from_pretrained(toy_folder, safety_checker=None)
    guide = distill(pipe.unet, TeacherCache.open(cache), DISTILL)
    first = roused(Guide.from_unet(pipe.unet, DISTILL.guide), scale=0.05)
    directory = folder / f"halving-{world}"
    guides = halve(
        pipe.unet,
        pipe.scheduler,
        first,
        TeacherCache.open(cache),
        dataclasses.replace(HALVE, end_steps=4),
        directory=directory,
    )
    matching = MatchConfig(train=dataclasses.replace(HALVE_TRAIN, warmup_images=16), num_steps=4)
    matched = match(
        pipe.unet, pipe.scheduler, guides[4], first, TeacherCache.open(cache), matching,
        directory=directory,
    )  # fmt: skip
    if rank == 0:
        matched.save_pretrained(folder / f"matched-{world}")
        guide.save_pretrained(folder / f"guide-{world}")
        guides[4].save_pretrained(folder / f"halved-{world}")
    torch.distributed.destroy_process_group()


def test_two_workers_train_the_guides_that_one_does(
    pipe: StableDiffusionPipeline, toy_folder: Path, cache_folder: Path, tmp_path: Path
) -> None:
    train_on_worker(0, 1, tmp_path, toy_folder, cache_folder)
    run_workers(train_on_worker, 2, tmp_path, toy_folder, cache_folder)
    cache = TeacherCache.open(cache_folder)
    pairs = cache.pairs(torch.arange(32), torch.device("cpu"))
    w = torch.full((32,), 6.0)
    fresh = Guide.from_unet(pipe.unet, DISTILL.guide)
    inputs = (pairs.z_t, pairs.timestep, pairs.conditions(w))
    with torch.no_grad():
        plain = GuidedDenoiser(pipe.unet, fresh, cache.schedule)(*inputs)
        for kind in ("guide", "halved", "matched"):
            one, two = (
                GuidedDenoiser(pipe.unet, guide, cache.schedule)(*inputs) - plain
                for guide in (Guide.from_pretrained(tmp_path / f"{kind}-{n}") for n in (1, 2))
            )
            # Adam makes a step of full size even where a gradient is rounding noise, so weights
            # may differ, more or less by what the processor rounds.
            assert (one - two).norm() < 1e-2 * one.norm(), kind


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_rows(
    pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    guide = Guide.from_unet(pipe.unet, GuideConfig(max_parameters_ratio=0.2))

    def loss_fn(step: int, part: slice) -> torch.Tensor:
        loss = sum(p.sum() for p in guide.parameters()) * torch.ones(16)
        return loss * (torch.tensor([float("nan")] + [1.0] * 15) if step == 3 else 1)

    checkpoint = tmp_path / "checkpoint.pt"
    with pytest.raises(
        ValueError, match=r"stopped at step 3 \(48 images\).*not finite at row 0 of its batch\."
    ):
        train(loss_fn, guide, TRAIN, run_hash="x", checkpoint=checkpoint)
    assert torch.load(checkpoint, weights_only=True)["step"] == 3


def test_a_sample_that_is_not_finite_is_named_by_its_shard(
    pipe: StableDiffusionPipeline, cache: TeacherCache
) -> None:
    shard = cache.pair_shards[0]._shard(2)
    shard["eps_c"][5] = torch.inf
    with pytest.raises(
        ValueError, match=r"not finite at row 5 of shard pairs-forward-00002\. Lower"
    ):
        distill(pipe.unet, cache, DISTILL)


@pytest.mark.parametrize("learning_rate", [0.3, 1e3])
def test_a_learning_rate_that_diverges_gives_no_guide(
    pipe: StableDiffusionPipeline, cache: TeacherCache, learning_rate: float
) -> None:
    train = dataclasses.replace(TRAIN, learning_rate=learning_rate)
    with pytest.raises(ValueError, match=r"Training stopped at step \d.*[Ll]ower learning_rate"):
        distill(pipe.unet, cache, dataclasses.replace(DISTILL, train=train))


def test_halving_rounds_halve() -> None:
    assert halving_rounds(64, 8) == (32, 16, 8)
    assert halving_rounds(8, 8) == ()
    for start, end in ((50, 8), (8, 16), (6, 4), (8, 0)):
        with pytest.raises(ValueError, match=f"Halving {start} steps never gives {end}"):
            halving_rounds(start, end)


@torch.no_grad()
def test_the_halving_target_takes_the_student_where_two_teacher_steps_go(
    pipe: StableDiffusionPipeline,
) -> None:
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    teacher = CFGDenoiser(pipe.unet, schedule)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn((2, 4, 4, 4), generator=generator)
    c, n = (torch.randn((2, 16, 32), generator=generator) for _ in range(2))
    conditions = Conditions(c_BLD=c, n_BLD=n, w_B=torch.tensor([2.0, 5.0]))
    for t, m, s in ((999, 874, 749), (124, 62, -1)):
        t_B, m_B, s_B = (torch.full((2,), value) for value in (t, m, s))
        eps = halving_target(
            teacher, schedule, z_t=z, t_B=t_B, m_B=m_B, s_B=s_B, conditions=conditions
        )
        z_m = schedule.ddim_step(z, teacher(z, t_B, conditions), t_B, m_B)
        z_s = schedule.ddim_step(z_m, teacher(z_m, m_B, conditions), m_B, s_B)
        landed = schedule.ddim_step(z, eps, t_B, s_B)
        torch.testing.assert_close(landed, z_s, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("steps_offset", [0, 1])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_the_teachers_two_steps_share_each_step_of_the_student(
    pipe: StableDiffusionPipeline, cache: TeacherCache, spacing: str, steps_offset: int
) -> None:
    asked: list[torch.Tensor] = []

    def zeros(z: torch.Tensor, t_B: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        asked.append(t_B)
        return torch.zeros_like(z)

    training = dataclasses.replace(HALVE_TRAIN, batch_size=64)
    config = HalveConfig(train=training, start_steps=32, end_steps=4, timestep_spacing=spacing)
    scheduler = ddim(steps_offset=steps_offset, set_alpha_to_one=False)  # as Stable Diffusion's
    for this in rounds_of(config):
        own = DDIMScheduler.from_config(scheduler.config, timestep_spacing=spacing)
        own.set_timesteps(this.num_steps)
        ends = dict(zip(own.timesteps.tolist(), [*own.timesteps[1:].tolist(), -1], strict=True))
        loss_fn = halving_objective(zeros, zeros, cache, scheduler, config, this, pipe.unet.device)
        asked.clear()
        assert loss_fn(0, slice(0, 64)).isfinite().all()
        for t, m, own_t in zip(*(each.long().tolist() for each in asked), strict=True):
            assert t == own_t and t in ends
            # to a timestep, as they are whole; and no teacher is asked at the end
            assert abs((t - m) - (m - ends[t])) <= 1.5 and m >= 0, (this.num_steps, t)


@torch.no_grad()
def test_where_a_step_keeps_the_noise_the_halving_target_is_the_teachers_eps(
    pipe: StableDiffusionPipeline,
) -> None:
    schedule = NoiseSchedule.from_scheduler(ddim(set_alpha_to_one=False))
    z = torch.randn((2, 4, 4, 4), generator=torch.Generator().manual_seed(0))
    c = torch.zeros(2, 16, 32)
    conditions = Conditions(c_BLD=c, n_BLD=c, w_B=torch.ones(2))
    teacher = PlainDenoiser(pipe.unet, schedule)
    t_B, s_B = torch.tensor([0, 0]), torch.tensor([-1, -1])
    eps = halving_target(teacher, schedule, z_t=z, t_B=t_B, m_B=t_B, s_B=s_B, conditions=conditions)
    assert torch.equal(eps, teacher(z, t_B, conditions))


def test_the_truncated_snr_loss_is_the_larger_of_x_and_eps_error(
    pipe: StableDiffusionPipeline,
) -> None:
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    generator = torch.Generator().manual_seed(0)
    z, eps, target = (torch.randn((3, 4, 4, 4), generator=generator) for _ in range(3))
    t_B = torch.tensor([10, 500, 999])

    def mse(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a - b).square().mean(dim=(1, 2, 3))

    x_mse = mse(schedule.to_x(eps, z, t_B), schedule.to_x(target, z, t_B))
    expected = torch.maximum(x_mse, mse(eps, target))
    loss = truncated_snr_loss(schedule, eps, target, z, t_B)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-4)


def test_halving_gives_a_guide_a_round_and_resumes_after_a_stop(
    pipe: StableDiffusionPipeline, cache: TeacherCache, tmp_path: Path
) -> None:
    first = roused(Guide.from_unet(pipe.unet, GuideConfig(max_parameters_ratio=0.2)))

    def run(folder: Path, **options: object) -> dict[int, Guide]:
        return halve(
            pipe.unet, pipe.scheduler, first, cache, HALVE, directory=tmp_path / folder, **options
        )

    whole = run(Path("whole"))
    assert {n: g.config.num_steps for n, g in whole.items()} == {8: None, 4: 4, 2: 2}
    with pytest.raises(Stop):
        run(Path("stopped"), report=interrupted(96 + 48))
    seen: list[int] = []
    resumed = run(Path("stopped"), report=lambda num_images, metrics: seen.append(num_images))
    assert seen[0] == 96 + 48  # the first round and half of the second are kept
    for num_steps, guide in whole.items():
        assert resumed[num_steps].weights_digest() == guide.weights_digest()


def test_rounds_that_are_finished_stay_so_when_others_come_after_them_or_fall_away(
    pipe: StableDiffusionPipeline, cache: TeacherCache, tmp_path: Path
) -> None:
    first = roused(Guide.from_unet(pipe.unet, GuideConfig(max_parameters_ratio=0.2)))
    one_step = dataclasses.replace(HALVE_TRAIN, num_images=16)
    trained: list[int] = []

    def run(end_steps: int) -> list[int]:
        trained.clear()
        config = dataclasses.replace(HALVE, train=one_step, end_steps=end_steps)
        halve(
            pipe.unet, pipe.scheduler, first, cache, config, directory=tmp_path,
            report=lambda _, metrics: trained.append(int(metrics["num_steps"])),
        )  # fmt: skip
        return list(trained)

    assert run(4) == [4]
    assert run(2) == [2]
    assert run(4) == []


@pytest.mark.parametrize(
    ("entries", "what"),
    [
        ({"base_hash": "another"}, "base_hash is another, not base"),
        ({"prediction_type": "v_prediction"}, "prediction_type is v_prediction, not epsilon"),
        ({"guidance_scale_range": [1.0, 3.0]}, r"range is \[1.0, 3.0\], not \[1.0, 8.0\]"),
    ],
)
def test_a_guide_that_was_made_for_something_else_is_not_halved(
    pipe: StableDiffusionPipeline,
    cache: TeacherCache,
    tmp_path: Path,
    entries: dict[str, Any],
    what: str,
) -> None:
    guide = Guide.from_unet(pipe.unet, GuideConfig(max_parameters_ratio=0.2), **entries)
    with pytest.raises(ValueError, match=what):
        halve(pipe.unet, pipe.scheduler, guide, cache, HALVE, directory=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("precision", few_of(["fp32", "bf16"], "fp32"))
def test_halving_lowers_the_distance_to_two_teacher_steps(
    pipe: StableDiffusionPipeline,
    cache: TeacherCache,
    precision: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pnp_core.precision.has_bf16", lambda device_type: True)
    teacher_guide = roused(
        Guide.from_unet(pipe.unet, GuideConfig(max_parameters_ratio=0.2)), scale=0.05
    )
    training = dataclasses.replace(HALVE_TRAIN, num_images=400, precision=precision)
    config = dataclasses.replace(HALVE, end_steps=4, train=training)
    losses: list[float] = []
    halve(
        pipe.unet,
        pipe.scheduler,
        teacher_guide,
        cache,
        config,
        directory=tmp_path,
        report=lambda done, metrics: losses.append(metrics["loss"]),
    )
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])


@pytest.mark.services
def test_the_last_point_of_a_round_is_at_its_end_where_a_batch_goes_beyond_it(
    pipe: StableDiffusionPipeline, cache: TeacherCache, tmp_path: Path
) -> None:
    training = dataclasses.replace(HALVE_TRAIN, num_images=HALVE_TRAIN.batch_size + 1)
    config = dataclasses.replace(HALVE, end_steps=HALVE.start_steps // 4, train=training)
    guide = Guide.from_unet(pipe.unet, GuideConfig(max_parameters_ratio=0.2))
    ends: dict[int, int] = {}

    def report(done: int, metrics: Mapping[str, float]) -> None:
        ends[int(metrics["num_steps"])] = done

    halve(pipe.unet, pipe.scheduler, guide, cache, config, directory=tmp_path, report=report)
    assert list(ends.values()) == [training.num_images, 2 * training.num_images]


def test_a_raised_guidance_scale_rises_by_the_gain_and_by_less_towards_the_highest() -> None:
    w_B = torch.linspace(1, 8, 1001, dtype=torch.float64)
    for gain in (1.2, 1.5, 1.99):
        raised = raised_guidance_scale(w_B, gain, highest=8.0)
        assert raised[0] == 1 and raised[-1] == pytest.approx(8)
        assert (raised.diff() > 0).all()  # also at the highest scales the dial moves the picture
        assert (raised[1:-1] > w_B[1:-1]).all()
        assert (raised[1] - 1) / (w_B[1] - 1) == pytest.approx(gain, rel=1e-2)
    assert torch.equal(raised_guidance_scale(w_B, 1.0, highest=8.0), w_B)
    for gain in (0.5, 2.0):
        with pytest.raises(ValueError, match=rf"guidance_gain is {gain}; it must lie in \[1, 2\)"):
            dataclasses.replace(HALVE, guidance_gain=gain)


def test_only_the_first_round_of_halving_raises_the_guidance_scale(
    pipe: StableDiffusionPipeline, cache: TeacherCache
) -> None:
    config = dataclasses.replace(HALVE, guidance_gain=1.8)
    plain = PlainDenoiser(pipe.unet, cache.schedule)

    class Asked:
        """Notes the guidance scales that it is asked for."""

        def __init__(self) -> None:
            self.scales: list[torch.Tensor] = []

        def __call__(
            self, z: torch.Tensor, t_B: torch.Tensor, conditions: Conditions
        ) -> torch.Tensor:
            self.scales.append(conditions.w_B)
            return plain(z, t_B, conditions)

    gains = []
    for this in rounds_of(config):
        student, teacher = Asked(), Asked()
        loss_fn = halving_objective(
            student, teacher, cache, pipe.scheduler, config, this, pipe.unet.device
        )
        loss_fn(0, slice(0, config.train.batch_size))
        (own,), (first, second) = student.scales, teacher.scales
        assert torch.equal(first, second) and len(own.unique()) > 1
        torch.testing.assert_close(first, raised_guidance_scale(own, this.gain, highest=8.0))
        gains.append(this.gain)
    assert gains == [1.8, 1.0]


def test_the_guided_denoiser_is_its_teacher_when_there_is_nothing_to_learn(
    pipe: StableDiffusionPipeline,
) -> None:
    """Where prompt and negative are the same, CFG adds nothing; a fresh guide agrees exactly."""
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    guide = Guide.from_unet(pipe.unet, GuideConfig(kind="full"))
    generator = torch.Generator().manual_seed(0)
    z, c = (
        torch.randn((2, 4, 4, 4), generator=generator),
        torch.randn((2, 16, 32), generator=generator),
    )
    t = torch.tensor([10, 900])
    conditions = Conditions(c_BLD=c, n_BLD=c, w_B=torch.tensor([3.0, 7.0]))
    with torch.no_grad():
        cfg = CFGDenoiser(pipe.unet, schedule)(z, t, conditions)
        guided = GuidedDenoiser(pipe.unet, guide, schedule)(z, t, conditions)
    torch.testing.assert_close(guided, cfg, atol=1e-5, rtol=1e-4)


def test_values_out_of_range_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="learning_rate is -1"):
        dataclasses.replace(TRAIN, learning_rate=-1)
    with pytest.raises(ValueError, match="precision is 'fp8'"):
        dataclasses.replace(TRAIN, precision="fp8")
    with pytest.raises(ValueError, match="needs 1 <= low < high"):
        dataclasses.replace(DISTILL, guidance_scale=(5.0, 2.0))


def test_halving_goes_down_to_four_steps_and_plug_takes_the_guide_of_the_call(
    pipe: StableDiffusionPipeline, cache: TeacherCache, tmp_path: Path
) -> None:
    first = roused(Guide.from_unet(pipe.unet, GuideConfig(max_parameters_ratio=0.2)), scale=0.05)
    one_step = dataclasses.replace(HALVE_TRAIN, num_images=16)
    config = dataclasses.replace(HALVE, train=one_step, start_steps=32, end_steps=4)
    guides = halve(pipe.unet, pipe.scheduler, first, cache, config, directory=tmp_path / "run")
    assert list(guides) == [32, 16, 8, 4]
    GuideBundle(guides).save(tmp_path / "bundle")

    def sample(plugged: Guide | GuideBundle, num_steps: int) -> np.ndarray:
        plug(pipe, plugged)
        generator = torch.Generator().manual_seed(0)
        call = {"guidance_scale": 4.0, "num_inference_steps": num_steps, "generator": generator}
        images = pipe("a cat", output_type="np", **call).images
        unplug(pipe)
        return np.asarray(images)

    for num_steps in (16, 8, 4):
        expected = sample(guides[num_steps], num_steps)
        made = sample(GuideBundle.load(tmp_path / "bundle"), num_steps)
        np.testing.assert_allclose(made, expected, atol=1e-5)
        assert not np.allclose(made, sample(first, num_steps), atol=1e-4)
