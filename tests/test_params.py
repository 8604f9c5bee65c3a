"""params.yaml: frozen, typed, strict; every complaint is one line that names the key."""

import dataclasses
import json
import re
import runpy
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from pydantic import BaseModel, ValidationError
from safetensors.torch import load_file, save_file

from components.params import (
    Cache,
    Distill,
    Guide,
    Halve,
    Params,
    ParamsError,
    check_files,
    load_params,
)
from pnp_core.models import load_pipeline
from pnp_core.settings import (
    MEMORY_ONLY,
    CacheConfig,
    DistillConfig,
    GuideConfig,
    HalveConfig,
    HalveSettings,
    SettingError,
    TrainConfig,
)
from tests import toy
from tests.test_single_file import original_layout, save_configs

pytest_plugins = ["tests.toy"]

ROOT = Path(__file__).parent.parent
RULE = {"min_gain": 0.5, "ratio": None, "max_loss": None}


def load(folder: Path, params: dict[str, Any]) -> Params:
    toy.write_params(folder, params)
    return load_params(folder / "params.yaml")


def changed(dotted: str, value: Any) -> dict[str, Any]:
    """The toy's parameters with one key set."""
    params = toy.toy_params()
    *sections, key = dotted.split(".")
    place = params
    for section in sections:
        place = place[section]
    place[key] = value
    return params


def test_guides_for_two_steps_or_fewer_are_matched_on_three_times_as_many_samples() -> None:
    made = HalveSettings(start_steps=32, end_steps=1, match_steps=8, match_images=100)
    assert made.matched == {8: 100, 4: 100, 2: 300, 1: 300}
    assert HalveSettings(start_steps=24, end_steps=3, match_steps=4).matched == {3: 6400}
    assert HalveSettings(start_steps=32, end_steps=8, match_steps=4).matched == {}


def test_a_password_in_the_address_of_mlflow_is_refused_and_not_told(tmp_path: Path) -> None:
    for uri in (
        "https://ann:secret@mlflow.example",
        "postgresql+psycopg2://ann:secret@db/mlflow",
        "postgresql://:secret/@#@db/mlflow",
    ):
        with pytest.raises(ParamsError, match="MLFLOW_TRACKING_PASSWORD") as error:
            load(tmp_path, changed("tracking.uri", uri))
        assert "secret" not in str(error.value)
    load(tmp_path, changed("tracking.uri", "postgresql://ann@db/mlflow"))


@pytest.mark.parametrize("section", ["distill", "halve"])
def test_a_batch_that_workers_can_not_share_out_is_refused(tmp_path: Path, section: str) -> None:
    params = changed(f"{section}.batch_size", 512)
    params["cluster"]["num_workers"] = 4
    other = "halve" if section == "distill" else "distill"
    params[other]["batch_size"] = 12
    load(tmp_path, params)
    params["cluster"]["num_workers"] = 6
    with pytest.raises(ParamsError, match=f"{section}.batch_size: 512 can't be shared out .* 6"):
        load(tmp_path, params)


def test_shipped_params_are_valid_and_frozen() -> None:
    params = load_params(ROOT / "params.yaml")
    assert params.models
    with pytest.raises(ValidationError):
        params.distill.num_images = 1  # type: ignore[misc]


MODEL = {"path": "x", "reference": "y"}


