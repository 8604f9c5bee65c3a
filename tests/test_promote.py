"""Promotion: whatever MLflow answers, what becomes champion is what the rules allow."""

import re
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from components import promote
from components.cli import main
from components.params import Evaluate, Params, Register, load_params
from components.places import Cluster, Tracking
from components.promote import Options
from components.tracking import Decision, Registry, TrackingError
from tests.cases import IF_CALLS_FAIL, few_of
from tests.stores import ERRORS, NAME, TOY, Calls, folder_of, register
from tests.toy import ROOT

pytest_plugins = ["tests.stores"]

RULES = load_params(ROOT / "params.yaml").promote
EVALUATE = Evaluate.model_construct(num_steps=(), review="quick")


def params(tracking: Tracking = TOY) -> Params:
    """What promotion reads of the parameters."""
    return Params.model_construct(
        tracking=tracking,
        register_=Register(name=NAME),
        promote=RULES,
        models={},
        evaluate=EVALUATE,
        cluster=Cluster(num_workers=0, max_failures=0, wait_minutes=0.05),
    )


def champion() -> str | None:
    return Registry(TOY, NAME).champion()


@pytest.fixture
def crowned(place: Path) -> None:
    """Version 1 is champion; version 2 is worse, version 3 better."""
    for fvu in (0.5, 0.7, 0.4):
        register(fvu)
    promote.run(params(), "1")


def decide(version: str | None = None, **options: Any) -> int:
    """Promote as the command line does; returns the exit code."""
    try:
        main_of(lambda: promote.run(params(), version, Options(**options)))
    except SystemExit as left:
        return int(left.code or 0)
    return 0


