"""The gate's rules, on evaluations with made-up numbers: what passes, what does not, and why."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from components.evaluation import Cell, Estimate, Evaluation
from components.params import load_params
from components.rules import NumberRule, Promote, ScoreRule
from components.verdict import Check, checks, clean, measured, not_compared
from tests.evaluations import estimate, evaluation
from tests.stores import results
from tests.toy import ROOT

RULES = load_params(ROOT / "params.yaml").promote
# The worst of seven models in benchmarks/results/quality.json, and guidance_fvu's.
WORST: dict[str, Any] = {"fid": 1.05, "clip_gain": 0.72, "guidance_fvu": 0.56}


def failed(
    candidate: Evaluation | dict[str, Evaluation],
    champion: Evaluation | dict[str, Evaluation] | None = None,
    rules: Promote = RULES,
    **expected: Any,
) -> dict[str, Check]:
    """The checks that don't hold, by rule."""
    mine = candidate if isinstance(candidate, dict) else {"base": candidate}
    theirs = {"base": champion} if isinstance(champion, Evaluation) else champion
    found = checks(mine, theirs, rules, **expected)
    return {check.rule: check for check in found if not check.passed}


def with_scores(given: Evaluation, change: dict[tuple[str, str], Estimate]) -> Evaluation:
    """The evaluation with other scores, by method and name."""

    def changed(cell: Cell) -> Cell:
        new = {s: e for (m, s), e in change.items() if m == cell.method and cell.solver == "ddim"}
        return replace(cell, scores={**cell.scores, **new})

    return replace(given, cells=tuple(map(changed, given.cells)))


def test_the_defaults_pass_the_demos_guide() -> None:
    assert failed(evaluation(**WORST)) == {}
    assert failed(evaluation(**WORST), evaluation(**WORST)) == {}


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ({"fid": 1.5}, "fid.min_gain"),
        ({"fid": 1.5}, "kid.min_gain"),
        ({"clip_gain": 0.3}, "clip_score.min_gain"),
        ({"clip_gain": -4.6}, "clip_score.min_gain"),  # 3 where CFG has 48
        ({"guidance_fvu": 0.95}, "guidance_fvu.most"),
        ({"flops_ratio": 0.7}, "flops_ratio.most"),
        ({"guidance_fvu": math.nan}, "guidance_fvu.most"),
        ({"fid": math.nan}, "fid.min_gain"),
    ],
)
def test_each_limit_refuses_what_is_beyond_it(given: dict[str, float], rule: str) -> None:
    found = failed(evaluation(**given))
    assert rule in found
    value = found[rule].value
    assert value is not None and (not math.isfinite(value) or f"{value:.3f}" in str(found[rule]))


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ({"fid": 1.08}, "fid.max_loss"),
        ({"clip_gain": 0.8}, "clip_score.max_loss"),
        ({"guidance_fvu": 0.6}, "guidance_fvu.max_loss"),
        ({"flops_ratio": 0.58}, "flops_ratio.max_loss"),
    ],
)
def test_what_the_limits_allow_is_refused_beside_a_better_champion(
    given: dict[str, float], rule: str
) -> None:
    assert failed(evaluation(**given)) == {}
    found = failed(evaluation(**given), evaluation())
    assert rule in found and found[rule].note == "worse"
    assert failed(evaluation(), evaluation(**given)) == {}, "the better one is promoted"


def test_time_decides_nothing() -> None:
    assert failed(evaluation(time_ratio=9.0), evaluation(time_ratio=0.5)) == {}


def loss_rules(max_loss: float) -> Promote:
    """With which only guidance_fvu against the champion matters."""
    rule = NumberRule(most=100.0, max_loss=max_loss)
    return replaced(RULES, guidance_fvu=rule, scores={})


def replaced(rules: Promote, **change: Any) -> Promote:
    return rules.model_copy(update=change)


def test_a_difference_inside_the_noise_is_neither_a_gain_nor_a_loss() -> None:
    champion = replace(evaluation(), guidance_fvu=estimate(0.5, spread=0.1, seed=1))
    for value in (0.56, 0.44):
        candidate = replace(evaluation(), guidance_fvu=estimate(value, spread=0.1, seed=2))
        assert failed(candidate, champion, loss_rules(0.0)) == {}
        found = checks({"base": candidate}, {"base": champion}, loss_rules(0.0))
        (loss,) = [c for c in found if c.rule == "guidance_fvu.max_loss"]
        assert loss.note == "no difference beyond noise"


