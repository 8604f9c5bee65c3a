"""What DVC shows of an evaluation: a dozen numbers, and curves as CSV files."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from components.evaluation import Cell, Evaluation
from components.methods import METHODS, SOLVERS

SCORES = ("fid", "kid", "clip_score", "diversity", "cfg_psnr")
COLUMNS = ("method", "solver", "num_steps", "forwards", "guidance_scale")


def headline(evaluation: Evaluation) -> dict[str, float]:
    """A dozen: how near the guide is to CFG, what it costs, at most and fewest steps.

    `fid_gain` and `clip_gain` are the share of what CFG gains over no guidance that the guide
    gains; they are left out where CFG gains nothing that is sure.
    """
    found = {"guidance_fvu": evaluation.guidance_fvu.value}
    found |= {name: evaluation.cost[name] for name in ("flops_ratio", "time_ratio")}
    found |= {f"negative_{name}": share.value for name, share in evaluation.negative.items()}
    counts = evaluation.num_steps
    for num_steps in dict.fromkeys((counts[0], counts[-1])):
        cell = evaluation.cell("guided", num_steps)
        assert cell
        found[f"fid_at_{num_steps}"] = cell.scores["fid"].value
        found[f"fid_over_cfg_at_{num_steps}"] = evaluation.ratio("fid", num_steps).value
        if "clip_score" in cell.scores:
            found[f"clip_at_{num_steps}"] = cell.scores["clip_score"].value
        for name, score in (("fid_gain", "fid"), ("clip_gain", "clip_score")):
            gain = evaluation.gain(score, num_steps) if score in cell.scores else None
            if gain is not None:
                found[f"{name}_at_{num_steps}"] = gain.value
    return found


def few(evaluation: Evaluation) -> dict[str, float]:
    """For `dvc metrics`, whose table of them fits a terminal.

    `guidance_fvu` and `flops_ratio`, and the guide's FID and CLIP score at most and fewest steps.
    """
    found = {"fvu": evaluation.guidance_fvu.value, "flops": evaluation.cost["flops_ratio"]}
    counts = evaluation.num_steps
    for name, score in (("fid", "fid"), ("clip", "clip_score")):
        for num_steps in dict.fromkeys((counts[0], counts[-1])):
            cell = evaluation.cell("guided", num_steps)
            assert cell
            if score in cell.scores:
                found[f"{name}_{num_steps}"] = cell.scores[score].value
    return found


def write_curves(evaluation: Evaluation, folder: Path) -> None:
    """Write quality.csv (over cost), scales.csv (over guidance scales) and fvu.csv (over time).

    Scores are the first judge's, each with the ends of its interval.
    """
    judge, scale = evaluation.judges[0], evaluation.guidance_scale
    cells = [cell for cell in evaluation.cells if cell.judge == judge]
    quality = [cell for cell in cells if cell.guidance_scale == scale]
    quality.sort(key=lambda cell: (cell.method, cell.solver, cell.forwards))
    others = [cell.num_steps for cell in cells if cell.guidance_scale != scale]
    num_steps = others[0] if others else evaluation.num_steps[0]
    scales = [cell for cell in cells if (cell.num_steps, cell.solver) == (num_steps, "ddim")]
    scales.sort(key=lambda cell: (cell.method, cell.guidance_scale))
    _write(folder / "quality.csv", map(_row, quality))
    _write(folder / "scales.csv", map(_row, scales))
    _write(
        folder / "fvu.csv",
        (
            {"timestep": t, "guidance_fvu": value, **_ends("guidance_fvu", interval)}
            for t, value, interval in (
                (int(t), value, evaluation.fvu_intervals[t])
                for t, value in evaluation.fvu_by_timestep.items()
            )
        ),
    )


def _row(cell: Cell) -> dict[str, Any]:
    row: dict[str, Any] = {name: getattr(cell, name) for name in COLUMNS}
    row["method"] = METHODS[cell.method] + SOLVERS[cell.solver]
    for name in SCORES:
        score = cell.scores.get(name)
        row[name] = "" if score is None else score.value
        row |= _ends(name, ("", "") if score is None else score.interval)
    return row


def _ends(name: str, interval: Sequence[Any]) -> dict[str, Any]:
    return {f"{name}_low": interval[0], f"{name}_high": interval[1]}


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    made = list(rows)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, made[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(made)
