"""Exact CFG steps in a guided run, in stock pipelines of several kinds."""

import functools
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    HeunDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
)
from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

from pnp_core.guide import Guide
from pnp_core.plug import plug, unplug
from tests.cases import few_of
from tests.pipeline_zoo import CASES, PHOTO, SIZE, Parts
from tests.pipelines.test_addons import ip_adapter
from tests.pipelines.test_classes import call_of, made
from tests.reference import CALL, Reference, guide_for, rows_run, run, stand_in

# Of each way to have a batch, to begin late, and to be told more than a prompt.
NAMES = [
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionAdapterPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionUpscalePipeline",
    "StableDiffusionGLIGENPipeline",
    "StableDiffusionInpaintPipelineLegacy",
]
QUICK = ("StableDiffusionImg2ImgPipeline", "StableDiffusionXLPipeline")
LATE = {"StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipelineLegacy"}
ENDED = [
    "StableDiffusionInpaintPipeline",
    "StableDiffusionXLControlNetPipeline",
    "StableDiffusionPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionControlNetInpaintPipeline",
    "StableDiffusionDepth2ImgPipeline",
]
NUM_STEPS = 4
EXACT = (0, 2)


class PartlyExact(Reference):
    """Passes the doubled batch on at the exact steps; gives no guidance from some step on."""

    def __init__(
        self,
        unet: Any,
        guide: Guide,
        scheduler: SchedulerMixin,
        exact: Any,
        end: int = NUM_STEPS,
    ) -> None:
        super().__init__(unet, guide, 1, scheduler)
        self.end = end
        self.exact, self.number = exact, -1

    def forward(self, *args: Any, **more: Any) -> Any:
        self.number += 1
        if self.number not in self.exact and self.number < self.end:
            return super().forward(*args, **more)
        output = self.unet(*args, **more)
        if self.number < self.end:
            return output
        c = output[0].chunk(2)[1]
        return (torch.cat([c, c]),)


def asked(pipe: Any, name: str) -> dict[str, Any]:
    call = {**call_of(pipe, CASES[name]), "num_inference_steps": NUM_STEPS}
    return call | ({"num_inference_steps": 2 * NUM_STEPS, "strength": 0.5} if name in LATE else {})


@pytest.mark.parametrize("name", few_of(NAMES, *QUICK))
def test_exact_steps_are_cfgs_and_the_others_the_guides(name: str, parts: Parts) -> None:
    pipe = made(name, parts)
    unet, guide, call = pipe.unet, guide_for(pipe.unet), asked(pipe, name)
    stand_in(pipe, PartlyExact(unet, guide, pipe.scheduler, EXACT))
    expected = run(pipe, call)
    stand_in(pipe, unet)
    plug(pipe, guide, exact_steps=2)
    rows = rows_run(unet)
    np.testing.assert_allclose(run(pipe, call), expected, atol=1e-3)
    assert rows == [2, 1, 2, 1]
    unplug(pipe)
    plug(pipe, guide)
    assert not np.allclose(run(pipe, call), expected, atol=1e-2)


@pytest.mark.parametrize("name", few_of(NAMES, *QUICK))
def test_as_many_exact_steps_as_steps_are_the_stock_pipeline_with_cfg(
    name: str, parts: Parts
) -> None:
    pipe = made(name, parts)
    call = asked(pipe, name)
    if "XL" in name:
        call["negative_original_size"] = (16, 16)
    stock = run(pipe, call)
    plug(pipe, guide_for(pipe.unet), exact_steps=9)
    assert np.array_equal(run(pipe, call), stock)


