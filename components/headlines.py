"""What is said of a guide where there is little room: a dozen numbers, a table, a few lines."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from components.evaluation import Evaluation
from components.methods import METHODS
from components.verdict import Check, Measured, measured

SCORES = {"fid": "FID", "kid": "KID", "clip_score": "CLIP"}
# MLflow's page of charts begins with the first name of all metrics, in a section of its group. One
# that only the models' runs have, which are folded away there, would be empty: this is no first.
GROUPS = {"cfg_psnr": "psnr_to_cfg"}
MAX_WIDTH = 100  # columns of a terminal
MAX_REASONS = 4  # failed rules that a description names
MAX_DESCRIPTION = 5000  # characters that MLflow's databases have room for


def numbers(
    evaluations: Mapping[str, Evaluation], checks: Sequence[Check], num_steps: Sequence[int]
) -> dict[str, float]:
    """A dozen: over all models and these numbers of steps, their mean and the worst of them.

    Gains are the share of what CFG gains over no guidance that the guide gains, of those models on
    which CFG gains anything that is sure. What was not measured at any of these is left out.
    """
    found: dict[str, float] = {"checks_failed": sum(not check.passed for check in checks)}
    found |= _spread("guidance_fvu", [e.guidance_fvu.value for e in evaluations.values()])
    at = [(e, steps) for e in evaluations.values() for steps in e.num_steps if steps in num_steps]
    ratios = [e.ratio("fid", steps).value for e, steps in at if has(e, "fid", steps)]
    found |= _spread("fid_over_cfg", ratios)
    for name, score in (("fid_gain", "fid"), ("clip_gain", "clip_score")):
        gains = [e.gain(score, steps) for e, steps in at if has(e, score, steps)]
        found |= _spread(name, [gain.value for gain in gains if gain], is_least=True)
    cells = [e.cell("guided", steps) for e, steps in at]
    psnrs = [cell.scores["cfg_psnr"].value for cell in cells if cell and "cfg_psnr" in cell.scores]
    found |= {"cfg_psnr_mean": fmean(psnrs)} if psnrs else {}
    for name in ("flops_ratio", "time_ratio"):
        costs = [e.cost[name] for e in evaluations.values() if name in e.cost]
        found |= {name: max(costs)} if costs else {}
    return found


def by_steps(evaluation: Evaluation) -> dict[int, dict[str, Any]]:
    """The first judge's scores at each number of steps: steps -> score -> way -> value."""
    found: dict[int, dict[str, Any]] = {}
    for cell in evaluation.cells:
        is_first = (cell.judge, cell.guidance_scale) == (
            evaluation.judges[0],
            evaluation.guidance_scale,
        )
        if is_first:
            solver = "" if cell.solver == "ddim" else f"_{cell.solver.replace('+', 'p')}"
            at = found.setdefault(cell.num_steps, {})
            for score, estimate in cell.scores.items():
                group = at.setdefault(GROUPS.get(score, score), {})
                group[cell.method + solver] = estimate.value
    return found


def table_rows(
    evaluations: Mapping[str, Evaluation], checks: Sequence[Check]
) -> list[dict[str, Any]]:
    """A row for each model and number of steps: every score by every method, and the rules."""
    rows = []
    for model, evaluation in evaluations.items():
        for num_steps in evaluation.num_steps:
            row: dict[str, Any] = {"model": model, "steps": num_steps}
            for score, label in SCORES.items():
                if has(evaluation, score, num_steps):
                    for method in METHODS:
                        cell = evaluation.cell(method, num_steps)
                        row[f"{label} {method}"] = cell.scores[score].value if cell else None
                    row[f"{label} gain"] = gain_text(measured(evaluation, score, num_steps))
            guided = evaluation.cell("guided", num_steps)
            if guided and "cfg_psnr" in guided.scores:
                row["PSNR to CFG, dB"] = guided.scores["cfg_psnr"].value
            row["guidance_fvu"] = evaluation.guidance_fvu.value
            row["FLOPs / CFG"] = evaluation.cost.get("flops_ratio")
            row["time / CFG"] = evaluation.cost.get("time_ratio")
            row["images"] = evaluation.num_images
            about = [c for c in checks if c.model == model and c.num_steps in (num_steps, None)]
            row["rules"] = f"{sum(c.passed for c in about)}/{len(about)}"
            rows.append(row)
    return rows


