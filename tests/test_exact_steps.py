"""Exact CFG steps in a guided run, with our own sampler and in a plugged pipeline."""

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    HeunDiscreteScheduler,
    IPNDMScheduler,
    StableDiffusionPipeline,
)
from diffusers.callbacks import SDCFGCutoffCallback
from torch import Tensor

from benchmarks.plug import counted_forwards
from pnp_core.conditions import Conditions
from pnp_core.denoiser import CFGDenoiser, GuidedDenoiser, PlainDenoiser
from pnp_core.exact import ExactDenoiser, spread
from pnp_core.forwards import half
from pnp_core.guide import Guide, GuideConfig
from pnp_core.models import encode_prompts
from pnp_core.plug import plug, unplug
from pnp_core.sample import initial_noise, sample
from pnp_core.schedule import NoiseSchedule, sampling_timesteps
from tests.conftest import roused
from tests.plugged import generate
from tests.reference import rows_run

STEPS = 5  # DDIM of diffusers misses its own grid by one where 1000 is not a multiple
EXACT = (0, 2)
LATENT = {"output_type": "latent"}


def denoiser_of(pipe: Any, guide: Guide, strength: float = 1.0) -> ExactDenoiser:
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    guided = GuidedDenoiser(pipe.unet, guide, schedule, strength=strength)
    return ExactDenoiser(guided, CFGDenoiser(pipe.unet, schedule), EXACT, STEPS)


def run_of(scales: tuple[float, ...] = (4.0, 6.0)) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    c, n = torch.randn(2, 2, 16, 32, generator=generator)
    return {
        "z_T": initial_noise((4, 4, 4), [3, 4]),
        "conditions": Conditions(c_BLD=c, n_BLD=n, w_B=torch.tensor(scales)),
        "num_steps": STEPS,
    }


