"""generate: with a folder's guide, with a registered one, beside CFG and no guidance."""

import re
from errno import ENOSPC
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from components import generate
from components.params import Model, Params, load_params
from components.tracking import Registry, Run
from pnp_core.bundle import GuideBundle
from pnp_core.guide import Guide, GuideConfig
from pnp_core.models import load_pipeline
from pnp_core.scheduling import SchedulerChoice
from tests.conftest import roused

pytest_plugins = ["tests.toy"]


@pytest.fixture
def params(world: Path) -> Params:
    """A world with a guide in guides/bundle."""
    params = load_params(Path("params.yaml"))
    torch.manual_seed(1)
    unet = load_pipeline(params.base).unet
    guide = roused(Guide.from_unet(unet, GuideConfig(max_parameters_ratio=0.2)))
    best = SchedulerChoice(name="DDIMScheduler", timestep_spacing="trailing")
    GuideBundle({2: guide, 4: guide}, {2: best, 4: best}).save("guides/bundle")
    return params


def made(params: Params, monkeypatch: pytest.MonkeyPatch, *options: str) -> np.ndarray:
    monkeypatch.setattr("sys.argv", ["generate", "red disc", *options])
    generate.run(params, generate.parsed())
    return np.asarray(Image.open("out.png"))


def register(registry: Registry, params: Params) -> None:
    with Run(registry.store, params.tracking, "register", params={}) as run:
        named: dict[str, Any] = {"key": "key", "metrics": {}, "tags": {}, "description": ""}
        registry.register(run, Path("guides/bundle"), **named)


