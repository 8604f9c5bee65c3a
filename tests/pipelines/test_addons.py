"""What people add to their pipelines, together with a guide.

Each is compared with the stock pipeline that has our own denoiser for its UNet (``guided``), or
refused in one sentence.
"""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    MultiControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import (
    AttnProcessor,
    CustomDiffusionAttnProcessor,
    SlicedAttnProcessor,
)
from diffusers.models.embeddings import (
    IPAdapterFaceIDPlusImageProjection,
    MultiIPAdapterImageProjection,
)
from peft import IA3Config, LNTuningConfig, LoHaConfig, LoKrConfig, LoraConfig
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from pnp_core.guide import Guide
from pnp_core.guide.unet import text_attentions
from pnp_core.plug import plug, unplug
from tests.cases import few_of
from tests.pipeline_zoo import PHOTO, SIZE, Parts, controlnet
from tests.reference import CALL, guide_for, guided, rows_run, run

OTHER = PHOTO.rotate(90).point(lambda x: 255 - x)


# IP-Adapter.


def ip_adapter(unet: UNet2DConditionModel) -> dict[str, dict[str, Tensor]]:
    """A random one, as it lies on disk."""
    torch.manual_seed(4)
    width = unet.config.cross_attention_dim
    layers: dict[str, Tensor] = {}
    for number, name in enumerate(n for n in unet.attn_processors if "attn2" in n):
        attention = unet.get_submodule(name.removesuffix(".processor"))
        for kind in "kv":
            weight = 0.2 * torch.randn(attention.inner_dim, width)
            layers[f"{2 * number + 1}.to_{kind}_ip.weight"] = weight
    projection = {
        "proj.weight": torch.randn(4 * width, 32),
        "proj.bias": torch.zeros(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    return {"image_proj": projection, "ip_adapter": layers}


def load_ip_adapter(pipe: Any) -> None:
    pipe.load_ip_adapter(ip_adapter(pipe.unet), subfolder="", weight_name="")


@pytest.mark.parametrize("first", ["adapter", "guide"])
def test_an_ip_adapter_is_loaded_before_or_after_plugging(
    pipe: StableDiffusionPipeline, guide: Guide, first: str
) -> None:
    plain_image = run(pipe, CALL)
    call = {**CALL, "ip_adapter_image": PHOTO}
    reference = copy.deepcopy(pipe)
    load_ip_adapter(reference)
    stock = run(reference, call)
    expected = guided(reference, guide, call)
    if first == "guide":
        plug(pipe, guide)
    load_ip_adapter(pipe)
    if first == "adapter":
        plug(pipe, guide)
    np.testing.assert_allclose(run(pipe, call), expected, atol=1e-5)
    assert not np.allclose(run(pipe, {**call, "ip_adapter_image": OTHER}), expected, atol=1e-3)
    unplug(pipe)
    np.testing.assert_array_equal(run(pipe, call), stock)
    pipe.unload_ip_adapter()
    assert np.array_equal(run(pipe, CALL), plain_image)


def test_an_ip_adapter_unloaded_while_plugged_leaves_the_guide(
    pipe: StableDiffusionPipeline, guide: Guide
) -> None:
    expected = guided(pipe, guide, CALL)
    plug(pipe, guide)
    load_ip_adapter(pipe)
    run(pipe, {**CALL, "ip_adapter_image": PHOTO})
    pipe.unload_ip_adapter()
    np.testing.assert_allclose(run(pipe, CALL), expected, atol=1e-5)


@pytest.mark.parametrize("num_prompts", [1, 2])
def test_an_ip_adapters_embeddings_are_taken_as_kept_for_cfg_or_without(
    pipe: StableDiffusionPipeline, guide: Guide, num_prompts: int
) -> None:
    load_ip_adapter(pipe)
    kept = pipe.prepare_ip_adapter_image_embeds(PHOTO, None, "cpu", 1, True)
    assert [len(each) for each in kept] == [2]
    alone = [each.chunk(2)[1] for each in kept]
    plug(pipe, guide)
    call = {**CALL, "prompt": ["a cat", "a cow"][:num_prompts]}
    call["negative_prompt"] = ["a dog"] * num_prompts
    expected = run(pipe, {**call, "ip_adapter_image": PHOTO})
    for embeds in (kept, alone):
        made = run(pipe, {**call, "ip_adapter_image_embeds": embeds})
        np.testing.assert_allclose(made, expected, atol=1e-5)
    unplug(pipe)
    stock = run(pipe, {**call, "ip_adapter_image": PHOTO})
    made = run(pipe, {**call, "ip_adapter_image_embeds": kept})
    np.testing.assert_allclose(made, stock, atol=1e-5)


def test_an_ip_adapters_scale_and_masks_work(pipe: StableDiffusionPipeline, guide: Guide) -> None:
    load_ip_adapter(pipe)
    call = {**CALL, "ip_adapter_image": PHOTO}
    strong = guided(pipe, guide, call)
    pipe.set_ip_adapter_scale(0.3)
    weak = guided(pipe, guide, call)
    assert not np.allclose(strong, weak, atol=1e-3)
    mask = torch.zeros(1, 1, SIZE, SIZE)
    mask[..., : SIZE // 2] = 1
    masked = guided(pipe, guide, {**call, "cross_attention_kwargs": {"ip_adapter_masks": [mask]}})
    assert not np.allclose(masked, weak, atol=1e-3)


def test_face_embeddings_for_both_prompts_are_refused_and_their_half_works(
    pipe: StableDiffusionPipeline, guide: Guide
) -> None:
    load_ip_adapter(pipe)
    width = pipe.unet.config.cross_attention_dim
    torch.manual_seed(5)
    faces = IPAdapterFaceIDPlusImageProjection(
        embed_dims=width, output_dims=width, hidden_dims=32, id_embeddings_dim=16,
        depth=1, dim_head=8, heads=2, num_tokens=4,
    ).eval()  # fmt: skip
    pipe.unet.encoder_hid_proj = MultiIPAdapterImageProjection([faces])
    faces.clip_embeds = both = torch.randn(2, 1, 5, 32)
    call = {**CALL, "ip_adapter_image_embeds": [torch.randn(2, 1, 16)]}
    unet = pipe.unet
    stock = run(pipe, call)
    plug(pipe, guide)
    with pytest.raises(ValueError, match=r"image_projection_layers\[0\]"):
        run(pipe, call)
    faces.clip_embeds = both.chunk(2)[1]
    made = run(pipe, call)
    assert np.isfinite(made).all() and not np.allclose(made, stock, atol=1e-3)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(made, run(pipe, {**call, "negative_prompt": "red"}), atol=1e-3)
    assert pipe.unet is unet
    unplug(pipe)
    plug(pipe, guide, exact_steps=1)
    with pytest.raises(ValueError, match="FaceID-Plus .* exact_steps=0"):
        run(pipe, call)


def test_custom_diffusion_is_refused_before_and_after_plugging(
    pipe: StableDiffusionPipeline, guide: Guide
) -> None:
    plug(pipe, guide)
    before = run(pipe, CALL)
    layer = text_attentions(pipe.unet)[0]
    own = layer.processor
    layer.set_processor(
        CustomDiffusionAttnProcessor(
            train_q_out=False, hidden_size=layer.inner_dim, cross_attention_dim=32
        )
    )
    with pytest.raises(ValueError, match="use Custom Diffusion unplugged"):
        run(pipe, CALL)
    unplug(pipe)
    with pytest.raises(ValueError, match="use Custom Diffusion unplugged"):
        plug(pipe, guide)
    layer.set_processor(own)
    plug(pipe, guide)
    np.testing.assert_allclose(run(pipe, CALL), before, atol=1e-5)


# Prompts.


def test_compels_embeddings_and_longer_prompts_work(
    pipe: StableDiffusionPipeline, guide: Guide
) -> None:
    torch.manual_seed(5)
    for length in (16, 48):
        c, n = (torch.randn(1, length, 32) for _ in range(2))
        call = {k: v for k, v in CALL.items() if "prompt" not in k}
        guided(pipe, guide, {**call, "prompt_embeds": c, "negative_prompt_embeds": n})


def test_embeddings_with_a_negative_prompt_left_out_are_guided_from_the_empty_one(
    pipe: StableDiffusionPipeline, guide: Guide
) -> None:
    c, _ = pipe.encode_prompt("a cat", "cpu", 1, False)
    call = {k: v for k, v in CALL.items() if "prompt" not in k}
    plug(pipe, guide)
    made = run(pipe, {**call, "prompt_embeds": c})
    expected = run(pipe, {**CALL, "negative_prompt": ""})
    np.testing.assert_allclose(made, expected, atol=1e-5)


def test_textual_inversion_is_loaded_before_or_after_plugging(
    pipe: StableDiffusionPipeline, guide: Guide
) -> None:
    pipe.tokenizer = copy.deepcopy(pipe.tokenizer)
    token = {"<new>": 3 * torch.randn(2, 32, generator=torch.Generator().manual_seed(6))}
    call = {**CALL, "prompt": "a <new> cat", "negative_prompt": "<new>"}
    twin = copy.deepcopy(pipe)
    twin.load_textual_inversion(token)
    expected = guided(twin, guide, call)
    plug(pipe, guide)
    before = run(pipe, call)
    pipe.load_textual_inversion(token)
    made = run(pipe, call)
    np.testing.assert_allclose(made, expected, atol=1e-5)
    assert not np.allclose(made, before, atol=1e-3)


def test_several_prompts_and_images_with_their_own_negatives_work(
    pipe: StableDiffusionPipeline, guide: Guide
) -> None:
    call = {**CALL, "prompt": ["a cat", "a cow"], "negative_prompt": ["a dog", "red"]}
    generators = [torch.Generator().manual_seed(n) for n in range(4)]
    plug(pipe, guide)
    together = pipe(**call, num_images_per_prompt=2, generator=generators).images
    for number, (c, n) in enumerate([("a cat", "a dog")] * 2 + [("a cow", "red")] * 2):
        alone = pipe(
            **{**CALL, "prompt": c, "negative_prompt": n},
            generator=torch.Generator().manual_seed(number),
        ).images
        torch.testing.assert_close(together[number], alone[0], atol=1e-4, rtol=0)


# Adapters of weights.

ADAPTERS: dict[str, Any] = {
    "lora": LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]),
    "dora": LoraConfig(r=4, use_dora=True, target_modules=["to_k", "to_v"]),
    "lora of convolutions": LoraConfig(r=4, target_modules=["conv1", "conv2", "to_k", "proj_in"]),
    "loha": LoHaConfig(r=4, target_modules=["to_q", "to_k", "to_v"]),
    "lokr": LoKrConfig(r=4, target_modules=["to_q", "to_k", "to_v"]),
    "ia3": IA3Config(target_modules=["to_k", "to_v"], feedforward_modules=[]),
    "norms": LNTuningConfig(target_modules=["norm1", "norm2", "conv_norm_out"]),
}
SAVED = LoraConfig(
    r=4, target_modules=["to_q"], modules_to_save=["norm1", "norm2", "conv_norm_out"]
)


def add_adapter(unet: UNet2DConditionModel, kind: str) -> None:
    """One of peft's, with random weights."""
    torch.manual_seed(7)
    unet.add_adapter(copy.deepcopy(ADAPTERS[kind]), adapter_name="style")
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if ".style" in name and "magnitude" not in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    unet.requires_grad_(False)


@pytest.mark.parametrize("kind", ["tiny", "encoder"])
def test_a_lora_on_the_first_convolution_is_added_before_or_after_plugging(
    parts: Parts, pipe: StableDiffusionPipeline, kind: str
) -> None:
    guide = guide_for(pipe.unet, kind)
    twin = copy.deepcopy(pipe)
    plug(twin, guide)
    for each in (pipe, twin):
        torch.manual_seed(7)
        config = LoraConfig(r=4, target_modules=["conv_in", "to_k"], init_lora_weights=False)
        each.unet.add_adapter(config)
        each.unet.requires_grad_(False)
    made = guided(pipe, guide, CALL)
    np.testing.assert_allclose(run(twin, CALL), made, atol=1e-4)
    twin.unet.fuse_lora()
    np.testing.assert_allclose(run(twin, CALL), made, atol=1e-3)


@pytest.mark.parametrize("first", few_of(["adapter", "guide"], "guide"))
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_of_peft_are_added_before_or_after_plugging(
    pipe: StableDiffusionPipeline, guide: Guide, kind: str, first: str
) -> None:
    twin = copy.deepcopy(pipe)
    without = guided(twin, guide, CALL)
    add_adapter(twin.unet, kind)
    expected = guided(twin, guide, CALL)
    assert not np.allclose(expected, without, atol=1e-3)
    if first == "guide":
        plug(pipe, guide)
        run(pipe, CALL)
    add_adapter(pipe.unet, kind)
    if first == "adapter":
        plug(pipe, guide)
    np.testing.assert_allclose(run(pipe, CALL), expected, atol=1e-4)
    pipe.unet.disable_adapters()
    np.testing.assert_allclose(run(pipe, CALL), without, atol=1e-4)


@pytest.mark.parametrize("first", ["adapter", "guide"])
@pytest.mark.parametrize("config", [ADAPTERS["norms"], SAVED], ids=["norms", "saved"])
def test_norms_that_peft_trains_are_guided_as_if_the_unet_had_them(
    pipe: StableDiffusionPipeline, config: Any, first: str
) -> None:
    twin, guide = copy.deepcopy(pipe), guide_for(pipe.unet)
    if first == "guide":
        plug(pipe, guide)
        run(pipe, CALL)
    pipe.unet.add_adapter(copy.deepcopy(config), adapter_name="style")
    if first == "adapter":
        plug(pipe, guide)
    torch.manual_seed(7)
    num_norms = 0
    for name, kept in pipe.unet.named_modules():
        if name.endswith((".ln_tuning_layers.style", ".modules_to_save.style")):
            own = twin.unet.get_submodule(name.rsplit(".", 2)[0])
            with torch.no_grad():
                for parameter, theirs in zip(own.parameters(), kept.parameters(), strict=True):
                    parameter.add_(0.3 * torch.randn_like(parameter))
                    theirs.copy_(parameter)
            num_norms += 1
    assert num_norms > 10
    expected = run(plug(twin, guide), CALL)
    np.testing.assert_allclose(run(pipe, CALL), expected, atol=1e-4)
    unplug(pipe)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.unet.modules())


