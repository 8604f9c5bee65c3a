"""A plugged stock pipeline, as its user sees it."""

import copy
import json
import logging
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
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
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
    UniPCMultistepScheduler,
)
from diffusers.callbacks import SDCFGCutoffCallback
from PIL import Image

from pnp_core.bundle import GuideBundle
from pnp_core.conditions import Conditions
from pnp_core.denoiser import GuidedDenoiser
from pnp_core.fit import own_parameters
from pnp_core.guide import Guide, GuideConfig
from pnp_core.models import encode_prompts
from pnp_core.plug import plug, unplug
from pnp_core.sample import decode, initial_noise, sample
from pnp_core.schedule import NoiseSchedule
from tests.cases import few_of
from tests.conftest import roused, save_lora
from tests.plugged import generate, picture

SIZES_OF_XL = ("original_size", "target_size")


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


def test_img2img_made_with_from_pipe_works_once_plugged_too(
    pipe: StableDiffusionPipeline, tiny: Guide
) -> None:
    plug(pipe, tiny)
    image_pipe = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    image_pipe.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match=r"Call plug\(pipe, guide\) on this pipeline too"):
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


@pytest.fixture
def control(pipe: StableDiffusionPipeline) -> StableDiffusionControlNetPipeline:
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
    return control


def test_a_controlnet_and_a_callback_that_is_given_the_text_go_together(
    control: StableDiffusionControlNetPipeline, tiny: Guide
) -> None:
    plug(control, tiny)
    call = {"image": [picture()] * 2, "prompt": ["a cat", "a dog"], "negative_prompt": ["x", "y"]}
    expected = generate(control, **call)
    other, _ = control.encode_prompt(["a cow", "a hen"], "cpu", 1, False)

    def given_back(running: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        assert len(given["prompt_embeds"]) == 4
        return given

    def switched(running: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        negative = given["prompt_embeds"].chunk(2)[0]
        return given | {"prompt_embeds": torch.cat([negative, other])}

    def made(callback: Any) -> np.ndarray:
        named = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
        return generate(control, **call, callback_on_step_end=callback, **named)

    assert np.array_equal(made(given_back), expected)
    assert not np.array_equal(made(switched), expected)
    cut = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    assert not np.array_equal(
        generate(control, image=picture(), callback_on_step_end=cut),
        generate(control, image=picture()),
    )


def test_a_controlnets_residuals_and_the_guides_both_act(
    control: StableDiffusionControlNetPipeline, tiny: Guide
) -> None:
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


@pytest.mark.gpu
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


@pytest.mark.parametrize("part", few_of(["unet", "block", "wrapped block"], "wrapped block"))
def test_what_was_compiled_in_another_way_and_has_run_is_guided_once_plugged(
    pipe: StableDiffusionPipeline, tiny: Guide, part: str
) -> None:
    plug(pipe, tiny)
    expected = generate(pipe)
    unplug(pipe)
    torch._dynamo.reset()
    unet = pipe.unet
    if part == "wrapped block":
        unet.up_blocks[0] = torch.compile(unet.up_blocks[0], backend="eager")
    else:
        compiled = unet if part == "unet" else unet.up_blocks[0]
        compiled.forward = torch.compile(compiled.forward, backend="eager")
    unguided = generate(pipe, guidance_scale=1.0)
    plug(pipe, tiny)
    np.testing.assert_allclose(generate(pipe), expected, atol=1e-4)
    unplug(pipe)
    np.testing.assert_allclose(generate(pipe, guidance_scale=1.0), unguided, atol=1e-5)


def test_an_adapter_that_rests_on_another_device_is_no_part_of_the_unets_place(
    pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    own = {id(p) for p in pipe.unet.parameters()}
    save_lora(pipe.unet, tmp_path)
    pipe.load_lora_weights(tmp_path, adapter_name="style")
    assert {id(p) for p in own_parameters(pipe.unet)} == own
    assert len(list(pipe.unet.parameters())) > len(own)


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


@pytest.mark.parametrize("scheduler", [DDPMScheduler, EulerDiscreteScheduler, LCMScheduler])
def test_timesteps_given_in_a_call_count_as_its_number_of_steps(
    pipe: StableDiffusionPipeline, scheduler: type[SchedulerMixin]
) -> None:
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    config = GuideConfig(max_parameters_ratio=0.2)
    guides = {
        n: roused(Guide.from_unet(pipe.unet, config, num_steps=n), scale=n / 50) for n in (4, 16)
    }
    call = {"num_inference_steps": None, "timesteps": [999, 759, 499, 259]}
    plug(pipe, guides[4])
    expected = generate(pipe, **call)
    unplug(pipe)
    plug(pipe, GuideBundle(guides))
    assert np.array_equal(generate(pipe, **call), expected)
    generate(pipe, num_inference_steps=16)
    assert np.array_equal(generate(pipe, **call), expected)


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


@pytest.mark.parametrize(
    "scheduler",
    [EDMEulerScheduler, EDMDPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler],
)
def test_a_scheduler_that_takes_a_prediction_for_something_else_is_refused(
    pipe: StableDiffusionPipeline, tiny: Guide, scheduler: type[SchedulerMixin]
) -> None:
    own, said = pipe.scheduler, f"under a {scheduler.__name__} it predicts something else"
    pipe.scheduler = scheduler()
    refused(pipe, tiny, said)
    pipe.scheduler = own
    plug(pipe, tiny)
    pipe.scheduler = scheduler()
    with pytest.raises(ValueError, match=said):
        generate(pipe)


@pytest.mark.parametrize("given", [None, "models/base", {}, torch.zeros(2)])
def test_what_is_no_pipeline_is_told_by_its_type(tiny: Guide, given: Any) -> None:
    with pytest.raises(TypeError, match=f"pipeline .* needed, not a {type(given).__name__}: "):
        plug(given, tiny)
    with pytest.raises(ValueError, match="has no guide plugged in"):
        unplug(given)


def test_what_is_no_guide_is_told_by_its_type(pipe: StableDiffusionPipeline) -> None:
    given: Any
    for given in (pipe.unet, None, "guides/bundle"):
        with pytest.raises(TypeError, match=f"needed, not a {type(given).__name__}: ") as told:
            plug(pipe, given)
        assert len(str(told.value)) < 200


@pytest.mark.parametrize("given", ["1", None, torch.ones(2), [1.0], 1j])
def test_a_strength_that_is_no_number_is_told_by_its_type(
    pipe: StableDiffusionPipeline, tiny: Guide, given: Any
) -> None:
    with pytest.raises(TypeError, match=f"^strength is .* and not a {type(given).__name__}.$"):
        plug(pipe, tiny, strength=given)


def test_what_is_no_number_of_exact_steps_is_told_in_short(
    pipe: StableDiffusionPipeline, tiny: Guide
) -> None:
    given: Any = pipe.unet
    with pytest.raises(ValueError, match="^exact_steps is .* not a UNet2DConditionModel.$"):
        plug(pipe, tiny, exact_steps=given)


@pytest.mark.parametrize("given", [1, np.float32(1.0), torch.tensor(1.0)])
def test_a_strength_may_be_any_number(
    pipe: StableDiffusionPipeline, tiny: Guide, given: Any
) -> None:
    expected = generate(plug(pipe, tiny))
    assert np.array_equal(generate(plug(unplug(pipe), tiny, strength=given)), expected)


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
        same = {f"{which}{size}": (32, 32) for which in ("", "negative_") for size in SIZES_OF_XL}
        xl("a cat", **same, **call)
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