def test_names_as_people_have_them(tmp_path: Path) -> None:
    params = toy.toy_params()
    names = ["base", "SDXL_Turbo-v2", "DreamShaper_8", "2024"]
    params["models"] = dict.fromkeys(names, MODEL)
    params["register"]["name"] = "My_Guide-1.5"
    loaded = load(tmp_path, params)
    assert list(loaded.models) == names and loaded.register_.name == "My_Guide-1.5"
    with pytest.raises(ParamsError, match="'My.Model' can't be a name here"):  # for DVC, two levels
        params["models"] = {"My.Model": MODEL}
        load(tmp_path, params)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("distil", {}, "unknown key 'distil', did you mean 'distill'?"),
        ("registr", {}, "unknown key 'registr', did you mean 'register'?"),
        ("distill.lerning_rate", 1, "'distill.lerning_rate', did you mean 'learning_rate'?"),
        ("distill.guide.knd", "tiny", "'distill.guide.knd', did you mean 'kind'?"),
        ("models.base.pth", "x", "unknown key 'models.base.pth', did you mean 'path'?"),
        ("cache.zzz", 1, "unknown key 'cache.zzz'"),
        ("promote.scores", {"fdi": RULE}, "promote.scores.fdi: should be 'fid', 'kid',"),
        ("promote.scores", {"fid": RULE | {"min_gian": 1}}, "min_gian', did you mean 'min_gain'?"),
        ("promote.at_steps", {2: {"fid": RULE | {"ration": 1}}}, "did you mean 'ratio'?"),
        ("promote.at_steps", {2: None, 3: None}, "at_steps: 3 is neither in evaluate.num_steps"),
        ("halve.num_images", "many", "halve.num_images: should be a valid integer"),
        ("halve.num_images", True, "halve.num_images: should be a valid integer"),
        ("halve.num_images", 3.5, "halve.num_images"),
        ("halve.num_images", None, "but is None (NoneType)"),
        ("halve.num_images", 0, "halve.num_images is 0; it must be at least 1"),
        ("evaluate.num_steps", [8, "4"], "evaluate.num_steps[1]"),
        (
            "distill.guide.kind",
            "huge",
            "guide.kind is 'huge'; it must be one of tiny, ",
        ),
        ("distill.precision", "fp16", "distill.precision is 'fp16'; it must be one of bf16, fp32"),
        ("evaluate.precision", "fp16", "evaluate.precision: should be 'bf16' or 'fp32'"),
        (
            "distill.guidance_scale",
            [8.0, 1.0],
            "distill.guidance_scale is [8.0, 1.0]; it needs",
        ),
        ("distill.guidance_scale", [1.0], "distill.guidance_scale"),
        ("halve.end_steps", 3, "halve: Halving 8 steps never gives 3: start_steps must be"),
        ("halve.guidance_gain", 0.5, "halve.guidance_gain is 0.5; it must lie in [1, 2)"),
        (
            "halve.match_images",
            16,
            "halve.match_images is 16, all in the warm-up (warmup_images 16)",
        ),
        ("models.My Model", MODEL, "models.My Model: 'My Model' can't be a name here: letters"),
        ("models.café", MODEL, "'café' can't be a name here: letters, digits, - and _"),
        ("models._x", MODEL, "- and _, beginning with a letter or digit"),
        ("models.Base", MODEL, "params.yaml: models: base and Base are one folder on some disks"),
        (
            "register.name",
            "a/b",
            "register.name: 'a/b' can't be a name here: letters, digits, -, _ and",
        ),
        ("models", {}, "models"),
        ("base", 3, "base: should be a valid string"),
        ("base", "", "base: String should have at least 1 character, but is ''"),
        ("models.base.path", "", "models.base: path or reference is empty"),
        ("companions", "", "companions: String should have at least 1 character"),
        ("storage", "", "storage: String should have at least 1 character"),
        ("promote.scores", {"fid": RULE | {"min_gain": float("inf")}}, "should be a finite number"),
        ("teacher.arguments", {"guidance_rescale": float("nan")}, "rescale: should be a finite"),
        ("distill.learning_rate", float("inf"), "distill.learning_rate: should be a finite"),
    ],
)
def test_mistake_is_named(tmp_path: Path, key: str, value: Any, message: str) -> None:
    with pytest.raises(ParamsError) as caught:
        load(tmp_path, changed(key, value))
    assert message in str(caught.value)
    assert "params.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