def main_of(work: Any) -> None:
    """Errors in one line, without a params.yaml."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("components.cli.load_params", lambda path: params())
        patch.setattr("components.cli.check_files", lambda params: None)
        main(lambda params: work())


def num_calls(calls: Calls, version: str) -> int:
    """How many calls a promotion takes when all goes well; the champion is as before."""
    before = champion()
    calls.reset()
    decide(version)
    number = len(calls.names)
    calls.reset()
    assert before
    Registry(TOY, NAME).store.client.set_registered_model_alias(NAME, "champion", before)
    return number


@pytest.mark.parametrize("first", few_of(range(2), 0))
@pytest.mark.parametrize("kind", few_of(ERRORS, "connection"))
def test_a_worse_guide_is_not_promoted_whichever_call_fails(
    crowned: None, calls: Calls, kind: str, first: int, capsys: pytest.CaptureFixture[str]
) -> None:
    number = num_calls(calls, "2")
    assert {"get_registered_model", "get_model_version_by_alias"} <= set(
        MlflowClient.__dict__
    ) and number > 8
    calls.error = ERRORS[kind]
    for failing in range(first, number, 2):
        capsys.readouterr()
        calls.reset(failing)
        code = decide("2")
        told = capsys.readouterr().err
        calls.reset()
        assert champion() == "1", calls.names
        assert code in (1, 3)
        if code == 1:
            assert len(told.splitlines()) == 1 and told.startswith("error: MLflow at "), told
            assert "same command again" in told or "MLFLOW_TRACKING_" in told


@pytest.mark.parametrize("way", IF_CALLS_FAIL)
def test_a_better_guide_is_promoted_or_an_error_told_whichever_call_fails(
    crowned: None, calls: Calls, way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    number = num_calls(calls, "3")
    calls.is_done_first = way != "not asked"
    client = Registry(TOY, NAME).store.client
    for failing in range(0, number, 3 if "third" in way else 1):
        calls.reset(failing)
        code = decide("3")
        calls.reset()
        if code == 0:
            assert champion() == "3"
        else:
            assert code == 1 and champion() in ("1", "3")
        assert decide("3") == 0 and champion() == "3", "the same command does it"
        client.set_registered_model_alias(NAME, "champion", "1")
    capsys.readouterr()
    promote.print_log(params())
    log = capsys.readouterr().out
    decisions = Registry(TOY, NAME).decisions()
    assert log.count("broke off") == sum(not d.is_done for d in decisions)
    assert {d.champion for d in decisions[1:]} == {"1"}, "what it was compared with"
    runs = client.search_runs([client.get_experiment_by_name(f"{NAME}-decisions").experiment_id])
    assert all(run.info.status != "RUNNING" for run in runs)


@pytest.mark.services
def test_with_no_champion_anything_that_fails_is_no_reason_to_promote(
    place: Path, calls: Calls
) -> None:
    register(0.9)  # beyond the absolute rule
    calls.reset()
    assert decide("1") == 3
    for failing in range(len(calls.names)):
        calls.reset(failing)
        assert decide("1") in (1, 3)
        calls.reset()
        assert champion() is None


def test_decisions_are_kept_with_who_when_what_and_why(
    crowned: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert decide("2") == 3
    assert decide("2") == 3
    assert decide("3") == 0
    decisions = Registry(TOY, NAME).decisions()
    assert [(d.verdict, d.candidate, d.champion) for d in decisions] == [
        ("promoted", "1", None),
        ("refused", "2", "1"),
        ("refused", "2", "1"),
        ("promoted", "3", "1"),
    ]
    refused = decisions[1]
    assert refused.is_done and str(Path.cwd()) in refused.who and "@" in refused.who
    assert refused.when <= decisions[2].when and refused.commit == "c0ffee"
    assert refused.rules["guidance_fvu.max_loss"] == RULES.guidance_fvu.max_loss
    assert refused.rules["fid.min_gain.16"] == RULES.scores["fid"].min_gain
    assert refused.values["candidate.base.guidance_fvu.most"] == 0.7
    assert refused.values["champion.base.guidance_fvu.most"] == 0.5
    (why,) = refused.reasons
    assert why.startswith("base: guidance_fvu.max_loss: 0.200 [")
    capsys.readouterr()
    promote.print_log(params())
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if "version" in line.split("by")[0][:30]]) == 4
    assert f"  - {why}" in lines and "c0ffee" in lines[0]


def test_as_many_reasons_and_as_long_ones_as_there_are(place: Path) -> None:
    register(0.5)
    reasons = [f"model-{i}: " + "x" * 400 for i in range(150)]
    registry = Registry(TOY, NAME)
    decision = Decision(verdict="refused", candidate="1", champion=None, reasons=reasons)
    with registry.deciding(wait_s=1):
        registry.decide(decision)
    assert list(registry.decisions()[0].reasons) == reasons


def test_a_champion_crowned_meanwhile_is_not_replaced_unseen(
    crowned: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    decides = Registry.decide

    def after_another(registry: Registry, decision: Decision, **others: Any) -> None:
        registry.store.client.set_registered_model_alias(NAME, "champion", "2")
        decides(registry, decision, **others)

    monkeypatch.setattr(Registry, "decide", after_another)
    assert decide("3") == 1
    assert (
        "version 2 became champion while version 3 was compared with 1" in capsys.readouterr().err
    )
    assert champion() == "2"
    assert not Registry(TOY, NAME).decisions()[-1].is_done


def test_an_alias_that_did_not_move_is_noticed(
    crowned: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", lambda *args: None)
    assert decide("3") == 1
    assert "was set to version 3, and is 1" in capsys.readouterr().err


def test_steps_at_which_the_champion_was_not_measured_are_named_where_it_is_decided(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    register(0.5, num_steps=(16,))
    promote.run(params(), "1")
    register(0.4)
    capsys.readouterr()
    page = Path("page.md")
    assert decide("2", page=page) == 0 and champion() == "2"
    said = "Not compared on base at 8 steps"
    assert said in capsys.readouterr().out and said in page.read_text()
    assert said in Registry(TOY, NAME).decisions()[-1].text


def test_absence_is_the_stores_own_word(place: Path) -> None:
    registry = Registry(TOY, NAME)
    assert registry.newest() is None and registry.champion() is None
    assert registry.decisions() == [] and registry.find("key") is None
    register(0.5)
    assert registry.champion() is None and registry.newest() == "1"
    with pytest.raises(ValueError, match=r"no usable version 7 .*its versions are: 1"):
        registry.summary("7")


def test_a_version_whose_files_are_gone_is_lost(crowned: None) -> None:
    folder = folder_of("2")
    folder.rename(folder.with_name("elsewhere"))
    with pytest.raises(TrackingError, match="version 2 is registered, but its files are lost"):
        promote.run(params(), "2")
    assert champion() == "1"


def test_a_version_that_the_report_names_is_lost_and_not_yet_to_be_made(place: Path) -> None:
    with pytest.raises(ValueError, match="has no version yet: run the stage register first"):
        promote.run(params())
    report = Path("results/report/summary.json")
    report.parent.mkdir(parents=True)
    report.write_text(f'{{"registered": {{"name": "{NAME}", "version": "1"}}}}')
    with pytest.raises(ValueError, match=re.escape("version 1 was registered, but MLflow at")):
        promote.run(params())


def test_a_result_that_lacks_a_number_is_named(
    crowned: None, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = folder_of("2") / "summary.json"
    summary.write_text(summary.read_text().replace("flops_ratio", "flops"))
    assert decide("2") == 3
    assert "flops_ratio was not measured" in capsys.readouterr().err
    summary.write_text(summary.read_text().replace('"format": 2', '"format": 1'))
    assert decide("2") == 3
    assert "version 2 was written by another version of this code" in capsys.readouterr().err
    summary.write_text("{")
    assert decide("2") == 3
    assert "can't be read" in capsys.readouterr().err
