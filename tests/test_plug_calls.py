"""A call's state belongs to its call."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.callbacks import SDCFGCutoffCallback

from pnp_core.conditions import Conditions
from pnp_core.denoiser import GuidedDenoiser
from pnp_core.guide import Guide, GuideConfig
from pnp_core.models import encode_prompts
from pnp_core.placing import on_device
from pnp_core.plug import plug, unplug
from pnp_core.plugged import plugged_class
from pnp_core.schedule import NoiseSchedule
from tests.conftest import roused
from tests.plugged import generate


def test_two_pipelines_over_one_unet_keep_their_own_settings(
    pipe: StableDiffusionPipeline, tiny: Guide
) -> None:
    calls: list[dict[str, Any]] = [
        {"guidance_scale": 3.0, "negative_prompt": "a dog", "num_inference_steps": 4},
        {"guidance_scale": 6.0, "negative_prompt": "red", "num_inference_steps": 2},
    ]
    strengths = (1.0, 0.5)
    alone = []
    for call, strength in zip(calls, strengths, strict=True):
        plug(pipe, tiny, strength=strength)
        alone.append(generate(pipe, **call))
        unplug(pipe)
    pipes = [
        StableDiffusionPipeline(**pipe.components, requires_safety_checker=False) for _ in calls
    ]
    for each, strength in zip(pipes, strengths, strict=True):
        each.set_progress_bar_config(disable=True)
        each.scheduler = copy.deepcopy(pipe.scheduler)
        plug(each, tiny, strength=strength)
    made: list[list[np.ndarray]] = [[], []]

    def other(at: int) -> Any:
        def callback(
            running: Any, step: int, timestep: Any, given: dict[str, Any]
        ) -> dict[str, Any]:
            if step == 0:
                made[at].append(generate(pipes[at], **calls[at]))
            return given

        return callback

    outer = generate(pipes[0], **calls[0], callback_on_step_end=other(1))
    np.testing.assert_array_equal(outer, alone[0])
    np.testing.assert_array_equal(made[1][0], alone[1])
    np.testing.assert_array_equal(generate(pipes[1], **calls[1]), alone[1])


def test_a_hundred_calls_in_eight_threads_don_t_see_one_another(
    pipe: StableDiffusionPipeline, tiny: Guide
) -> None:
    calls: list[dict[str, Any]] = [
        {"guidance_scale": 2.0 + n, "negative_prompt": f"dog {n % 3}", "num_inference_steps": 2}
        for n in range(8)
    ]

    def own() -> StableDiffusionPipeline:
        mine = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
        mine.set_progress_bar_config(disable=True)
        mine.scheduler = copy.deepcopy(pipe.scheduler)
        # a fast tokenizer keeps padding as state: shared by threads, stock pipelines fail too
        mine.tokenizer = copy.deepcopy(pipe.tokenizer)
        return plug(mine, tiny)

    expected = [generate(own(), **call) for call in calls]
    with ThreadPoolExecutor(8) as pool:
        pipes = [own() for _ in calls]

        def several(number: int) -> list[np.ndarray]:
            return [generate(pipes[number], **calls[number]) for _ in range(13)]

        for images, one in zip(pool.map(several, range(8)), expected, strict=True):
            for image in images:
                np.testing.assert_allclose(image, one, atol=1e-5)


def test_a_shallow_copy_is_plugged_and_unplugs_alone(
    pipe: StableDiffusionPipeline, tiny: Guide
) -> None:
    stock = generate(pipe)
    plug(pipe, tiny)
    expected = generate(pipe)
    twin = copy.copy(pipe)
    assert np.array_equal(generate(twin), expected)
    unplug(pipe)
    assert np.array_equal(generate(twin), expected)
    unplug(twin)
    assert np.array_equal(generate(pipe), stock)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.unet.modules())


@pytest.mark.parametrize("how", ["components", "from_pipe"])
def test_a_plugged_pipelines_class_makes_stock_ones_which_can_be_plugged(
    pipe: StableDiffusionPipeline, tiny: Guide, how: str
) -> None:
    stock = generate(pipe)
    plug(pipe, tiny)
    expected = generate(pipe)
    components = {**pipe.components, "requires_safety_checker": False}
    cls: Any = type(pipe)
    other = cls(**components) if how == "components" else cls.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    assert type(other) is StableDiffusionPipeline
    with pytest.raises(ValueError, match="has not been plugged"):
        generate(other)
    np.testing.assert_allclose(generate(copy.deepcopy(other)), stock, atol=1e-5)
    assert np.array_equal(generate(plug(other, tiny)), expected)
    unplug(pipe)
    assert np.array_equal(generate(unplug(other)), stock)


def test_a_pipeline_that_has_another_unet_since_says_nothing_of_its_old_one(
    pipe: StableDiffusionPipeline, tiny: Guide
) -> None:
    expected = generate(pipe)
    stock = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    plug(pipe, tiny)
    pipe.unet = copy.deepcopy(pipe.unet)
    assert np.array_equal(generate(stock), expected)


def test_pipelines_plugged_at_once_in_several_threads_are_guided(
    pipe: StableDiffusionPipeline, tiny: Guide
) -> None:
    call: dict[str, Any] = {"num_inference_steps": 2}
    plug(pipe, tiny)
    expected = generate(pipe, **call)
    unplug(pipe)

    def one(_: int) -> np.ndarray:
        mine = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
        mine.set_progress_bar_config(disable=True)
        mine.scheduler = copy.deepcopy(pipe.scheduler)
        mine.tokenizer = copy.deepcopy(pipe.tokenizer)
        made = generate(plug(mine, tiny), **call)
        del mine  # with the hooks, if no other thread needs them
        return made

    plugged_class.cache_clear()
    with ThreadPoolExecutor(8) as pool:
        for image in pool.map(one, range(40)):
            np.testing.assert_allclose(image, expected, atol=1e-5)


def test_what_encodes_a_prompt_in_a_callback_changes_nothing(
    pipe: StableDiffusionPipeline, tiny: Guide
) -> None:
    plug(pipe, tiny)
    expected = generate(pipe, negative_prompt="a dog")

    def count(running: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        running.encode_prompt("a cow", "cpu", 1, True, "blue")
        running.unet(torch.zeros(1, 4, 4, 4), 5, torch.zeros(1, 16, 32))
        return given

    made = generate(pipe, negative_prompt="a dog", callback_on_step_end=count)
    assert np.array_equal(made, expected)


def handed_over(
    pipe: Any, predict: Callable[..., torch.Tensor], *, after: int = 2, **options: Any
) -> torch.Tensor:
    """The latents of a run of four steps whose last ones are taken here, by `predict`."""
    kept: list[torch.Tensor] = []

    def keep(running: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        kept.append(given["latents"])
        return given

    generate(pipe, callback_on_step_end=keep, **options)
    pipe.scheduler.set_timesteps(4)
    latents = kept[after - 1]
    with torch.no_grad():
        for t in pipe.scheduler.timesteps[after:]:
            latents = pipe.scheduler.step(predict(latents, t), t, latents).prev_sample
    return latents


@pytest.mark.parametrize("how", ["both", "positive", "in place"])
def test_a_callback_switches_prompts_as_in_the_stock_pipeline(
    pipe: StableDiffusionPipeline, tiny: Guide, how: str
) -> None:
    """Compared with a run that is handed over: two calls, each with its own prompt."""
    plug(pipe, tiny)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    new, negative = pipe.encode_prompt("a cow", "cpu", 1, True, "a dog")

    def switch(running: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            if how == "both":
                given["prompt_embeds"] = torch.cat([negative, new])
            elif how == "positive":
                given["prompt_embeds"] = new
            else:
                given["prompt_embeds"].chunk(2)[1].copy_(new)
        return given

    made = generate(
        pipe, negative_prompt="a dog", output_type="latent", callback_on_step_end=switch,
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
    )  # fmt: skip
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    denoiser = GuidedDenoiser(pipe.unet, tiny, schedule)
    conditions = Conditions.at_scale(4.0, c_BLD=new, n_BLD=negative)
    latents = handed_over(
        pipe, lambda z, t: denoiser(z, t[None], conditions), negative_prompt="a dog"
    )
    np.testing.assert_allclose(made, latents.numpy(), atol=1e-5)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("exact_steps", [0, 1])
def test_prompts_written_in_place_are_those_given_anew_also_where_tensors_count_no_writes(
    pipe: StableDiffusionPipeline, tiny: Guide, exact_steps: int, context: Any
) -> None:
    plug(pipe, tiny, exact_steps=exact_steps)

    def switching(in_place: bool) -> np.ndarray:
        def switch(running: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
            if step != 1:
                return given
            if in_place:
                given["prompt_embeds"].copy_(both)
                return {}
            return {"prompt_embeds": both}

        asked = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
        return generate(pipe, callback_on_step_end=switch, output_type="latent", **asked)

    with context():
        c, n = pipe.encode_prompt("a cow", "cpu", 1, True, "red")
        both = torch.cat([n, c])
        np.testing.assert_allclose(switching(in_place=True), switching(in_place=False), atol=1e-5)


def test_what_a_callback_writes_into_the_negative_prompt_alone_has_no_effect_as_in_stock(
    pipe: StableDiffusionPipeline, xl_pipe: StableDiffusionXLPipeline, tiny: Guide
) -> None:
    names = ["negative_prompt_embeds", "negative_pooled_prompt_embeds"]

    def write(running: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        for name in names:
            if name in given:
                given[name].mul_(-3)
        return given

    size = {"height": 32, "width": 32}
    xl_guide = roused(Guide.from_unet(xl_pipe.unet, GuideConfig(max_parameters_ratio=0.2)))
    for each, own in ((pipe, tiny), (xl_pipe, xl_guide)):
        known = [name for name in names if name in each._callback_tensor_inputs]
        asked = {"callback_on_step_end": write, "callback_on_step_end_tensor_inputs": known}
        assert np.array_equal(generate(each, **size, **asked), generate(each, **size))
        plug(each, own)
        assert np.array_equal(generate(each, **size, **asked), generate(each, **size))


@pytest.mark.parametrize("after", [1, 2])
def test_a_callback_may_drop_samples_after_an_exact_step_and_after_a_guided_one(
    pipe: StableDiffusionPipeline, tiny: Guide, after: int
) -> None:
    """Compared with a run that is handed over to our own denoiser."""
    plug(pipe, tiny, exact_steps=1)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    prompts = {"prompt": ["a cat", "a cow"], "negative_prompt": ["a dog", "red"]}

    def drop(running: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step != after - 1:
            return given
        return {"latents": given["latents"][1:], "prompt_embeds": given["prompt_embeds"][[1, 3]]}

    asked = {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    made = generate(pipe, **prompts, **asked, output_type="latent", callback_on_step_end=drop)
    c, n = pipe.encode_prompt(prompts["prompt"], "cpu", 1, True, prompts["negative_prompt"])
    denoiser = GuidedDenoiser(pipe.unet, tiny, NoiseSchedule.from_scheduler(pipe.scheduler))
    conditions = Conditions.at_scale(4.0, c_BLD=c, n_BLD=n)
    latents = handed_over(
        pipe, lambda z, t: denoiser(z, t.expand(2), conditions), after=after, **prompts
    )
    np.testing.assert_allclose(made, latents[1:].numpy(), atol=1e-4)


def test_diffusers_own_callback_that_cuts_cfg_off_midway_works(
    pipe: StableDiffusionPipeline, tiny: Guide
) -> None:
    plug(pipe, tiny)
    cut = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    made = generate(pipe, output_type="latent", callback_on_step_end=cut)
    text = encode_prompts(pipe, ["a cat"]).states_NLD
    latents = handed_over(pipe, lambda z, t: pipe.unet(z, t, text).sample)
    np.testing.assert_allclose(made, latents.numpy(), atol=1e-5)


def test_another_unet_in_the_middle_of_a_call_is_told_where_a_guide_acts(
    pipe: StableDiffusionPipeline, tiny: Guide
) -> None:
    own = pipe.unet
    other = copy.deepcopy(own)

    def switch(running: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        running.unet = other
        return given

    plug(pipe, tiny)
    with pytest.raises(ValueError, match="another UNet in the middle of a call"):
        generate(pipe, callback_on_step_end=switch)
    pipe.unet = own
    generate(pipe, guidance_scale=1.0, callback_on_step_end=switch)


def test_a_pipeline_that_is_not_plugged_is_told_so_whatever_its_prompt(
    pipe: StableDiffusionPipeline, tiny: Guide
) -> None:
    plug(pipe, tiny)
    stock = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)

    def inside(running: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        with pytest.raises(ValueError, match=r"Call plug\(pipe, guide\) on this pipeline too"):
            generate(stock)
        return given

    generate(pipe, callback_on_step_end=inside)
    for options in ({}, {"guidance_scale": 1.0}, {"negative_prompt": "a dog"}):
        with pytest.raises(ValueError, match="has not been plugged"):
            generate(stock, **options)
    assert pipe.unet(torch.zeros(1, 4, 4, 4), 5, torch.zeros(1, 16, 32)) is not None  # no pipeline


def test_the_stock_classs_call_on_a_plugged_pipeline_is_told_that_no_guide_would_act(
    pipe: StableDiffusionPipeline, tiny: Guide
) -> None:
    call: dict[str, Any] = {"guidance_scale": 4.0, "num_inference_steps": 2}
    expected = generate(pipe, **call)
    plug(pipe, tiny)
    with pytest.raises(ValueError, match=r"^StableDiffusionPipeline.__call__ .* past its guide"):
        StableDiffusionPipeline.__call__(pipe, "a cat", **call)
    StableDiffusionPipeline.__call__(pipe, "a cat", **{**call, "guidance_scale": 1.0})
    unplug(pipe)
    again = generate(pipe, **call)
    assert np.array_equal(again, expected)


def test_a_deleted_pipeline_is_freed_without_the_cycle_collector(
    pipe: StableDiffusionPipeline, tiny: Guide
) -> None:
    mine = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    mine.set_progress_bar_config(disable=True)
    mine.scheduler = copy.deepcopy(pipe.scheduler)
    unet = pipe.unet
    gc.collect()
    gc.disable()
    try:
        plug(mine, tiny)

        def look(running: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
            running.unet(torch.zeros(1, 4, 4, 4), 5, torch.zeros(1, 16, 32))
            return given

        generate(mine, callback_on_step_end=look)
        gone = weakref.ref(mine)
        del mine
        assert gone() is None
    finally:
        gc.enable()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())


def test_a_pickled_pipeline_is_as_plugged_as_before(
    pipe: StableDiffusionPipeline, tiny: Guide
) -> None:
    stock = generate(pipe)
    plug(pipe, tiny, strength=0.7)
    twin = pickle.loads(pickle.dumps(pipe))
    # not bit for bit, here and below: copied weights may be aligned otherwise
    np.testing.assert_allclose(generate(twin), generate(pipe), atol=1e-5)
    unplug(twin)
    assert type(twin) is StableDiffusionPipeline
    np.testing.assert_allclose(generate(twin), stock, atol=1e-5)


def test_a_plugged_unet_can_be_pickled_alone(pipe: StableDiffusionPipeline, tiny: Guide) -> None:
    given = torch.zeros(1, 4, 4, 4), 5, torch.zeros(1, 16, 32)
    expected = pipe.unet(*given).sample
    plug(pipe, tiny)
    twin = pickle.loads(pickle.dumps(pipe.unet))
    torch.testing.assert_close(twin(*given).sample, expected, atol=1e-5, rtol=0)


def test_a_preview_of_fewer_steps_in_a_callback_may_share_the_scheduler(
    pipe: StableDiffusionPipeline, tiny: Guide
) -> None:
    stock = copy.deepcopy(pipe)
    plug(pipe, tiny, strength=0.0)

    def preview(running: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            generate(copy.copy(running), num_inference_steps=2)
        return given

    unguided = generate(stock, guidance_scale=1.0, callback_on_step_end=preview)
    found = generate(pipe, callback_on_step_end=preview)
    np.testing.assert_allclose(found, unguided, atol=1e-5)


@pytest.mark.parametrize("strength", [-0.1, float("nan"), float("inf"), 1e39])
def test_a_strength_that_can_t_be_is_refused(
    pipe: StableDiffusionPipeline, tiny: Guide, strength: float
) -> None:
    with pytest.raises(ValueError, match="from 0 to"):
        plug(pipe, tiny, strength=strength)


def test_a_path_is_no_guide(pipe: StableDiffusionPipeline) -> None:
    given: Any = "zoo/guide"
    with pytest.raises(TypeError, match="GuideBundle.load"):
        plug(pipe, given)


def test_unplugging_in_a_callback_is_refused(pipe: StableDiffusionPipeline, tiny: Guide) -> None:
    plug(pipe, tiny)
    expected = generate(pipe)

    def callback(running: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        with pytest.raises(ValueError, match="in the middle of a call"):
            unplug(running)
        return given

    assert np.array_equal(generate(pipe, callback_on_step_end=callback), expected)
    unplug(pipe)


def test_unplugging_in_another_thread_is_refused_while_a_call_is_under_way(
    pipe: StableDiffusionPipeline, tiny: Guide
) -> None:
    plug(pipe, tiny)
    expected = generate(pipe)

    def callback(running: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        with (
            ThreadPoolExecutor(1) as other,
            pytest.raises(ValueError, match="in the middle of a call"),
        ):
            other.submit(unplug, running).result()
        unplug(copy.copy(running))  # another pipeline, of which no call is under way
        return given

    assert np.array_equal(generate(pipe, callback_on_step_end=callback), expected)
    with pytest.raises(ZeroDivisionError):
        generate(pipe, callback_on_step_end=lambda *_: 1 / 0)  # a call that failed is over
    unplug(pipe)


def test_plugging_in_the_middle_of_a_call_ends_it_with_an_error(
    pipe: StableDiffusionPipeline, tiny: Guide
) -> None:
    def callback(running: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        plug(running, tiny)
        return given

    with pytest.raises(ValueError, match="before the guide was plugged in"):
        generate(pipe, guidance_scale=4.0, callback_on_step_end=callback)
    generate(pipe, guidance_scale=4.0)


@pytest.mark.parametrize("through", ["in place", "data", "a new parameter", "dtype"])
def test_a_guide_stays_where_it_is_and_has_one_copy_on_each_other_device(
    tiny: Guide, through: str
) -> None:
    cpu, meta = torch.device("cpu"), torch.device("meta")
    assert on_device(tiny, cpu) is tiny
    twin = on_device(tiny, meta)
    assert {p.device for p in twin.parameters()} == {meta}
    assert {p.device for p in tiny.parameters()} == {cpu}
    assert on_device(tiny, meta) is twin
    weight = next(tiny.parameters())
    with torch.no_grad():
        if through == "in place":
            weight.mul_(2)
        elif through == "data":  # as averaged weights are written
            weight.data.copy_(weight.data * 2)
        elif through == "a new parameter":
            name = next(name for name, _ in tiny.named_parameters())
            tiny.load_state_dict({**tiny.state_dict(), name: weight * 2}, assign=True)
        else:
            tiny.half()
    anew = on_device(tiny, meta)
    assert anew is not twin and next(anew.parameters()).dtype == next(tiny.parameters()).dtype
    assert on_device(tiny, meta) is anew
