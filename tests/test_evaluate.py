"""The stage evaluate at toy size: what is kept, what is made again, and what is refused."""

import csv
import functools
import io
import os
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import pnp_core
from components import (
    dataset,
    device,
    evaluate,
    judging,
    likeness,
    prepare,
    references,
    register,
    sampling,
)
from components.environment import quiet
from components.evaluation import Evaluation
from components.images import Gallery, KeptImages, Setting, Task, alone_with
from components.judging import Judge
from components.measuring import Sampled, measure_negatives, num_at_a_time
from components.params import Params, load_params
from components.paths import BUNDLE, PREPARED
from components.pictures import grid
from components.references import References
from components.sampling import Sampler, settings_of
from components.scores import RealImages
from pnp_core import cores
from pnp_core.bundle import GuideBundle
from pnp_core.files import read_json, write_json
from pnp_core.guide import Guide, GuideConfig
from tests import toy
from tests.cases import few_of
from tests.conftest import roused

pytest_plugins = ["tests.toy"]
quiet()

TRAIN = PREPARED / "train.parquet"
Made = Counter[tuple[Setting, Task]]


def params_with(**evaluate: Any) -> Params:
    """The toy's parameters with some keys of `evaluate` changed, as params.yaml here."""
    values = toy.toy_params()
    values["evaluate"] |= evaluate
    toy.write_params(Path(), values)
    return load_params(Path("params.yaml"))


def write_bundle(scale: float) -> None:
    """A guide for 4 and for 2 steps, with random weights of this size."""
    unet = UNet2DConditionModel.from_pretrained("models/base", subfolder="unet")
    guides = {}
    for num_steps in (2, 4):
        torch.manual_seed(num_steps)
        guide = Guide.from_unet(unet, GuideConfig(max_parameters_ratio=0.2))
        guides[num_steps] = roused(guide, scale * num_steps)
    GuideBundle(guides).save("guides/bundle")


