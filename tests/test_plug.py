"""A plugged stock pipeline, as its user sees it."""

import copy
import gc
import json
import logging
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    SchedulerMixin,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNetMotionModel,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import SDCFGCutoffCallback
from PIL import Image
from torch._dynamo.testing import CompileCounter

from pnp_core.bundle import GuideBundle
from pnp_core.conditions import Conditions
from pnp_core.denoiser import GuidedDenoiser
from pnp_core.guide import Guide, GuideConfig
from pnp_core.guide.unet import text_attentions
from pnp_core.inject import Negatives
from pnp_core.models import encode_prompts
from pnp_core.placing import on_device
from pnp_core.plug import plug, unplug
from pnp_core.sample import decode, initial_noise, sample
from pnp_core.schedule import NoiseSchedule
from tests.conftest import changed, roused, same_weights, save_lora


def generate(pipe: Any, prompt: Any = "a cat", **options: Any) -> np.ndarray:
    defaults = {
        "prompt": prompt,
        "num_inference_steps": 4,
        "guidance_scale": 4.0,
        "output_type": "np",
        "generator": torch.Generator().manual_seed(3),
    }
    return np.asarray(pipe(**{**defaults, **options}).images)


@pytest.fixture
def tiny(pipe: StableDiffusionPipeline) -> Guide:
    return roused(Guide.from_unet(pipe.unet, GuideConfig(max_parameters_ratio=0.2)))


def test_a_plugged_pipeline_makes_what_our_own_sampler_makes(
    pipe: StableDiffusionPipeline, guide: Guide
) -> None:
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    z = sample(
        GuidedDenoiser(pipe.unet, roused(guide), schedule),
        pipe.scheduler,
        z_T=initial_noise((4, 4, 4), [3]),
        conditions=Conditions.at_scale(
            4.0,
            c_BLD=encode_prompts(pipe, ["a cat"]).states_NLD,
            n_BLD=encode_prompts(pipe, ["a dog"]).states_NLD,
        ),
        num_steps=4,
    )
    plug(pipe, guide)
    made = generate(pipe, negative_prompt="a dog")
    np.testing.assert_allclose(made * 255, decode(pipe, z), atol=0.6)


def test_a_step_costs_one_forward_of_one_sample(pipe: StableDiffusionPipeline, tiny: Guide) -> None:
    batches = []
    pipe.unet.register_forward_hook(lambda module, args, out: batches.append(len(out[0])))
    plug(pipe, tiny)
    generate(pipe)
    assert batches == [1, 1, 1, 1]


def test_unplugging_gives_back_the_pipeline_bit_for_bit(
    pipe: StableDiffusionPipeline, tiny: Guide
) -> None:
    before = generate(pipe, negative_prompt="a dog")
    config = dict(pipe.unet.config)
    plug(pipe, tiny)
    assert not np.array_equal(generate(pipe, negative_prompt="a dog"), before)
    unplug(pipe)
    assert np.array_equal(generate(pipe, negative_prompt="a dog"), before)
    assert dict(pipe.unet.config) == config
    with pytest.raises(ValueError, match="no guide plugged in"):
        unplug(pipe)


def test_negative_prompt_guidance_scale_and_strength_all_matter(
    pipe: StableDiffusionPipeline, tiny: Guide
) -> None:
    unguided = generate(pipe, guidance_scale=1.0)
    plug(pipe, tiny)
    made = [
        generate(pipe),
        generate(pipe, negative_prompt="a dog"),
        generate(pipe, guidance_scale=6.0),
    ]
    assert all(not np.array_equal(a, b) for a, b in zip(made, [*made[1:], made[0]], strict=True))
    assert np.array_equal(generate(pipe, guidance_scale=1.0), unguided)
    unplug(pipe)
    plug(pipe, tiny, strength=0.0)
    assert np.array_equal(generate(pipe), unguided)


def test_several_prompts_and_images_a_prompt_keep_their_negatives(
    pipe: StableDiffusionPipeline, tiny: Guide
) -> None:
    plug(pipe, tiny)
    generators = [torch.Generator().manual_seed(i) for i in (0, 1, 2, 3)]
    together = generate(
        pipe,
        ["a cat", "a cow"],
        negative_prompt=["a dog", "red"],
        num_images_per_prompt=2,
        generator=generators,
    )
    alone = [
        generate(pipe, p, negative_prompt=n, generator=torch.Generator().manual_seed(i))[0]
        for i, (p, n) in enumerate([("a cat", "a dog")] * 2 + [("a cow", "red")] * 2)
    ]
    np.testing.assert_allclose(together, np.stack(alone), atol=1e-4)


