"""What a preset will take, counted: memory of a training step, disk of a cache."""

import re
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from benchmarks import plan
from components.params import Params, load_params
from pnp_core import memory
from tests.toy import small_unet


def small_params(**distill: Any) -> Params:
    """The preset of Stable Diffusion 1.5 with other settings of `distill`, for a small UNet."""
    params = load_params(plan.PRESETS / "sd15.yaml")
    guide = params.distill.guide.model_copy(update={"max_parameters_ratio": 0.2})
    section = params.distill.model_copy(update={"guide": guide, **distill})
    return params.model_copy(update={"distill": section})


@pytest.fixture
def for_a_small_unet(monkeypatch: pytest.MonkeyPatch) -> None:
    small = dict(small_unet(UNet2DConditionModel).config)
    monkeypatch.setattr(plan, "unet_config", lambda name: small)


@pytest.mark.services
@pytest.mark.usefixtures("for_a_small_unet")
def test_a_gpu_that_a_preset_does_not_fit_is_refused_with_a_micro_batch_that_does() -> None:
    params = small_params(micro_batch_size=512)
    peak = plan.plan("sd15", params, gpus=1, tflops=100)["peak_gb"]
    memory_gb = memory.RESERVED_GB + peak / 2
    with pytest.raises(ValueError, match=r"micro_batch_size (\d+) with gradient_") as refused:
        plan.plan("sd15", params, gpus=1, tflops=100, memory=memory_gb)
    found = re.findall(
        r"micro_batch_size (\d+) with gradient_checkpointing (\w+)", str(refused.value)
    )
    for rows, checkpoints in found:
        step = plan.step_of(plan.unet_config("sd15"), params, "meta")
        peaks = [step.peak_gb(int(rows) + n, checkpoints=checkpoints == "true") for n in (0, 2)]
        assert peaks[0] <= memory_gb - memory.RESERVED_GB
        assert peaks[1] > memory_gb - memory.RESERVED_GB or rows == "512"


@pytest.mark.usefixtures("for_a_small_unet")
def test_a_way_in_which_not_one_sample_fits_is_not_proposed() -> None:
    step = plan.step_of(plan.unet_config("sd15"), small_params(), "meta")
    plainly, checkpointed = (step.peak_gb(1, checkpoints=c) for c in (False, True))
    between = memory.RESERVED_GB + (plainly + checkpointed) / 2
    assert memory.fitting(step, between, checkpoints=False) == 0
    assert memory.fitting(step, between, checkpoints=True) >= 1
    with pytest.raises(ValueError, match="Not even one sample fits"):
        memory.check_fits("It", step, plainly, memory.RESERVED_GB + checkpointed / 2)


def test_alive_tensors_are_added_up_and_forgotten() -> None:
    with memory.Alive() as alive:
        a = torch.empty(1000, device="meta")
        b = a[:10].expand(5, 10)  # no memory of its own
        c = torch.empty(500, device="meta", dtype=torch.bfloat16)
        del a, b
        d = torch.empty(100, device="meta")
    assert (alive.peak, alive.now) == (4 * 1000 + 2 * 500, 2 * 500 + 4 * 100)
    del c, d
    assert alive.now == 0


def test_what_is_counted_on_meta_tensors_is_what_real_ones_take() -> None:
    def step(device: str) -> None:
        with torch.device(device):
            x = torch.randn(16, 32)
            net = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8))
        net(x).square().sum().backward()

    with memory.Alive() as real:
        step("cpu")
    assert memory.count(lambda: step("meta"), mixed=False).peak == real.peak > 0


@pytest.mark.services
@pytest.mark.usefixtures("for_a_small_unet")
def test_checkpoints_take_less_and_more_samples_more() -> None:
    step = plan.step_of(plan.unet_config("sd15"), small_params(), "meta")
    plainly, checkpointed = (step.peak_gb(8, checkpoints=c) for c in (False, True))
    assert step.held() / 1e9 < checkpointed < plainly < step.peak_gb(9, checkpoints=False)


def test_the_disk_of_a_cache_and_gradients_in_parts_are_what_is_promised() -> None:
    found = plan.checks()
    assert 0.98 <= found["disk_ratio"] <= 1.02
    assert found["accumulation_error"] <= 1e-5
