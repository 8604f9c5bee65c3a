"""The promote flow: a decision as Prefect shows it, and the command line's exit code."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prefect.artifacts import Artifact
from prefect.client.orchestration import get_client

import flows.promote
from components import promote
from components.tracking import Registry
from flows import room
from flows.process import StageFailed
from flows.promote import promote_flow
from tests import toy
from tests.stores import NAME, TOY, register
from tests.toy import ROOT

pytest_plugins = ["tests.toy"]


@pytest.fixture
def versions(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout in which version 1 may be champion, and version 2 not."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    params = toy.toy_params()
    del params["models"]["tuned"]
    params["promote"]["guidance_fvu"]["most"] = 0.6
    toy.write_params(Path(), params)
    for fvu in (0.5, 0.7):
        register(fvu, num_steps=(4, 2))


def champion() -> str | None:
    return Registry(TOY, NAME).champion()


def last_state() -> Any:
    with get_client(sync_client=True) as client:
        (run,) = client.read_flow_runs(limit=1, sort="EXPECTED_START_TIME_DESC")  # type: ignore
    return run.state


def page() -> str:
    """What the artifact shows."""
    found = Artifact.get("promotion")
    assert found
    return str(found.data)


def test_a_refusal_is_a_completed_run_whose_artifact_says_why(
    prefect_server: None, versions: None
) -> None:
    assert promote_flow() == 3
    state = last_state()
    assert (state.type.value, state.name) == ("COMPLETED", "Refused")
    assert page().startswith(f"# {NAME} version 2: refused") and "guidance_fvu.most" in page()
    assert champion() is None


def test_each_option_reaches_the_command_line(
    prefect_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def stand_in(name: str, command: list[str], log: Any, **_: Any) -> None:
        commands.append(command)
        Path(command[-1]).write_text("# decided")

    monkeypatch.setattr(flows.promote, "run", stand_in)
    given = {"dry_run": True, "force": True, "reevaluate": True, "allow_dirty": True}
    assert promote_flow(version=3, reason="-- because", **given) == 0
    monkeypatch.setattr("sys.argv", commands[0][2:])
    read = vars(promote.parsed())
    assert read.items() >= {**given, "version": 3, "reason": "-- because"}.items()
    assert promote_flow(rollback=True) == 0 and "--rollback" in commands[1]
    assert page() == "# decided" and last_state().name == "Completed"


def test_only_a_reevaluation_waits_for_a_gpu_that_another_run_has(
    prefect_server: None, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = toy.toy_params()
    params["cluster"]["wait_minutes"] = 0.02
    toy.write_params(Path(), params)
    used: list[Any] = []

    def stand_in(_: str, command: list[str], log: Any, *, environment: Any) -> None:
        used.append(environment)
        Path(command[-1]).write_text("# decided")

    monkeypatch.setattr(flows.promote, "run", stand_in)
    monkeypatch.setattr(room.tempfile, "gettempdir", lambda: str(world))
    monkeypatch.setattr(room, "SECONDS_BETWEEN_LOOKS", 0.1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with room.room("distill", 1, 1.0, print):
        assert promote_flow() == 0 and used == [{}]
        with pytest.raises(StageFailed, match="promote: the GPUs of this machine are taken"):
            promote_flow(reevaluate=True)
    assert promote_flow(reevaluate=True) == 0
    assert used[1:] == [{"CUDA_VISIBLE_DEVICES": "3"}]


def test_what_could_not_be_decided_is_a_failed_run(
    prefect_server: None, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with pytest.raises(StageFailed, match="promote: --force needs --reason"):
        promote_flow(force=True)
    assert last_state().type.value == "FAILED"


@pytest.mark.services
def test_the_command_lines_exit_code_says_refused(versions: None) -> None:
    def call(*options: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "flows", "promote", *options]
        return subprocess.run(command, capture_output=True, text=True)

    refused = call("--version", "2")
    assert refused.returncode == 3, refused.stderr
    assert "Traceback" not in refused.stderr and champion() is None
    assert "refused: pnp-guide version 2" in refused.stdout + refused.stderr
    assert call("--version", "1").returncode == 0 and champion() == "1"
