"""What Prefect, DVC, MLflow and Ray add to the work itself.

    python -m benchmarks.overhead --json              # what the committed results say
    python -m benchmarks.overhead --run               # at the demo's size: hours
    python -m benchmarks.overhead --run --size toy    # in the tests' world: minutes

The same pipeline is run from nothing in four ways, each with one tool more: the bare stages one
after another, without tracking; with MLflow; by `dvc repro`; by the flow. What a way takes longer
than the one before is its tool's. Ray's is from a run of the training stages with two workers: what
it takes beyond half of what they take alone.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from benchmarks.bare import MODULES
from components.environment import quiet
from pnp_core.files import read_json, write_json
from tests.toy import make_repository

RESULTS = Path("benchmarks/results/overhead.json")
ROOT = Path(__file__).parent.parent
TRAINED = ("cache", "distill", "halve")
NUM_WORKERS = 2
Commands = Sequence[Sequence[str]]


def main() -> None:
    """Print what each tool takes, with `--run` after measuring it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--run", action="store_true", help="measure; else read the results")
    parser.add_argument("--size", choices=("demo", "toy"), default="demo")
    parser.add_argument("--scratch", type=Path, default=Path("build/overhead"), help="checkouts")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    arguments = parser.parse_args()
    quiet()
    if arguments.run:
        measure(arguments.size, arguments.scratch.absolute())
    if not RESULTS.exists():
        sys.exit(f"error: no {RESULTS}: python -m benchmarks.overhead --run makes it")
    numbers = summary(read_json(RESULTS))
    if not arguments.json:
        print("\n".join(f"{name:<18} {value}" for name, value in numbers.items()))
    print(json.dumps(numbers))


def measure(size: str, scratch: Path) -> None:
    """Seconds of each way, and of a flow and a `dvc repro` that find nothing to do.

    Written after each; what an earlier call with this `scratch` measured is not measured again.
    """
    fresh, kept = scratch / "fresh", scratch / "results.json"
    if not kept.exists():
        shutil.rmtree(scratch, ignore_errors=True)
        make_checkout(size, fresh)
    results: dict[str, Any] = {"size": size, "seconds": {}}
    if kept.exists():
        results = read_json(kept)
    results["cpus"] = os.cpu_count()
    models = YAML(typ="safe").load(fresh / "params.yaml")["models"]
    stages = [*MODULES, *(f"evaluate@{model}" for model in models), "register"]
    repro, flow = [["dvc", "repro"]], [["python", "-m", "flows", "distill"]]
    trained = [bare(stage) for stage in TRAINED]
    ways: list[tuple[str, Commands, str | None]] = [  # name, commands, and what they go on from
        ("bare", [bare(stage) for stage in stages[:-1]], None),  # what register does is MLflow's
        ("mlflow", [tracked(stage) for stage in stages], None),
        ("dvc", repro, None),
        ("prefect", flow, None),
        ("noop_flow", flow, None),
        ("noop_dvc", repro, None),
        ("prepared", [bare("prepare")], None),
        ("alone", trained, "prepared"),
        ("ray", trained, "prepared"),
    ]
    for way, commands, before in ways:
        if way in results["seconds"]:
            continue
        if way.startswith("noop"):
            folder = scratch / "prefect"
        else:
            folder = scratch / way
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(scratch / before if before else fresh, folder, symlinks=True)
        if way == "ray":
            set_workers(folder / "params.yaml", NUM_WORKERS)
        results["seconds"][way] = timed(commands, folder)
        print(f"{way}: {results['seconds'][way]:.1f} s", flush=True)
        write_json(kept, results)
    write_json(RESULTS, results)


def make_checkout(size: str, folder: Path) -> None:
    """A checkout in which nothing has been run."""
    if size == "toy":
        make_repository(folder)
    else:
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    for name in ("benchmarks", "tests"):
        shutil.copytree(ROOT / name, folder / name, dirs_exist_ok=True)


def bare(stage: str) -> list[str]:
    """The command of a stage without tracking."""
    return ["python", "-m", "benchmarks.bare", stage]


def tracked(stage: str) -> list[str]:
    """The command of a stage as dvc.yaml has it."""
    name, _, model = stage.partition("@")
    return ["python", "-m", f"components.{name}", *(["--model", model] if model else [])]


def set_workers(path: Path, num_workers: int) -> None:
    """Let the stages that train do so on Ray."""
    values = YAML(typ="safe").load(path)
    values["cluster"]["num_workers"] = num_workers
    with path.open("w") as file:
        YAML().dump(values, file)


def timed(commands: Commands, folder: Path) -> float:
    """Seconds that the commands take, one after another. Exits if one of them fails."""
    dropped = ("PREFECT_", "MLFLOW_", "RAY_", "DVC_", "PYTHONPATH")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    environment["PREFECT_HOME"] = str(folder / ".prefect")
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    began = time.perf_counter()
    for command in commands:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode != 0:
            sys.exit(f"error: {' '.join(command)} fails:\n{done.stdout[-2000:]}")
    return time.perf_counter() - began


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """The shares of the flow's time, and the seconds of a run that finds nothing to do."""
    seconds = results["seconds"]
    flow = seconds["prefect"]
    shares = {
        "mlflow_share": (seconds["mlflow"] - seconds["bare"]) / flow,
        "dvc_share": (seconds["dvc"] - seconds["mlflow"]) / flow,
        "prefect_share": (flow - seconds["dvc"]) / flow,
        "ray_share": (seconds["ray"] - seconds["alone"] / NUM_WORKERS) / seconds["ray"],
    }
    return {
        "size": results["size"],
        "overhead_share": round((flow - seconds["bare"]) / flow, 3),
        "overhead_s": round(flow - seconds["bare"], 1),
        "noop_flow_s": round(seconds["noop_flow"], 1),
        "noop_dvc_s": round(seconds["noop_dvc"], 1),
        **{name: round(share, 3) for name, share in shares.items()},
    }


if __name__ == "__main__":
    main()
