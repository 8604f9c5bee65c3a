"""UNets of every kind beneath a plugged pipeline: each works, or is refused in one sentence."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig, get_peft_model
from torch import nn

from pnp_core.conditions import Conditions
from pnp_core.denoiser import GuidedDenoiser
from pnp_core.guide import KINDS, Guide, GuideConfig
from pnp_core.plug import plug
from pnp_core.schedule import NoiseSchedule
from tests.pipeline_zoo import PHOTO, SIZE, Parts
from tests.reference import CALL, SCALE, guide_for, guided, run, with_unet


@pytest.mark.parametrize(
    "changes",
    [
        {"only_cross_attention": True},
        {"mid_block_type": None},
        {"mid_block_type": "UNetMidBlock2D"},
        {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"},
        {"use_linear_projection": True, "transformer_layers_per_block": 2},
        {"resnet_time_scale_shift": "scale_shift", "time_embedding_type": "fourier"},
        {"upcast_attention": True},
        {
            "down_block_types": ("CrossAttnDownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "CrossAttnUpBlock2D"),
        },
        {
            "down_block_types": ("CrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
            "up_block_types": ("ResnetUpsampleBlock2D", "CrossAttnUpBlock2D"),
        },
        {
            "down_block_types": ("CrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"),
            "up_block_types": ("SimpleCrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        },
    ],
    ids=lambda changes: ", ".join(map(str, changes.values())),
)
@pytest.mark.parametrize("kind", KINDS)
def test_unets_of_other_layouts_work(parts: Parts, changes: dict[str, Any], kind: str) -> None:
    torch.manual_seed(0)
    unet = parts.unet(**changes)
    guided(with_unet(parts, unet), guide_for(unet, kind), CALL)


def test_a_refiner_works_and_its_negative_score_is_said_to_have_no_effect(
    parts: Parts, caplog: pytest.LogCaptureFixture
) -> None:
    config = {**parts.xl.unet.config, "projection_class_embeddings_input_dim": 5 * 8 + 24}
    refining = {**parts.xl.components, "unet": UNet2DConditionModel.from_config(config)}
    refiner = StableDiffusionXLImg2ImgPipeline(
        **refining, requires_aesthetics_score=True, add_watermarker=False
    )
    refiner.set_progress_bar_config(disable=True)
    own, call = guide_for(refiner.unet), {**CALL, "image": PHOTO, "strength": 1.0}
    with caplog.at_level(logging.WARNING):
        guided(refiner, own, {**call, "negative_aesthetic_score": 6.0})
        assert "no effect" not in caplog.text
        guided(refiner, own, call)
        assert "negative_aesthetic_score" in caplog.text


def test_an_xl_pipeline_works_with_a_full_guide_too(parts: Parts) -> None:
    xl = StableDiffusionXLPipeline(**parts.xl.components, add_watermarker=False)
    xl.set_progress_bar_config(disable=True)
    guided(xl, guide_for(xl.unet, "full"), {**CALL, "height": SIZE, "width": SIZE})


@pytest.mark.parametrize("kind", ["encoder", "full"])
def test_sizes_that_a_callback_changes_reach_the_guide(parts: Parts, kind: str) -> None:
    xl = StableDiffusionXLPipeline(**parts.xl.components, add_watermarker=False)
    xl.set_progress_bar_config(disable=True)

    def change(running: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        return {"add_time_ids": given["add_time_ids"] + 100}

    asked = {
        "callback_on_step_end": change,
        "callback_on_step_end_tensor_inputs": ["add_time_ids"],
    }
    call = {**CALL, "height": SIZE, "width": SIZE, "num_inference_steps": 3, **asked}
    guided(xl, guide_for(xl.unet, kind), call)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_hid_dim": 32, "encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim_type"),
        ({"addition_embed_type": "text"}, "addition_embed_type 'text'"),
        ({"dual_cross_attention": True}, "plain transformer blocks"),
        ({"cross_attention_dim": (32, 48)}, "one width of text states"),
        (
            {
                "down_block_types": ("KDownBlock2D", "KCrossAttnDownBlock2D"),
                "up_block_types": ("KCrossAttnUpBlock2D", "KUpBlock2D"),
                "mid_block_type": None,
            },
            "plain transformer blocks",
        ),
        ({"time_cond_proj_dim": 8}, "guidance-distilled itself"),
    ],
)
def test_unets_that_no_guide_knows_are_refused(
    parts: Parts, guide: Guide, changes: dict[str, Any], message: str
) -> None:
    unet = parts.unet(**changes)
    pipe = with_unet(parts, unet)
    with pytest.raises(ValueError, match=message):
        plug(pipe, guide)
    assert type(pipe) is StableDiffusionPipeline
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())


def test_a_full_guide_is_not_made_for_a_unet_with_class_labels(parts: Parts) -> None:
    with pytest.raises(ValueError, match="make a tiny one"):
        Guide.from_unet(parts.unet(num_class_embeds=4), GuideConfig(kind="full"))


def wrapped_in_peft(unet: Any) -> Any:
    return get_peft_model(unet, LoraConfig(target_modules=["to_q"]))


def quantised(unet: Any) -> Any:
    return torch.ao.quantization.quantize_dynamic(unet, {nn.Linear}, dtype=torch.qint8)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch is about to move its quantisation
@pytest.mark.parametrize(
    ("wrapper", "message"),
    [
        (wrapped_in_peft, r"within a PeftModel: pipe.unet = pipe.unet.merge_and_unload\(\)"),
        (nn.DataParallel, "within a DataParallel: pipe.unet = pipe.unet.module"),
        (quantised, "quantised"),
    ],
)
def test_a_wrapped_unet_is_refused(
    pipe: StableDiffusionPipeline, guide: Guide, wrapper: Callable[[Any], Any], message: str
) -> None:
    pipe.unet = wrapper(pipe.unet)
    with pytest.raises(ValueError, match=message):
        plug(pipe, guide)
    assert type(pipe) is StableDiffusionPipeline


def test_what_is_refused_of_a_peft_model_works_as_the_sentence_says(
    pipe: StableDiffusionPipeline, guide: Guide
) -> None:
    pipe.unet = wrapped_in_peft(pipe.unet).merge_and_unload()
    guided(pipe, guide, CALL)


def test_a_replica_on_another_device_is_refused(
    pipe: StableDiffusionPipeline, guide: Guide
) -> None:
    plug(pipe, guide)
    replica = pipe.unet._replicate_for_data_parallel()
    with pytest.raises(ValueError, match="DataParallel"):
        replica(torch.zeros(1, 4, 4, 4), 5, torch.zeros(1, 16, 32))


class HandsOn(UNet2DConditionModel):
    """A user's subclass that hands everything on."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def test_a_unets_subclass_that_hands_on_its_arguments_goes_as_its_ancestor(
    pipe: StableDiffusionPipeline, guide: Guide
) -> None:
    expected = guided(pipe, guide, CALL)
    pipe.unet.__class__ = HandsOn
    np.testing.assert_allclose(guided(pipe, guide, CALL), expected, atol=1e-5)


