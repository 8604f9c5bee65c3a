"""Fine-tunes as they are: whole, and with what params.yaml says of each."""

import argparse
import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTextModel

from components import generate, prepare
from components.environment import quiet
from components.images import Setting, Task
from components.likeness import LEAST_REPLICATES
from components.measuring import unexplained
from components.params import Model, Params, ParamsError, check_files, load_params
from components.rows import load_row
from components.sampling import Sampler, choose_tasks, count_prompts, fvu_tasks
from components.scores import resamples
from pnp_core.bundle import GuideBundle
from pnp_core.fine_tunes import load_model, skip_layers
from pnp_core.guide import Guide, GuideConfig
from pnp_core.identity import model_identity
from pnp_core.model_configs import check_not_distilled
from pnp_core.model_files import check_base, configs_of, is_whole
from pnp_core.models import encode_prompts, load_pipeline
from tests import toy
from tests.conftest import changed, roused, same_weights, save_lora
from tests.test_single_file import original_layout

pytest_plugins = ["tests.toy"]
quiet()
OWN = Setting("cfg", 2, "ddim", 4.0)
TASKS = [Task("red disc", 0, True), Task("blue bar", 1, False)]


def shaken(module: torch.nn.Module) -> Any:
    """A copy with other weights."""
    other = copy.deepcopy(module)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return other


@pytest.fixture
def whole(pipe: StableDiffusionPipeline, tmp_path: Path) -> Path:
    """A fine-tune with a UNet, text encoder, VAE and scheduler settings of its own."""
    tuned = StableDiffusionPipeline(
        **{
            **pipe.components,
            "unet": changed(pipe.unet),
            "text_encoder": shaken(pipe.text_encoder),
            "vae": shaken(pipe.vae),
            "scheduler": DDIMScheduler.from_config(pipe.scheduler.config, beta_end=0.015),
        },
        requires_safety_checker=False,
    )
    tuned.save_pretrained(tmp_path / "whole")
    return tmp_path / "whole"


def images(pipe: StableDiffusionPipeline) -> np.ndarray:
    """What a stock pipeline makes of the tasks."""
    made = [
        pipe(
            task.prompt,
            num_inference_steps=2,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(task.seed),
            output_type="np",
        ).images[0]
        for task in TASKS
    ]
    return np.round(np.stack(made) * 255).astype(np.int64)


def sampler(pipe: StableDiffusionPipeline, params: Params, row: Model | None = None) -> Sampler:
    torch.manual_seed(1)
    guide = roused(Guide.from_unet(pipe.unet, GuideConfig(max_parameters_ratio=0.2)))
    return Sampler(pipe, GuideBundle({2: guide}), params, row)


def test_a_whole_fine_tune_samples_what_its_own_stock_pipeline_does(
    whole: Path, pipe: StableDiffusionPipeline, world: Path
) -> None:
    params = load_params(Path("params.yaml"))
    stock = StableDiffusionPipeline.from_pretrained(whole, safety_checker=None)
    expected = images(stock)
    made = sampler(load_model(whole, base=pipe), params).make(OWN, TASKS).astype(np.int64)
    assert np.abs(made - expected).max() <= 1
    mixed = copy.copy(pipe)
    mixed.unet = stock.unet
    assert np.abs(images(mixed) - expected).max() > 10, "the base's other parts give other images"


