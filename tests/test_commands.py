"""Commands of stages that take no arguments."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = ("prepare", "cache", "distill", "halve", "register", "registered")


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_takes_no_arguments_does_nothing_when_given_some(
    tmp_path: Path, stage: str
) -> None:
    def run(argument: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", f"components.{stage}", argument],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )

    refused = run("base")
    assert refused.returncode == 2, refused.stderr
    assert f"python -m components.{stage}: error: unrecognized arguments: base" in refused.stderr
    if stage == "cache":
        told = run("--help")
        assert told.returncode == 0 and "params.yaml" in told.stdout
        assert "everything frozen, computed once" in told.stdout
