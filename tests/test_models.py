"""Models as people share them: folders and LoRAs. Single files have tests of their own."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import (
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file

from pnp_core.model_files import check_model_files, weights_hash
from pnp_core.models import encode_prompts, load_pipeline, load_unet
from tests.conftest import changed, same_weights, save_lora


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


def kohya_lora(folder: Path) -> dict[str, torch.Tensor]:
    """The LoRA of a folder in the key layout of kohya's tools."""
    result = {}
    for key, value in load_file(folder / "pytorch_lora_weights.safetensors").items():
        module, kind = key.split(".lora_")
        name = "lora_unet_" + module.removeprefix("unet.").replace(".", "_")
        result[f"{name}.lora_{'down' if kind == 'A.weight' else 'up'}.weight"] = value
        result[f"{name}.alpha"] = torch.tensor(4.0)
    return result


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("architecture", ["sd", "xl"])
def test_a_lora_file_loads_as_a_fine_tune(
    pipe: StableDiffusionPipeline,
    xl_pipe: StableDiffusionXLPipeline,
    tmp_path: Path,
    architecture: str,
    layout: str,
) -> None:
    base = pipe if architecture == "sd" else xl_pipe
    save_lora(base.unet, tmp_path)
    expected = load_unet(tmp_path, base=base)
    assert not same_weights(expected, base.unet)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    if layout == "kohya":
        save_file(kohya_lora(tmp_path), tmp_path / "style.safetensors")
        file = tmp_path / "style.safetensors"
    merged, weights = load_unet(file, base=base).state_dict(), expected.state_dict()
    for key, value in weights.items():
        torch.testing.assert_close(merged[key], value)


def test_a_loras_text_encoder_part_leaves_the_base_alone(
    pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    save_lora(pipe.unet, tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    name = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_"
    text = {f"{name}A.weight": torch.ones(4, 32), f"{name}B.weight": torch.ones(32, 4)}
    save_file({**load_file(file), **text}, file)
    before = copy.deepcopy(pipe.text_encoder.state_dict())
    load_unet(file, base=pipe)
    after = pipe.text_encoder.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[k], before[k]) for k in before)


def test_a_lora_of_another_unet_is_refused(
    pipe: StableDiffusionPipeline, xl_pipe: StableDiffusionXLPipeline, tmp_path: Path
) -> None:
    save_lora(xl_pipe.unet, tmp_path)
    with pytest.raises(ValueError, match="is not for the base's UNet"):
        load_unet(tmp_path, base=pipe)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_a_lora_of_which_a_part_has_no_module_in_the_unet_is_refused(
    pipe: StableDiffusionPipeline, tmp_path: Path, layout: str
) -> None:
    deeper = UNet2DConditionModel.from_config({**pipe.unet.config, "layers_per_block": 2})
    save_lora(deeper, tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    if layout == "kohya":
        save_file(kohya_lora(tmp_path), file)
    # to_q and to_v of two attentions in each transformer: 6 of these, where the base has 4.
    with pytest.raises(ValueError, match=r"lacks 8 of the 24 modules .* such as \w+_blocks\."):
        load_unet(file, base=pipe)


def test_a_fine_tune_of_another_architecture_is_refused_naming_both(
    pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    other = UNet2DConditionModel.from_config({**pipe.unet.config, "cross_attention_dim": 48})
    other.save_pretrained(tmp_path / "other/unet")
    with pytest.raises(ValueError, match="it has text_dim = 48, the base has 32"):
        load_unet(tmp_path / "other", base=pipe)


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
    torch.testing.assert_close(text.states_NLD, torch.cat([c, n[:1]]))
    torch.testing.assert_close(text.pooled_NP, torch.cat([pooled, pooled_n[:1]]))


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