def test_replicates_are_paired_so_that_common_noise_is_none() -> None:
    noise = np.random.default_rng(0).standard_normal(200) * 0.1

    def with_fvu(value: float) -> Evaluation:
        replicates = tuple(float(value + x) for x in noise)
        return replace(evaluation(), guidance_fvu=Estimate(value=value, replicates=replicates))

    found = failed(with_fvu(0.52), with_fvu(0.5), loss_rules(0.01))
    assert found["guidance_fvu.max_loss"].interval == pytest.approx((0.02, 0.02))


def test_the_interval_of_a_loss_is_that_of_independent_normal_noise() -> None:
    generator = np.random.default_rng(0)

    def with_fvu(value: float, spread: float) -> Evaluation:
        replicates = tuple(map(float, value + spread * generator.standard_normal(20_000)))
        return replace(evaluation(), guidance_fvu=Estimate(value=value, replicates=replicates))

    found = checks({"base": with_fvu(0.6, 0.03)}, {"base": with_fvu(0.5, 0.04)}, loss_rules(0.01))
    (loss,) = [c for c in found if c.rule == "guidance_fvu.max_loss"]
    half_width = 1.96 * 0.05  # of the difference of both: sqrt(0.03^2 + 0.04^2)
    assert loss.interval == pytest.approx((0.1 - half_width, 0.1 + half_width), abs=3e-3)


def test_a_limit_holds_for_the_whole_interval() -> None:
    sure, unsure = (
        replace(evaluation(), guidance_fvu=estimate(0.8, spread=s)) for s in (0.01, 0.1)
    )
    assert failed(sure) == {}
    assert "more images would tell" in failed(unsure)["guidance_fvu.most"].note


def test_where_cfgs_own_gain_is_noise_the_ratio_to_cfg_takes_its_place_and_is_said_to() -> None:
    unguided = ("unguided", "fid")
    same = with_scores(evaluation(), {unguided: estimate(5.0, spread=0.05, seed=7)})
    found = measured(same, "fid", 16)
    assert (found.kind, found.estimate.value) == ("ratio", pytest.approx(1.0))
    assert "CFG's own gain is inside its interval" in found.note
    assert failed(same) == {}
    worse = failed(with_scores(evaluation(fid=1.5), {unguided: estimate(5.0, spread=0.05)}))
    assert worse["fid.ratio"].value == pytest.approx(1.5)
    assert "the ratio to CFG takes the gain's place" in str(worse["fid.ratio"])


def test_a_guide_that_is_as_bad_as_a_cfg_that_harms_is_not_said_to_gain() -> None:
    harming = with_scores(evaluation(fid=2.0), {("unguided", "fid"): estimate(4.0)})
    assert harming.gain("fid", 16) is None, "CFG loses 1, and the guide loses 6: no gain of 600 %"
    assert "CFG itself is worse than no guidance" in failed(harming)["fid.ratio"].note


def test_where_cfgs_gain_is_noise_for_one_of_two_both_are_compared_by_the_ratio_to_cfg() -> None:
    noisy = {("unguided", "fid"): estimate(10.0, spread=0.4, seed=8)}
    noisy |= {("guided", "fid"): estimate(6.5, seed=2)}
    candidate, champion = with_scores(evaluation(), noisy), evaluation()
    assert (measured(candidate, "fid", 16).kind, measured(champion, "fid", 16).kind) == (
        "ratio",
        "gain",
    )
    found = checks({"base": candidate}, {"base": champion}, RULES)
    (loss,) = [c for c in found if (c.rule, c.num_steps) == ("fid.max_loss", 16)]
    assert loss.value == pytest.approx(0.3) and loss.champion == pytest.approx(1.0)