def test_what_a_fine_tune_shares_with_the_base_is_in_memory_once(
    whole: Path, pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    before = {name: id(part) for name, part in pipe.components.items()}
    loaded = load_model(whole, base=pipe)
    assert all(getattr(loaded, n) is not getattr(pipe, n) for n in ("unet", "vae", "text_encoder"))
    pipe.unet, original = changed(pipe.unet), pipe.unet
    pipe.save_pretrained(tmp_path / "other")
    pipe.unet = original
    loaded = load_model(tmp_path / "other", base=pipe)
    assert loaded.vae is pipe.vae and loaded.text_encoder is pipe.text_encoder
    assert loaded.unet is not pipe.unet
    assert {name: id(part) for name, part in pipe.components.items()} == before


def test_a_unet_alone_and_a_lora_have_the_base_for_the_rest(
    pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    changed(pipe.unet).save_pretrained(tmp_path / "tuned/unet")
    save_lora(pipe.unet, tmp_path / "lora")
    for name in ("tuned", "lora"):
        loaded = load_model(tmp_path / name, base=pipe)
        assert loaded.unet is not pipe.unet and loaded.vae is pipe.vae
        assert loaded.text_encoder is pipe.text_encoder and loaded.scheduler is pipe.scheduler


def test_a_whole_single_file_has_its_own_parts_by_the_configs_of_the_base(
    whole: Path, toy_folder: Path, pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    tuned = StableDiffusionPipeline.from_pretrained(whole, safety_checker=None)
    file = tmp_path / "tuned.safetensors"
    save_file(original_layout(tuned), file)
    loaded = load_model(file, base=pipe, configs=toy_folder)
    for name in ("unet", "vae", "text_encoder"):
        assert same_weights(getattr(loaded, name), getattr(tuned, name))
    assert loaded.scheduler.config["beta_end"] == pipe.scheduler.config["beta_end"]
    others = {model_identity(path, toy_folder) for path in (whole, toy_folder)}
    assert model_identity(file, toy_folder) not in others


def test_a_whole_model_of_another_architecture_is_refused(
    pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    config = {**pipe.unet.config, "layers_per_block": 2}
    other = StableDiffusionPipeline(
        **{**pipe.components, "unet": type(pipe.unet).from_config(config)},
        requires_safety_checker=False,
    )
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="not a fine-tune of the base"):
        load_model(tmp_path / "other", base=pipe)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("empty.safetensors", "damaged or only partly downloaded"),
        ("m.ckpt", "pickled checkpoint"),
        ("m.png", "not a model"),
    ],
)
def test_a_file_that_is_no_model_is_told_by_its_name(
    pipe: StableDiffusionPipeline, toy_folder: Path, tmp_path: Path, name: str, said: str
) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"{name} is .*{said}"):
        load_model(tmp_path / name, base=pipe)
    with pytest.raises(ValueError, match=f"{name} is .*{said}"):
        model_identity(tmp_path / name, toy_folder)


@pytest.mark.parametrize("read", [check_base, is_whole, configs_of, check_not_distilled])
def test_whoever_reads_a_damaged_file_of_weights_says_so(
    tmp_path: Path, read: Callable[[Path], Any]
) -> None:
    (tmp_path / "cut.safetensors").write_bytes(b"\x20" + 7 * b"\0" + b'{"a":')
    with pytest.raises(ValueError, match="cut.safetensors is damaged or only partly downloaded"):
        read(tmp_path / "cut.safetensors")