@pytest.mark.parametrize("first", ["adapter", "guide"])
@pytest.mark.parametrize("part", ["attn2", "ff", "mid_block"])
def test_a_copy_that_peft_keeps_of_another_part_is_refused(
    pipe: StableDiffusionPipeline, part: str, first: str
) -> None:
    guide = guide_for(pipe.unet)
    if first == "guide":
        plug(pipe, guide)
    pipe.unet.add_adapter(LoraConfig(target_modules=["to_q"], modules_to_save=[part]))
    with pytest.raises(ValueError, match=rf"keeps a copy of [\w.]*{part} in this UNet"):
        plug(pipe, guide) if first == "adapter" else run(pipe, CALL)


def test_a_loras_scale_in_cross_attention_kwargs_and_fusing_work(
    pipe: StableDiffusionPipeline, guide: Guide
) -> None:
    add_adapter(pipe.unet, "lora")
    half = {**CALL, "cross_attention_kwargs": {"scale": 0.5}}
    whole, weaker = guided(pipe, guide, CALL), guided(pipe, guide, half)
    assert not np.allclose(whole, weaker, atol=1e-3)
    pipe.fuse_lora(components=["unet"], lora_scale=0.5)
    np.testing.assert_allclose(guided(pipe, guide, CALL), weaker, atol=1e-3)
    pipe.unfuse_lora(components=["unet"])  # which keeps that scale
    np.testing.assert_allclose(guided(pipe, guide, CALL), weaker, atol=1e-3)


