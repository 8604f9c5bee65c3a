"""What a GPU takes: every row is made, on toys, and what is cut short goes on."""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import results, rows, table
from benchmarks.gpu.rows import Group
from benchmarks.gpu.scale import Scale, toy_scale, true_scale
from pnp_core.files import read_json
from tests.cases import few_of

CARD = "CPU, toy sizes"
FEW = """
import pytest

@pytest.mark.gpu
@pytest.mark.parametrize("number", [1, 2])
def test_good(number): pass

@pytest.mark.gpu
def test_bad(): assert 0

@pytest.mark.gpu
@pytest.mark.skip
def test_skipped(): pass

def test_that_needs_no_gpu(): assert 0
"""


@pytest.fixture(scope="module")
def scale() -> Scale:
    return toy_scale()


def counting(names: tuple[str, ...], made: list[str], failing: str | None = None) -> Group:
    """A group whose rows are told of as they are made."""

    def row(name: str) -> dict[str, Any]:
        made.append(name)
        if name == failing:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return {"ms": {"plain": 1.0}}

    return Group(names, lambda: {name: lambda name=name: row(name) for name in names})


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Four rows in two groups in place of all; what is made of them is put down."""
    made: list[str] = []
    groups = [counting(("a", "b"), made, failing="b"), counting(("c", "d"), made)]
    monkeypatch.setattr(results, "groups", lambda scale, scratch: groups)
    return made


def not_compiled(scale: Scale, scratch: Path) -> Iterator[Group]:
    """The rows that a CPU makes quickly."""
    for group in rows.groups(scale, scratch):
        names = tuple(n for n in group.names if rows.COMPILED not in n and rows.GRAPH not in n)
        opened = group.open
        yield Group(names, lambda opened=opened, names=names: {n: opened()[n] for n in names})


@pytest.mark.parametrize("what", few_of(["sd15", "sdxl", "sd15, not compiled"]))
def test_every_row_is_made_on_toys(
    what: str, scale: Scale, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _, less = what.partition(", ")
    scale = replace(scale, bases={base: scale.bases[base]})
    if less:
        for module in (results, table):
            monkeypatch.setattr(module, "groups", not_compiled)
    few = tmp_path / "test_few.py"
    few.write_text(FEW)
    monkeypatch.setattr(rows, "TESTS", (str(few),))
    for module in (rows, table):
        monkeypatch.setattr(module, "BATCHES", (1,))
    path = tmp_path / "gpu.json"
    results.run(scale, path, minutes=8, done=lambda: None)
    found = read_json(path)
    made = found[CARD]["rows"]
    assert set(made) == set(table.row_names(scale))
    assert {name: row["failed"] for name, row in made.items() if "failed" in row} == {}
    for name, row in made.items():
        if "ms" in row:
            ways = {"plain", "cfg", "tiny"} | ({"encoder", "full"} if rows.EAGER in name else set())
            assert set(row["ms"]) == set(row["memory_gb"]) == ways
            assert min(row["ms"].values()) > 0
    assert made[f"{base} train eager"]["samples_per_second"] > 0
    assert made[f"{base} cache"]["pairs_per_second"] > 0
    found_tests = {key: made["tests"][key] for key in ("passed", "skipped", "not_passed")}
    assert found_tests == {"passed": 2, "skipped": 1, "not_passed": ["test_bad"]}
    summary = table.summary(found, scale, results.code_digest())
    assert summary["missing"] == summary["failed"] == summary["of_other_code"] == []
    assert less or "not measured" not in table.as_markdown(found, scale, {})


def test_a_row_that_fails_says_so_and_the_others_are_made(
    few_rows: list[str], scale: Scale, tmp_path: Path
) -> None:
    path = tmp_path / "gpu.json"
    results.run(scale, path, minutes=1, done=lambda: None)
    made = read_json(path)[CARD]["rows"]
    assert list(few_rows) == ["a", "b", "c", "d"]
    assert made["b"]["failed"] == "the GPU's memory does not suffice"
    assert "memory does not suffice" in table.as_markdown(read_json(path), scale, {})


def test_a_run_that_was_killed_goes_on_where_it_was(
    few_rows: list[str], scale: Scale, tmp_path: Path
) -> None:
    path = tmp_path / "gpu.json"

    def killed() -> None:
        if few_rows == ["a", "b", "c"]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        results.run(scale, path, minutes=1, done=killed)
    assert set(read_json(path)[CARD]["rows"]) == {"a", "b", "c"}
    few_rows.clear()
    results.run(scale, path, minutes=1, done=lambda: None)
    assert few_rows == ["b", "d"]  # what had failed, and what was missing


@pytest.mark.services
def test_rows_of_other_code_are_made_again_and_kept_until_then(
    few_rows: list[str], scale: Scale, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "gpu.json"
    results.run(scale, path, minutes=1, done=lambda: None)
    few_rows.clear()
    monkeypatch.setattr(results, "code_digest", lambda: "other code")
    results.run(scale, path, minutes=0, done=lambda: None)
    assert few_rows == [] and len(read_json(path)[CARD]["rows"]) == 4
    results.run(scale, path, minutes=1, done=lambda: None)
    assert few_rows == ["a", "b", "c", "d"]


def test_a_row_that_hangs_is_ended_and_one_that_the_time_ends_is_left_for_the_next_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def hang() -> dict[str, Any]:
        time.sleep(20)
        return {}

    monkeypatch.setattr(results, "LONGEST_S", 0.2)
    row = results.guarded(hang, time.monotonic() + 10)
    assert row is not None and row["failed"] == "took more than 0.2 s"
    assert results.guarded(hang, time.monotonic() + 0.1) is None


def test_without_results_every_figure_is_null_and_missing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "RESULTS", tmp_path / "gpu.json")
    monkeypatch.setattr(sys, "argv", ["gpu", "--json"])
    command.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["missing"] == table.row_names(true_scale())
    for key in ("over_plain", "over_cfg"):
        assert found[key] == {base: {"1": None, "4": None} for base in ("sd15", "sdxl")}
    assert found["card"] is found["over_plain_eager"] is found["sdxl_24gb"] is None


def test_figures_are_ratios_of_the_largest_cards_times() -> None:
    row = {"ms": {"plain": 10.0, "cfg": 18.0, "tiny": 11.0}, "code": "now"}
    small = {"memory_gb": 24.0, "rows": {"sd15 compiled 1": {**row, "ms": {}}}}
    large = {"memory_gb": 80.0, "rows": {"sd15 compiled 1": row, "sdxl eager 1": row}}
    found = table.summary({"small": small, "large": large}, true_scale(), "now")
    assert found["card"] == "large"
    assert found["over_plain"]["sd15"] == {"1": pytest.approx(1.1), "4": None}
    assert found["over_cfg"]["sd15"]["1"] == pytest.approx(11 / 18)
    assert found["over_plain_eager"] == pytest.approx(1.1)


def test_a_cpu_writes_nothing_among_a_gpus_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "RESULTS", tmp_path / "gpu.json")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu", "--run"])
    with pytest.raises(SystemExit, match="finds no GPU"):
        command.main()
    assert list(tmp_path.iterdir()) == []
    assert command.TINY.parts[0] == "build"
