"""Matching after halving: what its losses are least for, what it trains, and that it can stop."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor, nn

from pnp_core.cache import TeacherCache
from pnp_core.conditions import Conditions
from pnp_core.denoiser import CFGDenoiser, GuidedDenoiser
from pnp_core.fake_score import FakeScore
from pnp_core.guide import Guide, GuideConfig
from pnp_core.match import (
    MatchConfig,
    Noised,
    fake_loss,
    match,
    matching_loss,
    matching_objective,
    own_states,
)
from pnp_core.sample import sample
from pnp_core.schedule import NoiseSchedule, sampling_timesteps
from pnp_core.train import TrainConfig, train
from tests.cases import few_of
from tests.conftest import roused
from tests.toy import ddim

TRAIN = TrainConfig(
    num_images=64,
    batch_size=16,
    learning_rate=1e-3,
    warmup_images=16,
    ema_halflife_images=16,
    precision="fp32",
    report_every_images=16,
    checkpoint_every_images=16,
)
MATCH = MatchConfig(train=TRAIN, num_steps=2)
VARIANCE = 0.3  # of the latents of a world in which every score is known


def guide_of(pipe: StableDiffusionPipeline) -> Guide:
    """One that acts, and is not trained."""
    return roused(Guide.from_unet(pipe.unet, GuideConfig(max_parameters_ratio=0.2)), scale=0.05)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal, in float64."""
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def noised(schedule: NoiseSchedule, z_s: Tensor, s: int, t: int) -> Noised:
    """States at ``s``, noised to times up to ``t``."""
    generator = torch.Generator().manual_seed(3)
    share_B = torch.rand(len(z_s), generator=generator, dtype=torch.float64)
    s_B, t_B = (torch.full((len(z_s),), at) for at in (s, t))
    return Noised(schedule, z_s, s_B, t_B, share_B, normal(generator, *z_s.shape))


@pytest.mark.parametrize(("s", "t"), [(-1, 249), (249, 499), (749, 999), (3, 4)])
def test_noised_states_have_the_noise_of_a_time_between_a_steps_two_ends(s: int, t: int) -> None:
    schedule = NoiseSchedule.from_scheduler(ddim())
    at = noised(schedule, torch.zeros(512, 1, 2, 2, dtype=torch.float64), s, t)
    assert (at.tau_B > s).all() and (at.tau_B <= t).all()
    assert at.tau_B.unique().numel() > 0.4 * min(t - s, 400)
    alpha2 = schedule.alphas_cumprod[at.tau_B.clamp(min=0)].reshape(-1, 1, 1, 1)
    alpha2_s = schedule.alphas_cumprod[s] if s >= 0 else torch.tensor(1.0)
    # forward diffusion from s on: z_tau | z_s has variance 1 - alpha_tau^2 / alpha_s^2
    torch.testing.assert_close(at.added**2, 1 - alpha2 / alpha2_s, rtol=1e-6, atol=2e-8)
    torch.testing.assert_close(at.z, at.added * at.noise)


@pytest.mark.parametrize(("s", "t"), [(-1, 249), (249, 499)])
def test_the_fake_loss_is_least_for_the_score_of_the_states(s: int, t: int) -> None:
    """The states are normal, and so is what is made of them, whose score is known."""
    schedule = NoiseSchedule.from_scheduler(ddim())
    z_s = VARIANCE**0.5 * normal(torch.Generator().manual_seed(1), 20_000, 1, 2, 2)
    at = noised(schedule, z_s, s, t)
    kept2 = 1 - at.added**2  # alpha_tau^2 / alpha_s^2
    eps = at.sigma * at.z / (kept2 * VARIANCE + at.added**2)  # -sigma times the score
    least = fake_loss(schedule, eps, at).mean()
    for factor in (0.9, 1.1):
        assert fake_loss(schedule, factor * eps, at).mean() > least
    assert fake_loss(schedule, eps + 0.1 * at.sigma, at).mean() > least


def test_the_matching_loss_moves_states_from_the_fake_prediction_to_the_teachers() -> None:
    schedule = NoiseSchedule.from_scheduler(ddim())
    generator = torch.Generator().manual_seed(2)
    z_s = normal(generator, 4, 1, 2, 2).requires_grad_(True)
    at = noised(schedule, z_s.detach(), 249, 499)
    teacher, fake = normal(generator, 4, 1, 2, 2), normal(generator, 4, 1, 2, 2)
    s_B = torch.full((4,), 249)
    (gradient,) = torch.autograd.grad(
        matching_loss(schedule, teacher, fake, at, z_s, s_B).sum(), z_s
    )
    difference = (at.sigma / at.alpha) * (fake - teacher)  # teacher's x-prediction less the fake's
    cosine = torch.cosine_similarity(-gradient.flatten(1), difference.flatten(1))
    torch.testing.assert_close(cosine, torch.ones_like(cosine))
    same = matching_loss(schedule, teacher, teacher, at, z_s, s_B)
    assert torch.equal(same, torch.zeros_like(same))