@pytest.mark.parametrize("scheduler", [HeunDiscreteScheduler, PNDMScheduler])
def test_a_run_that_begins_at_the_second_of_two_equal_timesteps_has_its_forwards_counted(
    scheduler: Any, parts: Parts
) -> None:
    name = "StableDiffusionInpaintPipelineLegacy"  # does not note how many timesteps it takes
    pipe = made(name, parts)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    call = asked(pipe, name) | {"num_inference_steps": 6, "strength": 0.7}
    rows = rows_run(pipe.unet)
    stock, num_forwards = run(pipe, call), len(rows)
    plug(pipe, guide_for(pipe.unet), exact_steps=num_forwards)
    assert np.array_equal(run(pipe, call), stock)
    unplug(pipe)
    plug(pipe, guide_for(pipe.unet), exact_steps=num_forwards - 1)
    rows.clear()
    run(pipe, call)
    assert sorted(rows) == [1] + [2] * (num_forwards - 1)


@pytest.mark.parametrize(
    "name", ["StableDiffusionPanoramaPipeline", "StableDiffusionParadigmsPipeline"]
)
def test_what_does_not_run_one_step_a_forward_is_refused(name: str, parts: Parts) -> None:
    pipe = made(name, parts)
    cls, guide = type(pipe), guide_for(pipe.unet)
    with pytest.raises(ValueError, match=f"{name} can't have exact steps.*exact_steps=0"):
        plug(pipe, guide, exact_steps=1)
    assert type(pipe) is cls
    plug(pipe, guide)


def test_guess_mode_keeps_its_meaning_in_exact_steps(parts: Parts) -> None:
    """There the forward under the negative prompt has none of the ControlNet's residuals."""
    name = "StableDiffusionControlNetPipeline"
    pipe = made(name, parts)
    call = asked(pipe, name) | {"guess_mode": True}
    stock = run(pipe, call)
    plug(pipe, guide_for(pipe.unet), exact_steps=NUM_STEPS)
    assert np.array_equal(run(pipe, call), stock)