@torch.no_grad()
def by_hand(pipe: Any, guide: Guide, strength: float) -> Tensor:
    """DDIM and CFG written out, in eps whatever the UNet predicts."""
    of = run_of()
    conditions, z = of["conditions"], of["z_T"]
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    guided = GuidedDenoiser(pipe.unet, guide, schedule, strength=strength)
    grid = sampling_timesteps(pipe.scheduler, STEPS)
    for step in range(STEPS):
        t_B, s_B = grid[step].expand(2), grid[step + 1].expand(2)
        if step in EXACT:
            eps_c, eps_n = (
                schedule.to_eps(pipe.unet(z, t_B, text).sample, z, t_B)
                for text in (conditions.c_BLD, conditions.n_BLD)
            )
            eps = eps_c + (conditions.w_B - 1).view(-1, 1, 1, 1) * (eps_c - eps_n)
        else:
            eps = guided(z, t_B, conditions)
        z = schedule.ddim_step(z, eps, t_B, s_B)
    return z


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_our_denoiser_does_cfg_at_its_steps_and_guides_at_the_others(
    prediction_type: str, pipe: StableDiffusionPipeline, tiny: Guide
) -> None:
    pipe.scheduler.register_to_config(prediction_type=prediction_type)
    for strength in (1.0, 0.5):
        made = sample(denoiser_of(pipe, tiny, strength), pipe.scheduler, **run_of())
        expected = by_hand(pipe, tiny, strength)
        torch.testing.assert_close(made, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_plugged_pipeline_does_what_our_denoiser_does(
    prediction_type: str, pipe: StableDiffusionPipeline
) -> None:
    pipe.scheduler.register_to_config(prediction_type=prediction_type)
    config = GuideConfig(max_parameters_ratio=0.2)
    tiny = roused(Guide.from_unet(pipe.unet, config, prediction_type=prediction_type))
    texts = [encode_prompts(pipe, [p]).states_NLD for p in ("a cat", "a dog")]
    conditions = Conditions.at_scale(4.0, c_BLD=texts[0], n_BLD=texts[1])
    z_T = initial_noise((4, 4, 4), [3])
    of = {"z_T": z_T, "conditions": conditions, "num_steps": STEPS}
    expected = sample(denoiser_of(pipe, tiny, 0.7), pipe.scheduler, **of)  # type: ignore[arg-type]
    plug(pipe, tiny, strength=0.7, exact_steps=2)
    call = {"negative_prompt": "a dog", "num_inference_steps": STEPS, "latents": z_T}
    made = generate(pipe, **call, **LATENT)
    np.testing.assert_allclose(made, expected.numpy(), atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_at_a_scale_of_at_most_1_our_denoiser_does_not_guide(
    pipe: StableDiffusionPipeline, tiny: Guide
) -> None:
    of = run_of((1.0, 0.5))
    plain = PlainDenoiser(pipe.unet, NoiseSchedule.from_scheduler(pipe.scheduler))
    expected = sample(plain, pipe.scheduler, **of)
    made = sample(denoiser_of(pipe, tiny), pipe.scheduler, **of)
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-5)


def test_a_denoiser_begins_each_run_anew(pipe: StableDiffusionPipeline, tiny: Guide) -> None:
    denoiser, of = denoiser_of(pipe, tiny), run_of()
    first = sample(denoiser, pipe.scheduler, **of)
    assert torch.equal(sample(denoiser, pipe.scheduler, **of), first)
    denoiser(of["z_T"], torch.tensor([999, 999]), of["conditions"])  # a run that was given up
    assert torch.equal(sample(denoiser, pipe.scheduler, **run_of()), first)


def test_where_prompt_and_negative_prompt_are_the_same_there_is_no_guidance(
    pipe: StableDiffusionPipeline, tiny: Guide
) -> None:
    unguided = generate(pipe, guidance_scale=1.0)
    plug(pipe, tiny, exact_steps=2)
    np.testing.assert_allclose(generate(pipe, negative_prompt="a cat"), unguided, atol=1e-5)


@pytest.mark.parametrize("num_steps", [1, 4, 6, 13])
def test_exact_steps_are_spread_evenly_from_the_first_on(num_steps: int) -> None:
    for num_exact in range(1, 2 * num_steps):
        steps = spread(num_exact, num_steps)
        assert steps[0] == 0 and len(set(steps)) == min(num_exact, num_steps)
        gaps = np.diff([*steps, num_steps])
        assert gaps.max() - gaps.min() <= 1
    assert spread(0, num_steps) == ()


# In a plugged pipeline


def test_no_exact_steps_is_a_guided_run_as_ever(pipe: StableDiffusionPipeline, tiny: Guide) -> None:
    twin = copy.deepcopy(pipe)
    plug(pipe, tiny, exact_steps=0)
    plug(twin, tiny)
    rows = rows_run(pipe.unet)
    made = generate(pipe, negative_prompt="a dog")
    np.testing.assert_allclose(made, generate(twin, negative_prompt="a dog"), atol=1e-5)
    assert rows == [1, 1, 1, 1]


@pytest.mark.parametrize(("num_exact", "rows"), [(1, [2, 1, 1, 1]), (3, [2, 2, 1, 2])])
def test_an_exact_step_costs_two_rows_and_others_one(
    pipe: StableDiffusionPipeline, tiny: Guide, num_exact: int, rows: list[int]
) -> None:
    plug(pipe, tiny, exact_steps=num_exact)
    found = rows_run(pipe.unet)
    generate(pipe)
    assert found == rows


def test_a_scheduler_of_two_forwards_a_step_has_its_forwards_counted(
    pipe: StableDiffusionPipeline, tiny: Guide
) -> None:
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    plug(pipe, tiny, exact_steps=2)
    rows = rows_run(pipe.unet)
    assert np.isfinite(generate(pipe)).all()
    assert rows == [2, 1, 1, 1, 2, 1, 1]  # 4 steps are 7 forwards


def test_two_calls_one_after_another_don_t_see_each_other(
    pipe: StableDiffusionPipeline, tiny: Guide
) -> None:
    plug(pipe, tiny, exact_steps=1)
    first = generate(pipe, **LATENT)
    generate(pipe, "a cow", num_inference_steps=3)
    assert np.array_equal(generate(pipe, **LATENT), first)


def test_several_prompts_come_out_as_alone(pipe: StableDiffusionPipeline, tiny: Guide) -> None:
    plug(pipe, tiny, exact_steps=2)
    generators = [torch.Generator().manual_seed(i) for i in (0, 1)]
    pairs = [("a cat", "a dog"), ("a cow", "red")]
    together = generate(
        pipe, [p for p, _ in pairs], negative_prompt=[n for _, n in pairs], generator=generators
    )
    for seed, (prompt, negative) in enumerate(pairs):
        generator = torch.Generator().manual_seed(seed)
        alone = generate(pipe, prompt, negative_prompt=negative, generator=generator)
        np.testing.assert_allclose(together[seed], alone[0], atol=1e-4)


def test_calls_in_threads_over_one_unet_keep_their_own_exact_steps(
    pipe: StableDiffusionPipeline, tiny: Guide
) -> None:
    def own(num_exact: int) -> StableDiffusionPipeline:
        mine = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
        mine.set_progress_bar_config(disable=True)
        mine.scheduler, mine.tokenizer = map(copy.deepcopy, (pipe.scheduler, pipe.tokenizer))
        return plug(mine, tiny, exact_steps=num_exact)

    pipes = [own(n) for n in range(3)]
    alone = [generate(each, guidance_scale=2.0 + n) for n, each in enumerate(pipes)]

    def several(number: int) -> list[np.ndarray]:
        return [generate(pipes[number], guidance_scale=2.0 + number) for _ in range(3)]

    with ThreadPoolExecutor(3) as pool:
        for images, one in zip(pool.map(several, range(3)), alone, strict=True):
            for image in images:
                np.testing.assert_allclose(image, one, atol=1e-5)


@pytest.mark.parametrize("how", ["scale alone", "diffusers' own"])
def test_a_callback_that_ends_guidance_midway_leaves_the_prompts_prediction(
    pipe: StableDiffusionPipeline, tiny: Guide, how: str
) -> None:
    plug(pipe, tiny, exact_steps=2)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    kept: list[Tensor] = []

    def end(running: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            kept.append(given["latents"])
            running._guidance_scale = 1.0
        return given

    latents_of_step_1 = generate(pipe, **LATENT, callback_on_step_end=end)
    if how != "scale alone":
        cut = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
        made = generate(pipe, **LATENT, callback_on_step_end=cut)
        np.testing.assert_allclose(made, latents_of_step_1, atol=1e-5)
    text, latents = encode_prompts(pipe, ["a cat"]).states_NLD, kept[0]
    pipe.scheduler.set_timesteps(4)
    with torch.no_grad():
        for t in pipe.scheduler.timesteps[2:]:
            latents = pipe.scheduler.step(pipe.unet(latents, t, text).sample, t, latents)[0]
    np.testing.assert_allclose(latents_of_step_1, latents.numpy(), atol=1e-5)


def test_guidance_that_a_callback_begins_midway_is_refused_as_without_exact_steps(
    pipe: StableDiffusionPipeline, tiny: Guide
) -> None:
    def begin(running: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        running._guidance_scale = 4.0
        return given

    plug(pipe, tiny, exact_steps=1)
    with pytest.raises(ValueError, match="raised above 1 in the middle of a call"):
        generate(pipe, guidance_scale=1.0, callback_on_step_end=begin)


def test_a_callback_sees_and_changes_both_prompts_as_in_the_stock_pipeline(
    pipe: StableDiffusionPipeline, tiny: Guide
) -> None:
    new, negative = pipe.encode_prompt("a cow", "cpu", 1, True, "red")
    both, alone = torch.cat([negative, new]), new

    def switching(states: Tensor) -> Any:
        def switch(running: Any, step: int, timestep: Any, given: dict[str, Any]) -> Any:
            assert len(given["prompt_embeds"]) == 2
            return {**given, "prompt_embeds": states} if step == 0 else given

        return {
            "callback_on_step_end": switch,
            "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
        }

    stock = generate(pipe, **LATENT, **switching(both))
    plug(pipe, tiny, exact_steps=4)
    assert np.array_equal(generate(pipe, **LATENT, **switching(both)), stock)
    with pytest.raises(ValueError, match=r"torch.cat\(\[negative, prompt\]\)"):
        generate(pipe, **switching(alone))


def test_without_strength_exact_steps_are_cfgs_and_the_others_unguided(
    pipe: StableDiffusionPipeline, tiny: Guide
) -> None:
    text, null = (encode_prompts(pipe, [p]).states_NLD for p in ("a cat", ""))
    plug(pipe, tiny, strength=0.0, exact_steps=1)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    latents = initial_noise((4, 4, 4), [3])
    made = generate(pipe, latents=latents, **LATENT)
    pipe.scheduler.set_timesteps(4)
    with torch.no_grad():
        for step, t in enumerate(pipe.scheduler.timesteps):
            eps_c, eps_n = (pipe.unet(latents, t, states).sample for states in (text, null))
            eps = eps_n + 4.0 * (eps_c - eps_n) if step == 0 else eps_c
            latents = pipe.scheduler.step(eps, t, latents)[0]
    np.testing.assert_allclose(made, latents.numpy(), atol=1e-4)


def test_a_step_after_the_first_waits_for_nothing(
    pipe: StableDiffusionPipeline, tiny: Guide
) -> None:
    plug(pipe, tiny, exact_steps=2)
    with counted_forwards(pipe.unet) as counted:
        pipe("a cat", negative_prompt="a dog", num_inference_steps=6, output_type="latent")
    assert len(counted) == 6 and not any(counted[2:])  # the guide reads the prompts in the second


@pytest.mark.parametrize("number", [-1, 1.0, True, "2", None])
def test_what_is_no_number_of_exact_steps_is_refused_in_one_line(
    pipe: StableDiffusionPipeline, tiny: Guide, number: Any
) -> None:
    cls = type(pipe)
    with pytest.raises(ValueError, match=rf"^exact_steps is a whole number .* not {number!r}\.$"):
        plug(pipe, tiny, exact_steps=number)
    assert type(pipe) is cls


def test_a_number_of_exact_steps_may_be_numpys(pipe: StableDiffusionPipeline, tiny: Guide) -> None:
    expected = generate(plug(pipe, tiny, exact_steps=2))
    number: Any = np.int64(2)
    assert np.array_equal(generate(plug(unplug(pipe), tiny, exact_steps=number)), expected)


class Weights(NamedTuple):
    """What a user's attention processor is given."""

    of_rows: Tensor
    gain: float


def test_a_named_tuple_of_a_doubled_batch_is_halved_as_one() -> None:
    found = half({"weights": Weights(torch.arange(4), 0.5)}, num_rows=4, num_samples=2)
    assert isinstance(found["weights"], Weights)
    assert found["weights"].of_rows.tolist() == [2, 3] and found["weights"].gain == 0.5


def test_a_scheduler_without_noise_levels_serves(
    pipe: StableDiffusionPipeline, tiny: Guide
) -> None:
    pipe.scheduler = IPNDMScheduler()
    stock = generate(pipe, negative_prompt="a dog")
    plug(pipe, tiny, exact_steps=2)
    rows = rows_run(pipe.unet)
    assert np.isfinite(generate(pipe, negative_prompt="a dog", **LATENT)).all()
    assert rows == [2, 1, 2, 1]
    unplug(pipe)
    plug(pipe, tiny, exact_steps=4)
    assert np.array_equal(generate(pipe, negative_prompt="a dog"), stock)
