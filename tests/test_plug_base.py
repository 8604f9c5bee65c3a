"""Nothing of the base's is touched, and what is replaced after plugging is looked at."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNetMotionModel,
)

from pnp_core.guide import Guide
from pnp_core.plug import plug, unplug
from tests.conftest import changed, same_weights
from tests.plugged import generate


def test_a_plugged_unet_looks_as_the_stock_one_to_whoever_reads_it(
    pipe: StableDiffusionPipeline, tiny: Guide, tmp_path: Path
) -> None:
    pipe.unet.config.encoder_hid_dim_type = "kept as an attribute"
    config, items = pipe.unet.config, dict(pipe.unet.config)
    plug(pipe, tiny)
    generate(pipe)
    assert pipe.unet.config is config and dict(config) == items
    assert config.encoder_hid_dim_type == "kept as an attribute"
    assert config.time_cond_proj_dim is None
    twin = UNet2DConditionModel.from_config(pipe.unet.config)
    twin.load_state_dict(pipe.unet.state_dict())
    pipe.unet.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["time_cond_proj_dim"] is None and "encoder_hid_dim_type" in saved
    assert type(pipe.unet) is UNet2DConditionModel and "save_config" not in vars(pipe.unet)


def test_a_motion_model_made_of_a_plugged_unet_is_that_of_the_stock_one(
    pipe: StableDiffusionPipeline, tiny: Guide
) -> None:
    def hooks(model: torch.nn.Module) -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    torch.manual_seed(0)
    expected = UNetMotionModel.from_unet2d(pipe.unet)
    plug(pipe, tiny)
    torch.manual_seed(0)
    made = UNetMotionModel.from_unet2d(pipe.unet)
    assert same_weights(made, expected) and hooks(made) == 0


@pytest.mark.parametrize("first", ["wrapper", "plug"])
def test_a_users_own_wrapper_of_a_method_is_called_and_stays(
    pipe: StableDiffusionPipeline, tiny: Guide, first: str
) -> None:
    plug(pipe, tiny)
    expected = generate(pipe, negative_prompt="a dog")
    unplug(pipe)
    seen = []

    def wrap() -> None:
        inner = pipe.encode_prompt

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            seen.append(args)
            return inner(*args, **kwargs)

        pipe.encode_prompt = wrapper

    for what in ("wrapper", "plug") if first == "wrapper" else ("plug", "wrapper"):
        if what == "wrapper":
            wrap()
        else:
            plug(pipe, tiny)
    wrapper = vars(pipe)["encode_prompt"]
    assert np.array_equal(generate(pipe, negative_prompt="a dog"), expected) and seen
    unplug(pipe)
    assert pipe.encode_prompt is wrapper and vars(pipe)["encode_prompt"] is wrapper


def test_a_unet_that_is_replaced_is_served_if_the_guide_fits_it(
    pipe: StableDiffusionPipeline, tiny: Guide
) -> None:
    first, other = pipe.unet, changed(pipe.unet)
    plug(pipe, tiny)
    generate(pipe)
    pipe.unet = other
    made = generate(pipe)
    assert not any(m._forward_hooks for m in first.modules())
    unplug(pipe)
    plug(pipe, tiny)
    assert np.array_equal(generate(pipe), made)
    pipe.unet = UNet2DConditionModel.from_config({**other.config, "block_out_channels": (64, 64)})
    with pytest.raises(ValueError, match="This guide was made for a UNet with channels"):
        generate(pipe)


def test_a_unet_stays_guided_where_another_shares_its_blocks_and_is_unplugged(
    pipe: StableDiffusionPipeline, tiny: Guide
) -> None:
    other = copy.deepcopy(pipe)
    other.unet.up_blocks = pipe.unet.up_blocks
    plug(pipe, tiny)
    expected = generate(pipe)
    plug(other, tiny)
    assert np.array_equal(generate(other), expected)
    unplug(other)
    assert np.array_equal(generate(pipe), expected)


def test_a_scheduler_of_another_prediction_type_is_refused_when_called(
    pipe: StableDiffusionPipeline, tiny: Guide
) -> None:
    plug(pipe, tiny)
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, prediction_type="v_prediction"
    )
    with pytest.raises(ValueError, match="scheduler has 'v_prediction'"):
        generate(pipe)
