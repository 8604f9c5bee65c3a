"""What is said of a guide in few words: numbers, a table, lines."""

import dataclasses

import pytest

from components import curves, headlines, register
from components.evaluation import Estimate
from components.params import checked
from components.report import content
from components.verdict import Check, measured
from tests.evaluations import estimate, evaluation
from tests.toy import toy_params

MODELS = {
    "base": evaluation("base", fid=1.0, clip_gain=0.9),
    "fluent-emoji-with-a-long-name": evaluation("fluent", fid=1.2, clip_gain=0.5, flops_ratio=0.6),
}
STEPS = (16, 8)
PASSED = Check(rule="fid.min_gain", model="base", num_steps=16, passed=True)
FAILED = Check(rule="complete", model="base", passed=False, note="no kid")


def test_means_and_the_worst_are_those_over_models_and_steps() -> None:
    found = headlines.numbers(MODELS, [PASSED, FAILED], STEPS)
    assert len(found) == 12
    assert found["fid_over_cfg_mean"] == pytest.approx(1.1)
    assert found["fid_over_cfg_worst"] == pytest.approx(1.2)
    assert found["clip_gain_mean"] == pytest.approx(0.7)
    assert found["clip_gain_worst"] == pytest.approx(0.5)
    assert found["flops_ratio"] == 0.6 and found["checks_failed"] == 1


def test_a_full_reviews_numbers_are_over_the_steps_of_a_quick_one() -> None:
    quick, few = evaluation("base", fid=1.0), evaluation("base", num_steps=(4, 2), fid=3.0)
    full = dataclasses.replace(quick, cells=(*quick.cells, *few.cells))
    assert full.num_steps == (16, 8, 4, 2)
    expected = headlines.numbers({"base": quick}, [PASSED], STEPS)
    assert headlines.numbers({"base": full}, [PASSED], STEPS) == expected
    assert expected["fid_over_cfg_worst"] == pytest.approx(1.0)
    assert "fid_over_cfg_worst" not in headlines.numbers({"base": few}, [PASSED], STEPS)


@pytest.mark.parametrize(
    ("review", "num_images", "num_steps"), [("quick", 64, "4, 2"), ("full", 72, "4, 2, 1")]
)
def test_runs_are_told_apart_by_what_was_sampled(
    review: str, num_images: int, num_steps: str
) -> None:
    values = toy_params()
    values["evaluate"]["review"] = review
    found = register.told_apart(checked(values, "params.yaml"))
    assert found["evaluate.review"] == review and found["models"] == "base, tuned"
    assert (found["evaluate.num_images"], found["evaluate.num_steps"]) == (num_images, num_steps)


def test_mlflows_charts_begin_with_a_number_that_every_guides_run_has() -> None:
    steps = headlines.by_steps(MODELS["base"]).values()
    of_models = {f"{group}/{way}" for at in steps for group, ways in at.items() for way in ways}
    of_guides = headlines.numbers(MODELS, [PASSED], STEPS)
    assert "fid/guided" in of_models and min(of_models | of_guides.keys()) in of_guides


def test_a_model_on_which_cfg_gains_nothing_sure_is_no_part_of_the_gains() -> None:
    noisy = {"base": MODELS["base"], "noisy": evaluation("noisy", spread=0.5)}
    assert headlines.numbers(noisy, [], STEPS)["fid_gain_worst"] == pytest.approx(1.0)


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
    found = headlines.numbers({"harmed": harmed}, [], STEPS)
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


@pytest.mark.parametrize("where", ["end", "middle"])
def test_no_two_models_have_one_name_in_the_table(where: str) -> None:
    same = "a-fine-tune-of-which-many-were-made"
    names = [f"{same}-{n}" if where == "end" else f"{same}-{n}-{same}" for n in (1, 2)]
    rows = headlines.table_rows(dict.fromkeys(names, MODELS["base"]), [])
    lines = headlines.as_markdown(rows).splitlines()
    labels = [line.split("|")[1].strip() for line in lines[2:6]]
    assert labels[0] == labels[1] != labels[2] == labels[3], "two numbers of steps each"
    is_short = max(map(len, lines)) <= 100
    assert is_short == (where == "end"), "as wide as it must be to tell them apart"


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