def picture(colour: int = 128) -> Image.Image:
    return Image.new("RGB", (32, 32), (colour, 40, 90))


def test_img2img_made_with_from_pipe_works_once_plugged_too(
    pipe: StableDiffusionPipeline, tiny: Guide
) -> None:
    plug(pipe, tiny)
    image_pipe = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    image_pipe.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match=r"call plug\(pipe, guide\) on this pipeline too"):
        generate(image_pipe, image=picture())
    plug(image_pipe, tiny)
    one, other = (generate(image_pipe, image=picture(), negative_prompt=n) for n in ("", "a dog"))
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("channels", [4, 9])
def test_inpainting_works_with_four_and_nine_channels(
    pipe: StableDiffusionPipeline, channels: int
) -> None:
    unet = UNet2DConditionModel.from_config({**pipe.unet.config, "in_channels": channels})
    parts = {**pipe.components, "unet": unet}
    inpaint = StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    inpaint.set_progress_bar_config(disable=True)
    guide = roused(Guide.from_unet(unet, GuideConfig(max_parameters_ratio=0.2)))
    mask = Image.new("L", (32, 32), 255)
    call = {"image": picture(), "mask_image": mask, "height": 32, "width": 32}
    before = generate(inpaint, **call)
    plug(inpaint, guide)
    assert not np.array_equal(generate(inpaint, **call), before)
    unplug(inpaint)
    assert np.array_equal(generate(inpaint, **call), before)


def test_a_controlnets_residuals_and_the_guides_both_act(
    pipe: StableDiffusionPipeline, tiny: Guide
) -> None:
    torch.manual_seed(0)
    controlnet = ControlNetModel.from_unet(
        pipe.unet, conditioning_embedding_out_channels=(8, 8, 8, 8)
    )
    with torch.no_grad():
        for parameter in controlnet.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    parts = {**pipe.components, "controlnet": controlnet}
    control = StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    control.set_progress_bar_config(disable=True)
    plug(control, tiny)
    both = generate(control, image=picture())
    without_control = generate(control, image=picture(), controlnet_conditioning_scale=0.0)
    unplug(control)
    without_guide = generate(control, image=picture(), guidance_scale=1.0)
    assert not np.array_equal(both, without_control)
    assert not np.array_equal(both, without_guide)


def test_a_deep_copy_has_a_guide_of_its_own(pipe: StableDiffusionPipeline, tiny: Guide) -> None:
    plug(pipe, tiny)
    expected = generate(pipe)
    twin = copy.deepcopy(pipe)
    with torch.no_grad():
        for parameter in (*pipe.unet.parameters(), *tiny.parameters()):
            parameter.zero_()
    # not bit for bit: copied weights may be aligned otherwise
    np.testing.assert_allclose(generate(twin), expected, atol=1e-5)
    unplug(twin)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler,
        DDPMScheduler,
        DPMSolverMultistepScheduler,
        DPMSolverSinglestepScheduler,
        EulerDiscreteScheduler,
        EulerAncestralDiscreteScheduler,
        HeunDiscreteScheduler,
        LCMScheduler,
        PNDMScheduler,
        UniPCMultistepScheduler,
    ],
)
def test_with_any_scheduler_a_fresh_guide_is_no_guide_and_a_trained_one_acts(
    pipe: StableDiffusionPipeline, tiny: Guide, scheduler: type[SchedulerMixin]
) -> None:
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    unguided = generate(pipe, guidance_scale=1.0)
    plug(pipe, Guide.from_unet(pipe.unet, GuideConfig(max_parameters_ratio=0.2)))
    assert np.array_equal(generate(pipe), unguided)
    unplug(pipe)
    plug(pipe, tiny)
    made = generate(pipe)
    assert np.isfinite(made).all() and not np.array_equal(made, unguided)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_pipeline_works_with_a_full_precision_guide(
    pipe: StableDiffusionPipeline, guide: Guide, dtype: torch.dtype
) -> None:
    plug(pipe, roused(guide, scale=0.05))
    full = generate(pipe)
    pipe.to(dtype)
    half = generate(pipe)
    np.testing.assert_allclose(half, full, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_guide_can_have_the_half_precision_of_its_pipeline(
    pipe: StableDiffusionPipeline, guide: Guide, dtype: torch.dtype
) -> None:
    bundle = GuideBundle({50: roused(guide, scale=0.05)})
    plug(pipe, bundle)
    full = generate(pipe)
    pipe.to(dtype)
    bundle.to(dtype)
    np.testing.assert_allclose(generate(pipe), full, atol=0.1)


NEEDS_CUDA = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="accelerate can't offload like this from a CPU to itself"
)


