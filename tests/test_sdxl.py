"""A base in the SDXL architecture, from its cache to the plug: pooled text and sizes go along."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from components import cache as cache_stage
from components import distill as distill_stage
from components import evaluate, prepare
from components import halve as halve_stage
from components.environment import quiet
from components.params import load_params
from pnp_core.cache import CacheBuilder, Example, TeacherCache, build_cache
from pnp_core.conditions import Conditions
from pnp_core.denoiser import CFGDenoiser, GuidedDenoiser
from pnp_core.distill import DistillConfig, distill
from pnp_core.files import read_json
from pnp_core.guide import KINDS, Guide, GuideConfig
from pnp_core.halve import HalveConfig, halve
from pnp_core.models import added_conditions, encode_prompts, load_pipeline
from pnp_core.plug import plug, unplug
from pnp_core.sample import decode, initial_noise, sample
from pnp_core.schedule import NoiseSchedule
from pnp_core.train import TrainConfig
from tests.conftest import BASE, CACHE_CONFIG, changed, roused

pytest_plugins = ["tests.toy"]
quiet()

TRAIN = TrainConfig(
    num_images=1600,
    batch_size=16,
    learning_rate=5e-3,
    ema_halflife_images=64,
    precision="fp32",
    checkpoint_every_images=10_000,
)
DISTILL = DistillConfig(train=TRAIN, guide=GuideConfig(max_parameters_ratio=0.2))
# Enough states that what is learnt from them holds for others.
CACHE = dataclasses.replace(
    CACHE_CONFIG, num_forward=128, num_trajectory=384, trajectory_steps=8, shard_size=128
)
CPU = torch.device("cpu")


@pytest.fixture
def cache(
    xl_pipe: StableDiffusionXLPipeline, examples: list[Example], tmp_path: Path
) -> TeacherCache:
    folder = tmp_path / "cache"
    build_cache(CacheBuilder(xl_pipe, examples, CACHE, folder, base=BASE, data_hash="data"))
    return TeacherCache.open(folder)


def explicit_added(pooled: torch.Tensor) -> dict[str, torch.Tensor]:
    """As the stock pipeline passes it for a whole 32 px image."""
    sizes = torch.tensor([[32.0, 32, 0, 0, 32, 32]])
    return {"text_embeds": pooled, "time_ids": sizes.expand(len(pooled), -1)}


@torch.no_grad()
def test_cached_pairs_equal_two_explicit_passes_with_their_own_pooled_text(
    xl_pipe: StableDiffusionXLPipeline, cache: TeacherCache
) -> None:
    pairs = cache.pairs(torch.arange(cache.num_pairs), CPU)
    assert pairs.added is not None
    pooled, negative_pooled = pairs.added.pooled_BP, pairs.added.negative_pooled_BP
    for text, own, eps in (
        (pairs.text, pooled, pairs.eps_c),
        (pairs.negative_text, negative_pooled, pairs.eps_n),
    ):
        expected = xl_pipe.unet(
            pairs.z_t, pairs.timestep, text, added_cond_kwargs=explicit_added(own)
        ).sample
        torch.testing.assert_close(eps, expected, atol=2e-3, rtol=2e-3)  # stored in half precision
    assert not torch.equal(pooled, negative_pooled)


def distance(images: np.ndarray, references: np.ndarray) -> float:
    return float(np.square(images - references).mean())


def test_a_distilled_guide_brings_an_sdxl_pipeline_closer_to_cfg(
    xl_pipe: StableDiffusionXLPipeline, cache: TeacherCache
) -> None:
    guide = distill(xl_pipe.unet, cache, DISTILL)

    def images(guidance_scale: float) -> np.ndarray:
        return np.asarray(
            xl_pipe(
                ["thing a", "thing c"],
                num_inference_steps=4,
                guidance_scale=guidance_scale,
                output_type="np",
                generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
            ).images
        )

    unguided, cfg = images(1.0), images(6.0)
    plug(xl_pipe, guide)
    assert distance(images(6.0), cfg) < 0.8 * distance(unguided, cfg)
    unplug(xl_pipe)
    assert np.array_equal(images(6.0), cfg)


@pytest.mark.services
def test_halving_trains_a_guide_of_an_sdxl_base(
    xl_pipe: StableDiffusionXLPipeline, cache: TeacherCache, tmp_path: Path
) -> None:
    teacher = roused(
        Guide.from_unet(xl_pipe.unet, GuideConfig(max_parameters_ratio=0.2)), scale=0.05
    )
    losses: list[float] = []
    config = HalveConfig(
        train=dataclasses.replace(TRAIN, num_images=480, report_every_images=16),
        start_steps=4,
        end_steps=2,
    )
    guides = halve(
        xl_pipe.unet,
        xl_pipe.scheduler,
        teacher,
        cache,
        config,
        directory=tmp_path / "halve",
        report=lambda done, metrics: losses.append(metrics["loss"]),
    )
    assert guides[2].config.num_steps == 2
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("negative_prompt", [None, "a dog"])
def test_a_plugged_sdxl_pipeline_makes_what_our_own_sampler_makes(
    xl_pipe: StableDiffusionXLPipeline, kind: str, negative_prompt: str | None
) -> None:
    guide = roused(
        Guide.from_unet(xl_pipe.unet, GuideConfig(kind=kind, max_parameters_ratio=0.2)), scale=0.05
    )
    c, n = (encode_prompts(xl_pipe, [prompt]) for prompt in ("a cat", negative_prompt or ""))
    added = added_conditions(xl_pipe, c, n)
    conditions = Conditions.at_scale(4.0, c_BLD=c.states_NLD, n_BLD=n.states_NLD, added=added)
    inputs = {"z_T": initial_noise((4, 4, 4), [3]), "conditions": conditions, "num_steps": 4}
    schedule = NoiseSchedule.from_scheduler(xl_pipe.scheduler)
    call = {"negative_prompt": negative_prompt, "guidance_scale": 4.0, "num_inference_steps": 4}

    def made() -> np.ndarray:
        generator = torch.Generator().manual_seed(3)
        return np.asarray(xl_pipe("a cat", generator=generator, output_type="np", **call).images)

    cfg = sample(CFGDenoiser(xl_pipe.unet, schedule), xl_pipe.scheduler, **inputs)
    np.testing.assert_allclose(made() * 255, decode(xl_pipe, cfg), atol=0.6)
    guided = sample(GuidedDenoiser(xl_pipe.unet, guide, schedule), xl_pipe.scheduler, **inputs)
    plug(xl_pipe, guide)
    np.testing.assert_allclose(made() * 255, decode(xl_pipe, guided), atol=0.6)


def test_the_pooled_negative_prompt_reaches_a_full_guide(
    xl_pipe: StableDiffusionXLPipeline,
) -> None:
    guide = roused(Guide.from_unet(xl_pipe.unet, GuideConfig(kind="full")))
    c, n, pooled, pooled_n = xl_pipe.encode_prompt("a cat", device="cpu", negative_prompt="a dog")
    plug(xl_pipe, guide)

    def made(negative_pooled: torch.Tensor) -> np.ndarray:
        return np.asarray(
            xl_pipe(
                prompt_embeds=c,
                negative_prompt_embeds=n,
                pooled_prompt_embeds=pooled,
                negative_pooled_prompt_embeds=negative_pooled,
                num_inference_steps=2,
                guidance_scale=4.0,
                output_type="np",
                generator=torch.Generator().manual_seed(3),
            ).images
        )

    assert not np.array_equal(made(pooled_n), made(pooled))


def test_an_sdxl_folder_loads_as_a_base(xl_pipe: StableDiffusionXLPipeline, tmp_path: Path) -> None:
    xl_pipe.save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path)
    assert isinstance(loaded, StableDiffusionXLPipeline)
    weights = xl_pipe.unet.state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in loaded.unet.state_dict().items())


@pytest.mark.services
def test_the_stages_train_and_evaluate_a_guide_of_an_sdxl_base(
    xl_pipe: StableDiffusionXLPipeline, world: Path
) -> None:
    for name in ("base", "tuned"):
        shutil.rmtree(world / "models" / name)
    xl_pipe.save_pretrained(world / "models/base")
    for name in ("models/tuned", "companions/other"):
        changed(xl_pipe.unet).save_pretrained(world / name / "unet")
    params = load_params(world / "params.yaml")
    # gently: at the toy's own rate a guide learns the base's few prompts by heart
    gentle = params.distill.model_copy(update={"num_images": 320, "learning_rate": 1e-4})
    params = params.model_copy(update={"distill": gentle})
    for stage in (prepare, cache_stage, distill_stage, halve_stage):
        stage.run(params)
    for model in ("base", "tuned"):
        evaluate.run(params, model)
        metrics = read_json(world / f"results/evaluate/{model}/metrics.json")
        assert 0 < metrics["fvu"] < 1
