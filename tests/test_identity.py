"""The identity of a base follows everything that it is made of, and nothing else."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from huggingface_hub import constants
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors.torch import load_file, save_file

from components import cache, prepare
from components.params import load_params
from components.training import open_cache
from pnp_core import models
from pnp_core.files import read_json
from pnp_core.identity import base_identity
from pnp_core.model_files import hub_revision, weights_hash
from pnp_core.models import load_pipeline, load_unet
from tests import toy
from tests.cases import few_of
from tests.test_single_file import original_layout, save_configs, sd15_pipeline

pytest_plugins = ["tests.toy"]


def alter(file: Path) -> None:
    """Change one weight, or one entry of a config or a vocabulary."""
    if file.suffix == ".safetensors":
        tensors = load_file(file)
        name = next(name for name, x in tensors.items() if x.is_floating_point())
        tensors[name] = tensors[name] + 1
        save_file(tensors, file, metadata={"format": "pt"})
    else:
        file.write_text(json.dumps({**json.loads(file.read_text()), "altered": 1}))


@pytest.fixture
def base(toy_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(toy_folder, tmp_path / "base")


@pytest.mark.parametrize(
    ("file", "part"),
    [
        ("unet/diffusion_pytorch_model.safetensors", "unet"),
        ("unet/config.json", "unet"),
        ("scheduler/scheduler_config.json", "scheduler"),
        ("text_encoder/model.safetensors", "text"),
        ("text_encoder/config.json", "text"),
        ("tokenizer/tokenizer.json", "text"),
        ("tokenizer/tokenizer_config.json", "text"),
        ("vae/diffusion_pytorch_model.safetensors", "vae"),
        ("vae/config.json", "vae"),
    ],
)
def test_each_file_of_a_base_is_in_the_identity_of_its_part_alone(
    base: Path, file: str, part: str
) -> None:
    before = base_identity(base)
    alter(base / file)
    after = base_identity(base)
    changed = {name for name in asdict(before) if asdict(before)[name] != asdict(after)[name]}
    assert changed - {"base_hash"} == {part}
    assert after.base_hash == weights_hash(base)
    assert len(before.differs(after)) == 1


def test_what_stands_for_an_empty_prompt_is_in_the_identity(
    xl_pipe: StableDiffusionXLPipeline, tmp_path: Path
) -> None:
    xl_pipe.save_pretrained(tmp_path / "xl")
    before = base_identity(tmp_path / "xl")
    alter(tmp_path / "xl/text_encoder_2/config.json")
    second = base_identity(tmp_path / "xl")
    index = json.loads((tmp_path / "xl/model_index.json").read_text())
    index["force_zeros_for_empty_prompt"] = not index["force_zeros_for_empty_prompt"]
    (tmp_path / "xl/model_index.json").write_text(json.dumps(index))
    third = base_identity(tmp_path / "xl")
    assert len({before.text, second.text, third.text}) == 3
    assert (before.unet, before.vae) == (third.unet, third.vae)


def test_who_saved_a_base_and_where_is_not_in_its_identity(base: Path) -> None:
    before = base_identity(base)
    config = base / "vae/config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "_diffusers_version": "9", "_name_or_path": "x"}))
    (base / "vae/README.md").write_text("words")
    assert base_identity(shutil.copytree(base, base.parent / "elsewhere")) == before


def test_a_base_that_lacks_a_part_is_named(base: Path) -> None:
    shutil.rmtree(base / "scheduler")
    with pytest.raises(ValueError, match="lacks its folder scheduler/"):
        base_identity(base)
    index = read_json(base / "model_index.json")
    del index["scheduler"]
    (base / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="is no base: it lacks its scheduler folder"):
        base_identity(base)


def test_a_single_file_base_follows_its_weights_and_the_configs_beside_it(
    pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    path = tmp_path / "mine.safetensors"
    tensors = original_layout(sd15_pipeline(pipe))
    save_file(tensors, path)
    save_configs(pipe, tmp_path / "mine")
    before = base_identity(path)
    alter(tmp_path / "mine/vae/config.json")
    assert before.differs(base_identity(path)) == ["VAE"]
    alter(path)
    different = before.differs(base_identity(path))
    assert different == ["UNet", "text encoder or tokenizer", "VAE"]


Hub = Callable[[str | Exception], None]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """``hub(commit)`` sets what the hub answers, or with what it fails; asked anew each time."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def answer(what: str | Exception) -> None:
        def model_info(self: Any, hub_id: str) -> Any:
            if isinstance(what, Exception):
                raise what
            return huggingface_hub.hf_api.ModelInfo(
                id=hub_id, sha=what, private=False, downloads=0, likes=0, tags=[]
            )

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
        hub_revision.cache_clear()

    yield answer
    hub_revision.cache_clear()