def test_a_kid_that_may_be_zero_is_compared_by_its_difference() -> None:
    generator = np.random.default_rng(0)

    def around(value: float) -> Estimate:
        replicates = tuple(map(float, value + 0.001 * generator.standard_normal(200)))
        return Estimate(value=value, replicates=replicates)

    kids = {("unguided", "kid"): around(0.0002), ("cfg", "kid"): around(0.0001)}
    as_good = with_scores(evaluation(), {**kids, ("guided", "kid"): around(0.0005)})
    assert measured(as_good, "kid", 16).kind == "difference" and failed(as_good) == {}
    worse = with_scores(evaluation(), {**kids, ("guided", "kid"): around(0.01)})
    assert failed(worse).keys() == {"kid.ratio"}


def test_a_kid_that_may_be_zero_may_be_no_more_than_the_champions_beyond_noise() -> None:
    """Its rule's 0.05 is a share: of KIDs themselves it would be ten times what any guide has."""
    noise = 0.001 * np.random.default_rng(0).standard_normal(200)

    def of_kid(value: float) -> Evaluation:
        kids = {"unguided": 0.0002, "cfg": 0.0001, "guided": value}
        around = {
            (method, "kid"): Estimate(value=kid, replicates=tuple((kid + noise).tolist()))
            for method, kid in kids.items()
        }
        return with_scores(evaluation(), around)

    champion = {"base": of_kid(0.0)}
    lost = [
        [c.rule for c in checks({"base": of_kid(kid)}, champion, RULES) if not c.passed]
        for kid in (0.0, 0.004)
    ]
    assert lost[0] == [] and "kid.max_loss" in lost[1]


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"base_hash": "x"}, "the base differs"),
        ({"model_hash": "x"}, "the model's weights differ"),
        ({"data_hash": "x"}, "the data differs"),
        ({"judges_hash": "x"}, "the judges differ"),
        ({"tasks_hash": "x"}, "prompts and seeds differ"),
        ({"reference_hash": "x"}, "the reference images differ"),
        ({"teacher": "x"}, "the teacher's rule differs"),
        ({"measured_by": 2}, "the version of the measuring code differs: 2, and 1"),
        ({"judge": "another"}, "the judge differs: another, and judge for the champion"),
        ({"unheard_of": 1}, "unheard_of differs"),
        ({"num_images": 12}, "the number of images differs: 12, and 192"),
        ({"guidance_scale": 1.2}, "the guidance scale differs: 1.2, and 3.0"),
        ({"strength": 0.8}, "the guide's strength differs: 0.8, and 1.0 for the champion"),
        ({"trigger": "emoji"}, "the trigger words differ: emoji, and none for the champion"),
        ({"clip_skip": 1}, "clip_skip differs: 1, and 0"),
        ({"fvu_steps": 50}, "the number of steps that guidance_fvu is measured along differs"),
    ],
)
def test_what_was_not_measured_alike_is_refused_by_name(other: dict[str, Any], says: str) -> None:
    better = evaluation(fid=0.5, clip_gain=1.0, guidance_fvu=0.1, **other)
    found = failed(better, evaluation())
    assert found.keys() == {"comparable"} and says in str(found["comparable"])


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("num_images", 400, "the number of images differs: 400, and 192"),
        ("guidance_scale", 1.2, "the guidance scale differs: 1.2, and 3.0"),
    ],
)
def test_what_an_evaluation_is_of_counts_beside_what_it_says(
    field: str, value: float, says: str
) -> None:
    other = replace(evaluation(), **{field: value})
    if field == "guidance_scale":
        at = tuple(replace(cell, guidance_scale=value) for cell in other.cells)
        other = replace(other, cells=at)
    assert says in failed(other, evaluation())["comparable"].note


def shifted(given: Evaluation, method: str, score: str, by: float) -> Evaluation:
    """The evaluation with a method's score moved at every number of steps."""

    def moved(cell: Cell) -> Cell:
        if cell.method != method:
            return cell
        old = cell.scores[score]
        new = Estimate(value=old.value + by, replicates=tuple(x + by for x in old.replicates))
        return replace(cell, scores={**cell.scores, score: new})

    return replace(given, cells=tuple(map(moved, given.cells)))


