"""What commands refuse at once, before anything is computed, started or replaced."""

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from components.fetch import wanted
from components.inputs import places_of
from components.params import ParamsError
from components.paths import BUNDLE, EVALUATED
from components.registered import run as tell_version
from flows.__main__ import check, parser
from flows.evaluate import _placed, check_given
from pnp_core.files import write_json, write_text

pytest_plugins = ["tests.toy"]
ROOT = Path(__file__).parent.parent
STAGES = ("prepare", "cache", "distill", "halve", "register", "registered", "lineage", "tracking")


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


@pytest.fixture
def evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout in which all is there that an evaluation needs."""
    monkeypatch.chdir(tmp_path)
    BUNDLE.mkdir(parents=True)
    write_json(Path("data/prepared/manifest.json"), {})


def test_an_evaluation_replaces_results_alone(evaluated: None) -> None:
    write_text(Path("models/tuned/unet/config.json"), "{}")
    other = Path("other")
    other.mkdir()
    with pytest.raises(ValueError, match="models/tuned has no evaluation.json, and would be repl"):
        places_of("tuned", other, Path("models"))
    write_json(Path("mine/tuned/evaluation.json"), {})
    Path("empty/tuned").mkdir(parents=True)
    for into in ("mine", "empty", "new"):
        places_of("tuned", other, Path(into))


def test_another_guides_results_do_not_take_the_place_of_the_pipelines(evaluated: None) -> None:
    Path("other").mkdir()
    with pytest.raises(ValueError, match="results/evaluate is of guides/bundle: name another"):
        places_of("tuned", Path("other"), EVALUATED)
    assert places_of("tuned", BUNDLE.absolute(), EVALUATED.absolute()) == (BUNDLE, EVALUATED)


def test_what_an_evaluation_lacks_is_told_by_the_stage_that_makes_it(evaluated: None) -> None:
    with pytest.raises(ValueError, match="--guide nope: there is no such folder: .*fetch"):
        places_of("tuned", Path("nope"), Path("mine"))
    Path("data/prepared/manifest.json").unlink()
    with pytest.raises(ValueError, match="manifest.json: dvc repro prepare makes it"):
        places_of("tuned", BUNDLE, EVALUATED)
    BUNDLE.rmdir()
    with pytest.raises(ValueError, match="run the stage halve first"):
        places_of("tuned", BUNDLE, EVALUATED)


def test_a_version_of_no_report_is_told_by_the_stage_that_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    params: Any = None
    with pytest.raises(ValueError, match="results/report/summary.json: run the stage register"):
        tell_version(params)


@pytest.mark.parametrize(
    ("text", "said"),
    [(text, "a number, or champion") for text in ("abc", "Champion", "1.5", "")]
    + [(text, "no version has the number") for text in ("0", "-1", str(2**63))],
)
def test_what_is_no_version_is_refused_before_mlflow_is_asked(text: str, said: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=said):
        wanted(text)
    assert wanted("champion") == "champion" and wanted("7") == "7"


def test_a_forced_promotion_without_a_reason_is_refused_before_a_server_is_started() -> None:
    with pytest.raises(ValueError, match="--force needs --reason"):
        check(parser().parse_args(["promote", "--force"]))
    check(parser().parse_args(["promote", "--version", "2", "--dry-run"]))


def test_a_fine_tune_of_a_home_folder_is_found(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(world))
    check_given(_placed("~/models/tuned"), _placed("~/art/tuned.parquet"))


def test_a_fine_tune_that_is_not_there_is_told_before_a_workspace_is_made(world: Path) -> None:
    del world
    for path, reference, said in (
        ("models/nope", "art/tuned.parquet", "path: No model at models/nope"),
        ("models/tuned", "art/nope", "reference: there is no art/nope"),
    ):
        with pytest.raises(ParamsError, match=said):
            check_given(path, reference)
    check_given("models/tuned", "art/tuned.parquet")


@pytest.mark.parametrize("module", ["zoo.prompts", "tests.pipeline_page"])
def test_what_writes_a_tracked_file_writes_nothing_when_asked_for_help(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and f"usage: python -m {module}" in done.stdout


@pytest.mark.parametrize("benchmark", ["demo", "faults.__main__", "overhead", "review"])
def test_a_benchmark_that_reads_its_results_prints_json_when_asked_alone(
    benchmark: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    main = importlib.import_module(f"benchmarks.{benchmark}").main

    def last_line(*options: str) -> str:
        monkeypatch.setattr(sys, "argv", [benchmark, *options])
        main()
        return capsys.readouterr().out.splitlines()[-1]

    assert isinstance(json.loads(last_line("--json")), dict)
    with pytest.raises(json.JSONDecodeError):
        json.loads(last_line())