def test_own_states_are_those_of_the_samplers_run(
    pipe: StableDiffusionPipeline, cache: TeacherCache
) -> None:
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    scheduler.set_timesteps(4)
    student = GuidedDenoiser(pipe.unet, guide_of(pipe), cache.schedule)
    generator = torch.Generator().manual_seed(0)
    indices = cache.latent_indices(batch_size=5, seed=0, step=0)
    latents = cache.latents(indices, cache.draws(indices, generator), slice(0, 5)).map(Tensor.float)
    w_B, number_B = torch.tensor([1.0, 2.0, 3.0, 4.0, 8.0]), torch.tensor([0, 3, 1, 2, 3])
    grid = sampling_timesteps(pipe.scheduler, 4, "trailing")
    with torch.no_grad():
        found = own_states(student, cache.schedule, grid, latents, w_B, number_B)
        z = latents.noise
        for number, t in enumerate(scheduler.timesteps):
            here = number_B == number
            torch.testing.assert_close(found[here], z[here], rtol=1e-3, atol=1e-4)
            eps = student(z, t.expand(5), latents.conditions(w_B))
            z = scheduler.step(eps, int(t), z).prev_sample


class Normal(nn.Module):
    """eps of normal latents of one variance around a mean, which is trained: ``(1, C, 1, 1)``."""

    def __init__(self, schedule: NoiseSchedule, channels: int, mean: float = 0.0) -> None:
        super().__init__()
        self.schedule = schedule
        self.mean = nn.Parameter(torch.full((1, channels, 1, 1), mean))

    def __call__(self, z_BCHW: Tensor, t_B: Tensor, conditions: Conditions) -> Tensor:
        """The score of what they are when noised, times -sigma."""
        alpha, sigma = self.schedule.alpha_sigma(t_B, z_BCHW)
        return sigma * (z_BCHW - alpha * self.mean) / (alpha**2 * VARIANCE + sigma**2)


def test_matched_states_are_distributed_as_the_teachers(
    pipe: StableDiffusionPipeline, cache: TeacherCache
) -> None:
    """In a world of normal latents, whose mean the student has wrong."""
    channels = pipe.unet.config.in_channels
    student, fake, teacher = (Normal(cache.schedule, channels, mean) for mean in (0.0, 0.0, 0.8))
    training = dataclasses.replace(TRAIN, num_images=4800, learning_rate=2e-2)
    loss_fn = matching_objective(
        [student], [fake], [teacher], cache, pipe.scheduler,
        dataclasses.replace(MATCH, train=training), torch.device("cpu"),
    )  # fmt: skip
    both = nn.ModuleList([student, fake])
    train(loss_fn, both, training, run_hash="")
    z_T = torch.randn(256, channels, 4, 4, generator=torch.Generator().manual_seed(1))
    text = torch.zeros(256, 1, 1)
    conditions = Conditions.at_scale(3.0, c_BLD=text, n_BLD=text)
    with torch.no_grad():
        made, wanted = (
            sample(
                model, pipe.scheduler, z_T=z_T, conditions=conditions, num_steps=2,
                timestep_spacing="trailing",
            )
            for model in (student, teacher)
        )  # fmt: skip
    assert float(wanted.mean()) > 0.5
    assert float(made.mean()) == pytest.approx(float(wanted.mean()), abs=0.1)


@pytest.mark.parametrize(("num_steps", "kept"), few_of([(4, 0.5), (2, 0.0)], (4, 0.5)))
def test_above_two_steps_the_result_is_half_way_from_the_halved_guide(
    num_steps: int,
    kept: float,
    pipe: StableDiffusionPipeline,
    cache: TeacherCache,
    tmp_path: Path,
) -> None:
    guide, config = guide_of(pipe), dataclasses.replace(MATCH, num_steps=num_steps)

    def weights(folder: str) -> Tensor:
        (tmp_path / folder).mkdir()
        directory = tmp_path / folder
        made = match(pipe.unet, pipe.scheduler, guide, guide, cache, config, directory=directory)
        return nn.utils.parameters_to_vector(made.parameters()).detach()

    made = weights("made")
    with mock.patch("pnp_core.match.KEPT", 0.0):
        trained = weights("trained")
    halved = nn.utils.parameters_to_vector(guide.parameters())
    assert not torch.equal(trained, halved)
    torch.testing.assert_close(made, kept * halved + (1 - kept) * trained)


