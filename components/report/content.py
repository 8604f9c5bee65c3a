"""What the page says, in the order in which it says it: numbers become words here.

A number stands with its 95 % interval where it has one. Shares of CFG's gain are used where CFG
gains something, and ratios to CFG's score where its gain is inside its own interval.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from components.evaluation import LOWER_IS_BETTER, Estimate, Evaluation
from components.headlines import by_model
from components.report import plots
from components.verdict import Check, measured

METHODS = {"unguided": "unguided", "cfg": "CFG", "guided": "guided"}
SCORES = {"fid": "FID", "kid": "KID", "clip_score": "CLIP score", "diversity": "diversity"}
OF_A_MODEL = (
    *("model_hash", "reference_hash", "tasks_hash"),
    *("guidance_scale", "strength", "trigger", "clip_skip"),
)
NEGATIVE = {
    "picture": "change of the picture by a negative prompt, over that under CFG",
    "avoided": "fall of the score for what was to be avoided, over that under CFG",
}
COSTS = {  # {} is the size of the batch that was timed
    "flops_ratio": "FLOPs of a step, over CFG",
    "time_ratio": "time of the denoising, over CFG, {} images at a time",
    "time_ratio_batch_1": "the same, one image at a time",
    "image_time_ratio": "time with decoding, over CFG, {} images at a time",
    "image_time_ratio_batch_1": "the same, one image at a time",
    "guided_ms_per_image": "guided, ms an image, {} at a time",
    "cfg_ms_per_image": "CFG, ms an image, {} at a time",
    "guided_ms_per_image_batch_1": "guided, ms an image, one at a time",
    "cfg_ms_per_image_batch_1": "CFG, ms an image, one at a time",
    "guided_peak_mb": "guided, memory at its peak, MB",
    "cfg_peak_mb": "CFG, memory at its peak, MB",
}


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that a page is made of.

    Attributes:
        name: of the registered model.
        version: None if it is not registered yet.
        made: when, in words.
        evaluations: by model.
        checks: each rule, and what it said.
        champion: who it was compared with, or why with nobody, in a sentence.
        no_champion_pictures: why the champion's pictures are not among those shown; empty if they
            are.
        lineage: what the guide was made of.
        links: label -> address, of the runs that it belongs to.
    """

    name: str
    version: str | None
    made: str
    evaluations: Mapping[str, Evaluation]
    checks: Sequence[Check]
    champion: str
    no_champion_pictures: str = ""
    lineage: Mapping[str, str] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A cell of a table: the number, what stands below it, and how good it is, from 0 to 1."""

    text: str
    below: str = ""
    goodness: float | None = None


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A score of every model at every number of steps; `rows` is model -> a cell each."""

    title: str
    note: str
    columns: Sequence[int]
    rows: Mapping[str, Sequence[Entry | None]]


@dataclass(frozen=True, kw_only=True)
class Worst:
    """Where the guide does worst, by one number."""

    label: str
    text: str
    where: str


def view(report: Report) -> dict[str, Any]:
    """What the page's template shows, by name."""
    evaluations = report.evaluations
    first = next(iter(evaluations.values()))
    failed = [check for check in report.checks if not check.passed]
    return {
        "report": report,
        "failed": failed,
        "checks": [_check(check) for check in sorted(report.checks, key=lambda c: c.passed)],
        "headlines": headlines(evaluations),
        "costs": costs(evaluations),
        "shares": shares(evaluations),
        "matrices": matrices(evaluations),
        "curves": {model: curves(evaluation) for model, evaluation in evaluations.items()},
        "timesteps": plots.unexplained_by_timestep(evaluations, name="timesteps"),
        "models": list(evaluations),
        "scores": list(SCORES.values()),
        "judges": first.judges,
        "identity": {_of(name, first.model): value for name, value in first.identity.items()},
        "num_images": by_model({m: e.num_images for m, e in evaluations.items()}),
        "guidance_scale": by_model({m: e.guidance_scale for m, e in evaluations.items()}),
    }