OUT_OF_RANGE = [
    ("cache", CacheConfig, {"num_forward": -1}),
    ("cache", CacheConfig, {"num_forward": 0, "num_trajectory": 0}),
    ("cache", CacheConfig, {"shard_size": 0}),
    ("cache", CacheConfig, {"negative_fraction": 1.5}),
    ("cache", CacheConfig, {"guidance_scale": [0.5, 2.0]}),
    ("cache", CacheConfig, {"precision": "fp16"}),
    ("distill", TrainConfig, {"learning_rate": 0.0}),
    ("cache", CacheConfig, {"seed": 2**63}),
    ("distill", TrainConfig, {"seed": 2**64}),
    ("distill", TrainConfig, {"warmup_images": -1}),
    ("distill", TrainConfig, {"warmup_images": 64}),  # as long as all of the training
    ("halve", TrainConfig, {"num_images": 15}),  # less than the warm-up
    ("halve", TrainConfig, {"seed": -1}),
    ("distill.guide", GuideConfig, {"max_parameters_ratio": 1.0}),
    ("halve", HalveConfig, {"timestep_spacing": "even"}),
    ("halve", HalveConfig, {"timestep_spacing": "linspace"}),
    ("halve", HalveConfig, {"end_steps": 8}),
    ("halve", HalveConfig, {"start_steps": -8}),
]


@pytest.mark.parametrize(("section", "config", "change"), OUT_OF_RANGE)
def test_params_have_the_ranges_of_the_library(
    tmp_path: Path, section: str, config: type, change: dict[str, Any]
) -> None:
    params = toy.toy_params()
    place = params
    for part in section.split("."):
        place = place[part]
    names = {field.name for field in dataclasses.fields(config)}
    given = {key: value for key, value in place.items() if key in names}
    if config is HalveConfig:
        given["train"] = TrainConfig(num_images=1, batch_size=1)
    config(**given)
    with pytest.raises(ValueError) as librarys:
        config(**given | change)
    place |= change
    with pytest.raises(ParamsError) as ours:
        load(tmp_path, params)
    separator = "." if isinstance(librarys.value, SettingError) else ": "
    assert str(ours.value).endswith(f"params.yaml: {section}{separator}{librarys.value}")


@pytest.mark.parametrize(
    ("section", "configs", "from_elsewhere"),
    [
        (Cache, [CacheConfig], {"guider"}),
        (Distill, [TrainConfig, DistillConfig], {"train", "guider"}),
        (Guide, [GuideConfig], set()),
        (Halve, [TrainConfig, HalveConfig], {"train", "guidance_scale"}),
    ],
)
def test_a_section_has_every_setting_of_the_library_and_needs_it_said_unless_it_is_optional(
    section: type[BaseModel], configs: list[type], from_elsewhere: set[str]
) -> None:
    names = {field.name for config in configs for field in dataclasses.fields(config)}
    assert set(section.model_fields) == names - from_elsewhere
    optional = {name for name, field in section.model_fields.items() if not field.is_required()}
    assert optional == (MEMORY_ONLY if TrainConfig in configs else set())