def test_an_encoder_guide_runs_after_hooks_that_came_later(parts: Parts) -> None:
    """As those of ToMe, which note the size of what comes in before the UNet's forward."""
    pipe = with_unet(parts, copy.deepcopy(parts.base.unet))
    guide = guide_for(pipe.unet, "encoder")
    plug(pipe, guide)
    order: list[str] = []
    pipe.unet.register_forward_pre_hook(lambda module, args: order.append("user"))
    pipe.unet.conv_in.register_forward_pre_hook(lambda module, args: order.append("forward"))
    run(pipe, {**CALL, "num_inference_steps": 1})
    assert order == ["user", "forward", "forward"]


def test_layerwise_casting_works(pipe: StableDiffusionPipeline, guide: Guide) -> None:
    pipe.unet.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    )
    guided(pipe, guide, CALL)


def test_group_offload_works(pipe: StableDiffusionPipeline, guide: Guide) -> None:
    pipe.unet.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    guided(pipe, guide, CALL)


def test_training_through_gradient_checkpoints_of_diffusers_is_refused(
    pipe: StableDiffusionPipeline, guide: Guide
) -> None:
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    denoiser = GuidedDenoiser(pipe.unet, guide, schedule)
    c, n = torch.randn(1, 16, 32), torch.randn(1, 16, 32)
    step = torch.randn(1, 4, 4, 4), torch.tensor([5]), Conditions.at_scale(SCALE, c_BLD=c, n_BLD=n)
    pipe.unet.enable_gradient_checkpointing()
    with pytest.raises(ValueError, match=r"unet.disable_gradient_checkpointing\(\)"):
        denoiser(*step)
    with torch.no_grad():
        denoiser(*step)
    pipe.unet.disable_gradient_checkpointing()
    assert denoiser(*step).requires_grad
