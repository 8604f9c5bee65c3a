"""Whether a guide may become champion: what was measured, held against the rules of params.yaml.

Values in, values out: no store and no files, so that the gate and the report say the same.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from components.evaluation import LOWER_IS_BETTER, Estimate, Evaluation
from components.likeness import differences, has, missing, oddities, unlike
from components.methods import METHODS
from components.rules import NumberRule, Promote, Rule


@dataclass(frozen=True, kw_only=True)
class Check:
    """One rule, held against one model at one number of steps.

    Attributes:
        rule: its key in `promote` of params.yaml, such as `fid.min_gain`; or one about no number:
            `complete` (all was measured), `comparable` (as the champion was), `usable`, `clean
            commit`.
        model: its name in params.yaml; `all` for what is not about a model.
        num_steps: None for what is not a matter of steps.
        limit: None for a rule about no number.
        is_least: whether `limit` is the least that passes; else it is the most.
        value: the candidate's. Of a `max_loss`: how much worse it is than the champion's. None for
            a rule about no number.
        interval: the value's 95 %; None for a number that has none.
        champion: the champion's value; None without one. Of a `max_loss`: what the loss is from.
        passed: whether the rule holds.
        note: what is to be known to read the numbers; why it failed, where they don't say.
    """

    rule: str
    model: str
    num_steps: int | None = None
    limit: float | None = None
    is_least: bool = False
    value: float | None = None
    interval: tuple[float, float] | None = None
    champion: float | None = None
    passed: bool
    note: str = ""

    def __str__(self) -> str:
        """One line: where, which rule, the numbers, and the note."""
        where = self.model if self.num_steps is None else f"{self.model}, {self.num_steps} steps"
        parts = []
        if self.value is not None:
            within = " [{:z.3f}, {:z.3f}]".format(*self.interval) if self.interval else ""
            parts.append(f"{self.value:z.3f}{within}")
        if self.limit is not None:
            parts.append(f"{'at least' if self.is_least else 'at most'} {self.limit:g} is allowed")
        if self.champion is not None:
            parts.append(f"the champion has {self.champion:z.3f}")
        if self.note:
            parts.append(self.note)
        return f"{where}: {self.rule}: {', '.join(parts) or 'holds'}"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a rule is held against.

    Attributes:
        estimate: the number.
        kind: `gain`, the share of CFG's gain over no guidance that the guide gains; `ratio`, its
            score over CFG's; `difference`, its score less CFG's; or `number`, the number itself.
        is_least: whether more is better.
        note: why it is not the gain.
    """

    estimate: Estimate
    kind: str
    is_least: bool
    note: str = ""


def checks(
    candidate: Mapping[str, Evaluation],
    champion: Mapping[str, Evaluation] | None,
    rules: Promote,
    *,
    models: Sequence[str] = (),
    num_steps: Sequence[int] = (),
) -> list[Check]:
    """Every rule, on every model at every number of steps. The guide passes if all of them do.

    A limit is held against the worse end of the 95 % interval: what may be noise does not pass.
    Worse than the champion is what lost more than is allowed, and more than noise explains.

    Args:
        candidate: its evaluations by model.
        champion: the champion's; None without one.
        rules: of params.yaml.
        models: on which it must have been evaluated, beside the champion's.
        num_steps: at which it must have been evaluated, likewise.
    """
    theirs = champion or {}
    found: list[Check] = []
    for model in dict.fromkeys([*models, *theirs, *candidate]):
        if model in candidate:
            found += _of_model(model, candidate[model], theirs.get(model), rules, num_steps)
        else:
            found.append(_about("complete", model, ["it was not evaluated on this model"]))
    if apart := unlike(candidate):
        found.append(_about("comparable", "all", apart))
    return found or [_about("complete", "no model", ["it was evaluated on no model"])]


def not_compared(
    candidate: Mapping[str, Evaluation], champion: Mapping[str, Evaluation] | None, rules: Promote
) -> str:
    """Where the champion was not measured, so that no rule compares with it, in a sentence.

    Empty: nowhere, or there is none. Evaluations that differ are not meant: they fail `comparable`.
    """
    if champion is None:
        return ""
    where = []
    for model, mine in candidate.items():
        theirs = champion.get(model)
        if theirs is None:
            where.append(f"on {model}")
        elif not differences(mine, theirs):
            lacking = [n for n in mine.num_steps if _lacks(mine, theirs, rules, n)]
            if lacking:
                where.append(f"on {model} at {' and '.join(map(str, lacking))} steps")
    if not where:
        return ""
    places = ", ".join(where)
    return f"Not compared {places}: the champion was not measured there, --reevaluate measures it."