@pytest.mark.parametrize(
    ("method", "score", "by", "says"),
    [
        ("unguided", "clip_score", -30.0, "clip_score of unguided at 16 steps is 10, and 40 for"),
        ("unguided", "fid", 60.0, "fid of unguided at 16 steps is 70, and 10 for the champion"),
        ("cfg", "fid", 2.0, "fid of CFG at 8 steps is 7, and 5 for the champion"),
    ],
)
def test_a_gain_over_other_images_of_no_guidance_or_of_cfg_is_none(
    method: str, score: str, by: float, says: str
) -> None:
    found = failed(shifted(evaluation(fid=0.9), method, score, by), evaluation())
    assert found.keys() == {"comparable"} and says in found["comparable"].note
    assert failed(shifted(evaluation(), method, score, by / 1e4), evaluation()) == {}, "rounding"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("base_hash", "base and tuned differ in the base"),
        ("judges_hash", "base and tuned differ in the judges"),
        ("precision", "base and tuned differ in the precision"),
    ],
)
def test_models_that_were_not_measured_alike_are_no_evaluation_of_one_guide(
    name: str, says: str
) -> None:
    rows = {"base": evaluation(), "tuned": evaluation("tuned", model_hash="tuned")}
    assert failed(rows) == {}
    found = failed({**rows, "tuned": evaluation("tuned", **{name: "other"})})
    assert found.keys() == {"comparable"} and found["comparable"].note == says


def test_where_the_champion_was_not_measured_it_is_said_that_nothing_was_compared() -> None:
    champion = {"base": evaluation(num_steps=(16,))}
    candidate = {"base": evaluation(guidance_fvu=0.5), "new": evaluation("new", model_hash="new")}
    assert failed(candidate, champion) == {}
    said = not_compared(candidate, champion, RULES)
    assert said.startswith("Not compared on base at 8 steps, on new: ") and "--reevaluate" in said
    assert not_compared(champion, champion, RULES) == not_compared(candidate, None, RULES) == ""
    no_rule = replaced(RULES, at_steps={8: None})
    assert "on base" not in not_compared(candidate, champion, no_rule)
    unlike = {"base": evaluation(data_hash="x")}
    assert not_compared(unlike, champion, RULES) == "", "that fails as such"


def exactly(value: float) -> Estimate:
    """With fifty replicates that all say the same."""
    return Estimate(value=value, replicates=(value,) * 50)


@pytest.mark.parametrize("replicates", [1, 39, 50], ids=["one", "a few", "all the same"])
def test_an_interval_that_is_of_few_replicates_is_none(replicates: int) -> None:
    whole = evaluation(fid=1.5)

    def cut(found: Estimate) -> Estimate:
        return (
            exactly(found.value)
            if replicates == 50
            else replace(found, replicates=found.replicates[:replicates])
        )

    cells = [
        replace(cell, scores={name: cut(score) for name, score in cell.scores.items()})
        for cell in whole.cells
    ]
    note = failed(replace(whole, cells=tuple(cells)))["complete"].note
    assert "at 16 and 8 steps fid has no interval of 40 replicates that differ" in note
    fvu = failed(replace(whole, guidance_fvu=cut(whole.guidance_fvu)))["complete"].note
    assert fvu == "guidance_fvu has no interval of 40 replicates that differ"
    guided = with_scores(whole, {("guided", "fid"): cut(estimate(5.0))})
    assert "at 16 and 8 steps fid has no interval" in failed(guided)["complete"].note


def test_numbers_that_can_not_be_are_refused_by_name() -> None:
    good = evaluation()
    for ratio in (-1.0, 0.0):
        cost = replace(good, cost={**good.cost, "flops_ratio": ratio})
        assert f"flops_ratio is {ratio:g}, which it can't be" in failed(cost)["usable"].note
    fvu = replace(good, guidance_fvu=estimate(-0.5))
    assert failed(fvu)["usable"].note == "guidance_fvu is -0.5, which it can't be"
    for name, value in (("fid", -5.0), ("clip_score", 300.0), ("diversity", -0.1)):
        found = failed(with_scores(good, {("guided", name): estimate(value)}))["usable"].note
        assert f"{name} of guided at 16 steps is {value:g}, which it can't be" in found


