"""Single files in the original Stable Diffusion key layout, as bases and as fine-tunes, offline."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from pnp_core.model_configs import image_size
from pnp_core.model_files import (
    LAYOUTS,
    LORA_FILE,
    check_clip_skip,
    check_same_kind,
    weights_hash,
)
from pnp_core.models import load_pipeline, load_unet
from tests.conftest import changed, same_weights, save_lora

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
OUTER = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE = {
    "conv_shortcut": "nin_shortcut",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0.group_norm": "mid.attn_1.norm",
    "mid_block.attentions.0.to_q": "mid.attn_1.q",
    "mid_block.attentions.0.to_k": "mid.attn_1.k",
    "mid_block.attentions.0.to_v": "mid.attn_1.v",
    "mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out",
    "conv_norm_out": "norm_out",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
}


OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def original_unet_key(key: str, unet: UNet2DConditionModel) -> str:
    """A UNet's key in the layout that Stable Diffusion checkpoints are shared in."""
    per_block = unet.config.layers_per_block + 1
    for ours, theirs in OUTER.items():
        if key.startswith(f"{ours}."):
            return key.replace(ours, theirs)
    for ours, theirs in RESNET.items():
        key = re.sub(rf"(resnets\.\d+)\.{ours}\.", rf"\1.{theirs}.", key)
    if match := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", key):
        kind, number, rest = match.groups()
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(number)}.{rest}"
    match = re.match(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", key)
    assert match is not None, key
    side, block, kind, number, rest = match.groups()
    first = per_block * int(block)
    if kind == "downsamplers":
        return f"input_blocks.{first + per_block}.0.{rest.replace('conv', 'op')}"
    if kind == "upsamplers":
        slot = 2 if unet.config.up_block_types[int(block)] == "CrossAttnUpBlock2D" else 1
        return f"output_blocks.{first + per_block - 1}.{slot}.{rest}"
    slot = 1 if kind == "attentions" else 0
    place = first + int(number)
    return f"input_blocks.{place + 1}.{slot}.{rest}" if side == "down" else (
        f"output_blocks.{place}.{slot}.{rest}"
    )  # fmt: skip


def original_unet(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    return {
        f"model.diffusion_model.{original_unet_key(key, unet)}": value.contiguous()
        for key, value in unet.state_dict().items()
    }


def original_vae(vae: AutoencoderKL) -> dict[str, Tensor]:
    last = len(vae.config.block_out_channels) - 1
    result = {}
    for key, value in vae.state_dict().items():
        if ".attentions." in key and value.ndim == 2:
            value = value[..., None, None]
        for ours, theirs in VAE.items():
            key = key.replace(ours, theirs)
        key = re.sub(r"down_blocks\.(\d)", r"down.\1", key)
        key = re.sub(r"up_blocks\.(\d)", lambda match: f"up.{last - int(match[1])}", key)
        result[f"first_stage_model.{key.replace('resnets', 'block')}"] = value.contiguous()
    return result


def original_text(
    text_encoder: CLIPTextModel, prefix: str = "cond_stage_model.transformer.text_model."
) -> dict[str, Tensor]:
    return {
        prefix + key.removeprefix("text_model."): value.contiguous()
        for key, value in text_encoder.state_dict().items()
    }


def open_clip_text(text_encoder: CLIPTextModelWithProjection) -> dict[str, Tensor]:
    """The second text encoder of SDXL, in OpenCLIP's layout."""
    prefix = "conditioner.embedders.1.model."
    state = text_encoder.state_dict()
    result = {
        "text_projection": state["text_projection.weight"].T,
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        result[f"ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
        for layer in range(text_encoder.config.num_hidden_layers):
            ours, theirs = f"text_model.encoder.layers.{layer}", f"transformer.resblocks.{layer}"
            for a, b in OPEN_CLIP.items():
                result[f"{theirs}.{b}.{kind}"] = state[f"{ours}.{a}.{kind}"]
            qkv = [state[f"{ours}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
            result[f"{theirs}.attn.in_proj_{kind}"] = torch.cat(qkv)
    return {prefix + key: value.contiguous() for key, value in result.items()}


def original_layout(pipe: StableDiffusionPipeline) -> dict[str, Tensor]:
    return {
        **original_unet(pipe.unet),
        **original_vae(pipe.vae),
        **original_text(pipe.text_encoder),
    }


def sd15_pipeline(pipe: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """The toy base with a UNet of Stable Diffusion 1.5's topology, narrow."""
    torch.manual_seed(0)
    pipe.unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32, 64, 64),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    return pipe


def save_configs(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """A diffusers folder without its weights."""
    pipe.save_pretrained(folder)
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()


def test_a_single_file_loads_as_a_base_by_the_configs_in_the_folder_of_its_name(
    pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    base = sd15_pipeline(pipe)
    save_file(original_layout(base), tmp_path / "mine.safetensors")
    with pytest.raises(ValueError, match="32 wide, text width 32.*Put the configs"):
        load_pipeline(tmp_path / "mine.safetensors")
    save_configs(base, tmp_path / "mine")
    loaded = load_pipeline(tmp_path / "mine.safetensors")
    for part in ("unet", "vae", "text_encoder"):
        assert same_weights(getattr(loaded, part), getattr(base, part)), part
    assert loaded.scheduler.config.timestep_spacing == "trailing"
    ours, theirs = (
        p("a cat", num_inference_steps=2, generator=torch.manual_seed(0), output_type="np").images
        for p in (base, loaded)
    )
    # not bit for bit: weights read from a file may be aligned otherwise
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def write_sparse(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A safetensors file of float16 zeros that takes no room on the disk."""
    header, end = {}, 0
    for key, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def from_layout(name: str, part: str) -> torch.nn.Module:
    """A model of the built-in configs, on the meta device."""
    folder = LAYOUTS / name / part
    with torch.device("meta"):
        if part in ("unet", "vae"):
            kind = UNet2DConditionModel if part == "unet" else AutoencoderKL
            return kind.from_config(kind.load_config(folder))
        config = CLIPTextConfig.from_pretrained(folder)
        with_projection = part == "text_encoder_2"
        return (CLIPTextModelWithProjection if with_projection else CLIPTextModel)(config)


@pytest.mark.parametrize(
    ("name", "part", "published"),
    [
        ("sd15", "unet", 859_520_964),
        ("sd15", "vae", 83_653_863),
        ("sd15", "text_encoder", 123_060_480),
        ("sd21", "unet", 865_910_724),
        ("sd21", "vae", 83_653_863),
        ("sd21", "text_encoder", 340_387_840),
        ("sdxl", "unet", 2_567_463_684),
        ("sdxl", "vae", 83_653_863),
        ("sdxl", "text_encoder", 123_060_480),
        ("sdxl", "text_encoder_2", 694_659_840),
    ],
)
def test_built_in_configs_have_the_parameters_of_the_published_models(
    name: str, part: str, published: int
) -> None:
    assert sum(p.numel() for p in from_layout(name, part).parameters()) == published


@pytest.mark.services
def test_a_checkpoint_of_the_true_sd15_layout_loads_as_a_base_without_any_config(
    tmp_path: Path,
) -> None:
    parts = {part: from_layout("sd15", part) for part in ("unet", "vae", "text_encoder")}
    shapes = {
        **original_unet(parts["unet"]),
        **original_vae(parts["vae"]),
        **original_text(parts["text_encoder"]),
    }
    write_sparse(tmp_path / "sd15.safetensors", {k: tuple(v.shape) for k, v in shapes.items()})
    pipe = load_pipeline(tmp_path / "sd15.safetensors", dtype=torch.float16)
    assert isinstance(pipe, StableDiffusionPipeline)
    for name, part in parts.items():
        loaded = getattr(pipe, name)
        assert {k: v.shape for k, v in loaded.state_dict().items()} == {
            k: v.shape for k, v in part.state_dict().items()
        }
        assert not any(p.any() for p in loaded.parameters()), "read from the file"
    assert pipe.tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]


def test_an_sdxl_file_loads_as_a_base_with_both_text_encoders(
    xl_pipe: StableDiffusionXLPipeline, tmp_path: Path
) -> None:
    first = "conditioner.embedders.0.transformer.text_model."
    save_file(
        {
            **original_unet(xl_pipe.unet),
            **original_vae(xl_pipe.vae),
            **original_text(xl_pipe.text_encoder, first),
            **open_clip_text(xl_pipe.text_encoder_2),
        },
        tmp_path / "xl.safetensors",
    )
    save_configs(xl_pipe, tmp_path / "xl")
    loaded = load_pipeline(tmp_path / "xl.safetensors")
    assert isinstance(loaded, StableDiffusionXLPipeline)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        assert same_weights(getattr(loaded, part), getattr(xl_pipe, part)), part


def test_the_built_in_tokenizer_of_openclips_encoders_pads_with_zeros() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(LAYOUTS / "tokenizer", pad_token="!")
    ids = tokenizer("a cat", padding="max_length").input_ids
    assert ids == [49406, 320, 2368, 49407] + 73 * [0]


def test_what_is_no_whole_checkpoint_is_refused_as_a_base(
    pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    unet_only = tmp_path / "unet.safetensors"
    save_file(original_unet(sd15_pipeline(pipe).unet), unet_only)
    with pytest.raises(ValueError, match="has no VAE: it can be a fine-tune of a base"):
        load_pipeline(unet_only)
    without_text = tmp_path / "no-text.safetensors"
    save_file({**original_unet(pipe.unet), **original_vae(pipe.vae)}, without_text)
    with pytest.raises(ValueError, match="has no text encoder"):
        load_pipeline(without_text)
    save_file(pipe.unet.state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not a checkpoint in the original Stable Diffusion"):
        load_pipeline(tmp_path / "other.safetensors")
    save_lora(pipe.unet, tmp_path)
    with pytest.raises(ValueError, match="is a LoRA: it can be a fine-tune"):
        load_pipeline(tmp_path / "pytorch_lora_weights.safetensors")


@pytest.mark.parametrize("part", ["model.diffusion_model", "first_stage_model", "cond_stage_model"])
def test_a_file_that_lacks_a_weight_is_refused(
    pipe: StableDiffusionPipeline, tmp_path: Path, part: str
) -> None:
    base = sd15_pipeline(pipe)
    save_configs(base, tmp_path / "mine")
    weights = original_layout(base)
    del weights[[name for name in weights if name.startswith(part)][2]]
    save_file(weights, tmp_path / "mine.safetensors")
    with pytest.raises(ValueError, match=r"mine.safetensors .*(missing|lacks).*get it again"):
        load_pipeline(tmp_path / "mine.safetensors")
    if part == "model.diffusion_model":
        with pytest.raises(ValueError, match=r"mine.safetensors .* missing; get it again"):
            load_unet(tmp_path / "mine.safetensors", base=base)


def test_a_truncated_file_is_refused(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    save_file(original_layout(sd15_pipeline(pipe)), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged or only partly downloaded"):
        load_pipeline(path)
    with pytest.raises(ValueError, match="damaged or only partly downloaded"):
        load_unet(path, base=pipe)


def test_configs_that_do_not_fit_the_file_are_refused_naming_both(
    pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    base = sd15_pipeline(pipe)
    save_file(original_layout(base), tmp_path / "mine.safetensors")
    base.unet = UNet2DConditionModel.from_config({**base.unet.config, "cross_attention_dim": 48})
    save_configs(base, tmp_path / "mine")
    with pytest.raises(ValueError, match=r"mine.safetensors don't fit the configs in .*mine:"):
        load_pipeline(tmp_path / "mine.safetensors")


def test_the_hash_of_a_single_file_base_follows_its_scheduler(
    pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    path = tmp_path / "mine.safetensors"
    save_file(original_layout(sd15_pipeline(pipe)), path)
    save_configs(pipe, tmp_path / "mine")
    before = weights_hash(path)
    pipe.scheduler.register_to_config(prediction_type="v_prediction")
    save_configs(pipe, tmp_path / "mine")
    assert weights_hash(path) != before


@pytest.mark.parametrize("architecture", ["sd", "xl"])
def test_a_single_file_loads_as_a_fine_tune(
    pipe: StableDiffusionPipeline,
    xl_pipe: StableDiffusionXLPipeline,
    tmp_path: Path,
    architecture: str,
) -> None:
    base = sd15_pipeline(pipe) if architecture == "sd" else xl_pipe
    tuned = changed(base.unet)
    save_file(original_unet(tuned), tmp_path / "tuned.safetensors")
    assert same_weights(load_unet(tmp_path / "tuned.safetensors", base=base), tuned)
    base.unet = UNet2DConditionModel.from_config({**base.unet.config, "cross_attention_dim": 16})
    with pytest.raises(ValueError, match="is not a fine-tune of the base"):
        load_unet(tmp_path / "tuned.safetensors", base=base)


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_the_size_of_a_bases_images_is_told_by_its_configs(
    pipe: StableDiffusionPipeline, tmp_path: Path, name: str
) -> None:
    assert image_size(LAYOUTS / name) == {"sd15": 512, "sd21": 768, "sdxl": 1024}[name]
    pipe.save_pretrained(tmp_path / "base")
    assert image_size(tmp_path / "base") == pipe.unet.config.sample_size * pipe.vae_scale_factor


def lora_by_kohya(lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A LoRA's weights under the names of kohya's tools."""
    found = {}
    for key, value in lora.items():
        module, matrix = key.removeprefix("unet.").removesuffix(".weight").rsplit(".lora_", 1)
        end = {"A": "lora_down", "B": "lora_up"}[matrix]
        found[f"lora_unet_{module.replace('.', '_')}.{end}.weight"] = value
    return found


@pytest.mark.parametrize("form", ["single file", "LoRA", "kohya's LoRA"])
def test_of_a_file_shapes_tell_without_loading_whether_it_is_for_the_base(
    pipe: StableDiffusionPipeline, tmp_path: Path, form: str
) -> None:
    file = tmp_path / "tuned.safetensors"
    if form == "single file":
        save_file(original_unet(pipe.unet), file)
    else:
        save_lora(pipe.unet, tmp_path)
        weights = load_file(tmp_path / LORA_FILE)
        save_file(weights if form == "LoRA" else lora_by_kohya(weights), file)
    pipe.save_pretrained(tmp_path / "base")
    check_same_kind(file, tmp_path / "base")
    with_other = {**pipe.unet.config, "cross_attention_dim": 16}
    pipe.unet = UNet2DConditionModel.from_config(with_other)
    pipe.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="no fine-tune of .*cross_attention_dim 32, the base's 16"):
        check_same_kind(file, tmp_path / "other")


@pytest.mark.parametrize(("name", "skipped"), [("sd15", 12), ("sd21", 23), ("sdxl", 1)])
def test_configs_tell_how_many_layers_can_be_skipped(name: str, skipped: int) -> None:
    tuned = LAYOUTS / name / "unet"  # without a text encoder of its own
    if name != "sdxl":
        check_clip_skip(tuned, LAYOUTS / name, skipped - 1)
    check_clip_skip(tuned, LAYOUTS / name, 0)
    with pytest.raises(ValueError, match="clip_skip is"):
        check_clip_skip(tuned, LAYOUTS / name, skipped)