def headlines(evaluations: Mapping[str, Evaluation]) -> list[Worst]:
    """What the guide costs, and where it is worst, as a reader would first ask."""
    found = []
    by_cost = {m: e.cost["flops_ratio"] for m, e in evaluations.items() if "flops_ratio" in e.cost}
    if by_cost:
        model = max(by_cost, key=by_cost.__getitem__)
        text = percent(by_cost[model])
        found.append(Worst(label="of CFG's FLOPs", text=text, where=f"at most, on {model}"))
    by_time = {m: e.cost["time_ratio"] for m, e in evaluations.items() if "time_ratio" in e.cost}
    if by_time:
        model = max(by_time, key=by_time.__getitem__)
        text = percent(by_time[model])
        found.append(Worst(label="of CFG's time", text=text, where=f"at most, on {model}"))
    for score in ("clip_score", "fid"):
        shares = {
            (model, steps): share
            for model, e in evaluations.items()
            for steps in e.num_steps
            if _has(e, score, steps) and (share := e.gain(score, steps)) is not None
        }
        if shares:
            at = min(shares, key=lambda key: shares[key].value)
            label = f"of CFG's gain in {SCORES[score]}"
            where = f"at worst, on {at[0]} at {at[1]} steps"
            found.append(Worst(label=label, text=percent(shares[at].value), where=where))
    by_fvu = {m: e.guidance_fvu.value for m, e in evaluations.items()}
    model = max(by_fvu, key=by_fvu.__getitem__)
    text = percent(by_fvu[model])
    where = f"at worst, on {model}"
    if evaluations[model].fvu_prompts.get("trained"):
        where += f", along {evaluations[model].fvu_along}"
    found.append(Worst(label="of guidance left unexplained", text=text, where=where))
    return found


def matrices(evaluations: Mapping[str, Evaluation]) -> list[Matrix]:
    """The scores of fine-tunes by steps, those first that mean the same on every model."""
    found = []
    for score in ("clip_score", "fid"):
        found.append(
            _matrix(
                evaluations,
                f"Share of CFG’s gain, {SCORES[score]}",
                "100 % is what CFG gains over no guidance. Where CFG’s own gain is inside its "
                "interval, or is a loss, the guide’s score over CFG’s stands instead (× CFG); "
                "where that may be zero besides, their difference (off CFG).",
                lambda e, steps, score=score: _share(e, score, steps),
            )
        )
    for score, label in SCORES.items():
        better = "lower" if score in LOWER_IS_BETTER else "higher"
        note = "Guided; below it CFG and unguided. "
        if score != "diversity":
            # Each model has prompts and reference images of its own.
            note += f"Better is {better}; compare with CFG and along a row, not between models."
        found.append(
            _matrix(
                evaluations, label, note, lambda e, steps, score=score: _scores(e, score, steps)
            )
        )
    found.append(
        _matrix(
            evaluations,
            "PSNR to CFG",
            "In dB, of guided to CFG’s image of the same seed.",
            _psnr,
        )
    )
    return [matrix for matrix in found if any(any(row) for row in matrix.rows.values())]


def curves(evaluation: Evaluation) -> dict[str, Any]:
    """The plots of one model, and the numbers behind them."""
    prefix = "".join(letter if letter.isalnum() else "-" for letter in evaluation.model)
    steps = [cell.num_steps for cell in evaluation.cells if cell.method == "guided"]
    many = max(set(steps), key=lambda n: (steps.count(n), n)) if steps else 0
    figures = {
        "FID against cost": plots.score_against_cost(evaluation, "fid", name=f"{prefix}-fid"),
        "CLIP score against cost": plots.score_against_cost(
            evaluation, "clip_score", name=f"{prefix}-clip"
        ),
        f"FID against CLIP score over guidance scales, {many} steps": plots.fid_against_clip(
            evaluation, many, name=f"{prefix}-scales"
        ),
    }
    rows = [
        {
            "method": METHODS.get(cell.method, cell.method),
            "solver": cell.solver,
            "w": f"{cell.guidance_scale:g}",
            "steps": cell.num_steps,
            "forwards": number(cell.forwards),
            "judge": cell.judge,
            "scores": [
                estimate(cell.scores[score]) if score in cell.scores else Entry(text="–")
                for score in SCORES
            ],
        }
        for cell in sorted(
            evaluation.cells, key=lambda c: (c.judge, c.guidance_scale, c.forwards, c.method)
        )
    ]
    return {"figures": {title: svg for title, svg in figures.items() if svg}, "rows": rows}


def costs(evaluations: Mapping[str, Evaluation]) -> list[tuple[str, dict[str, str]]]:
    """What was measured of time and memory: a label, and the number of each model."""
    found = []
    for key, label in COSTS.items():
        known = {m: number(e.cost[key]) for m, e in evaluations.items() if key in e.cost}
        sizes = {f"{e.cost.get('batch_size', 1):g}" for e in evaluations.values()}
        if known:
            found.append((label.format("/".join(sorted(sizes))), known))
    machines = {m: e.timed_on for m, e in evaluations.items() if e.timed_on}
    if machines:
        found.append(("times were taken on", machines))
    return found


