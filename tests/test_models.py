"""Models as people share them: folders and LoRAs. Single files have tests of their own."""

import copy
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers import (
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from pnp_core.model_files import check_base, check_model_files, check_same_kind, weights_hash
from pnp_core.models import encode_prompts, load_pipeline, load_unet
from tests.cases import few_of
from tests.conftest import changed, same_weights, save_lora
from tests.test_single_file import original_unet_key


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


def kohya_lora(
    folder: Path, original: UNet2DConditionModel | None = None
) -> dict[str, torch.Tensor]:
    """The LoRA of a folder in the key layout of kohya's tools, as they name an SDXL UNet's modules
    if it is given."""
    result = {}
    for key, value in load_file(folder / "pytorch_lora_weights.safetensors").items():
        module, kind = key.removeprefix("unet.").split(".lora_")
        if original is not None:
            module = original_unet_key(f"{module}.", original).removesuffix(".")
        name = "lora_unet_" + module.replace(".", "_")
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
    with pytest.raises(
        ValueError, match=r"of the 24 modules .* find 8 there, such as \w+_blocks\."
    ):
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


def test_a_pipeline_without_a_unet_is_refused_by_its_class(tmp_path: Path) -> None:
    (tmp_path / "sd3/transformer").mkdir(parents=True)
    parts = {"transformer": ["diffusers", "SD3Transformer2DModel"], "unet": [None, None]}
    index = {"_class_name": "StableDiffusion3Pipeline", **parts}
    (tmp_path / "sd3/model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="sd3 is a StableDiffusion3Pipeline, not a Stable Diffu"):
        check_model_files(tmp_path / "sd3")


@pytest.mark.parametrize(
    ("lacks", "message"),
    [
        ("tokenizer", "lacks its folder tokenizer/"),
        ("scheduler", "lacks its folder scheduler/"),
        ("scheduler/scheduler_config.json", "scheduler lacks scheduler_config.json"),
        ("unet/config.json", "unet lacks config.json"),
    ],
)
def test_a_pipeline_that_lacks_a_part_of_its_index_is_refused_by_that_part(
    toy_folder: Path, tmp_path: Path, lacks: str, message: str
) -> None:
    base = tmp_path / "base"
    shutil.copytree(toy_folder, base)
    check_model_files(base)
    shutil.rmtree(base / lacks) if (base / lacks).is_dir() else (base / lacks).unlink()
    with pytest.raises(ValueError, match=message):
        check_model_files(base)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_weights_of_another_name_than_is_loaded_are_refused_by_both_names(
    toy_folder: Path, tmp_path: Path, part: str
) -> None:
    base = tmp_path / "base"
    shutil.copytree(toy_folder, base)
    (weights,) = (base / part).glob("*.safetensors")
    weights.rename(weights.with_suffix(".fp16.safetensors"))
    name = weights.name.replace(".", r"\.")
    with pytest.raises(ValueError, match=rf"has \w+\.fp16\.safetensors and no {name}, the name"):
        check_model_files(base)


JUNK = {"weight": torch.zeros(1)}
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"
PEFT = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"
LOHA = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.hada_w1_a"


@pytest.mark.parametrize("suffix", ["style.safetensors", "style/pytorch_lora_weights.safetensors"])
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([], "it is empty"),
        (["emb_params"], "no Stable Diffusion UNet, and is no LoRA for one: .* emb_params"),
        (["decoder.conv_in.weight"], "no Stable Diffusion UNet, and is no LoRA for one"),
        ([TEXT], "has nothing for a UNet"),
        ([PEFT], "has nothing for a UNet"),
        (["lora_x.weight"], "has nothing for a UNet"),
        ([LOHA], "of a kind that diffusers does not read: it has .*hada_w1_a"),
    ],
    ids=["empty", "textual inversion", "VAE", "text encoder", "peft", "junk", "LoHa"],
)
def test_a_file_that_has_nothing_for_a_unet_is_refused_by_its_header(
    tmp_path: Path, keys: list[str], message: str, suffix: str
) -> None:
    file = tmp_path / suffix
    file.parent.mkdir(exist_ok=True)
    save_file({key: torch.zeros(4, 32) for key in keys}, file)
    with pytest.raises(ValueError, match=message):
        check_model_files(file if file.parent == tmp_path else file.parent)


# Every kind of module that LoRAs are trained for.
ADAPTED = ["to_q", "to_k", "to_out.0", "ff.net.0.proj", "proj_in", "conv1", "conv_shortcut"]
ADAPTED += ["time_emb_proj", "conv_in", "linear_1", "downsamplers.0.conv"]