def test_the_identity_of_a_model_is_of_all_its_parts(
    whole: Path, toy_folder: Path, pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    changed(pipe.unet).save_pretrained(tmp_path / "tuned/unet")
    found = {path: model_identity(path, toy_folder) for path in (whole, tmp_path / "tuned")}
    shutil.copytree(toy_folder, tmp_path / "base")
    shaken(shaken(pipe.vae)).save_pretrained(tmp_path / "base/vae")
    assert model_identity(tmp_path / "tuned", tmp_path / "base") not in found.values()
    assert model_identity(whole, tmp_path / "base") == found[whole], "nothing of it is the base's"
    shutil.copytree(tmp_path / "base/vae", whole / "vae", dirs_exist_ok=True)
    assert model_identity(whole, toy_folder) not in found.values()


def with_layers(pipe: StableDiffusionPipeline, num_layers: int) -> StableDiffusionPipeline:
    config = copy.deepcopy(pipe.text_encoder.config)
    config.num_hidden_layers = num_layers
    torch.manual_seed(3)
    pipe.text_encoder = CLIPTextModel(config).eval()
    return pipe


def test_clip_skip_reads_the_layer_before_the_last_through_the_final_norm(
    pipe: StableDiffusionPipeline,
) -> None:
    encoder = with_layers(pipe, 3).text_encoder
    tokens = pipe.tokenizer(
        ["red disc"], padding="max_length", max_length=16, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        states = encoder(tokens, output_hidden_states=True).hidden_states
        norm = dict(encoder.named_modules())["final_layer_norm"]
        expected = norm(states[-2])
    skip_layers(pipe, 1)
    torch.testing.assert_close(encode_prompts(pipe, ["red disc"]).states_NLD, expected)
    weights = {p.data_ptr() for p in encoder.parameters()}
    assert {p.data_ptr() for p in pipe.text_encoder.parameters()} < weights, "shared, not copied"


def test_clip_skip_of_more_layers_than_there_are_and_of_sdxl_is_refused(
    pipe: StableDiffusionPipeline, xl_pipe: StableDiffusionXLPipeline
) -> None:
    with pytest.raises(ValueError, match="clip_skip is 3: the text encoder has 3 layers"):
        skip_layers(with_layers(pipe, 3), 3)
    with pytest.raises(ValueError, match="clip_skip is for bases with one text encoder"):
        skip_layers(xl_pipe, 1)


@pytest.fixture
def prepared(world: Path) -> Params:
    params = load_params(Path("params.yaml"))
    prepare.run(params)
    return params


def test_trigger_words_scale_and_strength_of_a_model_are_used(prepared: Params) -> None:
    row = Model(path="models/tuned", reference="", trigger="big", guidance_scale=2.0, strength=0.5)
    pipe = load_row(row, prepared.base)
    own, plain = sampler(pipe, prepared, row), sampler(pipe, prepared)
    assert own.guidance_scale == 2.0
    setting = Setting("guided", 2, "ddim", 2.0)
    made = own.make(setting, TASKS)
    assert not np.array_equal(made, plain.make(setting, TASKS))
    with_trigger = [task._replace(prompt=f"big {task.prompt}") for task in TASKS]
    half = Model(path="models/tuned", reference="", strength=0.5)
    assert np.array_equal(made, sampler(pipe, prepared, half).make(setting, with_trigger))
    assert not np.array_equal(made, plain.make(setting, with_trigger)), "strength plays a part"


def test_the_base_is_opened_once_however_its_path_is_written(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_params(Path("params.yaml")).base
    monkeypatch.setattr("components.rows.load_model", None)  # would open a fine-tune
    for written in (base, f"{base}/", str(Path(base).resolve())):
        load_row(Model(path=written, reference=""), base)


def test_prompts_and_the_negative_prompt_of_a_model_make_its_tasks(prepared: Params) -> None:
    row = Model(path="", reference="", prompts=("red disc", "a new thing"), negative_prompt="ugly")
    tasks = choose_tasks(prepared.evaluate, row)
    assert [task.prompt for task in tasks[:3]] == ["red disc", "a new thing", "red disc"]
    assert {task.negative for task in tasks} == {"ugly"} and len(tasks) == 64
    trained = {t.prompt for t in choose_tasks(prepared.evaluate) if not t.is_heldout}
    assert tasks[0].is_heldout == ("red disc" not in trained) and tasks[1].is_heldout


def test_without_prepared_data_it_is_said_what_makes_it(prepared: Params) -> None:
    Path("data/prepared/heldout.parquet").unlink()
    with pytest.raises(ValueError, match="no data/prepared/heldout.parquet: dvc repro prepare"):
        choose_tasks(prepared.evaluate)


@pytest.mark.parametrize("num_heldout", [0, 3, 40])
def test_guidance_fvu_has_an_interval_however_few_prompts_are_held_out(num_heldout: int) -> None:
    tasks = [Task(f"thing {n}", n, n < num_heldout) for n in range(192)]
    found = fvu_tasks(tasks)
    assert sum(task.is_heldout for task in found) == num_heldout
    parts = np.random.default_rng(0).uniform(0.4, 0.6, (len(found), 1))
    terms = {"unexplained": parts, "total": np.ones_like(parts), "timesteps": [500]}
    fvu, _ = unexplained(terms, tasks, found, resamples(len(tasks)))
    assert len(set(fvu.replicates)) >= LEAST_REPLICATES


def test_prompts_of_a_model_that_trajectories_followed_are_not_held_out(prepared: Params) -> None:
    Path("data/prepared/prompts.txt").write_text("two rings\na new bar\n")
    row = Model(path="", reference="", prompts=("two rings", "a new thing", "a new bar"))
    tasks = choose_tasks(prepared.evaluate, row)
    assert [task.is_heldout for task in tasks[:3]] == [False, True, False]
    assert {task.prompt for task in fvu_tasks(tasks)} == {"a new thing"}


def test_guidance_fvu_of_trained_prompts_alone_says_so(prepared: Params) -> None:
    Path("data/prepared/prompts.txt").write_text("two rings\n")
    row = Model(path="", reference="", prompts=("two rings",))
    of_fvu = fvu_tasks(choose_tasks(prepared.evaluate, row))
    assert len(of_fvu) == 22  # of 64 images
    assert count_prompts(of_fvu) == {"heldout": 0, "trained": 1}


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "models.tuned.prompts: there is no prompt in the list"),
        ("prompts.txt", "models.tuned.prompts: there is no file models/tuned/prompts.txt"),
        ("empty.txt", "models.tuned.prompts: there is no prompt in models/tuned/empty.txt"),
    ],
)
def test_prompts_that_are_not_there_are_named(world: Path, prompts: Any, message: str) -> None:
    Path("models/tuned/empty.txt").write_text("\n")
    values = toy.toy_params()
    values["models"]["tuned"]["prompts"] = prompts
    toy.write_params(world, values)
    with pytest.raises(ParamsError, match=message):
        check_files(load_params(Path("params.yaml")))