@pytest.mark.parametrize("first", ["offload", "plug"])
@pytest.mark.parametrize(
    "method",
    [
        "enable_model_cpu_offload",
        pytest.param("enable_sequential_cpu_offload", marks=NEEDS_CUDA),
    ],
)
def test_a_pipeline_can_be_offloaded_before_or_after_plugging(
    pipe: StableDiffusionPipeline, guide: Guide, method: str, first: str
) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    roused(guide)
    plain = generate(pipe)
    in_memory = copy.deepcopy(pipe)
    plug(in_memory, copy.deepcopy(guide))
    expected = generate(in_memory)
    if first == "plug":
        plug(pipe, guide)
    getattr(pipe, method)(device=device)
    if first == "offload":
        plug(pipe, guide)
    offloaded_to = {"enable_model_cpu_offload": "cpu", "enable_sequential_cpu_offload": "meta"}
    for _ in range(2):  # the second time, weights come back from where they were put
        np.testing.assert_allclose(generate(pipe), expected, atol=1e-3)
        assert {p.device.type for p in pipe.unet.parameters()} == {offloaded_to[method]}
    unplug(pipe)
    np.testing.assert_allclose(generate(pipe), plain, atol=1e-3)


def offload_sequentially(module: torch.nn.Module) -> None:
    """As accelerate does: a submodule's weights are on its device during its forward only."""
    home = {name: p.data for name, p in module.named_parameters(recurse=False)}

    def put(where: str | None) -> None:
        for name, data in home.items():
            placed = data if where is None else data.to(where)
            setattr(module, name, torch.nn.Parameter(placed, requires_grad=False))

    module.register_forward_pre_hook(lambda module, args: put(None))
    module.register_forward_hook(lambda module, args, output: put("meta"))
    put("meta")


@pytest.mark.parametrize("first", ["offload", "plug"])
def test_a_guide_needs_none_of_the_weights_of_a_sequentially_offloaded_unet(
    pipe: StableDiffusionPipeline, guide: Guide, first: str
) -> None:
    plug(pipe, roused(guide))
    expected = generate(pipe)
    if first == "offload":
        unplug(pipe)
    for module in pipe.unet.modules():
        offload_sequentially(module)
    if first == "offload":
        plug(pipe, guide)
    assert np.array_equal(generate(pipe), expected)
    assert {p.device.type for p in pipe.unet.parameters()} == {"meta"}


def test_a_compiled_unet_gives_the_same_image(pipe: StableDiffusionPipeline, tiny: Guide) -> None:
    plug(pipe, tiny)
    expected = generate(pipe)
    pipe.unet.compile(backend="eager")
    np.testing.assert_allclose(generate(pipe), expected, atol=1e-4)


def test_a_plugged_pipeline_saves_the_unet_config_as_it_was(
    pipe: StableDiffusionPipeline, tiny: Guide, tmp_path: Path
) -> None:
    plug(pipe, tiny)
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "unet/config.json").read_text())["time_cond_proj_dim"] is None
    assert generate(pipe) is not None  # and goes on working


def test_of_a_bundle_the_guide_for_the_number_of_steps_is_used(
    pipe: StableDiffusionPipeline,
) -> None:
    config = GuideConfig(max_parameters_ratio=0.2)
    guides = {
        n: roused(Guide.from_unet(pipe.unet, config, num_steps=n), scale=n / 50) for n in (2, 4)
    }
    plug(pipe, GuideBundle(guides))
    from_bundle = [generate(pipe, num_inference_steps=n) for n in guides]
    unplug(pipe)
    for guide, expected in zip(guides.values(), from_bundle, strict=True):
        plug(pipe, guide)
        made = generate(pipe, num_inference_steps=guide.config.num_steps)
        assert np.array_equal(made, expected)
        unplug(pipe)