def test_numbers_of_fewer_replicates_than_tell_an_interval_are_no_evaluation() -> None:
    good = evaluation()

    def cut(found: Estimate) -> Estimate:
        return replace(found, replicates=found.replicates[:1])

    cells = [
        replace(cell, scores={name: cut(score) for name, score in cell.scores.items()})
        for cell in good.cells
    ]
    no_rules = RULES.model_copy(update={"scores": {}, "at_steps": {}})
    for edited, name in (
        (replace(good, cells=tuple(cells)), "fid of unguided at 16 steps with 1"),
        (replace(good, guidance_fvu=cut(good.guidance_fvu)), "guidance_fvu with 1"),
        (replace(good, negative={"picture": cut(good.negative["picture"])}), "negative.picture"),
    ):
        found = checks({"base": edited}, None, no_rules)
        (usable,) = [check for check in found if check.rule == "usable"]
        assert not usable.passed
        assert "have fewer than 40 replicates" in usable.note and name in usable.note


def test_what_can_not_be_is_refused_by_whichever_judge_and_solver_it_is() -> None:
    good = evaluation()
    first, *others = good.cells
    other = replace(first, judge="other", scores={"fid": estimate(-5.0)})
    edited = replace(good, cells=(first, other, *others))
    assert "fid of unguided at 16 steps is -5" in failed(edited)["usable"].note
    edited = replace(good, cells=(other, *good.cells))
    assert "fid of unguided at 16 steps is -5" in failed(edited)["usable"].note


def test_a_cfg_of_which_a_score_is_zero_is_told_with_its_model() -> None:
    zero = with_scores(evaluation(), {("cfg", "fid"): exactly(0.0)})
    with pytest.raises(ValueError, match="base: fid of CFG at 16 steps is 0, .*: evaluate base ag"):
        zero.ratio("fid", 16)
    assert "fid of CFG at 16 steps is 0, which it can't be" in failed(zero)["usable"].note


def test_an_evaluation_that_does_not_say_what_it_is_of_is_refused() -> None:
    silent = replace(evaluation(), identity={"base_hash": "base"})
    found = failed(silent, silent)
    assert found.keys() == {"usable"} and "it does not say the judges" in found["usable"].note


def test_of_two_results_of_one_setting_none_counts() -> None:
    good = evaluation()
    flattering = with_scores(good, {("guided", "fid"): estimate(4.0)})
    twice = replace(good, cells=(*flattering.cells, *good.cells))
    assert "two results of guided at 16 steps" in failed(twice)["usable"].note


@pytest.mark.parametrize("commit", ["", "None", "HEAD", "none", "unknown", "c0ffee-dirty"])
def test_what_is_no_commits_name_is_no_clean_commit(commit: str) -> None:
    assert not clean(commit, allow_dirty=False).passed and clean(commit, allow_dirty=True).passed
    assert clean("c0ffee" * 6 + "c0ff", allow_dirty=False).passed


def broken(*path: Any, value: Any) -> Any:
    """What `save` writes of an evaluation, with one value of it another."""
    written = json.loads(json.dumps(results(evaluation())["base"]))
    inside = written
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    return written


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("guidance_fvu", "value"), None, "guidance_fvu.value: Input should be a valid number"),
        (("cells", 3, "num_steps"), "eight", "cells.3.num_steps: Input should be a valid integer"),
        (("cells", 0, "scores", "fid", "replicates"), 1, "cells.0.scores.fid.replicates"),
        (("identity",), None, "identity: Input should be a valid"),
        (("num_images",), "many", "num_images: "),
        (("cost", "flops_ratio"), "half", "cost.flops_ratio: "),
        (("cells",), [], "cells: there is none"),
        (("fvu_by_timestep",), {"abc": 0.5}, "fvu_by_timestep: 'abc' is no timestep"),
        (("cells", 0, "scores", "fid", "replicates"), [1.0], "from 1 to 50 replicates"),
    ],
)
def test_a_file_that_is_no_evaluation_is_refused_with_the_place(
    path: tuple[Any, ...], value: Any, says: str
) -> None:
    with pytest.raises(ValueError, match="summary.json is not what `evaluate` wrote") as told:
        Evaluation.from_json(broken(*path, value=value), where="summary.json")
    assert says in str(told.value)


