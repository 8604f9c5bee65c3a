"""What the benchmark of overhead says of the seconds that it measured."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import overhead
from tests.toy import make_world

ROOT = Path(__file__).parent.parent


def test_each_tool_has_what_it_takes_longer_than_without_it() -> None:
    ways = {"bare": 80.0, "mlflow": 90.0, "dvc": 94.0, "prefect": 100.0}
    others = {"noop_flow": 9.0, "noop_dvc": 2.0, "alone": 20.0, "ray": 40.0}
    numbers = overhead.summary({"size": "toy", "seconds": ways | others})
    assert numbers["overhead_share"] == 0.2
    shares = [numbers[f"{tool}_share"] for tool in ("mlflow", "dvc", "prefect")]
    assert shares == [0.1, 0.04, 0.06]
    assert sum(shares) == pytest.approx(numbers["overhead_share"])
    assert numbers["ray_share"] == 0.75, "40 s in place of 10"
    assert (numbers["noop_flow_s"], numbers["noop_dvc_s"]) == (9.0, 2.0)


def test_a_bare_stage_does_its_work_and_knows_no_mlflow(tmp_path: Path) -> None:
    make_world(tmp_path)
    code = (
        "import sys; sys.modules['mlflow'] = None; from benchmarks.bare import run; "
        "run('prepare'); run('cache'); run('distill')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "guides/distilled/config.json").exists()
    assert not (tmp_path / "mlflow.db").exists()
