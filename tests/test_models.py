"""Models as people share them: folders, single files in the original layout, LoRAs."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import (
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file

from pnp_core.models import (
    check_model_files,
    encode_prompts,
    load_pipeline,
    load_unet,
    weights_hash,
)
from tests.conftest import save_lora

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
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def original_key(key: str, unet: UNet2DConditionModel) -> str:
    """A UNet's key in the layout that Stable Diffusion 1.x checkpoints are shared in."""
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


def save_single_file(unet: UNet2DConditionModel, path: Path) -> None:
    tensors = {
        f"model.diffusion_model.{original_key(key, unet)}": value.contiguous()
        for key, value in unet.state_dict().items()
    }
    save_file(tensors, path)


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


def changed(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """As if it had been fine-tuned."""
    other = UNet2DConditionModel.from_config(unet.config)
    torch.manual_seed(1)
    other.load_state_dict(
        {k: v + 0.01 * torch.randn(v.shape) for k, v in unet.state_dict().items()}
    )
    return other


def same_weights(a: UNet2DConditionModel, b: UNet2DConditionModel) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(value, theirs[key]) for key, value in a.state_dict().items())


def test_a_single_file_in_the_original_layout_loads_as_a_fine_tune_offline(
    pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    base = sd15_pipeline(pipe)
    tuned = changed(base.unet)
    save_single_file(tuned, tmp_path / "tuned.safetensors")
    assert same_weights(load_unet(tmp_path / "tuned.safetensors", base=base), tuned)


def test_a_unet_folder_and_a_pipeline_folder_load_as_fine_tunes(
    pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    tuned = changed(pipe.unet)
    tuned.save_pretrained(tmp_path / "only/unet")
    assert same_weights(load_unet(tmp_path / "only", base=pipe), tuned)
    whole = StableDiffusionPipeline(**{**pipe.components, "unet": tuned})
    whole.save_pretrained(tmp_path / "whole")
    assert same_weights(load_unet(tmp_path / "whole", base=pipe), tuned)


def test_a_lora_loads_as_a_fine_tune_and_leaves_the_base_alone(
    pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    adapted = save_lora(pipe.unet, tmp_path)
    merged = load_unet(tmp_path, base=pipe)
    z, t, c = torch.randn(1, 4, 4, 4), torch.tensor([500]), torch.randn(1, 16, 32)
    with torch.no_grad():
        expected, ours = adapted(z, t, c).sample, merged(z, t, c).sample
        plain = pipe.unet(z, t, c).sample
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(ours, plain, atol=1e-3)
    assert all(torch.equal(v, before[k]) for k, v in pipe.unet.state_dict().items())


def test_a_fine_tune_of_another_architecture_is_refused_naming_both(
    pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    other = UNet2DConditionModel.from_config({**pipe.unet.config, "cross_attention_dim": 48})
    other.save_pretrained(tmp_path / "other/unet")
    with pytest.raises(ValueError, match="it has text_dim = 48, the base has 32"):
        load_unet(tmp_path / "other", base=pipe)
    save_single_file(sd15_pipeline(pipe).unet, tmp_path / "sd.safetensors")
    narrower = UNet2DConditionModel.from_config({**pipe.unet.config, "cross_attention_dim": 16})
    pipe.unet = narrower
    with pytest.raises(ValueError, match="is not a fine-tune of the base"):
        load_unet(tmp_path / "sd.safetensors", base=pipe)


def test_text_states_are_those_that_the_pipeline_uses(pipe: StableDiffusionPipeline) -> None:
    prompts = ["a cat", "a red apple", ""]
    expected = pipe.encode_prompt(prompts, "cpu", 1, True)
    states_NLD, pooled_NP = encode_prompts(pipe, prompts)
    assert torch.equal(states_NLD, expected[0])
    assert torch.equal(states_NLD[2], expected[1][0])
    assert pooled_NP is None


@torch.no_grad()
def test_text_states_of_sdxl_are_those_that_the_pipeline_uses(
    xl_pipe: StableDiffusionXLPipeline,
) -> None:
    prompts = ["a cat", "a red apple", ""]
    c, n, pooled, pooled_n = xl_pipe.encode_prompt(prompts[:2], device="cpu")
    text = encode_prompts(xl_pipe, prompts)
    assert text.pooled_NP is not None
    assert torch.equal(text.states_NLD[:2], c) and torch.equal(text.pooled_NP[:2], pooled)
    assert torch.equal(text.states_NLD[2], n[0]) and torch.equal(text.pooled_NP[2], pooled_n[0])


def test_the_hash_of_a_base_follows_its_weights(toy_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(toy_folder, tmp_path / "base")
    assert weights_hash(tmp_path / "base") == weights_hash(toy_folder)
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "base", subfolder="unet")
    changed(unet).save_pretrained(tmp_path / "base/unet")
    assert weights_hash(tmp_path / "base") != weights_hash(toy_folder)


def test_a_missing_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the path does not exist"):
        load_pipeline(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is not a model"):
        load_pipeline(tmp_path / "empty")


def test_a_half_downloaded_base_is_refused_by_file(toy_folder: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(toy_folder, base)
    weights = base / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="diffusion_pytorch_model.safetensors is damaged"):
        load_pipeline(base)
    weights.unlink()
    with pytest.raises(ValueError, match="unet has no weights"):
        load_pipeline(base)
    shutil.rmtree(base / "vae")
    with pytest.raises(ValueError, match="lacks its folder vae|unet has no weights"):
        check_model_files(base)


def test_a_missing_shard_is_named(toy_folder: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(toy_folder, base)
    index = {"weight_map": {"conv_in.weight": "diffusion_pytorch_model-00002.safetensors"}}
    path = base / "unet/diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="lacks diffusion_pytorch_model-00002.safetensors"):
        check_model_files(base)


def test_pickled_weights_are_refused(toy_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"x")
    with pytest.raises(ValueError, match="pickled checkpoint"):
        load_pipeline(tmp_path / "model.ckpt")
    base = tmp_path / "base"
    shutil.copytree(toy_folder, base)
    weights = base / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match="only pickled weights"):
        load_pipeline(base)