def test_a_registered_guide_makes_what_its_folder_makes(
    params: Params, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    registry = Registry(params.tracking, "pnp-guide")
    with pytest.raises(ValueError, match="pnp-guide has no champion in MLflow at .*promote"):
        made(params, monkeypatch, "--guide", "models:/pnp-guide@champion")
    register(registry, params)
    registry.store.client.set_registered_model_alias("pnp-guide", "champion", "1")
    image = made(params, monkeypatch)
    for guide in ("models:/pnp-guide@champion", "models:/pnp-guide/1"):
        assert np.array_equal(made(params, monkeypatch, "--guide", guide), image)
    assert (
        "guide pnp-guide version 1 on models/base: scale 4, 4 steps, DDIMScheduler with trailing "
        "spacing, seed 0"
    ) in capsys.readouterr().out
    with pytest.raises(ValueError, match="write models:/<name>@<alias>"):
        made(params, monkeypatch, "--guide", "models:/pnp-guide")


def test_no_copy_stays_of_a_registered_guide_that_is_kept_elsewhere(
    params: Params, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(params.tracking, "pnp-guide")
    registry.store.client.create_experiment(params.tracking.experiment, f"{s3}/mlflow")
    register(registry, params)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    image = made(params, monkeypatch, "--guide", "models:/pnp-guide/1")
    assert not list(temporary.iterdir())
    assert np.array_equal(image, made(params, monkeypatch))


@pytest.mark.parametrize("written", ["models/tuned/", "./models/tuned", "{here}/models/tuned"])
def test_a_model_of_params_yaml_is_known_however_its_path_is_written(
    world: Path, written: str
) -> None:
    params = load_params(Path("params.yaml"))
    assert generate.row_of(written.format(here=Path.cwd()), params) is params.models["tuned"]
    assert generate.row_of("models/other", params) == Model(path="models/other", reference="")


def test_compared_are_three_of_the_same_seed_with_the_time_of_each(
    params: Params, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = made(params, monkeypatch)
    sheet = made(params, monkeypatch, "--compare")
    assert re.search(
        r"unguided, \d+\.\d\d s\nCFG, \d+\.\d\d s\nguided, \d+\.\d\d s", capsys.readouterr().out
    )
    cell = np.asarray(Image.fromarray(alone).resize((128, 128), Image.Resampling.NEAREST))
    assert (sheet[-132:-4, -132:-4] == cell).all(), "the last picture is the guided one"


def test_a_guide_that_is_none_is_told_before_anything_is_opened(
    params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("components.rows.load_row", None)
    with pytest.raises(ValueError, match="--guide params.yaml: it is no folder"):
        made(params, monkeypatch, "--guide", "params.yaml")
    with pytest.raises(ValueError, match="--model tunde: no such path, .* are base, tuned"):
        made(params, monkeypatch, "--model", "tunde")
    with pytest.raises(ValueError, match="--guide nowhere: there is no such folder"):
        made(params, monkeypatch, "--guide", "nowhere")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--steps", "0"], "--steps: at least one step"),
        (["--steps", "-3"], "--steps: at least one step"),
        (["--steps", "9" * 400], "--steps: 10,000 steps are the most"),
        (["--guidance-scale", "nan"], "--guidance-scale: a number from 0 to 1000"),
        (["--guidance-scale", "-1"], "--guidance-scale: a number from 0 to 1000"),
        (["--guidance-scale", "1e308"], "--guidance-scale: a number from 0 to 1000"),
        (["--strength", "inf"], "--strength: a number from 0 to 1000"),
        (["--strength", "1e39"], "--strength: a number from 0 to 1000"),
        (["--seed", "99999999999999999999"], "--seed: a number below 2^64"),
    ],
)
def test_a_number_that_can_t_be_is_told_by_the_option(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    said: str,
) -> None:
    monkeypatch.setattr("sys.argv", ["generate", "red disc", *options])
    with pytest.raises(SystemExit) as stopped:
        generate.parsed()
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("option", ["prompt", "--negative", "--guide", "--model", "--out"])
def test_an_argument_that_is_not_utf_8_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    argument = ["caf\udce9"] if option == "prompt" else ["red disc", option, "caf\udce9"]
    monkeypatch.setattr("sys.argv", ["generate", *argument])
    with pytest.raises(SystemExit) as stopped:
        generate.parsed()
    assert stopped.value.code == 2
    assert f"{option}: it is not UTF-8 from character 4 on" in capsys.readouterr().err


def test_more_steps_than_the_base_has_timesteps_are_told_before_it_is_opened(
    params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("components.rows.load_row", None)
    with pytest.raises(ValueError, match="1001 steps, but models/base has 1000 timesteps"):
        made(params, monkeypatch, "--steps", "1001")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.safetensors", b"", "is damaged or only partly downloaded"),
        ("cut.safetensors", b"\x20" + 7 * b"\0" + b'{"a":', "is damaged or only partly downloaded"),
        ("m.ckpt", b"PK\3\4", "is a pickled checkpoint"),
        ("m.bin", b"x" * 9, "is a pickled checkpoint"),
        ("m.png", b"\x89PNG", "is not a model: expected a folder or a .safetensors file"),
        ("models/base/model_index.json", None, "is not a model: expected a folder or"),
    ],
)
def test_a_file_that_is_no_model_is_told_before_anything_is_opened(
    params: Params, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes | None, said: str
) -> None:
    if content is not None:
        Path(name).write_bytes(content)
    monkeypatch.setattr("components.rows.load_row", None)
    with pytest.raises(ValueError, match=f"^{name} {said}"):
        made(params, monkeypatch, "--model", name)


def test_a_guide_that_does_not_fit_is_told_before_pictures_are_made_without_it(
    params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet, config = load_pipeline(params.base).unet, GuideConfig(max_parameters_ratio=0.2)
    other = Guide.from_unet(unet, config, prediction_type="v_prediction")
    GuideBundle({4: other}).save("guides/other")
    monkeypatch.setattr(generate, "timed", None)
    with pytest.raises(ValueError, match="This guide was made for a base with prediction_type"):
        made(params, monkeypatch, "--guide", "guides/other", "--compare")


@pytest.mark.parametrize("guide", ["models:/x@y", "models:/x/1"])
def test_no_store_is_made_to_say_that_a_guide_is_not_registered(
    params: Params, monkeypatch: pytest.MonkeyPatch, guide: str
) -> None:
    for file in Path().glob("mlflow.db*"):
        file.unlink()
    with pytest.raises(ValueError, match=f"--guide {guide}: x has no versions here, .* no MLflow"):
        made(params, monkeypatch, "--guide", guide)
    assert not Path("mlflow.db").exists()


@pytest.mark.parametrize("prompt", ["a red\ndisc \t on\u2028blue", "apple " * 300, "a" * 1800])
def test_a_picture_of_several_is_as_wide_as_they_are_whatever_the_prompt(prompt: str) -> None:
    images = {label: Image.new("RGB", (64, 64)) for label in ("unguided", "CFG", "guided")}
    width = generate.side_by_side(images, title="a disc, seed 0").width
    sheet = generate.side_by_side(images, title=generate.title_of(prompt, 7))
    assert sheet.width == width
    assert sheet.height < 2 * width


def test_a_title_has_no_line_breaks_and_always_the_seed() -> None:
    assert generate.title_of("a red\ndisc ", 7) == "a red disc, seed 7"
    assert generate.title_of("a" * 1800, 7) == "a" * 400 + "…, seed 7"


@pytest.mark.parametrize("out", [".", "a.txt", "a.psd", "a.h5", "a.blp", "no/such/folder/a.png"])
def test_where_no_image_can_be_written_is_told_before_a_model_is_opened(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, out: str
) -> None:
    monkeypatch.chdir(tmp_path)  # where there is no model
    monkeypatch.setattr("sys.argv", ["generate", "red disc", "--out", out])
    nothing: Any = None
    with pytest.raises(ValueError, match="^--out "):
        generate.run(nothing, generate.parsed())


def test_a_model_in_a_home_folder_is_not_taken_for_one_on_a_hub(
    params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="No model at ~/nowhere: .* ~ is not expanded here"):
        made(params, monkeypatch, "--model", "~/nowhere")


def test_a_guidance_scale_of_0_is_no_guidance(
    params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    unguided = made(params, monkeypatch, "--guidance-scale", "1")
    assert np.array_equal(made(params, monkeypatch, "--guidance-scale", "0"), unguided)
    assert not np.array_equal(made(params, monkeypatch), unguided)


def test_a_picture_that_can_not_be_saved_leaves_the_one_before(
    params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = made(params, monkeypatch, "--out", "out.png")

    def half(self: Image.Image, path: Path, *_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", half)
    monkeypatch.setattr(generate, "check_out", lambda path: None)
    with pytest.raises(OSError, match=r"Could not write .*/out.png: .*No space.* is untouched"):
        made(params, monkeypatch, "--seed", "1")
    assert np.array_equal(np.asarray(Image.open("out.png")), before)


def test_a_folder_that_can_not_be_written_is_told_before_anything_is_opened() -> None:
    with pytest.raises(ValueError, match=r"--out /proc/out.png: nothing can be written in /proc"):
        generate.check_out(Path("/proc/out.png"))
