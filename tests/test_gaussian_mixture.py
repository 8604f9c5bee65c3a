"""Distillation where the truth is known: a mixture of four Gaussians.

The teacher's eps under a prompt (one Gaussian) and without (the whole mixture) are closed formulas,
so the guided eps that a guide has to reach is known exactly, at every state and guidance scale.
"""

from typing import Any, NamedTuple

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from pnp_core.cache import Pairs
from pnp_core.calls import now
from pnp_core.conditions import Conditions
from pnp_core.denoiser import CFGDenoiser, GuidedDenoiser, PlainDenoiser
from pnp_core.distill import DistillConfig, distill
from pnp_core.guide import Guide, GuideConfig
from pnp_core.sample import sample
from pnp_core.schedule import NoiseSchedule
from pnp_core.shards import shuffled
from pnp_core.train import TrainConfig
from tests.toy import ddim, small_unet

SHAPE = (2, 4, 4)
# Each Gaussian has a colour: the mean of a channel, the same at every pixel.
MEANS_KD = 0.5 * torch.tensor([[1, 1], [-1, 1], [-1, -1], [1, -1]]).repeat_interleave(16, dim=1)
STD = 0.5
TEXT_K2D = torch.eye(4, 16).unsqueeze(1).repeat(1, 2, 1)  # prompt k's text states; the null's are 0
SCHEDULER = ddim()
SCHEDULE = NoiseSchedule.from_scheduler(SCHEDULER)
MAX_GUIDANCE_SCALE = 3.0


class States(NamedTuple):
    """Noised draws from the mixture with the exact eps under their own prompt and without."""

    z: Tensor
    t: Tensor
    text: Tensor
    eps_c: Tensor
    eps_n: Tensor


def exact_eps(z_BD: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
    """eps of every single Gaussian, (B, K, D), and of their mixture, (B, D).

    z_t of component k is normal with mean ``alpha mu_k`` and variance ``alpha^2 s^2 + sigma^2``,
    and ``eps = -sigma grad log p(z_t)``.
    """
    alpha, sigma = (x.reshape(-1, 1, 1) for x in SCHEDULE.alpha_sigma(t_B, z_BD))
    variance = alpha**2 * STD**2 + sigma**2
    away_BKD = z_BD[:, None] - alpha * MEANS_KD
    eps_BKD = sigma * away_BKD / variance
    share_BK1 = (-away_BKD.square().sum(dim=2, keepdim=True) / (2 * variance)).softmax(dim=1)
    return eps_BKD, (share_BK1 * eps_BKD).sum(dim=1)


class ExactUNet(UNet2DConditionModel):
    """A base whose predictions are exact, under prompt k as well as without any prompt.

    What its random network predicts is taken away again, so only what a guide changes in it counts.
    """

    exact = staticmethod(exact_eps)

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **options: Any
    ) -> tuple[Tensor]:
        eps_BKD, eps_BD = self.exact(sample.flatten(1), timestep)
        prompt_BK = encoder_hidden_states[:, 0, : len(MEANS_KD)]
        has_prompt_B1 = prompt_BK.sum(dim=1, keepdim=True)
        exact_BD = (prompt_BK[..., None] * eps_BKD).sum(dim=1) + (1 - has_prompt_B1) * eps_BD
        inputs = (sample, timestep, encoder_hidden_states)
        network = super().forward(*inputs).sample
        now.acting = None  # the guide has done its part
        with torch.no_grad():
            unguided = super().forward(*inputs).sample
        return (exact_BD.unflatten(1, SHAPE) + network - unguided,)


def draw(num_states: int, seed: int) -> States:
    generator = torch.Generator().manual_seed(seed)
    k_B = torch.randint(len(MEANS_KD), (num_states,), generator=generator)
    x_BD = MEANS_KD[k_B] + STD * torch.randn((num_states, MEANS_KD.shape[1]), generator=generator)
    t_B = torch.randint(1000, (num_states,), generator=generator)
    z_BD = SCHEDULE.add_noise(x_BD, torch.randn(x_BD.shape, generator=generator), t_B)
    eps_BKD, eps_n_BD = exact_eps(z_BD, t_B)
    eps_c_BD = eps_BKD[torch.arange(num_states), k_B]
    z, eps_c, eps_n = (x.unflatten(1, SHAPE) for x in (z_BD, eps_c_BD, eps_n_BD))
    return States(z, t_B, TEXT_K2D[k_B], eps_c, eps_n)


