"""Bases whose last timestep has no signal: distilled and halved in v, where eps says nothing."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

from pnp_core.cache import CacheBuilder, Example, Pairs, TeacherCache, build_cache
from pnp_core.conditions import Conditions
from pnp_core.denoiser import GuidedDenoiser
from pnp_core.distill import distill
from pnp_core.guide import Guide
from pnp_core.halve import halve, truncated_snr_loss
from pnp_core.schedule import NoiseSchedule, two_step_target
from tests.conftest import BASE, CACHE_CONFIG
from tests.test_gaussian_mixture import (
    MAX_GUIDANCE_SCALE,
    MEANS_KD,
    SHAPE,
    STD,
    TEXT_K2D,
    ExactCache,
    ExactUNet,
    States,
    distances,
    distilled,
)
from tests.test_training import DISTILL, HALVE
from tests.toy import ddim, small_unet

SCHEDULER = ddim(prediction_type="v_prediction", rescale_betas_zero_snr=True)
SCHEDULE = NoiseSchedule.from_scheduler(SCHEDULER)
LAST = 999


def exact_v(z_BD: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
    """v of every single Gaussian, (B, K, D), and of their mixture, (B, D).

    Given z_t and component k, the mean of x is ``mu_k + alpha s^2 (z_t - alpha mu_k) / variance``,
    that of eps ``sigma (z_t - alpha mu_k) / variance``, and ``v = alpha eps - sigma x``.
    """
    alpha, sigma = (x.reshape(-1, 1, 1) for x in SCHEDULE.alpha_sigma(t_B, z_BD))
    variance = alpha**2 * STD**2 + sigma**2
    away_BKD = z_BD[:, None] - alpha * MEANS_KD
    x_BKD = MEANS_KD + alpha * STD**2 * away_BKD / variance
    v_BKD = alpha * sigma * away_BKD / variance - sigma * x_BKD
    share_BK1 = (-away_BKD.square().sum(dim=2, keepdim=True) / (2 * variance)).softmax(dim=1)
    return v_BKD, (share_BK1 * v_BKD).sum(dim=1)


class ExactV(ExactUNet):
    """Predicts v."""

    exact = staticmethod(exact_v)


def draw(num_states: int, seed: int) -> States:
    """A quarter of them at the last timestep."""
    generator = torch.Generator().manual_seed(seed)
    k_B = torch.randint(len(MEANS_KD), (num_states,), generator=generator)
    x_BD = MEANS_KD[k_B] + STD * torch.randn((num_states, MEANS_KD.shape[1]), generator=generator)
    t_B = torch.randint(1000, (num_states,), generator=generator)
    t_B[::4] = LAST
    z_BD = SCHEDULE.add_noise(x_BD, torch.randn(x_BD.shape, generator=generator), t_B)
    v_BKD, v_n_BD = exact_v(z_BD, t_B)
    z, v_c, v_n = (
        x.unflatten(1, SHAPE) for x in (z_BD, v_BKD[torch.arange(num_states), k_B], v_n_BD)
    )
    return States(z, t_B, TEXT_K2D[k_B], v_c, v_n)


class ExactVCache(ExactCache):
    """A teacher cache of exact predictions of v."""

    schedule = SCHEDULE

    def __init__(self) -> None:
        self.states = draw(self.num_pairs, seed=1)


@pytest.fixture(scope="module")
def base() -> ExactV:
    return small_unet(ExactV)


@pytest.fixture(scope="module")
def guide(base: ExactV) -> Guide:
    return distilled(base, ExactVCache())


def latents(seed: int, num_rows: int = 6) -> Tensor:
    return torch.randn(num_rows, *SHAPE, generator=torch.Generator().manual_seed(seed))


def test_the_last_timestep_has_no_signal_and_denoisers_give_v() -> None:
    assert SCHEDULE.alphas_cumprod[-1] == 0
    assert SCHEDULE.gives_v
    assert not NoiseSchedule.from_scheduler(ddim(prediction_type="v_prediction")).gives_v


def test_steps_in_v_are_those_of_diffusers() -> None:
    SCHEDULER.set_timesteps(10)
    z, v = latents(0), latents(1)
    for t, s in zip(SCHEDULER.timesteps, [*SCHEDULER.timesteps[1:], torch.tensor(-1)], strict=True):
        expected = SCHEDULER.step(v, t, z).prev_sample
        found = SCHEDULE.ddim_step(z, v, t.expand(6), s.expand(6))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("t", [LAST, 500])
def test_one_step_with_the_two_step_target_lands_where_two_do_also_from_pure_noise(t: int) -> None:
    t_B, m_B, s_B = (torch.full((6,), x) for x in (t, t // 2, -1))
    z_t = latents(0)
    z_m = SCHEDULE.ddim_step(z_t, latents(1), t_B, m_B)
    z_s = SCHEDULE.ddim_step(z_m, latents(2), m_B, s_B)
    v = two_step_target(SCHEDULE, z_t=z_t, z_s=z_s, t_B=t_B, s_B=s_B)
    torch.testing.assert_close(SCHEDULE.ddim_step(z_t, v, t_B, s_B), z_s, atol=1e-5, rtol=1e-5)


def test_the_truncated_snr_loss_of_v_is_the_larger_of_x_and_eps_error() -> None:
    t_B = torch.tensor([0, 200, 400, 600, 800, LAST])
    z, v, target = latents(0), latents(1), latents(2)
    alpha, sigma = SCHEDULE.alpha_sigma(t_B, z)

    def mse(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().mean(dim=(1, 2, 3))

    x_mse = mse(SCHEDULE.to_x(v, z, t_B), SCHEDULE.to_x(target, z, t_B))
    eps_mse = mse(alpha * v + sigma * z, alpha * target + sigma * z)
    loss = truncated_snr_loss(SCHEDULE, v, target, z, t_B)
    torch.testing.assert_close(loss, torch.maximum(x_mse, eps_mse))


@torch.no_grad()
@pytest.mark.parametrize("only_last", [False, True])
def test_a_guide_distilled_in_v_guides_also_where_there_is_no_signal(
    base: ExactV, guide: Guide, only_last: bool
) -> None:
    states = draw(1024, seed=2)
    here = states.t == LAST if only_last else torch.full((1024,), True)
    z, t, text, v_c, v_n = (x[here] for x in states)
    conditions = Conditions.at_scale(MAX_GUIDANCE_SCALE, c_BLD=text, n_BLD=torch.zeros_like(text))
    exact = v_n + MAX_GUIDANCE_SCALE * (v_c - v_n)
    guided = GuidedDenoiser(base, guide, SCHEDULE)(z, t, conditions)
    assert (guided - exact).square().sum() < 0.5 * (v_c - exact).square().sum()


@pytest.mark.parametrize("solver", ["ddim", "dpmsolver++"])
def test_guided_samples_from_pure_noise_land_where_exact_guidance_takes_them(
    base: ExactV, guide: Guide, solver: str
) -> None:
    off = distances(base, guide, SCHEDULE, SCHEDULER, solver=solver)
    assert off["guided"] < 0.5 * off["unguided"]


def test_caching_distilling_and_halving_stay_finite(
    pipe: StableDiffusionPipeline, examples: list[Example], tmp_path: Path
) -> None:
    pipe.scheduler = SCHEDULER
    builder = CacheBuilder(
        pipe, examples, CACHE_CONFIG, tmp_path / "cache", base=BASE, data_hash="data"
    )
    build_cache(builder)
    cache = TeacherCache.open(tmp_path / "cache", scheduler=SCHEDULER)
    pairs: Pairs = cache.pairs(torch.arange(cache.num_pairs), torch.device("cpu"))
    last = pairs.timestep == LAST
    assert last.any()
    assert (pairs.eps_c - pairs.eps_n)[last].abs().amax() > 0  # guidance is not lost there
    losses: list[float] = []

    def report(done: int, metrics: dict[str, float]) -> None:
        losses.append(metrics["loss"])

    guide = distill(pipe.unet, cache, DISTILL, report=report)
    short = dataclasses.replace(HALVE, end_steps=4)
    halve(pipe.unet, SCHEDULER, guide, cache, short, directory=tmp_path, report=report)
    assert torch.tensor(losses).isfinite().all()


@pytest.mark.parametrize(
    ("entries", "what"),
    [
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule"),
        ({"trained_betas": [0.1] * 10 + [0.9999999]}, "by its betas"),
    ],
)
def test_a_base_that_predicts_eps_without_signal_is_refused_by_what_takes_it(
    entries: dict[str, Any], what: str
) -> None:
    with pytest.raises(ValueError, match=rf"predicts epsilon .* no signal \({what}"):
        NoiseSchedule.from_scheduler(DDIMScheduler(**entries))
