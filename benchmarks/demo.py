"""How long a first evening takes: installing, the first picture, the demo and each of its stages.

    python -m benchmarks.demo --run      # in a fresh clone of HEAD, with nothing beside it
    python -m benchmarks.demo --json     # what the committed results say

`--run` clones the last commit into a temporary folder, so it installs everything there, about 7 GB.
With --json, the last line on stdout is one JSON object:

    install_s          `make install`
    first_picture_s    after it, `python -m components.generate` with zoo/guide
    demo_s             after that, `make demo`
    stages             seconds from a stage's first line to the next one's
    fid_ratio_worst    guided over CFG, of the demo's rows
    promoted           whether `python -m flows promote` made its guide the champion
    machine            its processor, cores used, whether it has bf16 units, and instructions used
"""

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.command import command_parser, errors_in_one_line
from benchmarks.record import as_line, precision_on, record
from components.environment import quiet
from components.evaluation import FILE, Evaluation
from components.paths import EVALUATED
from components.sampling import processor
from pnp_core.files import read_json, write_json
from pnp_core.precision import has_bf16

RESULTS = Path("benchmarks/results/demo.json")
PICTURE = ("--guide", "zoo/guide", "red apple", "--out", "first.png")
# Of a line of the flow's log; the flow's own lines have a level there.
STAGE = re.compile(r"\| (?!INFO|WARNING|ERROR)([\w-]+)\s+\|")


def run() -> dict[str, Any]:
    """All of it, see the module's docstring. Raises CalledProcessError if a command fails."""
    with tempfile.TemporaryDirectory() as temporary:
        clone = Path(temporary, "pnp-guide")
        subprocess.run(["git", "clone", "--quiet", ".", str(clone)], check=True)
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=clone, check=True, text=True, stdout=subprocess.PIPE
        )
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in ("PYTHONPATH", "VIRTUAL_ENV")
            and not name.startswith(("DVC_", "MLFLOW_", "PREFECT_"))
        }
        environment["PREFECT_HOME"] = str(clone / ".prefect")  # as `make demo` has it
        result: dict[str, Any] = {"install_s": timed(["make", "install"], clone, environment)}
        print(f"install: {result['install_s']:.0f} s", flush=True)
        python = [".venv/bin/python", "-m"]
        result["first_picture_s"] = timed(
            [*python, "components.generate", *PICTURE], clone, environment
        )
        print(f"first picture: {result['first_picture_s']:.0f} s", flush=True)
        result["stages"] = stages(clone, environment)
        result["demo_s"] = sum(result["stages"].values())
        evaluations = [
            Evaluation.load(file.parent) for file in sorted((clone / EVALUATED).glob(f"*/{FILE}"))
        ]
        result["fid_ratio_worst"] = max(
            each.ratio("fid", steps).value for each in evaluations for steps in each.num_steps
        )
        promotion = subprocess.run([*python, "flows", "promote"], cwd=clone, env=environment)
        result["promoted"] = promotion.returncode == 0
    made_by = record(guide="demo", precision=precision_on("cpu", "bf16"))
    made_by["commit"] = head.stdout.strip()  # here, files may have been changed since
    return {**result, "machine": machine(), "record": made_by}


def timed(command: list[str], folder: Path, environment: dict[str, str]) -> float:
    """Seconds that a command takes. Raises CalledProcessError if it fails."""
    start = time.monotonic()
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - start


def stages(folder: Path, environment: dict[str, str]) -> dict[str, float]:
    """Seconds of each stage of `make demo`; what comes before the first is `start`."""
    found: dict[str, float] = {}
    name, since = "start", time.monotonic()
    demo = subprocess.Popen(
        ["make", "demo"],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert demo.stdout
    for line in demo.stdout:
        print(line, end="", flush=True)
        stage = STAGE.search(line)
        if stage and stage[1] != name:
            now = time.monotonic()
            found[name] = found.get(name, 0.0) + now - since
            name, since = stage[1], now
    found[name] = found.get(name, 0.0) + time.monotonic() - since
    if demo.wait():
        raise subprocess.CalledProcessError(demo.returncode, "make demo")
    return found


def machine() -> dict[str, Any]:
    """What the times are of."""
    return {
        "processor": processor(),
        "cores": psutil.cpu_count(),
        "has_bf16": has_bf16("cpu"),
        "instructions": torch.backends.cpu.get_cpu_capability(),  # that PyTorch uses
        "system": platform.system(),
    }


@errors_in_one_line()
def main() -> None:
    """The command."""
    parser = command_parser("demo", __doc__)
    parser.add_argument("--run", action="store_true", help="install and run anew")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    arguments = parser.parse_args()
    quiet()
    if arguments.run:
        write_json(RESULTS, run())
    if not RESULTS.exists():
        sys.exit(f"error: there is no {RESULTS}: make it with --run")
    result = read_json(RESULTS)
    for name in ("install_s", "first_picture_s", "demo_s"):
        print(f"{name}: {result[name]:.0f}")
    for name, seconds in result["stages"].items():
        print(f"  {name}: {seconds:.0f}")
    print(f"worst FID over CFG's {result['fid_ratio_worst']:.3f}, promoted: {result['promoted']}")
    print(as_line(result["record"]))
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