def clean(commit: str, *, allow_dirty: bool) -> Check:
    """Whether what made the guide is in a commit, so that it can be made again."""
    is_known = re.fullmatch(r"[0-9a-f]{6,64}", commit) is not None
    note = f"made by {commit or 'nothing'}, which is no commit: commit, make it again, or "
    note += "--allow-dirty"
    passed = is_known or allow_dirty
    return Check(rule="clean commit", model="all", passed=passed, note="" if is_known else note)


def unusable(what: str, why: str) -> Check:
    """The check that fails where the results of a version can't be used."""
    return Check(rule="usable", model=what, passed=False, note=why)


def measured(evaluation: Evaluation, score: str, num_steps: int) -> Measured:
    """The share of what CFG gains in a score over no guidance that the guide gains.

    Where CFG gains nothing, or nothing beyond noise, that share says nothing: the guide's score
    over CFG's takes its place. Where CFG's may be zero, as a KID can: the difference to it.

    Raises:
        ValueError: the score was not measured.
    """
    unguided, cfg, _ = (_estimate(evaluation, m, score, num_steps) for m in METHODS)
    if (gain := evaluation.gain(score, num_steps)) is not None:
        return Measured(estimate=gain, kind="gain", is_least=True)
    low, high = cfg.with_other(unguided, lambda a, b: a - b).interval
    why = (
        "CFG itself is worse than no guidance"
        if low > 0 or high < 0
        else "CFG's own gain is inside its interval"
    )
    kind = "ratio" if min(cfg.value, cfg.interval[0], *cfg.replicates) > 0 else "difference"
    return _beside_cfg(evaluation, score, num_steps, kind, why)


def _beside_cfg(
    evaluation: Evaluation, score: str, num_steps: int, kind: str, why: str
) -> Measured:
    """The guide's score as a ratio to CFG's, or as a difference."""
    if kind == "ratio":
        found = evaluation.ratio(score, num_steps)
        note = f"{why}, so the ratio to CFG takes the gain's place"
    else:
        guided, cfg = (_estimate(evaluation, m, score, num_steps) for m in ("guided", "cfg"))
        found = guided.with_other(cfg, lambda a, b: a - b)
        note = f"{why} and CFG's score may be zero, so the difference takes the gain's place"
    is_least = score not in LOWER_IS_BETTER
    return Measured(estimate=found, kind=kind, is_least=is_least, note=note)


def _of_model(
    model: str,
    mine: Evaluation,
    theirs: Evaluation | None,
    rules: Promote,
    num_steps: Sequence[int],
) -> Iterator[Check]:
    lacks = missing(mine, rules, [*num_steps, *(theirs.num_steps if theirs else ())])
    if mine.model != model:
        lacks.append(f"its results are those of {mine.model}")
    yield _about("complete", model, lacks)
    if odd := oddities(mine):
        yield _about("usable", model, odd)
    if theirs is not None:
        apart = differences(mine, theirs)
        yield _about("comparable", model, apart)
        theirs = None if apart else theirs  # what is unlike is compared in nothing
    numbers: dict[str, Rule] = {
        "guidance_fvu": rules.guidance_fvu,
        "flops_ratio": rules.flops_ratio,
    }
    for name, limits in numbers.items():
        if own := _number(mine, name):
            about = Check(rule=name, model=model, passed=False)
            yield from _held(about, own, _number(theirs, name), limits)
    for steps in mine.num_steps:
        for score, rule in rules.at(steps).items():
            own, other = _scores(mine, theirs, score, steps)
            if own:
                about = Check(rule=score, model=model, num_steps=steps, passed=False)
                yield from _held(about, own, other, rule)


def _lacks(mine: Evaluation, theirs: Evaluation, rules: Promote, num_steps: int) -> bool:
    """Whether the champion lacks a score that a rule would compare at a number of steps."""
    return any(
        rule.max_loss is not None
        and has(mine, score, num_steps)
        and not has(theirs, score, num_steps)
        for score, rule in rules.at(num_steps).items()
    )