@pytest.mark.parametrize("kind", ["tiny", "encoder"])
def test_a_call_with_a_loras_scale_leaves_its_scaling_as_it_was(
    pipe: StableDiffusionPipeline, kind: str
) -> None:
    """An encoder guide leaves the UNet's forward half-way."""
    add_adapter(pipe.unet, "lora")
    layer = text_attentions(pipe.unet)[0].to_k
    before = dict(layer.scaling)
    plug(pipe, guide_for(pipe.unet, kind))
    half = {**CALL, "cross_attention_kwargs": {"scale": 0.5}}
    first = run(pipe, half)
    assert layer.scaling == before
    assert np.array_equal(run(pipe, half), first)


# Helpers that change how the UNet is run.


class Merging(BasicTransformerBlock):
    """As ToMe's blocks: pairs of positions are merged for attention, and taken apart after it."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        merged = hidden_states.unflatten(1, (-1, 2)).mean(dim=2)
        change = super().forward(merged, *args, **kwargs) - merged
        return hidden_states + change.repeat_interleave(2, dim=1)


def merge_tokens(pipe: Any) -> None:
    for module in pipe.unet.modules():
        if type(module) is BasicTransformerBlock:
            module.__class__ = Merging


def cache_deep_blocks(pipe: Any) -> None:
    """As DeepCache: later forwards take what the middle gave in the first.

    It knows the first by the timestep, which pipelines give as the second argument.
    """
    unet, block, kept = pipe.unet, pipe.unet.mid_block, []
    whole, middle = unet.forward, block.forward

    def run_whole(*args: Any, **kwargs: Any) -> Any:
        if args[1].item() == pipe.scheduler.timesteps[0]:
            kept.clear()
        return whole(*args, **kwargs)

    def run_middle(*args: Any, **kwargs: Any) -> Any:
        if not kept:
            kept.append(middle(*args, **kwargs))
        return kept[0]

    unet.forward, block.forward = run_whole, run_middle


HELPERS: dict[str, Callable[[Any], Any]] = {
    "FreeU": lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
    "ToMe": merge_tokens,
    "DeepCache": cache_deep_blocks,
    "attention slicing": lambda pipe: pipe.enable_attention_slicing(1),
    "fused projections": lambda pipe: pipe.fuse_qkv_projections(vae=False),
    "plain processors": lambda pipe: pipe.unet.set_attn_processor(AttnProcessor()),
    "sliced processors": lambda pipe: pipe.unet.set_attn_processor(SlicedAttnProcessor(1)),
    "channels last": lambda pipe: pipe.unet.to(memory_format=torch.channels_last),
    "train mode": lambda pipe: pipe.unet.train(),
    "gradient checkpointing": lambda pipe: (
        pipe.unet.train(), pipe.unet.enable_gradient_checkpointing()
    ),
    "forward chunking": lambda pipe: [
        module.set_chunk_feed_forward(1, dim=1)
        for module in pipe.unet.modules() if isinstance(module, BasicTransformerBlock)
    ],
}  # fmt: skip


@pytest.mark.parametrize("first", few_of(["helper", "guide"], "guide"))
@pytest.mark.parametrize("helper", HELPERS)
def test_helpers_that_change_how_the_unet_is_run_work_before_or_after_plugging(
    pipe: StableDiffusionPipeline, guide: Guide, helper: str, first: str
) -> None:
    twin = copy.deepcopy(pipe)
    HELPERS[helper](twin)
    expected = guided(twin, guide, CALL)
    if first == "guide":
        plug(pipe, guide)
    HELPERS[helper](pipe)
    if first == "helper":
        plug(pipe, guide)
    np.testing.assert_allclose(run(pipe, CALL), expected, atol=1e-4)


@pytest.mark.parametrize(
    "context",
    [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["inference mode", "autocast"],
)
def test_calls_within_a_context_work(
    pipe: StableDiffusionPipeline, guide: Guide, context: Callable[[], Any]
) -> None:
    with context():
        made = guided(pipe, guide, CALL, atol=0.05)
    np.testing.assert_allclose(made, guided(pipe, guide, CALL), atol=0.2)


@pytest.mark.parametrize("method", ["enable_tiling", "enable_slicing"])
def test_the_vaes_helpers_work(pipe: StableDiffusionPipeline, guide: Guide, method: str) -> None:
    getattr(pipe.vae, method)()
    guided(pipe, guide, {**CALL, "output_type": "np"})


def test_clip_skip_works(parts: Parts) -> None:
    """In SDXL: with this version of transformers, that of the stock SD pipeline fails."""
    config = copy.deepcopy(parts.base.text_encoder.config)
    config.num_hidden_layers = 3
    torch.manual_seed(0)
    deep = parts.sdxl(text_encoder=CLIPTextModel(config))
    config = copy.deepcopy(parts.xl.text_encoder_2.config)
    config.num_hidden_layers = 3
    deep["text_encoder_2"] = CLIPTextModelWithProjection(config)
    xl = StableDiffusionXLPipeline(**deep, add_watermarker=False)
    xl.set_progress_bar_config(disable=True)
    call = {**CALL, "height": SIZE, "width": SIZE}
    own = guide_for(xl.unet)
    made = [guided(xl, own, {**call, "clip_skip": skip}) for skip in (None, 1)]
    assert not np.allclose(*made, atol=1e-3)


def test_several_controlnets_and_guess_mode_work(
    pipe: StableDiffusionPipeline, guide: Guide
) -> None:
    nets = [controlnet(pipe.unet) for _ in range(2)]
    for control, image in ((nets[0], PHOTO), (MultiControlNetModel(nets), [PHOTO, OTHER])):
        controlled = StableDiffusionControlNetPipeline.from_pipe(pipe, controlnet=control)
        controlled.set_progress_bar_config(disable=True)
        call = {**CALL, "image": image}
        made = [guided(controlled, guide, {**call, "guess_mode": g}) for g in (False, True)]
        assert not np.allclose(*made, atol=1e-3)


def test_an_ensemble_with_a_refiner_that_is_not_plugged_works(parts: Parts) -> None:
    xl = StableDiffusionXLPipeline(**parts.xl.components, add_watermarker=False)
    xl.set_progress_bar_config(disable=True)
    refining = {**parts.xl.components, "unet": copy.deepcopy(parts.xl.unet)}
    refiner = StableDiffusionXLImg2ImgPipeline(**refining, add_watermarker=False)
    refiner.set_progress_bar_config(disable=True)
    call = {**CALL, "num_inference_steps": 4, "height": SIZE, "width": SIZE, "denoising_end": 0.5}
    made = guided(xl, guide_for(xl.unet), call)
    rest = {**CALL, "num_inference_steps": 4, "denoising_start": 0.5, "image": torch.tensor(made)}
    expected = run(refiner, rest)
    plug(xl, guide_for(xl.unet))
    rows = rows_run(xl.unet)
    handed_over = torch.tensor(run(xl, call))
    assert rows == [1, 1]
    np.testing.assert_allclose(run(refiner, {**rest, "image": handed_over}), expected, atol=1e-4)
    unplug(xl)