def test_a_file_of_prompts_in_the_models_folder_is_read(prepared: Params) -> None:
    Path("models/tuned/own.txt").write_text("one\n\n two \n")
    row = Model(path="models/tuned", reference="", prompts="own.txt")
    assert [task.prompt for task in choose_tasks(prepared.evaluate, row)[:3]] == [
        "one",
        "two",
        "one",
    ]


def test_generate_uses_a_model_as_params_yaml_says(
    prepared: Params, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole, "models/whole")
    values = toy.toy_params()
    values["models"]["own"] = {
        "path": "models/whole",
        "reference": "art/tuned.parquet",
        "trigger": "big",
        "guidance_scale": 2.0,
        "negative_prompt": "ugly",
    }
    toy.write_params(Path(), values)
    params = load_params(Path("params.yaml"))
    base = load_pipeline(params.base)
    torch.manual_seed(1)
    guide = roused(Guide.from_unet(base.unet, GuideConfig(max_parameters_ratio=0.2)))
    GuideBundle({2: guide}).save("guides/bundle")

    def made(model: str | None, prompt: str, **named: Any) -> np.ndarray:
        chosen = {"steps": 2, "guidance_scale": None, "strength": None, "negative": None}
        chosen |= {"compare": False, **named}
        arguments = argparse.Namespace(
            prompt=prompt,
            guide="guides/bundle",
            model=model,
            seed=0,
            out=Path("out.png"),
            **chosen,
        )
        generate.run(params, arguments)
        return np.asarray(Image.open("out.png"))

    named = made("own", "disc")
    assert np.array_equal(named, made("models/whole", "disc"))
    bare = load_params(Path("params.yaml")).model_copy(update={"models": {}})
    params = bare
    assert np.array_equal(
        named, made("models/whole", "big disc", guidance_scale=2.0, negative="ugly")
    )
    assert not np.array_equal(named, made("models/whole", "disc"))
