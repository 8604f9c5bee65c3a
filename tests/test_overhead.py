"""What the benchmark of overhead says of the seconds that it measured."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import overhead
from tests.toy import make_world

ROOT = Path(__file__).parent.parent


def test_the_flow_is_held_against_the_bare_stages_beside_it_and_tools_against_the_flow() -> None:
    seconds = {"bare": [10.0, 20.0, 20.0, 20.0, 10.0], "flow": [100.0]}
    others = {"noop_flow": [9.0], "noop_dvc": [2.0]}
    tools = {"bare": [10.0, 10.0], "mlflow": [15.0, 15.0], "dvc": [34.0], "flow": [40.0]}
    ray = {"prepared": [5.0], "alone": [8.0, 6.0, 6.0], "ray": [20.0, 10.0, 10.0]}
    results = {"size": "demo", "seconds": seconds | others, "tools": tools | ray}
    numbers = overhead.summary(results)
    assert (numbers["overhead_share"], numbers["overhead_s"]) == (0.2, 20.0)
    shares = [numbers[f"{tool}_share"] for tool in ("mlflow", "dvc", "prefect")]
    assert shares == [0.1, 0.04, 0.06]
    assert numbers["ray_share"] == 0.5, "30 s beside the 30 that half of 60 are"
    assert (numbers["noop_flow_s"], numbers["noop_dvc_s"]) == (9.0, 2.0)


def test_ways_run_side_by_side_and_are_timed_alone(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    wait = "import time; from pathlib import Path; Path('here').touch(); end = time.time() + 60"
    meet = "\nwhile not Path('../{}/here').exists(): assert time.time() < end; time.sleep(0.01)"
    meeting = {us: ["python", "-c", wait + meet.format(them)] for us, them in ("ab", "ba")}
    ways = {"a": [meeting["a"]], "b": [meeting["b"], ["sleep", "0.5"]]}
    seconds = overhead.side_by_side(ways, {name: tmp_path / name for name in ways})
    assert [len(seconds[name]) for name in "ab"] == [1, 2]
    assert seconds["b"][1] >= 0.5 and seconds["a"][0] < 60


@pytest.mark.services
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
