"""What is said of a guide in few words: numbers, a table, lines."""

import dataclasses

import pytest

from components import curves, headlines
from components.evaluation import Estimate
from components.report import content
from components.verdict import Check, measured
from tests.evaluations import estimate, evaluation

MODELS = {
    "base": evaluation("base", fid=1.0, clip_gain=0.9),
    "fluent-emoji-with-a-long-name": evaluation("fluent", fid=1.2, clip_gain=0.5, flops_ratio=0.6),
}
PASSED = Check(rule="fid.min_gain", model="base", num_steps=16, passed=True)
FAILED = Check(rule="complete", model="base", passed=False, note="no kid")


def test_means_and_the_worst_are_those_over_models_and_steps() -> None:
    found = headlines.numbers(MODELS, [PASSED, FAILED])
    assert len(found) == 12
    assert found["fid_over_cfg_mean"] == pytest.approx(1.1)
    assert found["fid_over_cfg_worst"] == pytest.approx(1.2)
    assert found["clip_gain_mean"] == pytest.approx(0.7)
    assert found["clip_gain_worst"] == pytest.approx(0.5)
    assert found["flops_ratio"] == 0.6 and found["checks_failed"] == 1


def test_mlflows_charts_begin_with_a_number_that_every_guides_run_has() -> None:
    steps = headlines.by_steps(MODELS["base"]).values()
    of_models = {f"{group}/{way}" for at in steps for group, ways in at.items() for way in ways}
    of_guides = headlines.numbers(MODELS, [PASSED])
    assert "fid/guided" in of_models and min(of_models | of_guides.keys()) in of_guides


def test_a_model_on_which_cfg_gains_nothing_sure_is_no_part_of_the_gains() -> None:
    noisy = {"base": MODELS["base"], "noisy": evaluation("noisy", spread=0.5)}
    assert headlines.numbers(noisy, [])["fid_gain_worst"] == pytest.approx(1.0)


def test_a_harm_of_cfg_is_no_gain_in_any_headline() -> None:
    # CFG's FID is 2 worse than no guidance, the guide's 1 worse: half of a harm is no gain of 50 %.
    base = MODELS["base"]
    fids = {"unguided": estimate(3.0), "cfg": estimate(5.0, seed=1), "guided": estimate(4.0)}
    cells = [
        dataclasses.replace(cell, scores={**cell.scores, "fid": fids[cell.method]})
        for cell in base.cells
    ]
    harmed = dataclasses.replace(base, cells=tuple(cells))
    assert measured(harmed, "fid", 16).kind == "ratio"
    found = headlines.numbers({"harmed": harmed}, [])
    assert "clip_gain_worst" in found and not any(name.startswith("fid_gain") for name in found)
    in_dvc = curves.headline(harmed)
    assert "clip_gain_at_16" in in_dvc and "fid_gain_at_16" not in in_dvc
    labels = [each.label for each in content.headlines({"harmed": harmed})]
    assert "of CFG's gain in CLIP score" in labels and "of CFG's gain in FID" not in labels


def test_the_table_has_what_the_rules_check_in_a_hundred_columns() -> None:
    table = headlines.as_markdown(headlines.table_rows(MODELS, [PASSED, FAILED]))
    lines = table.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[2].split("|")[3].strip() == "10 / 5 / 5"
    assert lines[2].split("|")[4].strip() == "100% / 100% / 90%"
    assert lines[2].split("|")[-2].strip() == "1/2", "the rule without steps counts at each"
    assert lines[3].split("|")[-2].strip() == "0/1"


def test_a_score_that_was_not_measured_is_a_dash() -> None:
    base = MODELS["base"]
    cells = [dataclasses.replace(c, scores={"fid": c.scores["fid"]}) for c in base.cells]
    rows = headlines.table_rows({"base": dataclasses.replace(base, cells=tuple(cells))}, [])
    assert "100% / – / –" in headlines.as_markdown(rows)


def test_a_description_names_the_verdict_and_the_first_failures() -> None:
    failed = [dataclasses.replace(FAILED, note=f"no {n}") for n in range(9)]
    text = headlines.description([PASSED, *failed], compared="No champion.", where=["52 %"])
    lines = text.splitlines()
    assert lines[0] == "Would be refused: 9 of 10 checks fail. No champion."
    assert lines[2] == "- base: complete: no 0" and lines[-2:] == ["- and 5 more", "- 52 %"]
    assert headlines.description([PASSED], compared="", where=[]).startswith("Passes all 1")


def test_what_stands_for_the_gain_is_told_from_it() -> None:
    found = Estimate(value=0.93)
    texts = {
        kind: headlines.gain_text(headlines.Measured(estimate=found, kind=kind, is_least=True))
        for kind in ("gain", "ratio", "difference")
    }
    assert texts == {"gain": "93%", "ratio": "0.93×", "difference": "+0.93"}