def test_results_that_are_not_there_or_not_whole_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no .*base/evaluation\.json: evaluate base fir"):
        Evaluation.load(tmp_path / "base")
    (tmp_path / "evaluation.json").write_text('{"format": 2, "cells"')
    with pytest.raises(ValueError, match=r"evaluation\.json can't be read \(.*\): evaluate again"):
        Evaluation.load(tmp_path)


def test_a_candidate_lacks_none_of_the_champions_models_and_step_counts() -> None:
    champion = {"base": evaluation(), "tuned": evaluation("tuned")}
    found = failed(evaluation(), champion)
    assert str(found["complete"]) == "tuned: complete: it was not evaluated on this model"
    found = failed(evaluation(num_steps=(16,)), evaluation(num_steps=(16, 8)))
    assert "at 8 steps it was not evaluated" in found["complete"].note
    assert failed(evaluation(num_steps=(16, 8)), evaluation(num_steps=(16,))) == {}


def test_without_a_champion_a_candidate_lacks_nothing_of_params_yaml() -> None:
    assert "tuned: complete: it was not" in str(failed(evaluation(), models=["tuned"])["complete"])
    assert "at 4 steps it was" in failed(evaluation(), num_steps=[16, 4])["complete"].note
    assert "on no model" in failed({})["complete"].note


def test_what_was_measured_in_part_is_refused() -> None:
    whole = evaluation()
    no_cfg = [c for c in whole.cells if (c.method, c.num_steps) != ("cfg", 8)]
    assert "at 8 steps it was not" in failed(replace(whole, cells=tuple(no_cfg)))["complete"].note
    assert "no image" in failed(replace(whole, cells=whole.cells[:2]))["complete"].note
    assert "flops_ratio was not measured" in failed(replace(whole, cost={}))["complete"].note
    assert (
        "192 images are too few"
        in failed(whole, rules=replaced(RULES, min_images=193))["complete"].note
    )
    assert "those of tuned" in failed({"base": evaluation("tuned")})["complete"].note


def test_a_rule_for_what_was_not_measured_is_refused_by_name() -> None:
    rule = ScoreRule(min_gain=0.5, ratio=None, max_loss=None)
    other = replaced(RULES, scores={"aesthetics": rule})
    assert (
        "at 16 and 8 steps aesthetics was not measured, and promote has a rule for it"
        in failed(evaluation(), rules=other)["complete"].note
    )
    at_4 = replaced(RULES, at_steps={4: {"fid": rule}})
    assert "at 4 steps it was not evaluated" in failed(evaluation(), rules=at_4)["complete"].note
    exact = with_scores(evaluation(), {("cfg", "fid"): Estimate(value=5.0)})
    assert "fid has no interval of 40" in failed(exact)["complete"].note


def test_a_number_of_steps_has_rules_of_its_own() -> None:
    strict = ScoreRule(min_gain=1.2, ratio=1.0, max_loss=0.0)
    found = failed(evaluation(), rules=replaced(RULES, at_steps={8: {"fid": strict}}))
    assert found.keys() == {"fid.min_gain"} and found["fid.min_gain"].num_steps == 8


def test_a_null_switches_a_rule_off() -> None:
    off = ScoreRule(min_gain=None, ratio=None, max_loss=None)
    assert failed(evaluation(fid=9.0), evaluation(), replaced(RULES, scores={"fid": off})) == {}
    unruled = replaced(RULES, at_steps={2: {"fid": off}})
    assert failed(evaluation(), rules=unruled) == {}, "2 steps need not be evaluated"


def test_at_steps_without_rules_no_score_decides() -> None:
    worse = evaluation(fid=9.0, clip_gain=0.1)
    assert {check.num_steps for check in checks({"base": worse}, None, RULES)} == {None, 16, 8}
    without = replaced(RULES, at_steps={8: None})
    assert {check.num_steps for check in checks({"base": worse}, None, without)} == {None, 16}


def test_a_rules_value_survives_the_file(tmp_path: Path) -> None:
    evaluation(**WORST).save(tmp_path)
    read = Evaluation.load(tmp_path)
    assert checks({"base": read}, None, RULES) == checks({"base": evaluation(**WORST)}, None, RULES)
