"""Judges: which networks can be one, what they see, and which are refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    BertConfig,
    BertModel,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetModel,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTModel,
)

from components.inputs import check_judge
from components.judging import INCEPTION, Judge
from components.references import judge_hash

pytest_plugins = ["tests.toy"]

CPU = torch.device("cpu")
IMAGES = np.random.default_rng(0).integers(0, 255, (5, 40, 40, 3), dtype=np.uint8)
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 32,
    "patch_size": 8,
}


def saved(model: Any, folder: Path) -> Path:
    """The model in a folder, with an image processor for 32 pixels."""
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def resnet() -> ResNetModel:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1])
    return ResNetModel(config)


def siglip() -> SiglipModel:
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
    return SiglipModel(SiglipConfig(text_config=text, vision_config=SMALL))


@pytest.mark.parametrize(
    ("model", "num_features"),
    [
        (lambda: ViTModel(ViTConfig(**SMALL)), 16),
        (lambda: ViTModel(ViTConfig(**SMALL), add_pooling_layer=False), 16),
        (lambda: Dinov2Model(Dinov2Config(**SMALL)), 16),
        (resnet, 12),
        (siglip, 16),
    ],
    ids=["ViT", "ViT without pooling", "DINOv2", "ResNet", "SigLIP"],
)
def test_an_image_model_of_transformers_gives_one_vector_an_image(
    model: Any, num_features: int, tmp_path: Path
) -> None:
    folder = saved(model(), tmp_path / "judge")
    check_judge(str(folder))
    judge = Judge(str(folder), CPU, batch_size=2)
    features = judge.features(IMAGES)
    assert features.shape == (5, num_features) and not judge.reads_text
    assert judge.name.endswith(f"{num_features} features)") and folder.as_posix() in judge.name
    np.testing.assert_allclose(judge.features(IMAGES[3:]), features[3:], atol=1e-5)


def test_a_classifier_without_weights_that_pool_gives_the_mean_of_its_tokens(
    tmp_path: Path,
) -> None:
    model = ViTForImageClassification(ViTConfig(**SMALL)).eval()
    judge = Judge(str(saved(model, tmp_path / "judge")), CPU)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "judge")
    pixels = processor(list(IMAGES), return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = model.vit(pixels).last_hidden_state.mean(dim=1)
    np.testing.assert_allclose(judge.features(IMAGES), expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("kind", ["CLIP", "ViT"])
def test_a_judge_that_lacks_a_weight_is_refused(
    kind: str, tmp_path: Path, untouched_world: Path
) -> None:
    folder = tmp_path / "judge"
    if kind == "CLIP":
        shutil.copytree(untouched_world / "models/judge", folder)
    else:
        saved(ViTModel(ViTConfig(**SMALL)), folder)
    weights = load_file(folder / "model.safetensors")
    del weights[next(name for name in weights if "layer" in name)]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"evaluate.judges: {folder} lacks 1 weights of the"):
        Judge(str(folder), CPU)


def test_an_image_model_of_timm_is_a_judge(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    name = "resnet10t.c3_in1k"
    model = timm.create_model(name, num_classes=0)
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architecture": "resnet10t",
        "num_classes": 0,
        "num_features": 512,
        "pretrained_cfg": {**model.pretrained_cfg, "input_size": [3, 32, 32]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    check_judge(str(tmp_path))
    assert Judge(str(tmp_path), CPU).features(IMAGES).shape == (5, 512)


def test_a_folder_without_safetensors_or_without_a_processor_is_refused_by_name(
    tmp_path: Path,
) -> None:
    model = ViTModel(ViTConfig(**SMALL))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"pickled weights \(pytorch_model.bin\), and nothing is"):
        Judge(str(tmp_path), CPU)
    (tmp_path / "model.safetensors").write_bytes(b"no weights, and a long header")
    with pytest.raises(ValueError, match=f"evaluate.judges: {tmp_path} is not a CLIP or another"):
        Judge(str(tmp_path), CPU)
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="evaluate.judges: .*bare is not a CLIP or another image"):
        Judge(str(tmp_path / "bare"), CPU)


def test_files_that_a_judge_can_not_open_are_refused_without_opening_them(tmp_path: Path) -> None:
    folder = saved(ViTModel(ViTConfig(**SMALL)), tmp_path / "judge")
    (folder / INCEPTION).write_bytes(b"half of a download")
    with pytest.raises(ValueError, match=f"{INCEPTION} is damaged or only partly downloaded"):
        check_judge(str(folder))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"only pickled weights \(.*pytorch_model.bin\)"):
        check_judge(str(folder))


def test_a_model_of_text_is_refused_as_a_judge(tmp_path: Path) -> None:
    small = {k: v for k, v in SMALL.items() if k not in ("image_size", "patch_size")}
    folder = saved(BertModel(BertConfig(**small, vocab_size=20)), tmp_path / "text")
    with pytest.raises(ValueError, match="evaluate.judges: .*text gives no features"):
        Judge(str(folder), CPU)


def test_a_judge_whose_features_are_no_numbers_is_refused(tmp_path: Path) -> None:
    model = ViTModel(ViTConfig(**SMALL))
    with torch.no_grad():
        model.pooler.dense.bias[0] = float("nan")
    folder = saved(model, tmp_path / "broken")
    with pytest.raises(ValueError, match="features of .*broken do not fit: .* 94% of them finite"):
        Judge(str(folder), CPU)


def test_the_hash_of_a_judge_is_of_its_weights_and_settings(tmp_path: Path) -> None:
    folder = saved(ViTModel(ViTConfig(**SMALL)), tmp_path / "judge")
    before = judge_hash(str(folder))
    (folder / "README.md").write_text("a note")
    assert judge_hash(str(folder)) == before
    settings = folder / "preprocessor_config.json"
    settings.write_text(settings.read_text().replace("32", "24"))
    assert judge_hash(str(folder)) != before