@pytest.mark.parametrize("end", [1, 2])
@pytest.mark.parametrize("name", few_of(ENDED, *ENDED[:2]))
def test_guidance_that_a_callback_ends_by_the_scale_alone_is_ended(
    name: str, end: int, parts: Parts
) -> None:
    """What stock pipelines can't do where a mask or an image is doubled besides the prompts."""
    pipe = made(name, parts)
    unet, guide, call = pipe.unet, guide_for(pipe.unet), asked(pipe, name)
    stand_in(pipe, PartlyExact(unet, guide, pipe.scheduler, EXACT, end))
    expected = run(pipe, call)
    stand_in(pipe, unet)

    def stop(running: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == end - 1:
            running._guidance_scale = 0.5
        return given

    plug(pipe, guide, exact_steps=2)
    rows = rows_run(unet)
    made_now = run(pipe, {**call, "callback_on_step_end": stop})
    np.testing.assert_allclose(made_now, expected, atol=1e-3)
    assert rows == [2, 1, 1, 1]


@torch.no_grad()
@pytest.mark.parametrize("part", ["mid_block", "mid_block.attentions.0.transformer_blocks.0.attn2"])
def test_a_part_that_may_keep_features_from_step_to_step_is_refused(
    part: str, parts: Parts
) -> None:
    pipe = made("StableDiffusionPipeline", parts)
    plug(pipe, guide_for(pipe.unet), exact_steps=1)
    call = asked(pipe, "StableDiffusionPipeline")
    module = pipe.unet.get_submodule(part)
    module.forward = module.forward
    with pytest.raises(ValueError, match=r"as DeepCache and T-GATE do.*exact_steps=0"):
        run(pipe, call)


@torch.no_grad()
@pytest.mark.parametrize("form", ["module", "forward"])
def test_compiled_blocks_serve_with_exact_steps_as_eager_ones_do(form: str, parts: Parts) -> None:
    pipe = made("StableDiffusionPipeline", parts)
    call, guide = asked(pipe, "StableDiffusionPipeline"), guide_for(pipe.unet)
    plug(pipe, guide, exact_steps=2)
    expected = run(pipe, call)
    unplug(pipe)
    block = pipe.unet.up_blocks[0]
    if form == "module":
        pipe.unet.up_blocks[0] = torch.compile(block, backend="eager")
    else:
        block.forward = torch.compile(block.forward, backend="eager")
    plug(pipe, guide, exact_steps=2)
    np.testing.assert_allclose(run(pipe, call), expected, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("how", ["before", "since", "since, by wraps"])
def test_a_forward_that_was_replaced_before_it_was_compiled_or_since_is_refused(
    how: str, parts: Parts
) -> None:
    pipe = made("StableDiffusionPipeline", parts)
    block = pipe.unet.mid_block
    if how == "since":
        block = pipe.unet.mid_block = torch.compile(block, backend="eager")
    elif how == "since, by wraps":
        block.forward = torch.compile(block.forward, backend="eager")
    own = block.forward
    block.forward = lambda *args, **more: own(*args, **more)
    if how == "before":
        block.forward = torch.compile(block.forward, backend="eager")
    elif how == "since, by wraps":
        block.forward = functools.wraps(own)(block.forward)
    plug(pipe, guide_for(pipe.unet), exact_steps=1)
    with pytest.raises(ValueError, match=r"as DeepCache and T-GATE do.*exact_steps=0"):
        run(pipe, asked(pipe, "StableDiffusionPipeline"))


@torch.no_grad()
def test_attentions_that_keep_what_they_gave_are_refused_with_exact_steps_alone(
    parts: Parts,
) -> None:
    pipe = made("StableDiffusionPipeline", parts)
    call = {**asked(pipe, "StableDiffusionPipeline"), "num_inference_steps": 6}
    config = PyramidAttentionBroadcastConfig(
        cross_attention_block_skip_range=2,
        cross_attention_timestep_skip_range=(100, 800),
        current_timestep_callback=lambda: 500,
    )
    apply_pyramid_attention_broadcast(pipe.unet, config)
    plug(pipe, guide_for(pipe.unet))
    run(pipe, call)
    unplug(pipe)
    plug(pipe, guide_for(pipe.unet), exact_steps=2)
    with pytest.raises(ValueError, match=r"PyramidAttentionBroadcastHook keeps .*exact_steps=0"):
        run(pipe, call)


@pytest.mark.parametrize(
    "name",
    [
        "StableDiffusionXLPipeline",
        "StableDiffusionXLInpaintPipeline",
        "StableDiffusionXLControlNetPipeline",
        "StableDiffusionXLControlNetInpaintPipeline",
        "StableDiffusionXLControlNetUnionPipeline",
        "StableDiffusionXLAdapterPipeline",
    ],
)
def test_a_run_that_ends_early_has_its_exact_steps_among_those_it_takes(
    name: str, parts: Parts
) -> None:
    pipe = made(name, parts)
    call = asked(pipe, name) | {"num_inference_steps": 2 * NUM_STEPS, "denoising_end": 0.5}
    plug(pipe, guide_for(pipe.unet), exact_steps=2)
    rows = rows_run(pipe.unet)
    run(pipe, call)
    assert rows == [2, 1, 2, 1]


def test_the_masks_of_two_ip_adapters_are_none_of_a_doubled_batch(
    pipe: StableDiffusionPipeline, guide: Guide
) -> None:
    pipe.load_ip_adapter([ip_adapter(pipe.unet)] * 2, subfolder="", weight_name=["", ""])
    masks = torch.zeros(2, 1, SIZE, SIZE)
    masks[0, ..., : SIZE // 2] = masks[1, ..., SIZE // 2 :] = 1
    images = {"ip_adapter_image": [PHOTO, PHOTO.rotate(90)]}
    call = {**CALL, **images, "cross_attention_kwargs": {"ip_adapter_masks": masks}}
    unet = pipe.unet
    stand_in(pipe, PartlyExact(unet, guide, pipe.scheduler, (0,)))
    as_list = {"ip_adapter_masks": [mask[None] for mask in masks]}
    expected = run(pipe, {**call, "cross_attention_kwargs": as_list})
    stand_in(pipe, unet)
    plug(pipe, guide, exact_steps=1)
    np.testing.assert_allclose(run(pipe, call), expected, atol=1e-3)
