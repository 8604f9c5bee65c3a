"""Guidance's own rules, and what is done once a call."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch._dynamo.testing import CompileCounter

from pnp_core.calls import now
from pnp_core.forwards import take_apart
from pnp_core.guide import Guide, GuideConfig
from pnp_core.guide.unet import text_attentions
from pnp_core.inject import Negatives
from pnp_core.plug import plug, unplug
from tests.cases import few_of
from tests.conftest import roused, save_lora
from tests.plugged import generate


def test_rows_whose_prompt_is_their_negative_prompt_come_out_unguided(
    pipe: StableDiffusionPipeline, guide: Guide
) -> None:
    prompts = ["a cat", "a dog", "red"]
    options: dict[str, Any] = {"output_type": "latent"}

    def several(**more: Any) -> np.ndarray:
        generators = [torch.Generator().manual_seed(i) for i in range(3)]
        return generate(pipe, prompts, generator=generators, **options, **more)

    unguided = several(guidance_scale=1.0)
    for num_steps in (None, 4):
        halved = roused(
            Guide.from_unet(
                pipe.unet,
                GuideConfig(kind=guide.config.kind, max_parameters_ratio=0.2),
                num_steps=num_steps,
            )
        )
        plug(pipe, halved)
        made = several(negative_prompt=["a cow", "a dog", "red"])
        unplug(pipe)
        np.testing.assert_allclose(made[1:], unguided[1:], atol=1e-5)
        assert not np.allclose(made[0], unguided[0], atol=1e-3)


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0])
def test_a_guidance_scale_of_at_most_1_is_no_guidance_also_for_a_halved_guide(
    pipe: StableDiffusionPipeline, scale: float
) -> None:
    unguided = generate(pipe, guidance_scale=scale)
    config = GuideConfig(max_parameters_ratio=0.2)
    plug(pipe, roused(Guide.from_unet(pipe.unet, config, num_steps=4)))
    assert np.array_equal(generate(pipe, guidance_scale=scale), unguided)


def test_the_picture_does_not_jump_just_above_1(pipe: StableDiffusionPipeline) -> None:
    config = GuideConfig(max_parameters_ratio=0.2)
    plug(pipe, roused(Guide.from_unet(pipe.unet, config, num_steps=4)))
    at = [generate(pipe, guidance_scale=1 + d, output_type="latent") for d in (0, 1e-3, 1.0)]
    assert np.abs(at[1] - at[0]).max() < 0.02 * np.abs(at[2] - at[0]).max()


def test_keys_and_values_of_the_negative_prompt_are_made_once_a_call(
    pipe: StableDiffusionPipeline, tiny: Guide
) -> None:
    plug(pipe, tiny)
    layer = text_attentions(pipe.unet)[0].to_k
    asked: list[int] = []
    layer.register_forward_hook(lambda module, args, output: asked.append(len(args[0])))
    generate(pipe, negative_prompt="a dog")
    assert len(asked) == 4 + 1  # the prompt's at each step, which the guide steers


@pytest.mark.parametrize("weights", ["attn2.to_v.lora_B", "attn2.to_v.weight"])
def test_they_are_made_again_when_a_callback_writes_into_weights(
    pipe: StableDiffusionPipeline, tiny: Guide, tmp_path: Path, weights: str
) -> None:
    """Through `data`, which no version counts: as peft's hotswap and some merges do."""
    if "lora" in weights:
        save_lora(pipe.unet, tmp_path)
        pipe.load_lora_weights(tmp_path, adapter_name="style")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    plug(pipe, tiny)
    written = [p for name, p in pipe.unet.named_parameters() if weights in name]
    seen: list[list[torch.Tensor]] = []

    def swap(running: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        call = now.calls[-2]
        seen.append([made.value for made in call.negatives.kept])
        for weight in written:
            weight.data.copy_(-3 * weight.data)
        return given

    generate(pipe, negative_prompt="a dog", num_inference_steps=2, callback_on_step_end=swap)
    for first, second in zip(*seen, strict=True):
        assert not torch.allclose(first, second, atol=1e-4)
    assert written


def test_they_are_made_again_when_a_lora_or_its_scale_changes(
    pipe: StableDiffusionPipeline, tiny: Guide, tmp_path: Path
) -> None:
    save_lora(pipe.unet, tmp_path)
    pipe.load_lora_weights(tmp_path, adapter_name="style")
    plug(pipe, tiny)
    pipe.set_adapters("style", 0.3)
    weak = generate(pipe, output_type="latent")
    pipe.set_adapters("style", 1.0)

    def weaken(running: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        running.set_adapters("style", 0.3)
        return given

    negatives = Negatives(torch.randn(1, 16, 32))
    layers = text_attentions(pipe.unet)
    negatives.follow(layers)
    strong = negatives.fill(0, layers[0])
    weaken(pipe, 0, 0, {})
    negatives.follow(layers)
    assert not torch.equal(negatives.fill(0, layers[0]).value, strong.value)
    assert np.array_equal(generate(pipe, output_type="latent"), weak)
    pipe.unload_lora_weights()
    negatives.follow(layers)
    assert negatives.kept[0] is None


def guide_of_one_level(pipe: StableDiffusionPipeline) -> Guide:
    """For a UNet that the pipeline is given: it has half of the code to compile."""
    one_level = {
        "block_out_channels": (32,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
    }
    torch.manual_seed(0)
    pipe.unet = UNet2DConditionModel.from_config({**pipe.unet.config, **one_level}).eval()
    return roused(Guide.from_unet(pipe.unet, GuideConfig(max_parameters_ratio=0.2)))


@pytest.mark.parametrize(
    "order",
    few_of(
        ["plug, module", "plug, wrapper", "plug, blocks"]
        + ["module, plug", "wrapper, plug", "blocks, plug"],
        "plug, module",
    ),
)
def test_compiled_without_a_break_or_recompilation_it_gives_the_same_images(
    pipe: StableDiffusionPipeline, order: str
) -> None:
    first, second = order.split(", ")
    tiny = guide_of_one_level(pipe)
    calls: list[dict[str, Any]] = [
        {"guidance_scale": 3.0, "num_inference_steps": 2},
        {"guidance_scale": 7.0, "negative_prompt": "a dog", "num_inference_steps": 3},
        {"prompt": "a cow", "guidance_scale": 4.5, "num_inference_steps": 2},
    ]
    plug(pipe, tiny)
    expected = [generate(pipe, **call) for call in calls]
    unplug(pipe)
    stock = generate(pipe, guidance_scale=1.0)
    torch._dynamo.reset()
    counter = CompileCounter()
    if first == "plug":
        plug(pipe, tiny)
    match second if first == "plug" else first:
        case "module":
            pipe.unet.compile(backend=counter, fullgraph=True)
        case "wrapper":
            pipe.unet = torch.compile(pipe.unet, backend=counter, fullgraph=True)
        case "blocks":
            pipe.unet.compile_repeated_blocks(backend=counter, fullgraph=True)
    if second == "plug":
        assert np.allclose(generate(pipe, guidance_scale=1.0), stock, atol=1e-5)
        plug(pipe, tiny)
    counts = []
    for call, image in zip(calls, expected, strict=True):
        np.testing.assert_allclose(generate(pipe, **call), image, atol=1e-4)
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1
    unplug(pipe)
    assert np.allclose(generate(pipe, guidance_scale=1.0), stock, atol=1e-5)


def test_exact_steps_compile_without_a_break_and_once(pipe: StableDiffusionPipeline) -> None:
    plug(pipe, guide_of_one_level(pipe), exact_steps=1)
    calls: list[dict[str, Any]] = [
        {"num_inference_steps": 2},
        {"num_inference_steps": 3, "guidance_scale": 7.0, "negative_prompt": "a dog"},
    ]
    expected = [generate(pipe, **call) for call in calls]
    torch._dynamo.reset()
    counter = CompileCounter()
    pipe.unet.compile(backend=counter, fullgraph=True)
    counts = []
    for call, image in zip(calls, expected, strict=True):
        np.testing.assert_allclose(generate(pipe, **call), image, atol=1e-4)
        counts.append(counter.frame_count)
    assert counts[0] == counts[1] == 2  # an exact step and a guided one


def test_repeated_blocks_that_are_alike_share_their_compiled_code(
    pipe: StableDiffusionPipeline,
) -> None:
    """PyTorch gives up on a function after eight versions, and SDXL has seventy such blocks."""
    wider = {"transformer_layers_per_block": 3, "layers_per_block": 2}
    torch.manual_seed(0)
    pipe.unet = UNet2DConditionModel.from_config({**pipe.unet.config, **wider}).eval()
    guide = roused(Guide.from_unet(pipe.unet, GuideConfig(max_parameters_ratio=0.2)))
    plug(pipe, guide)
    call: dict[str, Any] = {"negative_prompt": "a dog", "output_type": "latent"}
    expected = generate(pipe, **call)
    unplug(pipe)
    counts = {}
    for way in ("plain", "plugged"):
        torch._dynamo.reset()
        counter = CompileCounter()
        pipe.unet.compile_repeated_blocks(backend=counter, fullgraph=True)
        if way == "plugged":
            plug(pipe, guide)
            np.testing.assert_allclose(generate(pipe, **call), expected, atol=1e-4)
        else:
            generate(pipe, guidance_scale=1.0)
        counts[way] = counter.frame_count
    blocks = [m for m in pipe.unet.modules() if type(m).__name__ == "BasicTransformerBlock"]
    assert len(blocks) == 18
    # in the first block the guide acts on fewer layers
    assert counts["plugged"] <= counts["plain"] + 1
    unplug(pipe)
    assert all(type(block._compiled_call_impl).__name__ == "function" for block in blocks)


def test_states_of_both_prompts_for_the_samples_of_one_are_told_apart() -> None:
    """As a pipeline gives them that doubles them by a test of its own."""
    negative, prompt, pooled = torch.zeros(2, 7, 8), torch.ones(2, 7, 8), torch.ones(2, 5)
    arguments: dict[str, Any] = {
        "encoder_hidden_states": torch.cat([negative, prompt]),
        "added_cond_kwargs": {"text_embeds": torch.cat([0 * pooled, pooled])},
    }
    text, of_pooled = take_apart(arguments, 2)
    assert text is not None and torch.equal(text, negative)
    assert of_pooled is not None and torch.equal(of_pooled, 0 * pooled)
    assert torch.equal(arguments["encoder_hidden_states"], prompt)
    assert torch.equal(arguments["added_cond_kwargs"]["text_embeds"], pooled)
    assert take_apart(arguments, 2) == (None, None)
    assert torch.equal(arguments["encoder_hidden_states"], prompt)