def shares(evaluations: Mapping[str, Evaluation]) -> dict[str, dict[str, Entry]]:
    """What is no matter of steps: label -> model -> share."""
    found = {
        "guidance left unexplained": {
            m: _with_prompts(estimate(e.guidance_fvu, as_share=True), e)
            for m, e in evaluations.items()
        }
    }
    names = [name for e in evaluations.values() if e.negative for name in (*NEGATIVE, *e.negative)]
    for name in dict.fromkeys(names):
        found[NEGATIVE.get(name, f"negative prompt: {name}")] = {
            model: estimate(e.negative[name], as_share=True)
            if name in e.negative
            else Entry(text="–", below=_why_no_share(e))
            for model, e in evaluations.items()
        }
    return found


def _with_prompts(entry: Entry, evaluation: Evaluation) -> Entry:
    """`guidance_fvu`, and whose prompts it is of, where the evaluation says so."""
    if not evaluation.fvu_prompts:
        return entry
    return replace(entry, below=f"{entry.below}; {evaluation.fvu_along}".removeprefix("; "))


def _why_no_share(evaluation: Evaluation) -> str:
    """Why a share of what negative prompts do under CFG was not measured."""
    if not evaluation.negative:
        return "not measured"
    first = evaluation.judges[0]
    reads_text = any("clip_score" in c.scores for c in evaluation.cells if c.judge == first)
    return "CFG’s own change is inside its interval" if reads_text else "the judge reads no text"


def estimate(found: Estimate, *, as_share: bool = False) -> Entry:
    """A number over its interval."""
    low, high = found.interval
    write = percent if as_share else number
    below = "" if math.isnan(low) else f"{write(low)} to {write(high)}"
    return Entry(text=write(found.value), below=below)


def number(value: float) -> str:
    """Three significant digits; no exponent where a reader expects none."""
    if value != 0 and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.2e}"
    digits = 2 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 5)}f}"


def percent(value: float) -> str:
    """`0.93` as `93 %`."""
    return f"{100 * value:.0f} %"


def _check(check: Check) -> dict[str, Any]:
    """A row of the verdict's table."""
    sign = "≥" if check.is_least else "≤"
    return {
        "rule": check.rule,
        "model": check.model,
        "steps": "" if check.num_steps is None else check.num_steps,
        "limit": "" if check.limit is None else f"{sign} {check.limit:g}",
        "value": "" if check.value is None else f"{check.value:z.3f}",
        "interval": "{:z.3f} to {:z.3f}".format(*check.interval) if check.interval else "",
        "champion": "" if check.champion is None else f"{check.champion:z.3f}",
        "passed": check.passed,
        "note": check.note,
    }


def _of(name: str, model: str) -> str:
    """What is said of an evaluation, and of which model where others have another."""
    return f"{name} of {model}" if name in OF_A_MODEL else name


def _matrix(evaluations: Mapping[str, Evaluation], title: str, note: str, entry: Any) -> Matrix:
    columns = sorted({n for e in evaluations.values() for n in e.num_steps}, reverse=True)
    rows = {
        model: [entry(e, n) if n in e.num_steps else None for n in columns]
        for model, e in evaluations.items()
    }
    return Matrix(title=title, note=note, columns=columns, rows=rows)


def _share(evaluation: Evaluation, score: str, num_steps: int) -> Entry | None:
    if not _has(evaluation, score, num_steps):
        return None
    found = measured(evaluation, score, num_steps)
    if found.kind == "gain":
        made = estimate(found.estimate, as_share=True)
        goodness = min(1.0, max(0.0, found.estimate.value))
        return Entry(text=made.text, below=made.below, goodness=goodness)
    made = estimate(found.estimate)
    sign = "× CFG" if found.kind == "ratio" else "off CFG"
    return Entry(text=f"{made.text} {sign}", below=made.below)


def _scores(evaluation: Evaluation, score: str, num_steps: int) -> Entry | None:
    if not _has(evaluation, score, num_steps):
        return None
    cells = {m: evaluation.cell(m, num_steps) for m in METHODS}
    values = {m: cell.scores[score] for m, cell in cells.items() if cell}
    guided = estimate(values["guided"])
    others = f"CFG {number(values['cfg'].value)}, unguided {number(values['unguided'].value)}"
    text = f"{guided.text} ({guided.below})" if guided.below else guided.text
    return Entry(text=text, below=others)


def _psnr(evaluation: Evaluation, num_steps: int) -> Entry | None:
    cell = evaluation.cell("guided", num_steps)
    found = cell.scores.get("cfg_psnr") if cell else None
    return estimate(found) if found else None


def _has(evaluation: Evaluation, score: str, num_steps: int) -> bool:
    cells = [evaluation.cell(method, num_steps) for method in METHODS]
    return all(cell is not None and score in cell.scores for cell in cells)
