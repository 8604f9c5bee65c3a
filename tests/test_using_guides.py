"""docs/using-guides.md: every example runs."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from huggingface_hub import ModelCard
from PIL import Image
from ruamel.yaml import YAML
from safetensors.torch import save_file

from components.params import load_params, teacher_guider
from pnp_core.bundle import GuideBundle
from pnp_core.guide import Guide, GuideConfig
from tests import toy
from tests.conftest import changed, roused, save_lora
from tests.test_single_file import original_layout, original_unet, save_configs

PAGE = (Path(__file__).parent.parent / "docs/using-guides.md").read_text()
TINY = GuideConfig(max_parameters_ratio=0.2)


def blocks(language: str) -> dict[str, str]:
    """The page's code blocks by the heading above them."""
    result: dict[str, str] = {}
    for section in re.split(r"^#+ ", PAGE, flags=re.MULTILINE)[1:]:
        heading = section.splitlines()[0]
        for number, code in enumerate(re.findall(rf"```{language}\n(.*?)```", section, re.S)):
            result[f"{heading} {number + 1}" if number else heading] = code
    return result


PRELUDE, *_ = blocks("python").values()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the examples find in the working directory."""
    folder = tmp_path_factory.mktemp("examples")
    torch.manual_seed(0)
    base = toy.make_pipeline(folder / "tokenizer")
    xl = toy.make_xl_pipeline(base)
    models, guides = folder / "models", folder / "guides"
    base.save_pretrained(models / "base")
    xl.save_pretrained(models / "sdxl")
    ControlNetModel.from_unet(
        base.unet, conditioning_embedding_out_channels=(8, 8, 8, 8)
    ).save_pretrained(models / "controlnet")
    save_lora(base.unet, models / "style-lora")
    save_file(original_unet(changed(base.unet)), models / "style.safetensors")
    save_file(original_layout(base), models / "mine.safetensors")
    save_configs(base, models / "mine")
    made = {
        num_steps: roused(
            Guide.from_unet(base.unet, TINY, num_steps=num_steps, timestep_spacing="trailing")
        )
        for num_steps in (4, 16)
    }
    GuideBundle(made).save(guides / "bundle")
    roused(Guide.from_unet(xl.unet, TINY)).save_pretrained(guides / "sdxl")
    Image.new("RGB", (32, 32), (200, 40, 90)).save(folder / "photo.png")
    Image.new("L", (32, 32), 255).save(folder / "mask.png")
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model hub in the working directory."""

    class Repository:
        def __init__(self, repo_id: str, **options: Any) -> None:
            self.repo_id = repo_id

    def upload_folder(repo_id: str, folder_path: str, **options: Any) -> None:
        shutil.copytree(folder_path, repo_id)

    module = "diffusers.utils.hub_utils"
    monkeypatch.setattr(f"{module}.create_repo", Repository)
    monkeypatch.setattr(f"{module}.upload_folder", upload_folder)
    monkeypatch.setattr(
        f"{module}.load_or_create_model_card", lambda *a, **k: ModelCard("---\n---")
    )


@pytest.fixture
def here(files: Path, hub: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory of one example."""
    for entry in files.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    # Compiling takes long and has a test of its own; without a GPU there is none to offload from.
    monkeypatch.setattr(UNet2DConditionModel, "compile", lambda unet: None)
    if not torch.cuda.is_available():
        monkeypatch.setattr("diffusers.pipelines.pipeline_utils.get_device", lambda: "cpu:0")


@pytest.mark.parametrize("heading", list(blocks("python"))[1:])
def test_an_example_runs(here: None, heading: str) -> None:
    names: dict[str, Any] = {}
    exec(PRELUDE, names)
    exec(blocks("python")[heading], names)
    if "image = " in blocks("python")[heading]:
        assert isinstance(names["image"], Image.Image)
        assert names["image"].size == (32, 32)


def test_the_example_of_a_teacher_is_valid_in_params_yaml(tmp_path: Path) -> None:
    (example,) = blocks("yaml").values()
    toy.write_params(tmp_path, {**toy.toy_params(), **YAML(typ="safe").load(example)})
    guider = teacher_guider(load_params(tmp_path / "params.yaml"))
    assert guider.name == "AdaptiveProjectedGuidance"


def test_pushing_a_guide_uploads_its_config_and_safetensors(here: None) -> None:
    pipe = StableDiffusionPipeline.from_pretrained("models/base", safety_checker=None)
    guide = roused(Guide.from_unet(pipe.unet, TINY, base_hash="abc", guidance_scale_range=[1, 6]))
    guide.push_to_hub("me/my-guide")
    assert {file.name for file in Path("me/my-guide").iterdir()} == {
        "README.md",
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    pulled = Guide.from_pretrained("me/my-guide")
    assert pulled.weights_digest() == guide.weights_digest()
    assert (pulled.config.base_hash, pulled.config.guidance_scale_range) == ("abc", [1, 6])


@pytest.mark.parametrize("page", ["README.md", "zoo/README.md"])
def test_the_example_on_the_front_page_runs_on_the_embedded_world(page: str) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", Path(page).read_text(), re.S)
    found: dict[str, Any] = {}
    exec(code.replace("\npipe(", "\nimage = pipe("), found)
    assert found["image"].size == (64, 64)
