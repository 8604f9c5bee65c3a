"""The benchmarks measure what they say."""

import math
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import nn

from benchmarks import cache_cost, plan, train_cost
from benchmarks.cost import ARCHITECTURES
from components.environment import quiet
from components.params import load_params
from pnp_core.cache import Example
from pnp_core.guide import GuideConfig
from pnp_core.schedule import NoiseSchedule
from tests import toy

quiet()
BASE = Path(__file__).parent.parent / "zoo/models/base"
DOCUMENT = Path(__file__).parent.parent / "docs/own-models.md"


def forward_flops_by_layer(unet: UNet2DConditionModel, length: int) -> dict[str, int]:
    """FLOPs of one forward of one sample by the name of the layer, from the layers' shapes."""
    flops: dict[str, int] = {}

    def count(name: str):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> None:  # type: ignore[type-arg]
            if isinstance(module, nn.Conv2d):
                flops[name] = 2 * output.numel() * math.prod(module.weight.shape[1:])
            elif isinstance(module, nn.Linear):
                flops[name] = 2 * output.numel() * module.in_features
            else:  # every query against every key, and the values likewise
                context = kwargs.get("encoder_hidden_states")
                context = args[0] if context is None else context
                flops[name] = 4 * args[0].numel() * context.shape[1]

        return hook

    for name, module in unet.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear | Attention):
            module.register_forward_hook(count(name), with_kwargs=True)
    size = unet.config.sample_size
    z = torch.empty(1, unet.config.in_channels, size, size, device="meta")
    text = torch.empty(1, length, unet.config.cross_attention_dim, device="meta")
    unet(z, torch.empty(1, device="meta"), text)
    return flops


def test_the_ratio_of_training_flops_is_that_of_a_count_by_layer(
    pipe: StableDiffusionPipeline,
) -> None:
    config = UNet2DConditionModel.load_config(BASE / "unet")
    with torch.device("meta"):
        unet, counted = (UNet2DConditionModel.from_config(config) for _ in range(2))
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    ratio = train_cost.flops_ratio(unet, schedule, GuideConfig(), length=24)
    layers = forward_flops_by_layer(counted, 24)
    forward = sum(layers.values())
    # A frozen layer costs as much again for the gradient of its input; attention twice as much.
    backward = {
        name: flops * (2 if name.endswith(("attn1", "attn2")) else 1)
        for name, flops in layers.items()
    }
    first = "down_blocks.0.attentions.0"  # what comes before it reads the text needs no gradient
    block = f"{first}.transformer_blocks.0"
    without = ("conv_in", "time_embedding", "down_blocks.0.resnets.0", f"{first}.proj_in")
    without += (f"{block}.attn1", f"{block}.attn2.to_q")
    ours = sum(v for k, v in backward.items() if not k.startswith(without))
    naive = 2 * forward + forward + sum(backward.values())
    assert ratio == pytest.approx((forward + ours) / naive, rel=0.03)  # the rest is the guide
    assert ratio < 0.5


def test_the_training_benchmark_measures_every_ratio(
    pipe: StableDiffusionPipeline,
    examples: list[Example],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "DEFAULT_REGION", "ENDPOINT_URL"):
        monkeypatch.setenv(f"AWS_{name}", "changed by the benchmark")
    values = toy.toy_params()
    values["cache"]["batch_size"] = 8
    toy.write_params(tmp_path, values)
    params = load_params(tmp_path / "params.yaml")
    result = train_cost.measure(pipe, examples, params, num_pairs=64, num_images=12, rounds=1)
    assert result.keys() == {
        "train_flops_ratio",
        "train_time_ratio",
        "cache_efficiency",
        "cache_efficiency_all",
        "s3_efficiency",
    }
    assert all(0 < value < 10 for value in result.values())
    assert result["cache_efficiency_all"] < result["cache_efficiency"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_documented_cost_of_a_cache_is_what_the_command_prints(name: str) -> None:
    assert cache_cost.row(name, tflops=100) in DOCUMENT.read_text()


def test_a_pair_is_three_latents_in_half_precision_and_three_numbers() -> None:
    assert cache_cost.architecture_bytes("sd15").pair == 3 * 64 * 64 * 4 * 2 + 3 * 8
    assert cache_cost.architecture_bytes("sdxl").pair == 3 * 128 * 128 * 4 * 2 + 3 * 8
    assert cache_cost.architecture_bytes("sdxl").prompt == (77 * 2048 + 1280) * 2


@pytest.mark.parametrize("name", plan.NAMES)
def test_a_preset_is_valid_and_its_plan_follows_from_its_numbers(name: str) -> None:
    params = load_params(plan.PRESETS / f"{name}.yaml")
    one = plan.plan(name, params, gpus=1, tflops=100)
    assert one["hours"] == one["cache_hours"] + one["distill_hours"] + one["halve_hours"]
    pairs = params.cache.num_forward + params.cache.num_trajectory
    assert one["cache_gb"] == pytest.approx(pairs * cache_cost.architecture_bytes(name).pair / 1e9)
    assert one["params_ratio"] <= params.distill.guide.max_parameters_ratio
    num_base = one["guide_parameters"] / one["params_ratio"]
    assert one["companion_gb"] == pytest.approx(4 * num_base / 1e9)


def test_a_dry_run_takes_a_real_step(monkeypatch: pytest.MonkeyPatch) -> None:
    small = dict(UNet2DConditionModel.load_config(BASE / "unet"))
    monkeypatch.setattr(plan, "unet_config", lambda name: small)
    found = plan.dry_run("sd15", load_params(plan.PRESETS / "sd15.yaml"))
    assert found["peak_memory_gb"] > 0