def test_a_hub_id_is_known_by_its_revision(hub: Hub) -> None:
    identities = []
    for commit in ("a" * 40, "b" * 40, "a" * 40):
        hub(commit)
        identities.append((base_identity("owner/name"), weights_hash("owner/name")))
    assert identities[0] == identities[2] != identities[1]
    assert identities[0][0].text != identities[1][0].text


def test_without_the_hub_the_revision_is_that_which_lies_here(hub: Hub, tmp_path: Path) -> None:
    hub("a" * 40)
    online = base_identity("owner/name")
    hub(OfflineModeIsEnabled("offline"))
    with pytest.raises(ValueError, match="owner/name: which revision it is can't be told.*offline"):
        base_identity("owner/name")
    refs = tmp_path / "hub/models--owner--name/refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("a" * 40)
    assert base_identity("owner/name") == online


def test_what_is_loaded_from_the_hub_is_the_revision_that_is_recorded(
    hub: Hub, pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub("c" * 40)
    asked = []

    def from_pretrained(path: str, **options: Any) -> Any:
        asked.append(options["revision"])
        return pipe.unet if "subfolder" in options else pipe

    monkeypatch.setattr(models.AutoPipelineForText2Image, "from_pretrained", from_pretrained)
    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", from_pretrained)
    load_pipeline("owner/name")
    load_unet("owner/tuned", base=pipe)
    assert asked == ["c" * 40] * 2


@pytest.mark.parametrize(
    "part", few_of(["text_encoder/model.safetensors", "vae/config.json"], "vae/config.json")
)
def test_storage_never_serves_another_bases_shards(world: Path, part: str, tmp_path: Path) -> None:
    storage = tmp_path / "shared"
    storage.mkdir()
    toy.write_params(world, {**toy.toy_params(), "storage": str(storage)})
    params = load_params(Path("params.yaml"))
    prepare.run(params)
    cache.run(params)
    first = read_json(Path("data/cache/index.json"))
    before = {file: file.read_bytes() for file in storage.rglob("*") if file.is_file()}
    scheduler = load_pipeline(params.base).scheduler
    open_cache(params, scheduler)
    if part == "vae/config.json":
        file = world / "models/base" / part
        file.write_text(file.read_text().replace('"scaling_factor": 1.0', '"scaling_factor": 2.0'))
    else:
        alter(world / "models/base" / part)
    with pytest.raises(ValueError, match="with another (text encoder|VAE)"):
        open_cache(params, scheduler)
    cache.run(params)
    second = read_json(Path("data/cache/index.json"))
    assert second["storage"] != first["storage"]
    kind = "text" if part.startswith("text") else "moments-00000"
    assert second["files"][kind] != first["files"][kind]
    assert all(file.read_bytes() == content for file, content in before.items())
    open_cache(params, scheduler)


def test_a_cache_of_other_settings_than_params_yaml_has_now_is_refused(world: Path) -> None:
    params = load_params(Path("params.yaml"))
    prepare.run(params)
    cache.run(params)
    scheduler = load_pipeline(params.base).scheduler
    section = params.cache.model_copy(update={"num_forward": 48})
    with pytest.raises(ValueError, match="made with num_forward 32, not 48: build the cache again"):
        open_cache(params.model_copy(update={"cache": section}), scheduler)


def test_the_identity_of_the_shipped_base_is_in_the_shipped_guide() -> None:
    root = Path(__file__).parent.parent / "zoo"
    guides = list(root.glob("guide/**/config.json"))
    assert guides
    for config in guides:
        assert read_json(config)["base_hash"] == base_identity(root / "models/base").base_hash


def test_weights_are_read_once_a_process(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []

    def counted(path: Path) -> str:
        read.append(path)
        return "x"

    monkeypatch.setattr("pnp_core.identity.sha256_file", counted)
    assert base_identity(base) == base_identity(base)
    assert len(read) == len(set(read)) > 0