def _held(about: Check, own: Measured, other: Measured | None, rule: Rule) -> Iterator[Check]:
    """The checks of one number: against its limit, and against the champion's."""
    key, limit = _limit(rule, own.kind)
    before = None if other is None else other.estimate.value
    if limit is not None:
        low, high = _interval(own.estimate)
        # Of a difference it is enough that it may be none.
        is_low_end = own.is_least != (own.kind == "difference")
        end = low if is_low_end else high
        passed = _keeps(end, limit, own.is_least)
        note = own.note
        if not passed and _keeps(own.estimate.value, limit, own.is_least):
            beyond = "its interval reaches beyond the limit, more images would tell"
            note = f"{note}; {beyond}" if note else beyond
        yield replace(
            about,
            rule=f"{about.rule}.{key}",
            limit=limit,
            is_least=own.is_least,
            value=own.estimate.value,
            interval=(low, high) if own.estimate.replicates else None,
            champion=before,
            passed=passed,
            note=note,
        )
    if rule.max_loss is not None and other is not None:
        loss = _loss(own, other)
        low, high = _interval(loss)
        # a rule's loss is a share; where CFG's score may be zero there is nothing to share
        most = 0.0 if own.kind == "difference" else rule.max_loss
        passed = math.isfinite(loss.value) and (loss.value <= most or low <= 0)
        better, worse = high < 0, low > 0
        yield replace(
            about,
            rule=f"{about.rule}.max_loss",
            limit=most,
            value=loss.value,
            interval=(low, high) if loss.replicates else None,
            champion=before,
            passed=passed,
            note="better" if better else "worse" if worse else "no difference beyond noise",
        )


def _limit(rule: Rule, kind: str) -> tuple[str, float | None]:
    """The key and the limit of a rule for what was measured."""
    if isinstance(rule, NumberRule):
        return "most", rule.most
    if kind == "gain":
        return "min_gain", rule.min_gain
    return "ratio", 0.0 if kind == "difference" and rule.ratio is not None else rule.ratio


def _loss(own: Measured, other: Measured) -> Estimate:
    """How much worse the candidate is, pair by pair."""
    sign = -1 if own.is_least else 1
    a, b = own.estimate, other.estimate
    if len(a.replicates) != len(b.replicates):
        return Estimate(value=sign * (a.value - b.value))
    return a.with_other(b, lambda x, y: sign * (x - y))


def _keeps(value: float, limit: float, is_least: bool) -> bool:
    return math.isfinite(value) and (value >= limit if is_least else value <= limit)


def _interval(estimate: Estimate) -> tuple[float, float]:
    """Its interval; of an exact number, the number."""
    return estimate.interval if estimate.replicates else (estimate.value, estimate.value)


def _about(rule: str, model: str, objections: Sequence[str]) -> Check:
    """A check about no number."""
    return Check(rule=rule, model=model, passed=not objections, note="; ".join(objections))


def _number(evaluation: Evaluation | None, name: str) -> Measured | None:
    """A number that is no matter of steps; None if it was not measured."""
    if evaluation is None or (name == "flops_ratio" and name not in evaluation.cost):
        return None
    is_exact = name == "flops_ratio"
    found = Estimate(value=evaluation.cost[name]) if is_exact else evaluation.guidance_fvu
    return Measured(estimate=found, kind="number", is_least=False)


def _scores(
    mine: Evaluation, theirs: Evaluation | None, score: str, num_steps: int
) -> tuple[Measured | None, Measured | None]:
    """What the rules for a score are held against, of the same kind; None if it is not there."""
    known = [each if each and has(each, score, num_steps) else None for each in (mine, theirs)]
    own, other = (measured(each, score, num_steps) if each else None for each in known)
    if own and other and own.kind != other.kind:  # CFG's gain is at the edge of its interval
        kind = "difference" if "difference" in (own.kind, other.kind) else "ratio"
        why = "CFG's own gain is inside its interval for one of the two"
        own, other = (
            _beside_cfg(each, score, num_steps, kind, why) if each else None for each in known
        )
    return own, other


def _estimate(evaluation: Evaluation, method: str, score: str, num_steps: int) -> Estimate:
    cell = evaluation.cell(method, num_steps)
    if cell is None or score not in cell.scores:
        raise ValueError(f"{evaluation.model}: no {score} of {method} at {num_steps} steps")
    return cell.scores[score]