class ExactCache:
    """A teacher cache of exact predictions."""

    base_hash = content_hash = "mixture"
    schedule = SCHEDULE
    companions: tuple[str, ...] = ()
    num_pairs = 8192

    def __init__(self) -> None:
        self.states = draw(self.num_pairs, seed=1)

    def pair_indices(self, *, batch_size: int, seed: int, step: int, teacher: int = 0) -> Tensor:
        positions = torch.arange(step * batch_size, (step + 1) * batch_size)
        return shuffled(positions, (self.num_pairs,), num_shuffled=1, seed=seed)

    def pair_rows(self, indices: Tensor) -> dict[str, Tensor]:
        return dict(zip(("eps_c", "eps_n"), (x[indices] for x in self.states[3:]), strict=True))

    def stored_pairs(self, indices: Tensor) -> Pairs:
        z, t, text, eps_c, eps_n = (x[indices] for x in self.states)
        return Pairs(z, t, eps_c, eps_n, text, torch.zeros_like(text), added=None)

    def pairs(self, indices: Tensor, device: torch.device) -> Pairs:
        return self.stored_pairs(indices)


@pytest.fixture(scope="module")
def base() -> UNet2DConditionModel:
    return small_unet(ExactUNet)


def distilled(base: UNet2DConditionModel, cache: ExactCache) -> Guide:
    config = DistillConfig(
        train=TrainConfig(
            num_images=64 * 60,
            batch_size=64,
            learning_rate=1e-2,
            ema_halflife_images=500,
            precision="fp32",
            checkpoint_every_images=10**6,
        ),
        guide=GuideConfig(max_parameters_ratio=0.2),
        guidance_scale=(1.0, MAX_GUIDANCE_SCALE),
    )
    return distill(base, cache, config)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def guide(base: UNet2DConditionModel) -> Guide:
    return distilled(base, ExactCache())


def test_the_exact_eps_is_the_gradient_of_the_log_density() -> None:
    t_B = torch.tensor([20, 400, 700, 999])
    z_BD = 0.3 * torch.randn((4, 32), generator=torch.Generator().manual_seed(0))
    z_BD.requires_grad_()
    alpha, sigma = (x.flatten() for x in SCHEDULE.alpha_sigma(t_B, z_BD))
    spread = (alpha**2 * STD**2 + sigma**2).sqrt()
    parts = Independent(
        Normal(alpha[:, None, None] * MEANS_KD, spread[:, None, None].expand(-1, 4, 32)), 1
    )
    mixture = MixtureSameFamily(Categorical(torch.ones(4, 4)), parts)
    eps_BKD, eps_BD = exact_eps(z_BD.detach(), t_B)
    (score,) = torch.autograd.grad(mixture.log_prob(z_BD).sum(), z_BD)
    torch.testing.assert_close(eps_BD, -sigma[:, None] * score, atol=1e-5, rtol=1e-4)
    (score,) = torch.autograd.grad(parts.log_prob(z_BD[:, None])[:, 2].sum(), z_BD)
    torch.testing.assert_close(eps_BKD[:, 2], -sigma[:, None] * score, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("guidance_scale", [2.0, MAX_GUIDANCE_SCALE])
def test_a_distilled_guide_predicts_the_exact_guided_eps_at_states_it_never_saw(
    base: UNet2DConditionModel, guide: Guide, guidance_scale: float
) -> None:
    z, t, text, eps_c, eps_n = draw(1024, seed=2)
    conditions = Conditions.at_scale(guidance_scale, c_BLD=text, n_BLD=torch.zeros_like(text))
    exact = eps_n + guidance_scale * (eps_c - eps_n)
    unguided = PlainDenoiser(base, SCHEDULE)(z, t, conditions)
    torch.testing.assert_close(unguided, eps_c)
    guided = GuidedDenoiser(base, guide, SCHEDULE)(z, t, conditions)
    assert (guided - exact).square().sum() < 0.5 * (unguided - exact).square().sum()


@torch.no_grad()
def distances(
    base: UNet2DConditionModel,
    guide: Guide,
    schedule: NoiseSchedule,
    scheduler: DDIMScheduler,
    **options: Any,
) -> dict[str, float]:
    """How far from exact guidance's the samples are that are drawn with the guide and without."""
    text = TEXT_K2D.repeat(16, 1, 1)
    null = torch.zeros_like(text[:1])
    conditions = Conditions.at_scale(MAX_GUIDANCE_SCALE, c_BLD=text, n_BLD=null)
    z_T = torch.randn((len(text), *SHAPE), generator=torch.Generator().manual_seed(0))
    exact, guided, unguided = (
        sample(denoiser, scheduler, z_T=z_T, conditions=conditions, num_steps=10, **options)
        for denoiser in (
            CFGDenoiser(base, schedule),
            GuidedDenoiser(base, guide, schedule),
            PlainDenoiser(base, schedule),
        )
    )
    made = {"guided": guided, "unguided": unguided}
    return {name: float((x - exact).square().mean()) for name, x in made.items()}


def test_guided_samples_land_where_exact_guidance_takes_them(
    base: UNet2DConditionModel, guide: Guide
) -> None:
    off = distances(base, guide, SCHEDULE, SCHEDULER)
    assert off["guided"] < 0.5 * off["unguided"]