@pytest.fixture(scope="module")
def ready(untouched_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world with prepared data, a bundle, and the base evaluated."""
    with toy.inside_copy(untouched_world, tmp_path_factory.mktemp("ready")) as folder:
        prepare.run(params_with())
        write_bundle(0.02)
        evaluate.run(params_with(), "base")
    return folder


@pytest.fixture
def inside(ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same world, to be changed at will."""
    folder = tmp_path / "world"
    shutil.copytree(ready, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[Made]:
    """How often each image is sampled."""
    found: Made = Counter()
    make = Sampler.make

    def counting(self: Sampler, setting: Setting, tasks: Any) -> np.ndarray:
        found.update((setting, task) for task in tasks)
        return make(self, setting, tasks)

    monkeypatch.setattr(Sampler, "make", counting)
    yield found


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Samples that the UNet is asked for, a number for each call."""
    found: list[int] = []
    forward = UNet2DConditionModel.forward

    @functools.wraps(forward)  # hooks read its signature
    def counting(self: Any, sample: torch.Tensor, *rest: Any, **named: Any) -> Any:
        found.append(len(sample))
        return forward(self, sample, *rest, **named)

    monkeypatch.setattr(UNet2DConditionModel, "forward", counting)
    return found


def result() -> Evaluation:
    return Evaluation.load(Path("results/evaluate/base"))


def methods(made: Made) -> set[str]:
    return {setting.method for setting, _ in made}


def test_images_and_guidance_of_several_cores_are_those_of_one(
    inside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = evaluate.Work.of(params_with(), "base")
    images, terms = [], []
    monkeypatch.setattr(cores, "FEWEST_ROWS", 2)
    before = torch.get_num_threads()
    try:
        for num_threads in (3, 1):
            torch.set_num_threads(num_threads)
            tasks = [*work.tasks[:4], *work.negative_tasks[:3]]
            made = [work.sampler.make(setting, tasks).astype(int) for setting in work.recipes]
            images.append(np.stack(made))
            terms.append(work.sampler.fvu_terms(tasks))
    finally:
        torch.set_num_threads(before)
    assert np.abs(images[0] - images[1]).max() <= 1  # of 255
    for key in ("timesteps", "unexplained", "total"):
        np.testing.assert_allclose(terms[0][key], terms[1][key], rtol=1e-3)


def test_an_evaluation_that_is_killed_goes_on_and_makes_no_image_twice(
    inside: Path, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = result()
    shutil.rmtree("results")
    make, calls = evaluate.Work.make, []

    def killed(self: Any, setting: Setting, tasks: Any) -> None:
        calls.append(setting)
        if len(calls) == 5:
            raise KeyboardInterrupt
        make(self, setting, tasks)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate.Work, "make", killed)
        with pytest.raises(KeyboardInterrupt):
            evaluate.run(params_with(), "base")
    assert len(made) == 4 * 32 and not Path("results/evaluate/base").exists()
    evaluate.run(params_with(), "base")
    assert set(made.values()) == {1} and len(made) == 8 * 64 + 2 * 64
    assert result().cells == whole.cells and result().negative == whole.negative


def test_another_judge_and_another_version_of_the_scores_take_no_forward(
    inside: Path, forwards: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = result()
    shutil.copytree("models/judge", "models/other")
    monkeypatch.setattr(evaluate, "MEASURED_BY", 99)
    evaluate.run(params_with(judges=["models/judge", "models/other"]), "base")
    assert forwards == []
    after = result()
    assert after.judges == (before.judges[0], "models/other (CLIP, 16 features)")
    assert [cell for cell in after.cells if cell.judge == before.judges[0]] == list(before.cells)
    assert after.guidance_fvu == before.guidance_fvu and after.cost == before.cost
    assert after.identity["measured_by"] == 99


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images judges see, a number for each look."""
    found: list[int] = []
    embed = Judge._embed

    def counting(self: Judge, images: np.ndarray) -> torch.Tensor:
        found.append(len(images))
        return embed(self, images)

    monkeypatch.setattr(Judge, "_embed", counting)
    return found


def seen_in(model: str, looks: list[int], **changes: Any) -> tuple[np.ndarray, int]:
    """What the judge sees in a model's references, and at how many of them it looked for that."""
    params = params_with(**changes)
    judge = Judge(params.evaluate.judges[0], torch.device("cpu"))
    looks.clear()  # it was tried out
    real = References(params.models[model].reference, params).seen_by(judge)
    assert real.kernel_mean == RealImages(real.features_MD).kernel_mean
    return real.features_MD, sum(looks)


def features_of(path: Path) -> np.ndarray:
    with safe_open(path, framework="numpy") as file:
        found: np.ndarray = file.get_tensor("features")
    return found


def test_a_judge_looks_at_real_images_once_for_all_runs(
    inside: Path, looks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    (kept,) = Path("results/judged").iterdir()
    kept.unlink()
    before, (features, first) = result(), seen_in("base", looks)
    assert (len(features), first) == (len(toy.PROMPTS), len(toy.PROMPTS))
    monkeypatch.delattr(dataset, "reference_batches")  # they are not even read
    evaluate.run(params_with(), "base")
    again, second = seen_in("base", looks)
    assert second == 0 and result().cells == before.cells
    np.testing.assert_array_equal(again, features)


def test_models_with_the_same_references_share_what_a_judge_sees(
    inside: Path, looks: list[int]
) -> None:
    shutil.copy("art/main.parquet", "art/tuned.parquet")
    first, number = seen_in("tuned", looks)
    shutil.copytree("models/judge", "models/copy")
    second, again = seen_in("tuned", looks, judges=["models/copy"])
    assert (number, again) == (len(toy.PROMPTS), 0)
    np.testing.assert_array_equal(first, second)


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "cut off":
        del content[-100:]
    elif how == "no header":
        content[:8] = b"\xff" * 8
    else:
        content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["cut off", "no header", "a bit that flipped"])
def test_damaged_features_are_computed_anew_and_the_file_is_named(
    inside: Path, looks: list[int], capsys: pytest.CaptureFixture[str], how: str
) -> None:
    (kept,) = Path("results/judged").iterdir()
    features = features_of(kept)
    damage(kept, how)
    found, number = seen_in("base", looks)
    np.testing.assert_array_equal(found, features)
    np.testing.assert_array_equal(features_of(kept), features)
    assert number == len(toy.PROMPTS)
    assert f"{kept} is not whole (" in capsys.readouterr().out


def change_the_judge() -> None:
    path = Path("models/judge/model.safetensors")
    weights = load_file(path)
    weights["visual_projection.weight"] *= 2
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize("what", ["judge", "picture", "resolution", "code", "package", "device"])
def test_features_of_something_else_are_not_taken_for_these(
    inside: Path, looks: list[int], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    seen_in("tuned", looks)
    assert seen_in("tuned", looks)[1] == 0
    match what:
        case "judge":
            change_the_judge()
        case "picture":
            toy.make_art(Path("art/tuned.parquet"), brightness=0.4)
        case "resolution":
            monkeypatch.setattr(references, "read_json", lambda _: {"resolution": 16})
        case "code":
            monkeypatch.setattr(judging, "__file__", "params.yaml")
        case "package":
            monkeypatch.setattr(references, "version", lambda _: "0")
        case "device":
            monkeypatch.setattr(Judge, "device", "cuda")
    assert seen_in("tuned", looks)[1] == len(toy.PROMPTS)
    assert seen_in("tuned", looks)[1] == 0


@pytest.fixture
def cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What Linux says of its processors; nothing yet."""
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(sampling, "CPUINFO", path)
    return path


def test_a_processor_is_told_by_its_model_name(cpuinfo: Path) -> None:
    cpuinfo.write_text("processor\t: 0\nmodel\t\t: 17\nmodel name\t: A Fast One @ 2 GHz\n" * 2)
    assert sampling.processor() == "A Fast One @ 2 GHz"


@pytest.mark.parametrize("said", [None, "processor\t: 0\nmodel name\t:\nCPU part\t: 0xd0c\n"])
@pytest.mark.parametrize(("name", "expected"), [("arm", "arm"), ("", "aarch64")])
def test_a_processor_without_a_model_name_is_told_by_its_architecture(
    cpuinfo: Path, monkeypatch: pytest.MonkeyPatch, said: str | None, name: str, expected: str
) -> None:
    if said:
        cpuinfo.write_text(said)
    monkeypatch.setattr("platform.processor", lambda: name)
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert sampling.processor() == expected


def test_times_of_another_processor_are_not_taken_for_those_of_this_one(
    inside: Path, cpuinfo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, cost, said = [], result().cost, []

    def noting(self: Sampler, tasks: Any) -> Mapping[str, float]:
        measured.append(self.machine()["device"])
        return cost

    monkeypatch.setattr(Sampler, "cost", noting)
    for name in ("one", "one", "another"):
        cpuinfo.write_text(f"model name\t: {name}\n")
        evaluate.run(params_with(), "base")
        said.append(result().timed_on)
    assert said == [f"{name}, torch {torch.__version__}" for name in ("one", "one", "another")]
    assert measured == ["one", "another"]


def test_what_other_code_measured_is_measured_anew(
    inside: Path, tmp_path: Path, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of the same images, the same guide, on the same machine."""
    measured: list[str] = []
    terms, cost = Sampler.fvu_terms, result().cost

    def fvu_terms(self: Sampler, tasks: Any) -> Mapping[str, Any]:
        measured.append("guidance_fvu")
        return terms(self, tasks)

    monkeypatch.setattr(Sampler, "fvu_terms", fvu_terms)
    monkeypatch.setattr(Sampler, "cost", lambda *_: measured.append("cost") or cost)
    evaluate.run(params_with(), "base")
    assert measured == []
    shutil.copytree(Path(pnp_core.__file__).parent, tmp_path / "pnp_core")
    with (tmp_path / "pnp_core/guide/tiny.py").open("a") as file:
        file.write("# faster\n")
    monkeypatch.setattr(pnp_core, "__file__", str(tmp_path / "pnp_core/__init__.py"))
    evaluate.run(params_with(), "base")
    assert measured == ["guidance_fvu", "cost"] and not made


def test_more_images_sample_only_those_that_are_not_there(inside: Path, made: Made) -> None:
    before = Gallery.open("base")
    evaluate.run(params_with(num_images=72), "base")
    after = Gallery.open("base")
    assert after.tasks[:64] == before.tasks
    assert {task for _, task in made if not task.negative} == set(after.tasks[64:])
    assert {task for _, task in made if task.negative} == {
        task._replace(negative="red") for task in after.tasks[64:]
    }
    for setting in before.settings:
        assert after.files(setting)[:64] == before.files(setting)


def test_another_guide_samples_neither_cfg_nor_no_guidance(inside: Path, made: Made) -> None:
    before = result()
    write_bundle(0.04)
    evaluate.run(params_with(), "base")
    assert methods(made) == {"guided"}
    after = result()
    assert after.cell("cfg", 4) == before.cell("cfg", 4)
    assert after.cell("guided", 4) != before.cell("guided", 4)
    assert after.guidance_fvu != before.guidance_fvu


@pytest.mark.services
def test_a_guide_at_another_strength_is_not_comparable(inside: Path, made: Made) -> None:
    before = result()
    values = toy.toy_params()
    values["models"]["base"]["strength"] = 0.5
    toy.write_params(Path(), values)
    evaluate.run(load_params(Path("params.yaml")), "base")
    assert methods(made) == {"guided"}
    said = "the guide's strength differs: 0.5, and 1.0 for the champion"
    assert likeness.differences(result(), before) == [said]


def test_results_of_another_guide_are_not_registered(inside: Path) -> None:
    values = toy.toy_params()
    values["models"] = {"base": values["models"]["base"]}
    register.check_guide(GuideBundle.load("guides/bundle"), ["base"])
    write_bundle(0.04)
    toy.write_params(Path(), values)
    with pytest.raises(ValueError, match="results/evaluate/base is of another guide for 4 steps"):
        register.run(load_params(Path("params.yaml")))
    assert not Path("results/report").exists()


CHANGES = [
    ({"guidance_scales": [2.0]}, {("cfg", 2.0), ("guided", 2.0)}),
    ({"guidance_scale": 3.0}, {("cfg", 3.0), ("guided", 3.0)}),
    ({"grid_prompts": ["green bar", "blue ring", "red disc"]}, None),
]


@pytest.mark.parametrize(
    ("change", "expected"),
    few_of(CHANGES, CHANGES[0], CHANGES[2]),
    ids=["further scales", "another scale", "other prompts"],
)
def test_what_another_setting_changes_is_sampled_and_nothing_else(
    inside: Path, made: Made, change: Mapping[str, Any], expected: set[Any] | None
) -> None:
    evaluate.run(params_with(**change), "base")
    if expected is None:
        assert methods(made) == {"unguided", "cfg", "guided"}
    else:
        assert {(setting.method, setting.guidance_scale) for setting, _ in made} == expected


@pytest.mark.services
def test_a_full_review_is_one_setting(inside: Path) -> None:
    evaluate.run(params_with(review="full"), "base")
    evaluation = result()
    assert (evaluation.num_images, evaluation.num_steps) == (72, (4, 2, 1))
    assert evaluation.cell("guided", 4, guidance_scale=2.0)
    assert evaluation.cell("cfg", 1, solver="dpmsolver++")
    assert not evaluation.cell("cfg", 0, solver="dpmsolver++")


@pytest.mark.parametrize("num_steps", [2, 3, 5, 8, 16, 32, 50])
def test_cfg_at_equal_cost_takes_the_steps_that_cost_nearest_to_a_guided_run(
    num_steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = params_with(num_steps=[num_steps]).evaluate
    for forwards_per_step in (1.036, 1.34, 1.9):
        cost = num_steps * forwards_per_step
        found = settings_of(config, 3.0, forwards_per_step)
        (steps,) = (setting.num_steps for setting in found if setting.solver == "dpmsolver++")
        off = abs(2 * steps - cost)
        assert off <= 0.05 * cost or off == min(abs(2 * n - cost) for n in range(1, 100))
        if forwards_per_step == 1.036 and num_steps % 2 == 0:
            assert steps == num_steps / 2


def test_cfg_beside_an_encoder_guide_takes_as_many_forwards_as_it(inside: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained("models/base", subfolder="unet")
    guide = Guide.from_unet(unet, GuideConfig(kind="encoder", max_parameters_ratio=0.2))
    GuideBundle({16: guide}).save("guides/bundle")
    work = evaluate.Work.of(params_with(num_steps=[16]), "base")
    cost = 16 * work.sampler.forwards_per_step(work.tasks)["guided"]
    (steps,) = (s.num_steps for s in work.recipes if s.solver == "dpmsolver++")
    assert steps > 8 and abs(2 * steps - cost) <= 1


def test_a_file_of_images_that_is_damaged_is_made_anew_and_named(
    inside: Path, made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = sorted(Path("results/sampled/base").glob("*/*.parquet"))[:2]
    whole = first.read_bytes(), second.read_bytes()
    first.write_bytes(whole[0][: len(whole[0]) // 2])
    middle = len(whole[1]) // 3
    second.write_bytes(whole[1][:middle] + bytes([whole[1][middle] ^ 255]) + whole[1][middle + 1 :])
    evaluate.run(params_with(), "base")
    said = capsys.readouterr().out
    assert f"{first} is not whole" in said and f"{second} is not whole" in said
    assert len(made) == 64 and (first.read_bytes(), second.read_bytes()) == whole


def test_images_of_another_recipe_are_not_taken_for_these(inside: Path, made: Made) -> None:
    files = sorted(Path("results/sampled/base").glob("*/*.parquet"))
    file, theirs = files[0], files[-1]
    before = file.read_bytes()
    file.write_bytes(theirs.read_bytes())
    assert file.parent != theirs.parent
    evaluate.run(params_with(), "base")
    assert len(made) == 32 and file.read_bytes() == before


def test_what_no_setting_asks_for_is_not_kept(inside: Path) -> None:
    evaluate.run(params_with(num_steps=[4], negative_prompts=[]), "base")
    folders = {file.parent for file in Path("results/sampled/base").glob("*/*.parquet")}
    assert len(folders) == 4
    assert result().num_steps == (4,) and result().negative == {}


def test_the_teacher_runs_once_a_state_for_guidance_fvu(inside: Path, forwards: list[int]) -> None:
    work = evaluate.Work.of(params_with(), "base")
    terms = work.sampler.fvu_terms(work.tasks[:8])
    assert forwards == [16, 8] * 4
    assert np.shape(terms["unexplained"]) == (8, 4)


def test_what_a_reviewer_asks_for_is_there(inside: Path) -> None:
    evaluation = result()
    cost = evaluation.cost
    for method in ("unguided", "cfg", "guided"):
        assert cost[f"{method}_peak_mb"] > 0
        assert cost[f"{method}_ms_per_image"] > 0 and cost[f"{method}_ms_per_image_batch_1"] > 0
        cell = evaluation.cell(method, 4)
        assert cell and cell.forwards == pytest.approx(4 * cost[f"{method}_forwards_per_step"])
    assert cost["cfg_forwards_per_step"] == pytest.approx(2, rel=0.01)
    assert 1 < cost["guided_forwards_per_step"] < 2 and cost["batch_size"] == 4
    assert cost["unguided_peak_mb"] < cost["cfg_peak_mb"]
    assert list(evaluation.fvu_intervals) == list(evaluation.fvu_by_timestep)
    heldout = {task.prompt for task in Gallery.open("base").tasks if task.is_heldout}
    assert evaluation.fvu_prompts == {"heldout": len(heldout), "trained": 0}
    for t, (low, high) in evaluation.fvu_intervals.items():
        assert low < evaluation.fvu_by_timestep[t] < high


def test_dvc_is_given_a_few_flat_numbers_and_curves_of_all_settings(inside: Path) -> None:
    metrics = read_json(Path("results/evaluate/base/metrics.json"))
    assert set(metrics) == {"fvu", "flops", "fid_4", "fid_2", "clip_4", "clip_2"}
    cell = result().cell("guided", 2)
    assert cell and metrics["fid_2"] == cell.scores["fid"].value
    with Path("results/evaluate/base/quality.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["method"], row["num_steps"]) for row in rows} == {
        *((method, n) for method in ("unguided", "CFG", "guided") for n in ("4", "2")),
        ("CFG, DPM-Solver++", "2"),
        ("CFG, DPM-Solver++", "1"),
    }
    assert all(float(row["fid_low"]) < float(row["fid"]) < float(row["fid_high"]) for row in rows)
    evaluate.run(params_with(guidance_scales=[2.0, 6.0]), "base")
    with Path("results/evaluate/base/scales.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["guidance_scale"] for row in rows if row["method"] == "guided"] == [
        "2.0",
        "4.0",
        "6.0",
    ]


def test_held_out_prompts_are_marked_in_the_grid() -> None:
    images = np.zeros((2, 8, 8, 3), dtype=np.uint8)
    made = {
        marked: np.asarray(grid({"row": images}, ["a", "b"], title="t", marked=marked))
        for marked in ((False, False), (False, True))
    }
    blue = np.array([0, 0x50, 0xB0])
    found = {marked: (image == blue).all(axis=2).any() for marked, image in made.items()}
    assert found == {(False, False): False, (False, True): True}


def test_shares_of_negative_prompts_are_those_of_pictures_that_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    tasks = [Task("thing", seed, True) for seed in range(40)]
    avoiding = [task._replace(negative="red") for task in tasks]
    plain = generator.integers(80, 120, (40, 8, 8, 3)).astype(np.uint8)
    change = generator.integers(0, 40, plain.shape).astype(np.uint8)
    kept, recipes = KeptImages("model"), {}
    for method, share in (("cfg", 1.0), ("guided", 0.5)):
        setting = Setting(method, 4, "ddim", 3.0)
        recipes[setting] = recipe = {"method": method}
        kept.write(recipe, setting, tasks, plain)
        changed = plain + np.round(share * change).astype(np.uint8)
        kept.write(recipe, setting, avoiding, changed)
    sampled = Sampled(kept=kept, recipes=recipes, tasks=tasks)

    class Brightness:
        """Sees red in what is bright."""

        reads_text = True

        def clip_scores(self, images: np.ndarray, prompts: Any) -> np.ndarray:
            result: np.ndarray = 255 - images.reshape(len(images), -1).mean(axis=1)
            return result

    cfg = Setting("cfg", 4, "ddim", 3.0)
    found = measure_negatives(sampled, cfg, avoiding, ["red"] * 40, Brightness())  # type: ignore[arg-type]
    assert found["picture"].value == pytest.approx(0.5, abs=0.02)
    assert found["avoided"].value == pytest.approx(0.5, abs=0.02)
    assert len(found["avoided"].replicates) == len(sampled.counts) - 1


def test_data_without_held_out_prompts_is_refused_before_sampling(inside: Path) -> None:
    path = Path("data/prepared/heldout.parquet")
    table = pq.read_table(path)
    pq.write_table(table.slice(0, 0), path)
    with pytest.raises(ValueError, match="heldout.parquet has no prompts: .*heldout_fraction"):
        evaluate.run(params_with(), "base")


def test_a_guide_that_does_not_fit_is_refused_before_sampling(inside: Path, made: Made) -> None:
    unet = UNet2DConditionModel.from_pretrained("models/base", subfolder="unet")
    other = UNet2DConditionModel.from_config({**unet.config, "layers_per_block": 2})
    guide = Guide.from_unet(other, GuideConfig(max_parameters_ratio=0.2))
    GuideBundle({2: guide}).save("guides/bundle")
    with pytest.raises(ValueError, match="was made for a UNet with channels"):
        evaluate.run(params_with(num_images=72), "base")
    assert not made


def test_images_that_another_evaluation_is_at_are_not_forgotten(
    inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As those of a guide that is judged anew."""
    values = toy.toy_params()
    values["cluster"]["wait_minutes"] = 0.001
    toy.write_params(Path(), values)
    params = load_params(Path("params.yaml"))
    in_use = Path("results/sampled/base/0123456789abcdef")
    in_use.mkdir()
    busy = rf"evaluate base: another evaluation of it is at its images \(PID {os.getpid()}\): "
    with alone_with("base", 0.0), alone_with("tuned", 0.0):
        with pytest.raises(ValueError, match=busy + "waited .* when it ends"):
            evaluate.run(params, "base")
        assert in_use.exists()
    assert re.search(busy + "waiting, 0:00 at most", capsys.readouterr().out)
    evaluate.run(params, "base")
    assert not in_use.exists()


def methods_in(file: Path) -> set[str]:
    return set(pq.read_table(file, columns=["method"])["method"].to_pylist())


@pytest.mark.services
def test_a_guide_judged_anew_leaves_what_dvc_keeps_and_has_its_images_apart(
    inside: Path, made: Made
) -> None:
    def there() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in Path("results").rglob("*") if path.is_file()}

    guide, into = Path("other"), Path("runs/reevaluated/guide-1")
    Path("guides/bundle").rename("ours")
    write_bundle(0.03)
    Path("guides/bundle").rename(guide)
    Path("ours").rename("guides/bundle")
    before = there()
    evaluate.run(params_with(), "base", guide=guide, into=into)
    assert there() == before
    assert methods(made) == {"guided"}, "what no guide is in is not made again"
    found = {method for file in into.rglob("*.parquet") for method in methods_in(file)}
    assert found == {"guided"}


def test_a_file_in_place_of_the_folder_for_results_is_refused_before_sampling(
    inside: Path, made: Made
) -> None:
    with pytest.raises(ValueError, match="--into params.yaml: it is a file; name a folder"):
        evaluate.run(params_with(num_images=72), "base", into=Path("params.yaml"))
    assert not made


def test_what_the_gate_will_lack_is_told_before_sampling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def lacking(params: Params, *, reads_text: bool) -> list[str]:
        extent = params.evaluate.extent
        return params.promote.lacking(extent.num_images, extent.num_steps, reads_text=reads_text)

    assert lacking(params_with(), reads_text=True) == []
    rule = {"min_gain": 0.5, "ratio": None, "max_loss": None}
    values = toy.toy_params()
    values["promote"] |= {"min_images": 72, "scores": {"clip_score": rule}}
    values["promote"]["at_steps"] = {1: {"fid": rule}, 2: None}
    toy.write_params(Path(), values)
    found = lacking(load_params(Path("params.yaml")), reads_text=False)
    assert [line.split(" ")[0] for line in found] == ["64", "promote.at_steps", "promote"]
    values["evaluate"]["review"] = "full"
    toy.write_params(Path(), values)
    assert lacking(load_params(Path("params.yaml")), reads_text=True) == []


def test_a_machine_of_another_precision_refuses_to_sample(inside: Path) -> None:
    params = params_with()
    own = evaluate.Work.of(params, "base").sampler.precision
    other = "bf16" if own == "fp32" else "fp32"
    here = evaluate.Work.of(params, "base")
    tasks, settings = here.tasks, list(here.recipes)
    evaluate.sampling(params, "base", BUNDLE, None, own, tasks, settings)
    with pytest.raises(ValueError, match=f"is {own} on .*, and {other} where this began"):
        evaluate.sampling(params, "base", BUNDLE, None, other, tasks, settings)


def test_a_worker_makes_its_batches_without_prepared_data(
    inside: Path, made: Made, forwards: list[int]
) -> None:
    """Of which nothing is sent to nodes that do not see this folder."""
    params = params_with()
    here = evaluate.Work.of(params, "base")
    setting = here.cfg
    name = here.named(setting, here.tasks[3:5])
    shutil.rmtree("data")
    precision, settings = here.sampler.precision, list(here.recipes)
    forwards.clear()
    make = evaluate.sampling(params, "base", BUNDLE, None, precision, here.tasks, settings)
    assert forwards == [], "costs are counted where this began"
    make(name)
    assert made == Counter((setting, task) for task in here.tasks[3:5])


def test_a_disk_that_can_not_hold_the_images_is_refused_before_any_is_made(
    inside: Path, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, manifest = Path("results/sampled"), Path("data/prepared/manifest.json")
    with Image.open(io.BytesIO(pq.read_table(TRAIN)["image"][0]["bytes"].as_py())) as image:
        image.save(file := io.BytesIO(), "JPEG", quality=50)
        image = Image.open(file)
        image.save(whole := io.BytesIO(), "WEBP", lossless=True, quality=50, method=2)
    rows = pq.read_table(TRAIN).to_pylist()
    rows = [row | {"image": {"bytes": file.getvalue(), "path": None}} for row in rows]
    pq.write_table(pa.Table.from_pylist(rows), TRAIN)
    shutil.rmtree(folder)
    work = evaluate.Work.of(params_with(), "base")
    expected = len(whole.getvalue())
    assert evaluate.image_bytes(work) == expected != len(file.getvalue())
    values = read_json(manifest)
    write_json(manifest, values | {"resolution": values["resolution"] // 2})
    assert evaluate.image_bytes(work) == 4 * expected, "four times the pixels"
    write_json(manifest, values)

    num_images = sum(len(tasks) for _, tasks in work.missing())
    enough = num_images * evaluate.image_bytes(work)
    free = type("Usage", (), {"free": enough - 1})
    monkeypatch.setattr("shutil.disk_usage", lambda _: free)
    with pytest.raises(ValueError, match=r"sampled/base has .* ask for fewer images"):
        evaluate.sample_missing(work, "base")
    assert not made
    free.free = enough
    monkeypatch.setattr(evaluate.Work, "make", lambda *_: None)
    evaluate.sample_missing(work, "base")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_while_ray_workers_sample_nothing_of_this_process_is_on_its_gpu(
    inside: Path, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, cpu = torch.device("cpu", 0), torch.device("cpu")  # told apart by name alone
    on: dict[str, torch.device] = {}
    while_sampling: list[set[torch.device]] = []
    monkeypatch.setattr(device, "device", lambda: gpu)
    for cls in (DiffusionPipeline, GuideBundle, Judge):

        def to(self: Any, target: torch.device, cls: Any = cls, move: Any = cls.to) -> Any:
            on[cls.__name__] = target
            return move(self, target)

        monkeypatch.setattr(cls, "to", to)
    judge = Judge.__init__

    def opened(self: Judge, folder: str, target: torch.device) -> None:
        on["Judge"] = target
        judge(self, folder, target)

    monkeypatch.setattr(Judge, "__init__", opened)

    def sample(*_: Any) -> None:
        while_sampling.append({*on.values()})

    monkeypatch.setattr(evaluate, "sample_missing", sample)
    values = toy.toy_params()
    values["cluster"]["num_workers"] = num_workers
    toy.write_params(Path(), values)
    evaluate.run(load_params(Path("params.yaml")), "base")
    assert while_sampling == [{cpu if num_workers else gpu}]
    assert len(on) == 3 and {*on.values()} == {gpu}, "measured where there is a GPU"


def sample_and_lose_a_worker(params: Params, **named: Any) -> Callable[[str], None]:
    """The stage's work; a worker is killed once in the middle of it."""
    make = evaluate.sampling(params, **named)

    def make_or_die(name: str) -> None:
        if '"guided"' in name and not Path("killed").exists():
            Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        make(name)

    return make_or_die


@pytest.mark.services
def test_two_ray_workers_of_which_one_dies_make_the_images_that_one_process_does(
    inside: Path, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    def files() -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in Path("results/sampled/base").rglob("*.parquet")}

    alone, cells = files(), result().cells
    shutil.rmtree("results")
    work = evaluate.run_tasks
    monkeypatch.setattr(
        evaluate,
        "run_tasks",
        lambda make, *rest, **named: work(
            functools.partial(sample_and_lose_a_worker, **make.keywords), *rest, **named
        ),
    )
    values = toy.toy_params()
    values["cluster"]["num_workers"] = 2
    toy.write_params(Path(), values)
    evaluate.run(load_params(Path("params.yaml")), "base")
    assert Path("killed").exists() and not made, "this process made none"
    assert files() == alone and result().cells == cells


@pytest.mark.parametrize("on_gpus", [False, True])
def test_that_workers_have_gpus_and_what_measures_has_none_is_told(
    inside: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    on_gpus: bool,
) -> None:
    work = evaluate.Work.of(load_params(Path("params.yaml")), "base")
    monkeypatch.setattr("components.device.device", lambda: torch.device("cpu"))
    cluster = work.sampler.params.cluster.model_copy(update={"num_workers": 2})
    work.sampler.params = work.sampler.params.model_copy(update={"cluster": cluster})
    monkeypatch.setattr(evaluate, "run_tasks", lambda *_, **__: on_gpus)
    evaluate.sample_missing(work, "base")
    told = "evaluate base: this machine has no GPU, as the Ray workers have: judges, guidance_fvu"
    assert (told in capsys.readouterr().out) == on_gpus


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_images": 63}, "num_images is 63, and FID needs 64 at least"),
        ({"full": {"num_images": 12, "num_steps": [2], "guidance_scales": []}}, "full.num_images"),
        ({"judges": []}, "evaluate.judges"),
        ({"judges": ["models/judge", "models/judge/"]}, "judges: models/judge is named twice"),
        ({"grid_prompts": []}, "evaluate.grid_prompts"),
    ],
    ids=["too few", "too few in full", "no judge", "a judge twice", "no prompts"],
)
def test_what_can_not_be_measured_is_refused_by_name(
    world: Path, change: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        params_with(**change)


@pytest.mark.parametrize("side", [64, 512, 768, 1024, 4096])
def test_images_of_any_size_take_less_than_half_a_gigabyte_while_they_are_compared(
    side: int,
) -> None:
    num = num_at_a_time(side, side)
    assert num >= 1
    assert num * side * side * 3 * np.dtype(np.float64).itemsize < 0.5e9
