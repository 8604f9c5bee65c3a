"""What an evaluation does not do twice, and what a second Ray worker brings, on the embedded base.

With the guide that is committed, few images and one model.
"""

import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
from diffusers import UNet2DConditionModel
from ruamel.yaml import YAML

from components import evaluate, measuring
from components.evaluation import Evaluation
from components.params import Params, load_params
from components.paths import BUNDLE, EVALUATED, SAMPLED
from components.scores import Statistic, mean_of

ROOT = Path(__file__).parent.parent
MODEL = "base"
FEW: dict[str, Any] = {"num_images": 64, "num_steps": [4], "batch_size": 32}
BATCHES_BEFORE_KILL = 4
# a minute of sampling on a thread
LONG: dict[str, Any] = {
    "num_images": 64,
    "num_steps": [16],
    "batch_size": 16,
}
SECONDS_FOR_A_STAGE = 600.0

Image = tuple[str, str, str, int]  # folder of its recipe, prompt, negative prompt, seed


def resume(scratch: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """Kill an evaluation and go on with it, then measure something new of its images."""
    with world(scratch, **FEW):
        process = stage()
        wait_for_batches(process, BATCHES_BEFORE_KILL)
        process.kill()
        process.wait()
        before = {path: (identity(path), len(images_of(path))) for path in batches()}
        run_stage()
        again = sum(number for path, (was, number) in before.items() if identity(path) != was)
        made = Counter(image for path in batches() for image in images_of(path))
        again += sum(made.values()) - len(made)
        forwards, of_one, changed = measure_anew(load_params(Path("params.yaml")))
    keys: dict[str, float] = {
        "resample_images_after_kill": again,
        "new_metric_forwards": forwards,
    }
    seen = {
        "images at the kill": sum(number for _, number in before.values()),
        "images at the end": sum(made.values()),
        "scores that the new metric changed": changed,
        "calls of the UNet that the counter sees for one image of 4 steps": of_one,
    }
    return keys, seen


def ray(scratch: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """The sampling of one evaluation by one Ray worker and by two, of a thread each."""
    seconds = {}
    for num_workers in (1, 2):
        with world(scratch / str(num_workers), num_workers=num_workers, **LONG):
            work = evaluate.Work.of(load_params(Path("params.yaml")), MODEL)
            began = time.monotonic()
            evaluate.sample_missing(work, MODEL)
            seconds[num_workers] = time.monotonic() - began
    seen = {
        "seconds by number of workers, Ray's start included": seconds,
        "cores": os.cpu_count(),
        "load before": os.getloadavg()[0],
    }
    return {"ray_speedup_2_workers": seconds[1] / seconds[2]}, seen


def measure_anew(params: Params) -> tuple[int, int, int]:
    """Evaluate again with another metric and another judge.

    Returns calls of the UNet that it took, calls that one image takes, and how many scores are
    other ones than before.
    """
    before = Evaluation.load(EVALUATED / MODEL)
    shutil.copytree(params.evaluate.judges[0], "other-judge")
    judges = (*params.evaluate.judges, "other-judge")
    config = params.evaluate.model_copy(update={"judges": judges})
    calls: list[int] = []
    forward = UNet2DConditionModel.forward

    @wraps(forward)  # hooks read its signature
    def counted(*args: Any, **named: Any) -> Any:
        calls.append(1)
        return forward(*args, **named)

    with (
        mock.patch.object(UNet2DConditionModel, "forward", counted),
        mock.patch.object(measuring, "diversity", mean_length),
    ):
        evaluate.run(params.model_copy(update={"evaluate": config}), MODEL)
        taken = len(calls)
        work = evaluate.Work.of(params, MODEL)
        work.sampler.make(work.cfg, work.tasks[:1])
    after = Evaluation.load(EVALUATED / MODEL)
    assert len(after.judges) == 2 and len(after.cells) == 2 * len(before.cells)
    old = {_setting(cell): cell.scores["diversity"].value for cell in before.cells}
    now = {_setting(cell): cell.scores["diversity"].value for cell in after.cells}
    changed = sum(now[setting] != value for setting, value in old.items())
    return taken, len(calls) - taken, changed


def mean_length(features_ND: np.ndarray) -> Statistic:
    """A metric that the project does not have: the mean length of an image's features."""
    return mean_of(np.linalg.norm(features_ND, axis=1))


@contextmanager
def world(folder: Path, *, num_workers: int = 0, **changes: Any) -> Iterator[None]:
    """The embedded base with the committed guide in `folder`, which is the working directory."""
    folder.mkdir(parents=True, exist_ok=True)
    values = YAML().load(ROOT / "params.yaml")
    values["models"] = {MODEL: values["models"][MODEL]}
    values["prepare"]["files"] = values["prepare"]["files"][:1]
    values["evaluate"].update(changes)
    values["evaluate"]["grid_prompts"] = values["evaluate"]["grid_prompts"][:4]
    values["cluster"]["num_workers"] = num_workers
    YAML().dump(values, folder / "params.yaml")
    (folder / "zoo").symlink_to(ROOT / "zoo")
    shutil.copytree(ROOT / "zoo/guide", folder / BUNDLE)
    before = Path.cwd()
    os.chdir(folder)
    try:
        subprocess.run([sys.executable, "-m", "components.prepare"], env=environment(), check=True)
        yield
    finally:
        os.chdir(before)


def stage() -> "subprocess.Popen[bytes]":
    """The stage, begun."""
    command = [sys.executable, "-m", "components.evaluate", "--model", MODEL]
    return subprocess.Popen(command, env=environment(), stdout=sys.stderr)


def run_stage() -> None:
    """The stage, from where it is to its end."""
    if code := stage().wait(SECONDS_FOR_A_STAGE):
        raise ValueError(f"components.evaluate ended with {code}: see above")


def environment() -> dict[str, str]:
    """Of a process that finds this code from another folder."""
    path = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


def wait_for_batches(process: "subprocess.Popen[bytes]", number: int) -> None:
    """Until so many are there. Raises ValueError if the stage ends before."""
    while len(batches()) < number:
        if process.poll() is not None:
            raise ValueError(f"components.evaluate ended with {process.returncode}: see above")
        time.sleep(0.02)


def batches() -> list[Path]:
    """The files of images that are whole."""
    return sorted((SAMPLED / MODEL).glob("*/[!.]*.parquet"))


def identity(path: Path) -> tuple[int, int] | None:
    """Another one whenever a file is written anew; None for one that is gone."""
    if not path.exists():
        return None
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


def images_of(path: Path) -> list[Image]:
    """What is in a file of images."""
    columns = ["prompt", "negative_prompt", "seed"]
    rows = pq.read_table(path, columns=columns).to_pylist()
    return [(path.parent.name, r["prompt"], r["negative_prompt"], r["seed"]) for r in rows]


def _setting(cell: Any) -> tuple[Any, ...]:
    return cell.method, cell.num_steps, cell.solver, cell.guidance_scale, cell.judge
