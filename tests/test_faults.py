"""The benchmark of faults sees what it is there to see."""

import sys
from pathlib import Path

import pytest

from benchmarks.faults import __main__ as faults
from benchmarks.faults import workspace
from benchmarks.faults.listing import FAULTS, Fault
from benchmarks.faults.workspace import UnexpectedError, Workspace
from pnp_core.files import read_json

RESULTS = Path(__file__).parent.parent / faults.RESULTS


@pytest.fixture
def reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A checkout with a guide and nothing else."""
    monkeypatch.setattr(workspace, "SECONDS_TO_END", 0.5)
    guide = tmp_path / "reference/guides/distilled/guide.safetensors"
    guide.parent.mkdir(parents=True)
    guide.write_bytes(b"weights")
    return Workspace(tmp_path / "reference")


def seen(breaks: workspace.Callable[[Workspace], None], reference: Workspace) -> dict[str, object]:
    fault = Fault("a_fault", "kind", None, breaks)
    return faults.observe(fault, reference, reference.folder.with_name("a_fault"))


def test_a_command_that_says_what_is_wrong_is_told(reference: Workspace) -> None:
    def breaks(broken: Workspace) -> None:
        fails = "import sys; sys.exit('error: no such bucket')"
        broken.told(broken.run(sys.executable, "-c", fails), "error: no such bucket")

    row = seen(breaks, reference)
    assert (row["told"], row["said"], row["tracebacks"]) == (True, "no such bucket", 0)


@pytest.mark.parametrize(
    "code",
    ["pass", "import sys; sys.exit('something')", "print('error: no such bucket')"],
    ids=["nothing", "another line", "exit code 0"],
)
def test_anything_else_is_silent(reference: Workspace, code: str) -> None:
    def breaks(broken: Workspace) -> None:
        broken.told(broken.run(sys.executable, "-c", code), "error: no such bucket")

    row = seen(breaks, reference)
    assert not row["told"]
    assert faults.summary({"a_fault": row})["silent"] == 1


def test_tracebacks_orphans_and_other_bytes_are_counted(reference: Workspace) -> None:
    def breaks(broken: Workspace) -> None:
        broken.start("sleep", "99")
        broken.run(sys.executable, "-c", "1 / 0")
        (broken.folder / "guides/distilled/guide.safetensors").write_bytes(b"other")
        broken.stages = ("distill",)

    row = seen(breaks, reference)
    assert row["tracebacks"] == 1
    assert row["orphans"] == ["sleep 99"]
    assert row["bytes_differ"] == ["guides/distilled/guide.safetensors"]
    numbers = faults.summary({"a_fault": row})
    assert (numbers["tracebacks"], numbers["orphans"], numbers["bytes_differ"]) == (1, 1, 1)
    assert not list(Workspace.orphans(reference)), "it leaves nothing behind itself"


def test_a_benchmark_that_fails_itself_has_shown_nothing(reference: Workspace) -> None:
    def breaks(broken: Workspace) -> None:
        raise KeyError("a mistake in the benchmark")

    row = seen(breaks, reference)
    assert not row["told"] and "the benchmark fails" in str(row["said"])


def test_recovery_that_fails_is_not_recovery(reference: Workspace) -> None:
    with pytest.raises(UnexpectedError, match="does not go on"):
        reference.recovers("false")


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("{folder}/a/b.py is gone", "./a/b.py is gone"),
        ("held by PID 1: /usr/bin/python -c x", "held by PID 1: python -c x"),
        ("no database sqlite:////srv/team/m.db", "no database sqlite:///m.db"),
        ("in '/tmp/a-b/c': (/var/x/y)", "in 'c': (y)"),
        ("s3://bucket/prefix and http://127.0.0.1:9/api/x", None),
        ("CFG / guided, ./mnt/shared, data/cache, 1/2/3", None),
    ],
)
def test_results_name_no_place_of_the_machine_that_made_them(
    tmp_path: Path, said: str, kept: str | None
) -> None:
    said = said.format(folder=tmp_path)
    assert faults.without_places(said, tmp_path) == (kept or said)


def test_no_committed_result_has_a_place_in_it() -> None:
    for row in read_json(RESULTS).values():
        for text in (row["said"], *row["orphans"], *row["bytes_differ"]):
            assert faults.without_places(text, Path("/nowhere")) == text


def test_every_fault_says_what_it_breaks_and_the_results_are_of_these() -> None:
    assert len(FAULTS) >= 40
    assert all((fault.breaks.__doc__ or "").strip() for fault in FAULTS.values())
    assert read_json(RESULTS).keys() <= FAULTS.keys()
