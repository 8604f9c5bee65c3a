"""A version by itself: MLflow runs it in a fresh process elsewhere, and unpickles nothing."""

import base64
import importlib.util
import io
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, PNDMScheduler, StableDiffusionPipeline
from PIL import Image
from ruamel.yaml import YAML

import pnp_core
from components.tracking.serving import make_servable
from pnp_core import plug
from pnp_core.bundle import GuideBundle
from pnp_core.guide import Guide, GuideConfig
from pnp_core.models import load_pipeline
from pnp_core.scheduling import SchedulerChoice
from tests.conftest import changed, roused

BEST = SchedulerChoice(name="DDIMScheduler", timestep_spacing="trailing")
ASK = """
import json, sys
import mlflow
asked = json.loads(sys.argv[1])
model = mlflow.pyfunc.load_model(asked["version"])

def answer(params):
    try:
        return model.predict(asked["prompts"], params=params)
    except Exception as error:
        return str(error)

print(json.dumps([answer(params) for params in asked["params"]]))
"""


@pytest.fixture(scope="module")
def version(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a version whose guide does something, and of a fine-tune beside it."""
    folder = tmp_path_factory.mktemp("registered") / "guide"
    torch.manual_seed(1)
    pipe = StableDiffusionPipeline.from_pretrained(toy_folder, safety_checker=None)
    guide = roused(Guide.from_unet(pipe.unet, GuideConfig(max_parameters_ratio=0.2)))
    GuideBundle({2: guide, 4: guide}, {2: BEST, 4: BEST}).save(folder)
    changed(pipe.unet).save_pretrained(folder.parent / "tuned/unet")
    make_servable(folder, base=str(toy_folder), guidance_scale=5.0)
    return folder


@pytest.fixture(scope="module")
def answers(version: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Those of a fresh process in another folder, which knows nothing of the checkout."""
    usual = {"num_steps": 2, "guidance_scale": 4.0, "seed": 7}
    params = {
        "base": usual,
        "fine_tune": {**usual, "model": str(version.parent / "tuned")},
        "negative": {**usual, "negative_prompt": "a car"},
        "weakest": {**usual, "strength": 0.0},
        "unguided": {**usual, "guidance_scale": 0.0},
        "no_scale": {"num_steps": 2, "seed": 7},
        "no_steps": {"guidance_scale": 4.0, "seed": 7},
        "four": {**usual, "num_steps": 4},
        "missing": {"base": "nowhere/base"},
    }
    asked = {
        "version": str(version),
        "prompts": ["a cat", "a dog"],
        "params": list(params.values()),
    }
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PNP_GUIDE_BASE")}
    done = subprocess.run(
        [sys.executable, "-P", "-c", ASK, json.dumps(asked)],
        cwd=tmp_path_factory.mktemp("elsewhere"),
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(params, json.loads(done.stdout.splitlines()[-1]), strict=True))


def pixels(image: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image))))


def plugged(version: Path, base: Path, **asked: Any) -> np.ndarray:
    """What a user gets who plugs the bundle into a stock pipeline."""
    pipe = load_pipeline(base)
    BEST.set(pipe)
    plug(pipe, GuideBundle.load(version))
    image = pipe(
        "a dog", num_inference_steps=2, generator=torch.Generator().manual_seed(8), **asked
    )
    return np.asarray(image.images[0])


def test_without_a_number_of_steps_the_fewest_from_four_on_are_taken(
    answers: dict[str, Any],
) -> None:
    assert answers["no_steps"] == answers["four"] != answers["base"]


def test_a_fresh_process_elsewhere_makes_the_images_that_the_plug_makes(
    answers: dict[str, Any], version: Path, toy_folder: Path
) -> None:
    made = {name: pixels(images[1]) for name, images in answers.items() if name != "missing"}
    for name, call in {
        "base": {"guidance_scale": 4.0},
        "negative": {"guidance_scale": 4.0, "negative_prompt": "a car"},
        "unguided": {"guidance_scale": 0.0},
        "no_scale": {"guidance_scale": 5.0},  # what it was evaluated at
    }.items():
        own = plugged(version, toy_folder, **call)
        # another process may round otherwise: it has as many threads as there are cores
        assert np.abs(made[name].astype(int) - own).max() <= 1, name
    assert not np.array_equal(made["base"], made["fine_tune"])
    assert np.array_equal(made["weakest"], made["unguided"])