def test_a_guidance_scale_outside_the_trained_range_is_warned_about(
    pipe: StableDiffusionPipeline, tiny: Guide, caplog: pytest.LogCaptureFixture
) -> None:
    plug(pipe, tiny)
    with caplog.at_level(logging.WARNING):
        generate(pipe, guidance_scale=20.0)
    assert "guidance_scale 20 is outside [1, 8]" in caplog.text


def test_guidance_rescale_is_refused(pipe: StableDiffusionPipeline, tiny: Guide) -> None:
    plug(pipe, tiny)
    with pytest.raises(ValueError, match="guidance_rescale does not work with a guide"):
        generate(pipe, guidance_rescale=0.7)


def refused(pipe: Any, guide: Guide, message: str) -> None:
    before = dict(pipe.unet.config)
    with pytest.raises(ValueError, match=message):
        plug(pipe, guide)
    assert dict(pipe.unet.config) == before


def test_plugging_what_does_not_fit_is_refused_and_changes_nothing(
    pipe: StableDiffusionPipeline, tiny: Guide
) -> None:
    before = generate(pipe)
    other = UNet2DConditionModel.from_config({**pipe.unet.config, "block_out_channels": (32, 32)})
    refused(pipe, Guide.from_unet(other, GuideConfig(max_parameters_ratio=0.2)), "channels = ")
    v_guide = Guide.from_unet(
        pipe.unet, GuideConfig(max_parameters_ratio=0.2), prediction_type="v_prediction"
    )
    refused(pipe, v_guide, "prediction_type 'v_prediction'")
    wide = UNet2DConditionModel.from_config({**pipe.unet.config, "cross_attention_dim": 48})
    refused(
        pipe,
        Guide.from_unet(wide, GuideConfig(max_parameters_ratio=0.2)),
        "text_dim = 48, but this UNet has text_dim = 32",
    )
    assert np.array_equal(generate(pipe), before)
    plug(pipe, tiny)
    refused(pipe, tiny, "plugged already")
    refused(pipe, v_guide, "another guide plugged in")


class Int4Tensor(torch.Tensor):
    """A stand-in for the weights of torchao and quanto, which call themselves floating-point."""


@pytest.mark.parametrize("how", ["config", "quantizer", "integers", "subclass"])
def test_a_quantised_unet_is_refused_and_left_as_it_was(
    pipe: StableDiffusionPipeline, tiny: Guide, how: str
) -> None:
    conv = pipe.unet.conv_in
    match how:
        case "config":
            config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
            pipe.unet.register_to_config(quantization_config=config)
        case "quantizer":
            pipe.unet.hf_quantizer = object()
        case "integers":
            conv.weight = torch.nn.Parameter(conv.weight.data.to(torch.int8), requires_grad=False)
        case "subclass":
            conv.weight = torch.nn.Parameter(conv.weight.data.as_subclass(Int4Tensor))
    names = {
        "config": "bitsandbytes",
        "quantizer": "hf_quantizer",
        "integers": "torch.int8",
        "subclass": "Int4Tensor",
    }
    refused(pipe, tiny, rf"ordinary floating-point weights, but .* quantised \(.*{names[how]}")
    assert "encode_prompt" not in vars(pipe) and not pipe.unet._forward_pre_hooks


def test_a_unet_spread_over_devices_is_refused_and_left_as_it_was(
    pipe: StableDiffusionPipeline, tiny: Guide
) -> None:
    before = generate(pipe)
    pipe.unet.hf_device_map = {"down_blocks": 0, "up_blocks": 1}
    refused(pipe, tiny, "on one device, but this UNet is spread over 0, 1:")
    assert np.array_equal(generate(pipe), before)
    pipe.unet.hf_device_map = {"": 0}
    plug(pipe, tiny)  # whole on one device, by whichever name