def test_missing_key_is_named(tmp_path: Path) -> None:
    params = toy.toy_params()
    del params["halve"]["end_steps"]
    with pytest.raises(ParamsError, match=r"key 'halve\.end_steps' is missing"):
        load(tmp_path, params)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: [", "line 1: not valid YAML"),
        ("base: a\nbase: b\n", "not valid YAML"),
        ("just words", "expected `key: value`"),
        ("base: 2020-01-01", "of a kind not used here"),
        ("base: &a [*a]\n", "an alias stands within what it names"),
        ("? [1, 2]\n: 3\n", "a key is no text: put it in quotes"),
        ("cache:\n  2020-01-01: 3\n", "a key is no text: put it in quotes"),
        ("models:\n  2024: {}", "models: 2024 is read as no text: put it in quotes"),
    ],
)
def test_not_yaml(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(ParamsError) as caught:
        load_params(tmp_path / "params.yaml")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match="run this from the repository's root"):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["promote", "--log"], "no decision"),
        (["promote", "--rollback", "--reason", "worse"], "has no previous champion"),
        (["fetch", "--to", "there"], "has no champion yet"),
        (["tracking"], "has all that earlier runs"),
        (["cleanup"], "could go"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_what_reads_no_inputs_works_where_they_are_away(
    world: Path,
    command: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for folder in ("art", "models"):
        shutil.rmtree(folder)
    monkeypatch.setattr(sys, "argv", ["it", *command[1:]])
    with suppress(SystemExit):
        runpy.run_module(f"components.{command[0]}", run_name="__main__")
    said = capsys.readouterr()
    assert says in said.out + said.err


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("prepare.dataset", "nowhere", "prepare.dataset: there is no nowhere"),
        ("prepare.image_column", "imge", "prepare.dataset: art/main.parquet has no column 'imge'"),
        ("prepare.caption_column", "txt", "prepare.dataset: art/main.parquet has no column 'txt'"),
        ("prepare.files", ["x.parquet"], "prepare.files[0]: there is no art/x.parquet"),
        ("evaluate.judges", ["nowhere"], "evaluate.judges[0]: there is no nowhere"),
        ("evaluate.judges", ["params.yaml"], "evaluate.judges[0]: params.yaml is no folder"),
        ("models.tuned.reference", "nowhere", "models.tuned.reference: there is no nowhere"),
        ("models.tuned.path", "some/model/nowhere", "models.tuned.path: No model at"),
        ("base", "~/nowhere", "base: No model at ~/nowhere: the path does not exist, and ~ is not"),
    ],
)
def test_missing_file_is_named(world: Path, key: str, value: Any, message: str) -> None:
    with pytest.raises(ParamsError) as caught:
        check_files(load(world, changed(key, value)))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("models/base", "models/base has neither parquet files nor a metadata.jsonl"),
        ("params.yaml", "params.yaml is not a parquet file"),
        ("few.parquet", "few.parquet has 1 images: too few"),
        ("other.parquet", "other.parquet has no column 'image', it has picture"),
        ("pictures", "pictures/metadata.jsonl, line 2: there is no file pictures/b.png"),
        ("captions", "captions/metadata.jsonl, line 1: no 'caption'"),
    ],
)
def test_references_without_images_are_named_before_anything_runs(
    world: Path, reference: str, message: str
) -> None:
    toy.write_params(world, toy.toy_params())
    images = pq.read_table(world / "art/main.parquet")
    pq.write_table(images.slice(0, 1), world / "few.parquet")
    pq.write_table(images.select(["image"]).rename_columns(["picture"]), world / "other.parquet")
    for folder, key in (("pictures", "caption"), ("captions", "text")):
        (world / folder).mkdir()
        (world / folder / "a.png").touch()
        lines = [json.dumps({"file_name": f"{name}.png", key: "a cat"}) for name in "ab"]
        (world / folder / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(ParamsError) as caught:
        check_files(load(world, changed("models.tuned.reference", reference)))
    assert str(caught.value).startswith(f"params.yaml: models.tuned.reference: {message}")


def test_a_teacher_that_cannot_be_distilled_is_named(world: Path) -> None:
    params = load(world, changed("teacher.guider", "SkipLayerGuidance"))
    with pytest.raises(ParamsError, match="teacher: The guider 'SkipLayerGuidance' can't be"):
        check_files(params)


def test_half_downloaded_base_is_named(world: Path) -> None:
    weights = world / "models/base/unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ParamsError, match=r"params\.yaml: base: .*unet.*partly downloaded"):
        check_files(load(world, toy.toy_params()))


def test_companions_are_looked_at_too(world: Path) -> None:
    with pytest.raises(ParamsError, match="companions: there is no folder nowhere: make it"):
        check_files(load(world, changed("companions", "nowhere")))
    weights = world / "companions/other/unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ParamsError, match="companions/other: .*unet.*partly downloaded"):
        check_files(load(world, toy.toy_params()))
    shutil.rmtree(world / "companions/other")
    check_files(load(world, toy.toy_params()))


def test_a_model_that_is_no_fine_tune_is_named(world: Path) -> None:
    config = world / "models/tuned/unet/config.json"
    text = config.read_text()
    config.write_text(text.replace('"cross_attention_dim": 32', '"cross_attention_dim": 48'))
    with pytest.raises(ParamsError) as caught:
        check_files(load(world, toy.toy_params()))
    assert str(caught.value) == (
        "params.yaml: models.tuned.path: models/tuned is no fine-tune of models/base: its UNet has "
        "cross_attention_dim 48, the base's 32"
    )


def change_config(file: Path, **entries: Any) -> None:
    """Entries of a JSON file set to other values, or added."""
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def refusal(world: Path, params: dict[str, Any] | None = None) -> str:
    """What a toy world is refused with before anything runs."""
    with pytest.raises(ParamsError) as caught:
        check_files(load(world, params or toy.toy_params()))
    return str(caught.value)


@pytest.mark.parametrize(
    ("entries", "what"),
    [
        ({"prediction_type": "v_prediction"}, "prediction_type 'v_prediction'"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr True"),
        ({"beta_end": 0.02}, "beta_end 0.02"),
        ({"_class_name": "EDMEulerScheduler"}, "prediction_type 'EDMEulerScheduler'"),
    ],
)
def test_a_companion_whose_scheduler_is_not_the_bases_is_refused_by_what_differs(
    world: Path, entries: dict[str, Any], what: str
) -> None:
    scheduler = world / "companions/other/scheduler"
    shutil.copytree(world / "models/base/scheduler", scheduler)
    check_files(load(world, toy.toy_params()))
    change_config(scheduler / "scheduler_config.json", **entries)
    message = refusal(world)
    assert message.startswith(f"params.yaml: companions/other: companions/other has {what} ")
    assert "take it out of the companions" in message


@pytest.mark.parametrize("marks", [{"v_pred": torch.zeros(0)}, "modelspec"])
def test_a_single_file_that_says_that_it_predicts_v_is_refused_beside_a_base_of_epsilon(
    world: Path, marks: Any
) -> None:
    """By the empty weight of checkpoints, or the metadata of trainers."""
    unet = load_pipeline("models/base").unet.state_dict()
    weights = unet | (marks if isinstance(marks, dict) else {})
    said = {} if isinstance(marks, dict) else {"modelspec.prediction_type": "v"}
    save_file(weights, world / "companions/v.safetensors", metadata=said)
    message = refusal(world)
    assert message.startswith("params.yaml: companions/v.safetensors: companions/v.safetensors has")
    assert "prediction_type 'v_prediction'" in message
    scheduler = world / "models/base/scheduler/scheduler_config.json"
    change_config(scheduler, prediction_type="v_prediction")
    check_files(load(world, toy.toy_params()))


def test_a_row_of_models_that_predicts_something_else_than_the_base_is_refused(
    world: Path,
) -> None:
    shutil.copytree(world / "models/base/scheduler", world / "models/tuned/scheduler")
    scheduler = world / "models/tuned/scheduler/scheduler_config.json"
    change_config(scheduler, prediction_type="v_prediction")
    assert refusal(world).startswith(
        "params.yaml: models.tuned.path: models/tuned has prediction_type 'v_prediction'"
    )


def test_a_base_in_a_single_file_that_contradicts_its_configs_is_refused(world: Path) -> None:
    base = as_single_file(world)
    weights = load_file(world / base) | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    save_file(weights, world / base)
    assert "models/one.safetensors has prediction_type 'v_prediction' (its weight v_pred)" in (
        refusal(world, changed("base", base))
    )
    change_config(
        world / "models/one/scheduler/scheduler_config.json",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
    )
    params = changed("models.base.path", base) | {"base": base}
    check_files(load(world, params))


@pytest.mark.parametrize("key", ["base", "models.tuned.path", "companions/other"])
def test_a_model_that_is_guidance_distilled_itself_is_refused_wherever_it_stands(
    world: Path, key: str
) -> None:
    folder = {"base": "models/base", "models.tuned.path": "models/tuned"}.get(key, key)
    change_config(world / folder / "unet/config.json", time_cond_proj_dim=256)
    message = refusal(world)
    assert message.startswith(f"params.yaml: {key}: The UNet of {folder} is guidance-distilled")


@pytest.mark.parametrize(
    ("file", "entries", "what"),
    [
        ("unet", {"in_channels": 9}, "has 9 input channels and its VAE 4"),
        ("unet", {"sample_size": [4, 4]}, r"has sample_size \[4, 4\]"),
        ("unet", {"sample_size": None}, "has sample_size None"),
        ("unet", {"addition_embed_type": "text"}, "has addition_embed_type 'text'"),
        ("vae", {"_class_name": "AutoencoderTiny"}, "is an AutoencoderTiny"),
        ("vae", {"latents_mean": [0.1, 0.2, 0.3, 0.4]}, "has latents_mean"),
        (
            "scheduler",
            {"_class_name": "FlowMatchEulerDiscreteScheduler"},
            "has no alphas_cumprod",
        ),
        ("scheduler", {"prediction_type": "flow_prediction"}, "supported: epsilon, v_prediction"),
        ("scheduler", {"rescale_betas_zero_snr": True}, "or rescale_betas_zero_snr to false"),
        ("scheduler", {"beta_schedule": "squaredcos_cap_v2"}, "or beta_schedule to what the base"),
        (
            "scheduler",
            {"num_train_timesteps": 7},
            "halve.start_steps: 8 steps, but models/base has 7",
        ),
    ],
)
def test_a_base_that_can_not_work_is_refused_by_its_configs(
    world: Path, file: str, entries: dict[str, Any], what: str
) -> None:
    name = "scheduler_config.json" if file == "scheduler" else "config.json"
    change_config(world / "models/base" / file / name, **entries)
    params = toy.toy_params()
    del params["models"]["tuned"]
    shutil.rmtree(world / "companions/other")
    assert re.search(what, refusal(world, params))


def test_companions_without_trajectories_are_refused_before_anything_runs(world: Path) -> None:
    params = changed("cache.num_trajectory", 0)
    assert refusal(world, params).startswith("params.yaml: cache.num_trajectory is 0, and comp")
    shutil.rmtree(world / "companions/other")
    check_files(load(world, params))


def test_a_pickled_companion_is_refused_and_not_left_out(world: Path) -> None:
    (world / "companions/anime.ckpt").write_bytes(b"")
    assert refusal(world).startswith(
        "params.yaml: companions/anime.ckpt: companions/anime.ckpt is a pickled checkpoint"
    )


def test_a_base_and_a_fine_tune_that_cannot_be_used_are_named_before_anything_runs(
    world: Path,
) -> None:
    with pytest.raises(ParamsError, match=r"base: models/tuned has no model_index\.json"):
        check_files(load(world, changed("base", "models/tuned")))
    save_file({"emb_params": torch.zeros(1, 32)}, world / "models/words.safetensors")
    with pytest.raises(ParamsError, match=r"models\.tuned\.path: models/words\.safetensors has no"):
        check_files(load(world, changed("models.tuned.path", "models/words.safetensors")))


@pytest.mark.parametrize("beside", ["", ".safetensors"], ids=["folder", "single file"])
def test_images_of_another_size_than_the_bases_are_refused_with_both_sizes(
    world: Path, beside: str
) -> None:
    base = as_single_file(world) if beside else "models/base"
    check_files(load(world, changed("base", base)))
    params = changed("prepare.resolution", 48)
    with pytest.raises(ParamsError) as caught:
        check_files(load(world, params | {"base": base}))
    assert str(caught.value) == (
        f"params.yaml: prepare.resolution: 48 pixels, but {base} makes images of 32, to which all "
        "would be scaled: set it to 32"
    )


@pytest.mark.parametrize(
    ("lacks", "message"),
    [
        ("config.json", "models/judge has no config.json: a judge is a CLIP or another"),
        ("processor_config.json", "models/judge has no preprocessor_config.json, by which"),
        ("tokenizer.json", "models/judge is a CLIP model without a tokenizer"),
        ("model.safetensors", "models/judge has no weights: it needs .safetensors"),
        (None, "models/judge/model.safetensors is damaged or only partly downloaded"),
    ],
)
def test_a_judge_that_lacks_a_file_is_named_before_anything_runs(
    world: Path, lacks: str | None, message: str
) -> None:
    check_files(load(world, toy.toy_params()))
    if lacks:
        (world / "models/judge" / lacks).unlink()
    else:
        weights = world / "models/judge/model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ParamsError) as caught:
        check_files(load(world, toy.toy_params()))
    assert str(caught.value).startswith(f"params.yaml: evaluate.judges[0]: {message}")


def test_layers_that_the_text_encoder_has_not_are_named_before_anything_runs(world: Path) -> None:
    for skipped in (0, 1):  # of one
        params = toy.toy_params()
        params["models"]["tuned"]["clip_skip"] = skipped
        if not skipped:
            check_files(load(world, params))
            continue
        with pytest.raises(ParamsError) as caught:
            check_files(load(world, params))
        assert str(caught.value) == (
            "params.yaml: models.tuned.clip_skip: clip_skip is 1: the text encoder has 1 layers."
        )


def as_single_file(world: Path) -> str:
    """The base of a world in the original layout, with its configs beside it."""
    pipe = load_pipeline(world / "models/base")
    save_file(original_layout(pipe), world / "models/one.safetensors")
    save_configs(pipe, world / "models/one")
    return "models/one.safetensors"


HEAVY = "print(sorted({'torch', 'diffusers', 'mlflow', 'ray'} & set(sys.modules)))\n"


def run_code(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python code in a folder, by an interpreter of its own."""
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "stage", ["prepare", "cache", "distill", "halve", "evaluate --model tuned", "register"]
)
def test_a_mistake_is_found_before_anything_heavy_loads(tmp_path: Path, stage: str) -> None:
    toy.write_params(tmp_path, changed("distill.num_imagse", 3))
    name, *arguments = stage.split()
    done = run_code(
        "import sys, runpy\n"
        f"sys.argv[1:] = {arguments}\n"
        f"try: runpy.run_module('components.{name}', run_name='__main__')\n"
        f"finally: {HEAVY}",
        tmp_path,
    )
    assert done.returncode == 2
    assert done.stdout == "[]\n"
    assert done.stderr == (
        "error: params.yaml: unknown key 'distill.num_imagse', did you mean 'num_images'?\n"
    )


@pytest.mark.parametrize("beside", ["", ".safetensors"], ids=["folder", "single file"])
def test_what_params_yaml_points_at_is_checked_without_loading_anything_heavy(
    world: Path, beside: str
) -> None:
    toy.write_params(world, changed("base", as_single_file(world) if beside else "models/base"))
    done = run_code(
        "import sys\n"
        "from pathlib import Path\n"
        "from components.params import check_files, load_params\n"
        f"check_files(load_params(Path('params.yaml')))\n{HEAVY}",
        world,
    )
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("cache.trajectory_steps", 1001),
        ("evaluate.num_steps", [2, 1001]),
        ("evaluate.full.num_steps", [1001, 4, 2, 1]),
    ],
)
def test_more_steps_than_the_base_has_timesteps_are_refused_by_key(
    world: Path, key: str, value: Any
) -> None:
    with pytest.raises(ParamsError, match=f"{key}: 1001 steps, but models/base has 1000"):
        check_files(load(world, changed(key, value)))
