"""The report's plots, as SVG that takes its colours and fonts from the page around it."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from components.evaluation import Cell, Evaluation

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (4.4, 3.4)  # inches of 72 pixels: on a phone the letters keep their size
# What is drawn in these colours is shown in the page's own, light or dark: colour -> variable.
INK, GRID = "#010101", "#020202"
VARIABLES = {INK: "--ink", GRID: "--line"}
SERIES = [f"#0{number}0303" for number in range(1, 9)]  # --series-1 …
VARIABLES |= {colour: f"--series-{number}" for number, colour in enumerate(SERIES, 1)}


@dataclass(frozen=True, kw_only=True)
class Line:
    """One way of sampling in a plot: which cells, and how they are drawn."""

    label: str
    method: str
    solver: str
    colour: str
    marker: str
    dashes: str


LINES = (
    Line(
        label="unguided", method="unguided", solver="ddim", colour=SERIES[0], marker="s", dashes=":"
    ),
    Line(label="CFG", method="cfg", solver="ddim", colour=SERIES[1], marker="o", dashes="-"),
    Line(
        label="CFG, DPM++ 2M",
        method="cfg",
        solver="dpmsolver++",
        colour=SERIES[2],
        marker="D",
        dashes="--",
    ),
    Line(label="guided", method="guided", solver="ddim", colour=SERIES[3], marker="o", dashes="-"),
)
LABELS = {
    "fid": "FID (lower is better)",
    "kid": "KID (lower is better)",
    "clip_score": "CLIP score (higher is better)",
}


def score_against_cost(evaluation: Evaluation, score: str, *, name: str) -> "Markup | None":
    """A score over what an image costs, a line for each way of sampling; None if not measured."""
    figure, axes = _figure()
    for line in LINES:
        cells = [
            cell
            for cell in _cells(evaluation, line)
            if cell.guidance_scale == evaluation.guidance_scale and score in cell.scores
        ]
        cells.sort(key=lambda cell: cell.forwards)
        if cells:
            values = [cell.scores[score].value for cell in cells]
            _draw(axes, line, [cell.forwards for cell in cells], values)
            _intervals(axes, line, cells, score)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.set_xlabel("UNet forwards an image")
    axes.set_ylabel(LABELS[score])
    return _svg(figure, axes, name)


def fid_against_clip(evaluation: Evaluation, num_steps: int, *, name: str) -> "Markup | None":
    """FID over CLIP score, a point for each guidance scale; None if there is one scale only."""
    figure, axes = _figure()
    scales: set[float] = set()
    for line in LINES:
        cells = [
            cell
            for cell in _cells(evaluation, line)
            if cell.num_steps == num_steps and {"fid", "clip_score"} <= cell.scores.keys()
        ]
        cells.sort(key=lambda cell: cell.guidance_scale)
        if not cells:
            continue
        if line.method != "unguided":
            scales |= {cell.guidance_scale for cell in cells}
        else:
            cells = cells[:1]  # the scale is nothing to it
        x = [cell.scores["clip_score"].value for cell in cells]
        y = [cell.scores["fid"].value for cell in cells]
        _draw(axes, line, x, y)
        if line.method != "unguided":
            for cell, here in zip(cells, zip(x, y, strict=True), strict=True):
                axes.annotate(
                    f"{cell.guidance_scale:g}",
                    here,
                    xytext=(0, 6),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                    color=line.colour,
                )
    axes.set_xlabel(LABELS["clip_score"])
    axes.set_ylabel(LABELS["fid"])
    return _svg(figure, axes, name) if len(scales) > 1 else None


def unexplained_by_timestep(evaluations: Mapping[str, Evaluation], *, name: str) -> "Markup | None":
    """What the guide leaves of CFG's guidance at each timestep, a line for each model."""
    figure, axes = _figure()
    top = 1.0  # no guide at all
    for number, (model, evaluation) in enumerate(evaluations.items()):
        points = sorted((int(t), share) for t, share in evaluation.fvu_by_timestep.items())
        colour = SERIES[number % len(SERIES)]
        dashes = ("-", "--", ":")[number // len(SERIES) % 3]
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, dashes, marker=".", color=colour, label=model, linewidth=1.5)
            top = max(top, *y)
    axes.set_ylim(0, 1.05 * top)
    axes.invert_xaxis()
    axes.set_xlabel("timestep (sampling goes from left to right)")
    axes.set_ylabel("guidance left unexplained")
    return _svg(figure, axes, name)


def _cells(evaluation: Evaluation, line: Line) -> list[Cell]:
    return [
        cell
        for cell in evaluation.cells
        if (cell.method, cell.solver, cell.judge)
        == (line.method, line.solver, evaluation.judges[0])
    ]


def _draw(axes: "Axes", line: Line, x: Sequence[float], y: Sequence[float]) -> None:
    axes.plot(
        x,
        y,
        line.dashes,
        marker=line.marker,
        color=line.colour,
        label=line.label,
        linewidth=1.5,
        markersize=4.5,
    )


def _intervals(axes: "Axes", line: Line, cells: Sequence[Cell], score: str) -> None:
    """95 % intervals as thin bars, where there are any."""
    known = [cell for cell in cells if cell.scores[score].replicates]
    if known:
        ends = [cell.scores[score].interval for cell in known]
        lows, highs = zip(*ends, strict=True)
        axes.vlines(
            [cell.forwards for cell in known],
            lows,
            highs,
            color=line.colour,
            linewidth=1,
            alpha=0.6,
        )


def _figure() -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.tick_params(colors=INK, labelsize=10)
    axes.grid(color=GRID, linewidth=0.5, alpha=0.6)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=INK, fontsize=11)
    return figure, axes


def _svg(figure: "Figure", axes: "Axes", name: str) -> "Markup | None":
    """The drawing, to be put into a page; `name` keeps its ids apart from those of others."""
    import matplotlib
    from markupsafe import Markup

    if not axes.lines:
        return None
    # Beside the drawing: nothing is where intervals would be behind it.
    columns = 2 if len(axes.lines) < 5 else 3
    figure.legend(
        loc="outside upper left", ncols=columns, frameon=False, fontsize=10, labelcolor=INK
    )
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pnp"}):
        # No date: the same numbers give the same file.
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r"font: (\d+)px [^;\"]*", r"font-size: \1px", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    text = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", text, count=1)
    # Matplotlib has escaped what it was given.
    return Markup(re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", text, count=1))