def test_matching_trains_the_guide_alone_and_goes_on_after_a_stop(
    pipe: StableDiffusionPipeline, cache: TeacherCache, tmp_path: Path
) -> None:
    guide = guide_of(pipe)
    before = copy.deepcopy([pipe.unet.state_dict(), guide.state_dict()])

    def run(folder: str, report: Callable[..., None] = lambda *_: None) -> Guide:
        return match(
            pipe.unet, pipe.scheduler, guide, guide, cache, MATCH, directory=tmp_path / folder,
            report=report,
        )  # fmt: skip

    (tmp_path / "whole").mkdir()
    (tmp_path / "stopped").mkdir()
    whole = run("whole")
    for state, module in zip(before, (pipe.unet, guide), strict=True):
        assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    assert whole.weights_digest() != guide.weights_digest()

    def stop(done: int, metrics: Any) -> None:
        assert metrics["num_steps"] == 2
        if done == 48:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("stopped", stop)
    seen: list[int] = []
    resumed = run("stopped", lambda done, metrics: seen.append(done))
    assert seen[0] in (48, 64)  # what was done before stays
    assert resumed.weights_digest() == whole.weights_digest()
    run("stopped", lambda done, metrics: pytest.fail("was trained again"))


@pytest.mark.services
def test_one_matching_after_another_begins_anew_and_leaves_no_checkpoint(
    pipe: StableDiffusionPipeline,
    cache: TeacherCache,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    guide = guide_of(pipe)
    for num_steps, num_images in ((4, 32), (2, 64)):
        train = dataclasses.replace(TRAIN, num_images=num_images)
        config = MatchConfig(train=train, num_steps=num_steps)
        match(pipe.unet, pipe.scheduler, guide, guide, cache, config, directory=tmp_path)
    assert "of another run" not in capsys.readouterr().out
    assert not list(tmp_path.glob("*.pt"))
    assert len(list(tmp_path.glob("matched-*"))) == 2


def test_in_the_warm_up_and_in_every_other_step_the_fake_score_alone_learns(
    pipe: StableDiffusionPipeline, cache: TeacherCache
) -> None:
    guide = guide_of(pipe)
    fake = FakeScore(pipe.unet, guide)
    student = GuidedDenoiser(pipe.unet, guide, cache.schedule)
    changed = GuidedDenoiser(fake.unet, fake.guide, cache.schedule)
    loss_fn = matching_objective(
        [student],
        [changed],
        [CFGDenoiser(pipe.unet, cache.schedule)],
        cache,
        pipe.scheduler,
        MATCH,
        torch.device("cpu"),
    )
    guide.requires_grad_(True)
    for step, learns in ((0, False), (1, False), (2, True), (3, False), (4, True)):
        for module in (guide, fake):
            module.zero_grad(set_to_none=True)
        loss_fn(step, slice(0, 16)).sum().backward()
        assert any(p.grad is not None and p.grad.any() for p in guide.parameters()) == learns
        trained = [p for p in fake.parameters() if p.requires_grad]
        assert any(p.grad is not None and p.grad.any() for p in trained)


@pytest.mark.services
def test_gradient_checkpoints_change_nothing_of_what_is_matched(
    pipe: StableDiffusionPipeline, cache: TeacherCache, tmp_path: Path
) -> None:
    guide = guide_of(pipe)
    found = []
    for checkpoints in (False, True):
        directory = tmp_path / str(checkpoints)
        directory.mkdir()
        training = dataclasses.replace(TRAIN, gradient_checkpointing=checkpoints)
        config = dataclasses.replace(MATCH, train=training)
        found.append(
            match(pipe.unet, pipe.scheduler, guide, guide, cache, config, directory=directory)
        )
    for one, other in zip(*(guide.parameters() for guide in found), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_a_micro_batch_sees_its_rows_of_the_batch(
    pipe: StableDiffusionPipeline, cache: TeacherCache
) -> None:
    student = GuidedDenoiser(pipe.unet, guide_of(pipe), cache.schedule)
    teacher = CFGDenoiser(pipe.unet, cache.schedule)
    whole, parts = (
        matching_objective(
            [student], [student], [teacher], cache, pipe.scheduler, MATCH, torch.device("cpu")
        )
        for _ in range(2)
    )
    with torch.no_grad():
        for step in (0, 2):
            both = torch.cat([parts(step, slice(0, 6)), parts(step, slice(6, 16))])
            torch.testing.assert_close(both, whole(step, slice(0, 16)), rtol=1e-3, atol=1e-4)
