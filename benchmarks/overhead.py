"""What Prefect, DVC, MLflow and Ray add to the work itself.

    python -m benchmarks.overhead --json              # what the committed results say
    python -m benchmarks.overhead --run               # at the demo's size: half an hour
    python -m benchmarks.overhead --run --size toy    # in the tests' world alone: minutes

The bare stages, one after another and without tracking, and the flow make the same from nothing,
side by side on a thread each: whatever else the machine does slows both. What the flow takes longer
is the tools'. Who is first keeps its core busy until the other is done. `register` is no bare
stage: of its work, the report too is counted as the tools'.

Which tool takes how much is told by the tests' world with as many models as the demo, since it
depends on the stages and not on how long they compute: bare stages; with MLflow; by `dvc repro`; by
the flow; two and two side by side. Ray's part is what the stages that train take with two workers,
beyond half of what they take alone.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

from ruamel.yaml import YAML

from benchmarks.bare import MODULES
from benchmarks.command import command_parser, errors_in_one_line
from benchmarks.record import command
from components.environment import quiet
from components.lineage import git_commit
from pnp_core.files import read_json, write_json
from tests.toy import make_repository, toy_params

RESULTS = Path("benchmarks/results/overhead.json")
ROOT = Path(__file__).parent.parent
TRAINED = ("cache", "distill", "halve")
NUM_WORKERS = 2
REPRO, FLOW = ["dvc", "repro"], ["python", "-m", "flows", "distill"]
Commands = Sequence[Sequence[str]]


@errors_in_one_line()
def main() -> None:
    """Print what each tool takes, with `--run` after measuring it."""
    parser = command_parser("overhead", __doc__)
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
    if arguments.json:
        print(json.dumps(numbers))
    else:
        print("\n".join(f"{name:<18} {value}" for name, value in numbers.items()))


def measure(size: str, scratch: Path) -> None:
    """Seconds of each way, and of a flow and a `dvc repro` that find nothing to do.

    Written after each; what an earlier call with this `scratch` measured is not measured again.
    """
    kept = scratch / "results.json"
    if kept.exists():
        results = read_json(kept)
    else:
        shutil.rmtree(scratch, ignore_errors=True)
        make_toy(scratch / "toy")
        if size == "demo":
            make_demo(scratch / "demo")
        made_by = {"commit": git_commit(), "command": command(), "threads": 1}
        results = {"size": size, "cpus": os.cpu_count(), "record": made_by}
        results |= {"seconds": {}, "tools": {}}
    fresh = scratch / size
    stages = stages_of(fresh)
    tools = stages_of(scratch / "toy")
    trained = [bare(stage) for stage in TRAINED]
    # Of each group: where its seconds go, what its ways go on from, and the ways.
    groups: list[tuple[str, Path, dict[str, Commands]]] = [
        ("seconds", fresh, {"bare": [bare(s) for s in stages], "flow": [FLOW]}),
        ("seconds", scratch / f"{size}-flow", {"noop_flow": [FLOW]}),
        ("seconds", scratch / f"{size}-flow", {"noop_dvc": [REPRO]}),
        (
            "tools",
            scratch / "toy",
            {"bare": [bare(s) for s in tools], "mlflow": [*map(tracked, [*tools, "register"])]},
        ),
        ("tools", scratch / "toy", {"dvc": [REPRO], "flow": [FLOW]}),
        ("tools", scratch / "toy", {"prepared": [bare("prepare")]}),
        ("tools", scratch / "toy-prepared", {"alone": trained}),
        ("tools", scratch / "toy-prepared", {"ray": trained}),
    ]
    for part, source, ways in groups:
        if ways.keys() <= results[part].keys():
            continue
        name = "toy" if part == "tools" else size
        folders = {way: scratch / f"{name}-{way}" for way in ways}
        for way, folder in folders.items():
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(source, folder, symlinks=True)
            if way == "ray":
                set_workers(folder / "params.yaml", NUM_WORKERS)
        results[part] |= side_by_side(ways, folders)
        for way in ways:
            print(f"{name}, {way}: {sum(results[part][way]):.1f} s", flush=True)
        write_json(kept, results)
    write_json(RESULTS, results)


def make_toy(folder: Path) -> None:
    """A checkout of the tests' world with as many models as the demo."""
    params = toy_params()
    params["models"]["third"] = {"path": "models/tuned", "reference": "art/main.parquet"}
    make_repository(folder, params)
    with_benchmarks(folder)


def make_demo(folder: Path) -> None:
    """A checkout in which nothing has been run."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    with_benchmarks(folder)


def with_benchmarks(folder: Path) -> None:
    """Have what `bare` needs beside the stages."""
    for name in ("benchmarks", "tests"):
        shutil.copytree(ROOT / name, folder / name, dirs_exist_ok=True)


def stages_of(checkout: Path) -> list[str]:
    """All but `register`, as dvc.yaml names them."""
    models = YAML(typ="safe").load(checkout / "params.yaml")["models"]
    return [*MODULES, *(f"evaluate@{model}" for model in models)]


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
    with path.open("w", encoding="utf-8") as file:
        YAML().dump(values, file)


def side_by_side(
    ways: Mapping[str, Commands], folders: Mapping[str, Path]
) -> dict[str, list[float]]:
    """Seconds of each command of ways that run at the same time, each as if it were alone."""
    left, over = set(ways), Event()

    def go(way: str) -> list[float]:
        try:
            seconds = [timed(command, folders[way]) for command in ways[way]]
        finally:
            left.discard(way)
            if not left:
                over.set()
        with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
            over.wait()
            busy.kill()
        return seconds

    with ThreadPoolExecutor(len(ways)) as pool:
        return dict(zip(ways, pool.map(go, ways), strict=True))


def timed(command: Sequence[str], folder: Path) -> float:
    """Seconds that a command takes, on one thread. Exits if it fails."""
    dropped = ("PREFECT_", "MLFLOW_", "RAY_", "DVC_", "PYTHONPATH")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    environment["PREFECT_HOME"] = str(folder / ".prefect")
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment["OMP_NUM_THREADS"] = "1"
    began = time.perf_counter()
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
    seconds = {way: sum(each) for way, each in results["seconds"].items()}
    tools = {way: sum(each) for way, each in results["tools"].items()}
    trained_s = sum(results["seconds"]["bare"][MODULES.index(stage)] for stage in TRAINED)
    flow, ray = seconds["flow"], tools["ray"] - tools["alone"] / NUM_WORKERS
    shares = {
        "mlflow_share": (tools["mlflow"] - tools["bare"]) / flow,
        "dvc_share": (tools["dvc"] - tools["mlflow"]) / flow,
        "prefect_share": (tools["flow"] - tools["dvc"]) / flow,
        "ray_share": ray / (ray + trained_s / NUM_WORKERS),
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
