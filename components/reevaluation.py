"""A registered guide judged anew, by the stage `evaluate` with the present params.yaml."""

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from components.environment import die_with_parent
from components.evaluation import FILE, Evaluation
from components.params import Params
from components.paths import RUNS
from pnp_core.files import read_json, write_json

REEVALUATED = RUNS / "reevaluated"


@dataclass(frozen=True, kw_only=True)
class Reevaluated:
    """What a version was measured to be, by model, and the file that says all of it."""

    evaluations: Mapping[str, Evaluation]
    file: Path


def reevaluate(name: str, version: str, bundle: Path, params: Params) -> Reevaluated:
    """Judge the guides in the folder `bundle` on every model, and wait for it.

    What is sampled is kept, so that a second time goes on where the first was stopped. Raises
    ValueError if a model can't be judged.
    """
    into = REEVALUATED / f"{name}-{version}"
    for model in params.models:
        print(f"judging {name} version {version} anew on {model}", flush=True)
        options = ["--model", model, "--guide", str(bundle), "--into", str(into)]
        done = subprocess.run(
            [sys.executable, "-m", "components.evaluate", *options],
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=die_with_parent,
        )
        if done.returncode != 0:
            said = done.stderr.strip().splitlines() or ["it was killed: is memory short?"]
            raise ValueError(
                f"{name} version {version} could not be judged anew on {model}: "
                f"{said[-1].removeprefix('error: ')}"
            )
    found = into / f"version-{version}.json"
    write_json(found, {model: read_json(into / model / FILE) for model in params.models})
    evaluations = {model: Evaluation.load(into / model) for model in params.models}
    return Reevaluated(evaluations=evaluations, file=found)