def test_a_pipeline_without_a_unet_is_refused(pipe: StableDiffusionPipeline, tiny: Guide) -> None:
    class Other:
        unet = AutoencoderKL

    with pytest.raises(ValueError, match="has no UNet"):
        plug(Other(), tiny)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [StableDiffusionXLPipeline, StableDiffusionXLImg2ImgPipeline])
def test_sdxl_negative_sizes_are_said_to_have_no_effect(
    kind: type[StableDiffusionXLPipeline],
    xl_pipe: StableDiffusionXLPipeline,
    caplog: pytest.LogCaptureFixture,
) -> None:
    xl = kind.from_pipe(xl_pipe)
    xl.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {
        "num_inference_steps": 2,
        "guidance_scale": 4.0,
        "output_type": "latent",
    }
    if kind is StableDiffusionXLImg2ImgPipeline:
        call["image"] = Image.new("RGB", (32, 32))
    plug(xl, Guide.from_unet(xl.unet, GuideConfig(max_parameters_ratio=0.2)))
    with caplog.at_level(logging.WARNING):
        xl("a cat", **call)
        assert "no effect" not in caplog.text
        xl("a cat", negative_original_size=(8, 8), negative_target_size=(8, 8), **call)
        assert "negative_original_size" in caplog.text and "no effect" in caplog.text
    unplug(xl)
    assert "_get_add_time_ids" not in vars(xl)


def test_stable_diffusion_xl_pipelines_work_and_unplug_exactly(
    xl_pipe: StableDiffusionXLPipeline, guide: Guide
) -> None:
    xl = xl_pipe
    own = roused(
        Guide.from_unet(xl.unet, GuideConfig(kind=guide.config.kind, max_parameters_ratio=0.2))
    )
    size = {"height": 32, "width": 32}
    before = generate(xl, negative_prompt="a dog", **size)
    unguided = generate(xl, guidance_scale=1.0, **size)
    plug(xl, own)
    made = [generate(xl, **size), generate(xl, negative_prompt="a dog", **size)]
    assert not np.array_equal(*made)
    assert np.array_equal(generate(xl, guidance_scale=1.0, **size), unguided)
    unplug(xl)
    assert np.array_equal(generate(xl, negative_prompt="a dog", **size), before)


@pytest.mark.parametrize("first", ["lora", "guide"])
def test_a_lora_can_be_loaded_before_or_after_plugging(
    pipe: StableDiffusionPipeline, tiny: Guide, tmp_path: Path, first: str
) -> None:
    save_lora(pipe.unet, tmp_path)
    without = copy.deepcopy(pipe)
    plug(without, tiny)
    plain = generate(without)
    if first == "lora":
        pipe.load_lora_weights(tmp_path)
        plug(pipe, tiny)
    else:
        plug(pipe, tiny)
        pipe.load_lora_weights(tmp_path)
    made = generate(pipe)
    reference = copy.deepcopy(without)
    unplug(reference)
    reference.load_lora_weights(tmp_path)
    plug(reference, tiny)
    assert not np.array_equal(made, plain)
    np.testing.assert_allclose(made, generate(reference), atol=1e-5)
    pipe.unload_lora_weights()
    np.testing.assert_allclose(generate(pipe), plain, atol=1e-5)