def lora_for(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """A random LoRA for a UNet, in the layout of diffusers."""
    adapted = copy.deepcopy(unet)
    adapted.add_adapter(LoraConfig(r=4, target_modules=ADAPTED, init_lora_weights=False))
    return {f"unet.{key}": value for key, value in get_peft_model_state_dict(adapted).items()}


def as_earlier(lora: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A LoRA's attentions in the layout of diffusers before peft."""
    found = {}
    for key, value in lora.items():
        if module := re.fullmatch(r"(.+attn\d)\.(to_\w+)(?:\.0)?\.lora_([AB])\.weight", key):
            end = {"A": "down", "B": "up"}[module[3]]
            found[f"{module[1]}.processor.{module[2]}_lora.{end}.weight"] = value.contiguous()
    assert found
    return found


@pytest.mark.parametrize("layout", few_of(["diffusers", "earlier", "kohya"], "kohya"))
def test_a_loras_modules_are_compared_with_the_bases_in_every_layout_that_loads(
    pipe: StableDiffusionPipeline, toy_folder: Path, tmp_path: Path, layout: str
) -> None:
    def saved(unet: UNet2DConditionModel) -> Path:
        file = tmp_path / "pytorch_lora_weights.safetensors"
        lora = lora_for(unet)
        save_file(as_earlier(lora) if layout == "earlier" else lora, file)
        if layout == "kohya":
            save_file(kohya_lora(tmp_path), file)
        return file

    check_same_kind(saved(pipe.unet), toy_folder)
    assert not same_weights(load_unet(tmp_path, base=pipe), pipe.unet)
    for change in ({"block_out_channels": (32, 96)}, {"layers_per_block": 2}):
        file = saved(UNet2DConditionModel.from_config({**pipe.unet.config, **change}))
        with pytest.raises(ValueError, match="is no LoRA for the base: its .*lora"):
            check_same_kind(file, toy_folder)
        with pytest.raises(ValueError, match="is not for the base's UNet"):
            load_unet(file, base=pipe)


def test_an_sdxl_lora_of_kohyas_is_merged_whole_under_its_original_names(
    xl_pipe: StableDiffusionXLPipeline, tmp_path: Path
) -> None:
    xl_pipe.save_pretrained(tmp_path / "base")
    save_file(lora_for(xl_pipe.unet), tmp_path / "pytorch_lora_weights.safetensors")
    expected = load_unet(tmp_path / "pytorch_lora_weights.safetensors", base=xl_pipe).state_dict()
    save_file(kohya_lora(tmp_path, xl_pipe.unet), tmp_path / "style.safetensors")
    check_same_kind(tmp_path / "style.safetensors", tmp_path / "base")
    merged = load_unet(tmp_path / "style.safetensors", base=xl_pipe).state_dict()
    for key, value in expected.items():
        torch.testing.assert_close(merged[key], value)


def test_a_unet_in_a_file_of_its_own_is_compared_by_its_shapes(
    pipe: StableDiffusionPipeline, toy_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "tuned.safetensors"
    save_file(pipe.unet.state_dict(), file)
    check_model_files(file)
    check_same_kind(file, toy_folder)
    other = UNet2DConditionModel.from_config({**pipe.unet.config, "cross_attention_dim": 48})
    save_file(other.state_dict(), file)
    with pytest.raises(ValueError, match="its UNet has cross_attention_dim 48, the base's 32"):
        check_same_kind(file, toy_folder)


def test_a_unet_or_a_lora_alone_is_refused_as_a_base_before_it_is_loaded(
    pipe: StableDiffusionPipeline, toy_folder: Path, tmp_path: Path
) -> None:
    check_base(toy_folder)
    shutil.copytree(toy_folder / "unet", tmp_path / "tuned/unet")
    save_lora(pipe.unet, tmp_path / "lora")
    for alone in ("tuned", "lora", "lora/pytorch_lora_weights.safetensors"):
        check_model_files(tmp_path / alone)
        for refused in (check_base, load_pipeline, lambda path: check_same_kind(path, path)):
            with pytest.raises(ValueError, match="can be a fine-tune of a base, but not a base"):
                refused(tmp_path / alone)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        *(("model_index.json", "[]"), ("unet/config.json", "[]"), ("vae/config.json", "[]")),
        *(("text_encoder/config.json", "{"), ("scheduler/scheduler_config.json", "[]")),
        *(("tokenizer/tokenizer.json", "{"), ("tokenizer/tokenizer_config.json", "5")),
    ],
)
def test_a_config_that_is_no_object_is_named_before_anything_is_loaded(
    toy_folder: Path, tmp_path: Path, file: str, content: str
) -> None:
    shutil.copytree(toy_folder, tmp_path / "base")
    (tmp_path / "base" / file).write_text(content)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/base/{file} is damaged \("):
        check_model_files(tmp_path / "base")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_weight_of_another_shape_is_told_with_its_base_and_without_a_librarys_advice(
    toy_folder: Path, tmp_path: Path, part: str
) -> None:
    shutil.copytree(toy_folder, tmp_path / "base")
    (file,) = (tmp_path / "base" / part).glob("*.safetensors")
    weights = load_file(file)
    name = min(weights)
    save_file({**weights, name: torch.zeros(3, 5)}, file, {"format": "pt"})
    message = rf"{tmp_path}/base(/{part})? is damaged \(.* expected shape .*\): get it again\.$"
    with pytest.raises(ValueError, match=message):
        load_pipeline(tmp_path / "base")


def test_a_fine_tune_with_a_weight_of_another_shape_is_told_without_a_librarys_advice(
    pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    pipe.unet.save_pretrained(tmp_path / "unet")
    file = tmp_path / "unet/diffusion_pytorch_model.safetensors"
    save_file({**load_file(file), "conv_in.bias": torch.zeros(3, 5)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"The UNet in .* is damaged \(conv_in.*\): get it again"):
        load_unet(tmp_path, base=pipe)


@pytest.mark.parametrize(
    ("file", "entry"),
    [("unet/config.json", "block_out_channels"), ("text_encoder/config.json", "hidden_size")],
)
def test_a_base_whose_config_has_a_value_of_no_such_model_is_named(
    toy_folder: Path, tmp_path: Path, file: str, entry: str
) -> None:
    shutil.copytree(toy_folder, tmp_path / "base")
    config = json.loads((tmp_path / "base" / file).read_text())
    (tmp_path / "base" / file).write_text(json.dumps({**config, entry: "x"}))
    with pytest.raises(ValueError, match=rf"^{tmp_path}/base.* is damaged \(.*{entry}"):
        load_pipeline(tmp_path / "base")


def test_a_text_encoder_has_its_files_weights_whatever_its_config_says_of_their_type(
    toy_folder: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(toy_folder, tmp_path / "base")
    config = base / "text_encoder/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float16"}))
    expected = load_pipeline(toy_folder).text_encoder
    found = load_pipeline(base).text_encoder
    assert found.dtype == torch.float32 and same_weights(found, expected)


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_a_base_that_lacks_a_weight_is_refused_by_the_weights_name(
    toy_folder: Path, tmp_path: Path, part: str
) -> None:
    base = shutil.copytree(toy_folder, tmp_path / "base")
    (file,) = (base / part).glob("*.safetensors")
    weights = load_file(file)
    lost = next(name for name in weights if "layers.0" in name or "block" in name)
    del weights[lost]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{base} can't be used: .* {re.escape(lost)}"):
        load_pipeline(base)
    if part == "unet":
        whole = load_pipeline(toy_folder)
        with pytest.raises(ValueError, match=rf"{base} can't be used: .* {re.escape(lost)}"):
            load_unet(base, base=whole)


@pytest.mark.parametrize("form", ["pipeline", "unet", "lora"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_with_a_weight_that_is_not_finite_is_refused_by_its_path(
    pipe: StableDiffusionPipeline, tmp_path: Path, form: str, value: float
) -> None:
    base = copy.deepcopy(pipe)
    path = tmp_path / "broken"
    if form == "lora":
        save_lora(pipe.unet, path)
        weights = load_file(path / "pytorch_lora_weights.safetensors")
        next(iter(weights.values()))[0, 0] = value
        save_file(weights, path / "pytorch_lora_weights.safetensors")
    else:
        with torch.no_grad():
            next(pipe.unet.parameters()).view(-1)[0] = value
        pipe.save_pretrained(path) if form == "pipeline" else pipe.unet.save_pretrained(
            path / "unet"
        )
    with pytest.raises(ValueError, match=rf"{path}.* of its UNet2DConditionModel holds NaN or inf"):
        load_unet(path, base=base) if form != "pipeline" else load_pipeline(path)