def as_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table that also reads well as plain text, of at most `MAX_WIDTH` columns.

    It is wider where names of models would be the same when they are shortened.
    """
    columns = ["model", "steps", "FID", "gain", "fvu", "FLOPs", "time", "rules"]
    lines = [columns]
    for row in rows:
        scores = [row.get(f"FID {method}") for method in METHODS]
        gains = [row.get(f"{label} gain", "–") for label in SCORES.values()]
        lines.append(
            [
                row["model"],
                str(row["steps"]),
                " / ".join("–" if value is None else f"{value:.3g}" for value in scores),
                " / ".join(gains),
                f"{row['guidance_fvu']:.2f}",
                *(_short(row.get(name)) for name in ("FLOPs / CFG", "time / CFG")),
                row["rules"],
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    room = MAX_WIDTH - sum(widths[1:]) - 3 * len(columns) - 1
    short = {line[0]: _shortened(line[0], room) for line in lines}
    if len({*short.values()}) == len(short):  # else a wide table is better than two of one name
        lines = [[short[line[0]], *line[1:]] for line in lines]
    widths[0] = max(len(line[0]) for line in lines)
    text = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([text[0], rule, *text[1:]]) + "\n\n" + LEGEND


LEGEND = """FID: unguided / CFG / guided. Gain: of what CFG gains over no guidance, in FID / KID /
CLIP score; with × the guide's score over CFG's, where CFG's own gain is inside its interval, or is
a loss; with a sign the guide's score less CFG's, where that may be zero besides. fvu: guidance left
unexplained. FLOPs, time: of the denoising, over CFG. Rules: those that hold.
"""


def description(checks: Sequence[Check], *, compared: str, where: Sequence[str]) -> str:
    """A version's few lines, in Markdown: the verdict, what failed, where the guide is worst.

    The first line is plain: the list of versions shows it as it is written.
    """
    failed = [check for check in checks if not check.passed]
    verdict = (
        f"Would be refused: {len(failed)} of {len(checks)} checks fail."
        if failed
        else f"Passes all {len(checks)} checks."
    )
    lines = [f"{verdict} {compared}", ""]
    lines += [f"- {check}" for check in failed[:MAX_REASONS]]
    if len(failed) > MAX_REASONS:
        lines.append(f"- and {len(failed) - MAX_REASONS} more")
    text = "\n".join([*lines, *(f"- {line}" for line in where)]) + "\n"
    return text if len(text) <= MAX_DESCRIPTION else f"{text[: MAX_DESCRIPTION - 1]}…"


def gain_text(found: Measured) -> str:
    """`93%`, or in its place `1.04×` CFG's score, or `+0.010` off it."""
    value = found.estimate.value
    forms = {"gain": f"{value:.0%}", "ratio": f"{value:.2f}×"}
    return forms.get(found.kind, f"{value:+.2g}")


def has(evaluation: Evaluation, score: str, num_steps: int) -> bool:
    """Whether every method has this score at this number of steps."""
    cells = [evaluation.cell(method, num_steps) for method in METHODS]
    return all(cell is not None and score in cell.scores for cell in cells)


def _spread(name: str, values: Sequence[float], *, is_least: bool = False) -> dict[str, float]:
    if not values:
        return {}
    worst = min(values) if is_least else max(values)
    return {f"{name}_mean": fmean(values), f"{name}_worst": worst}


def by_model(values: Mapping[str, float]) -> str:
    """`3`, if that is the number of all models, else `3 (base), 7.5 (tuned)`."""
    models: dict[float, list[str]] = {}
    for model, value in values.items():
        models.setdefault(value, []).append(model)
    if len(models) == 1:
        return f"{next(iter(models)):g}"
    return ", ".join(f"{value:g} ({', '.join(names)})" for value, names in models.items())


def _shortened(name: str, room: int) -> str:
    """The name with its middle left out, if it is longer than `room` characters."""
    if len(name) <= room:
        return name
    end = (room - 1) // 2
    return f"{name[: room - 1 - end]}…{name[len(name) - end :]}"


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