def test_two_requests_at_once_get_what_each_gets_alone(
    version: Path, toy_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("served", version / "served_guide.py")
    assert spec and spec.loader
    served = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(served)
    model = served.ServedGuide()
    model.load_context(SimpleNamespace(model_config={"base": str(toy_folder)}))

    def answer(asked: dict[str, Any]) -> list[str]:
        return list(model.predict(None, ["a cat", "a dog"], params=asked))

    requests = [
        {"num_steps": 2, "guidance_scale": 4.0, "seed": 7, "strength": 1.0},
        {"num_steps": 3, "guidance_scale": 2.0, "seed": 9, "strength": 0.0},
    ]
    alone = [answer(asked) for asked in requests]
    first_samples, both_sample = threading.Event(), threading.Barrier(2)
    call = StableDiffusionPipeline.__call__

    def sample(pipe: StableDiffusionPipeline, *args: Any, **named: Any) -> Any:
        first_samples.set()
        with suppress(threading.BrokenBarrierError):  # the other has to wait for this one's end
            both_sample.wait(timeout=1)
        return call(pipe, *args, **named)

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", sample)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(answer, requests[0])
        assert first_samples.wait(timeout=60)
        second = threads.submit(answer, requests[1])
        assert [first.result(), second.result()] == alone
    assert alone[0] != alone[1]


def test_a_base_that_is_not_there_is_asked_for(answers: dict[str, Any]) -> None:
    said = answers["missing"]
    assert "nowhere/base can't be opened here" in said and "PNP_GUIDE_BASE" in said


def test_a_version_of_an_experiment_names_the_base_of_the_checkout(
    version: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = tmp_path / ".dvc/tmp/exps/pnp-1"
    for place in (tmp_path, workspace):
        (place / "models/base").mkdir(parents=True)
    monkeypatch.chdir(workspace)
    GuideBundle.load(version).save(tmp_path / "guide")
    make_servable(tmp_path / "guide", base="models/base", guidance_scale=3.0)
    about = YAML(typ="safe").load(tmp_path / "guide/MLmodel")
    assert about["flavors"]["python_function"]["config"]["base"] == f"{tmp_path}/models/base"


def test_a_version_has_nothing_to_unpickle(version: Path, tmp_path: Path) -> None:
    made = tmp_path / "guide"  # where none has run its code yet, which compiles it there
    GuideBundle.load(version).save(made)
    compiled = Path(pnp_core.__file__).parent / "__pycache__"
    compiled.mkdir(exist_ok=True)
    (compiled / "of_a_test.pyc").touch()
    try:
        make_servable(made, base="nowhere", guidance_scale=3.0)
    finally:
        (compiled / "of_a_test.pyc").unlink()
    kinds = {path.suffix for path in made.rglob("*") if path.is_file()}
    assert kinds <= {"", ".json", ".safetensors", ".py", ".yaml", ".txt", ".md"}
    assert "python_model.pkl" not in (made / "MLmodel").read_text()


def test_a_bundle_keeps_which_scheduler_is_best_and_old_ones_say_nothing(
    version: Path, tmp_path: Path
) -> None:
    bundle = GuideBundle.load(version)
    assert bundle.scheduler_for(2) == bundle.scheduler_for(3) == BEST
    index = version / "bundle.json"
    written = index.read_text()
    try:
        index.write_text(json.dumps({"num_steps": [2]}))
        assert GuideBundle.load(version).scheduler_for(2) is None
        index.write_text(written.replace("DDIMScheduler", "os.system"))
        with pytest.raises(ValueError, match="'os.system' is no scheduler"):
            GuideBundle.load(version)
    finally:
        index.write_text(written)


def test_another_scheduler_than_the_best_is_warned_about_once(
    version: Path, pipe: StableDiffusionPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = GuideBundle.load(version)
    pipe.scheduler = PNDMScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="leading", skip_prk_steps=True
    )
    plug(pipe, bundle)
    for _ in range(2):
        pipe("a cat", num_inference_steps=4, guidance_scale=4.0)
    (warning,) = [record.message for record in caplog.records]
    assert "DDIMScheduler with trailing spacing, and the pipeline has PNDMScheduler" in warning
    caplog.clear()
    bundle.scheduler_for(2).set(pipe)
    assert not pipe.scheduler.config.clip_sample
    pipe("a cat", num_inference_steps=4, guidance_scale=4.0)
    assert not caplog.records


def test_with_exact_steps_no_scheduler_is_said_to_be_the_best(
    version: Path, pipe: StableDiffusionPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    """It was found without them."""
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    plug(pipe, GuideBundle.load(version), exact_steps=2)
    pipe("a cat", num_inference_steps=4, guidance_scale=4.0)
    assert not caplog.records