# A call's state belongs to its call.


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
    kept: list[torch.Tensor] = []

    def keep(running: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        kept.append(given["latents"])
        return given

    generate(pipe, negative_prompt="a dog", callback_on_step_end=keep)
    pipe.scheduler.set_timesteps(4)
    latents = kept[1]

    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    denoiser = GuidedDenoiser(pipe.unet, tiny, schedule)
    conditions = Conditions.at_scale(4.0, c_BLD=new, n_BLD=negative)
    with torch.no_grad():
        for t in pipe.scheduler.timesteps[2:]:
            eps = denoiser(latents, t[None], conditions)
            latents = pipe.scheduler.step(eps, t, latents).prev_sample
    np.testing.assert_allclose(made, latents.numpy(), atol=1e-5)


def test_diffusers_own_callback_that_cuts_cfg_off_midway_works(
    pipe: StableDiffusionPipeline, tiny: Guide
) -> None:
    plug(pipe, tiny)
    cut = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    kept: list[torch.Tensor] = []

    def keep(running: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        kept.append(given["latents"])
        return given

    made = generate(pipe, output_type="latent", callback_on_step_end=cut)
    generate(pipe, callback_on_step_end=keep)
    latents, text = kept[1], encode_prompts(pipe, ["a cat"]).states_NLD
    pipe.scheduler.set_timesteps(4)
    with torch.no_grad():
        for t in pipe.scheduler.timesteps[2:]:
            eps = pipe.unet(latents, t, text).sample
            latents = pipe.scheduler.step(eps, t, latents).prev_sample
    np.testing.assert_allclose(made, latents.numpy(), atol=1e-5)


def test_a_pipeline_that_is_not_plugged_is_told_so_whatever_its_prompt(
    pipe: StableDiffusionPipeline, tiny: Guide
) -> None:
    plug(pipe, tiny)
    stock = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)

    def inside(running: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        with pytest.raises(ValueError, match=r"call plug\(pipe, guide\) on this pipeline too"):
            generate(stock)
        return given

    generate(pipe, callback_on_step_end=inside)
    for options in ({}, {"guidance_scale": 1.0}, {"negative_prompt": "a dog"}):
        with pytest.raises(ValueError, match="has not been plugged"):
            generate(stock, **options)
    assert pipe.unet(torch.zeros(1, 4, 4, 4), 5, torch.zeros(1, 16, 32)) is not None  # no pipeline


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
        generate(mine, callback_on_step_end=lambda running, step, timestep, given: given)
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


@pytest.mark.parametrize("strength", [-0.1, float("nan"), float("inf")])
def test_a_strength_that_can_t_be_is_refused(
    pipe: StableDiffusionPipeline, tiny: Guide, strength: float
) -> None:
    with pytest.raises(ValueError, match="from 0 on"):
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


def test_a_guide_stays_where_it_is_and_has_one_copy_on_each_other_device(tiny: Guide) -> None:
    cpu, meta = torch.device("cpu"), torch.device("meta")
    assert on_device(tiny, cpu) is tiny
    twin = on_device(tiny, meta)
    assert {p.device for p in twin.parameters()} == {meta}
    assert {p.device for p in tiny.parameters()} == {cpu}
    assert on_device(tiny, meta) is twin
    with torch.no_grad():
        next(tiny.parameters()).mul_(2)
    assert on_device(tiny, meta) is not twin


# Nothing of the base's is touched.


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


# Guidance's own rules.


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


# What is replaced after plugging.


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


def test_a_scheduler_of_another_prediction_type_is_refused_when_called(
    pipe: StableDiffusionPipeline, tiny: Guide
) -> None:
    plug(pipe, tiny)
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, prediction_type="v_prediction"
    )
    with pytest.raises(ValueError, match="scheduler has 'v_prediction'"):
        generate(pipe)


# Fast.


def test_keys_and_values_of_the_negative_prompt_are_made_once_a_call(
    pipe: StableDiffusionPipeline, tiny: Guide
) -> None:
    plug(pipe, tiny)
    layer = text_attentions(pipe.unet)[0].to_k
    asked: list[int] = []
    layer.register_forward_hook(lambda module, args, output: asked.append(len(args[0])))
    generate(pipe, negative_prompt="a dog")
    assert len(asked) == 4 + 1  # the prompt's at each step, which the guide steers


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


@pytest.mark.parametrize("style", ["module", "wrapper", "blocks"])
@pytest.mark.parametrize("first", ["plug", "compile"])
def test_compiled_without_a_break_or_recompilation_it_gives_the_same_images(
    pipe: StableDiffusionPipeline, tiny: Guide, style: str, first: str
) -> None:
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
    match style:
        case "module":
            pipe.unet.compile(backend=counter, fullgraph=True)
        case "wrapper":
            pipe.unet = torch.compile(pipe.unet, backend=counter, fullgraph=True)
        case "blocks":
            pipe.unet.compile_repeated_blocks(backend=counter, fullgraph=True)
    if first == "compile":
        assert np.allclose(generate(pipe, guidance_scale=1.0), stock, atol=1e-5)
        plug(pipe, tiny)
    counts = []
    for call, image in zip(calls, expected, strict=True):
        np.testing.assert_allclose(generate(pipe, **call), image, atol=1e-4)
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1
    unplug(pipe)
    assert np.allclose(generate(pipe, guidance_scale=1.0), stock, atol=1e-5)
