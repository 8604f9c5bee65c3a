"""What the rows say: the figures, and tables."""

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.gpu.rows import BATCHES, COMPILED, EAGER, GRAPH, Row, groups
from benchmarks.gpu.scale import Scale
from benchmarks.record import as_line

HOWS = (EAGER, COMPILED, GRAPH)
Results = Mapping[str, Any]


def row_names(scale: Scale) -> list[str]:
    """All rows there can be."""
    from pathlib import Path

    return [name for group in groups(scale, Path()) for name in group.names]


def main_card(results: Results) -> str | None:
    """The largest card's name; None: there are no results."""
    return max(results, key=lambda name: float(results[name]["memory_gb"]), default=None)


def summary(results: Results, scale: Scale, code: str) -> dict[str, Any]:
    """The figures on the largest card, null where its rows lack; and which rows lack or are old."""
    card = main_card(results)
    rows: Mapping[str, Row] = results[card]["rows"] if card else {}
    names = row_names(scale)
    found: dict[str, Any] = {"card": card}
    for key, how, reference in (
        ("over_plain", COMPILED, "plain"),
        ("over_cfg", COMPILED, "cfg"),
        ("over_plain_graph", GRAPH, "plain"),
    ):
        found[key] = {
            base: {str(batch): over(rows, base, how, batch, reference) for batch in BATCHES}
            for base in scale.bases
        }
    found["over_plain_eager"] = over(rows, "sdxl", EAGER, 1, "plain")
    for base in scale.bases:
        train = rows.get(f"{base} train {EAGER}", {})
        found[f"{base}_24gb"] = train.get("peak_gb")
        found[f"{base}_samples_per_second"] = train.get("samples_per_second")
        cache = rows.get(f"{base} cache", {})
        found[f"{base}_pairs_per_second"] = cache.get("pairs_per_second")
    found["tests"] = rows.get("tests")
    found["missing"] = [name for name in names if name not in rows]
    found["failed"] = [name for name in names if "failed" in rows.get(name, {})]
    found["of_other_code"] = [n for n in names if n in rows and rows[n]["code"] != code]
    return found


def over(rows: Mapping[str, Row], base: str, how: str, batch: int, reference: str) -> float | None:
    """Time of a tiny guide's step over another's; None: not measured."""
    ms = rows.get(f"{base} {how} {batch}", {}).get("ms")
    return None if ms is None else ms["tiny"] / ms[reference]


def as_markdown(results: Results, scale: Scale, kernels: Mapping[str, float]) -> str:
    """All cards' tables; where there are none, what a CPU counts in their stead.

    Args:
        results: by card.
        scale: what there is to measure.
        kernels: operations of a guided step over a plain one, by base, counted on meta tensors.
    """
    lines = ["# On a GPU", "", "`python -m benchmarks.gpu --run` makes this."]
    if not results:
        lines += ["", "No GPU has measured this yet. "]
        lines[-1] += "Counted without one, a guided step's kernels over a plain step's, eager: "
        lines[-1] += ", ".join(f"{name} {ratio:.3f}" for name, ratio in kernels.items()) + "."
    for card in results:
        lines += ["", f"## {card}", "", *card_lines(results[card], scale)]
    return "\n".join(lines) + "\n"


def card_lines(card: Results, scale: Scale) -> Iterator[str]:
    """One card's tables."""
    rows: Mapping[str, Row] = card["rows"]
    records = card.get("records", {})
    told = [record for name in rows for record in records.get(name, [])]
    for made_by in {str(record): record for record in told}.values():
        yield f"{as_line(made_by)} torch {made_by['torch']}, driver {made_by['driver']}."
    yield from ("", "Milliseconds of a step, and GB that it takes beside the weights; weights are")
    yield "random and in bf16, steps taken in turns, the median counts. A step is the UNet's."
    head = ("plain", "CFG", "tiny", "over plain", "over CFG", "encoder", "full")
    yield from ("", f"| base | batch | | {' | '.join(head)} |")
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for base in scale.bases:
        for batch in BATCHES:
            for how in HOWS:
                yield step_line(rows, base, how, batch)
    yield from ("", "| base | | samples a second | peak, GB | planned, GB | samples at once |")
    yield "|---|---|---|---|---|---|"
    for base in scale.bases:
        for how in (EAGER, COMPILED):
            yield train_line(rows, base, how)
    yield from ("", "| base | pairs a second | images | prompts | of bare forwards' speed |")
    yield "|---|---|---|---|---|"
    for base in scale.bases:
        row = rows.get(f"{base} cache", {})
        names = ("pairs_per_second", "images_per_second", "prompts_per_second", "efficiency")
        yield table_row(base, *(number(row.get(name)) for name in names))
    if (tests := rows.get("tests")) and "failed" not in tests:
        bad = ", ".join(tests["not_passed"]) or "none"
        yield from ("", f"Tests marked `gpu`: {tests['passed']} passed, not passed: {bad}, ")
        yield f"{tests['skipped']} skipped."
    failed = {name: row["failed"] for name, row in rows.items() if "failed" in row}
    if failed:
        yield from ("", "Rows that failed:", "")
        yield from (f"- {name}: {why}" for name, why in failed.items())


def step_line(rows: Mapping[str, Row], base: str, how: str, batch: int) -> str:
    """A row of the table of steps."""
    row = rows.get(f"{base} {how} {batch}", {})
    ms, memory = row.get("ms", {}), row.get("memory_gb", {})
    cells = [
        f"{ms[way]:.2f} ({memory[way]:.2f} GB)" if way in ms else "" if ms else "not measured"
        for way in ("plain", "cfg", "tiny", "encoder", "full")
    ]
    ratios = [number(over(rows, base, how, batch, way), 3) for way in ("plain", "cfg")]
    return table_row(base, str(batch), how, *cells[:3], *ratios, *cells[3:])


def train_line(rows: Mapping[str, Row], base: str, how: str) -> str:
    """A row of the table of training."""
    row = rows.get(f"{base} train {how}", {})
    numbers = [number(row.get(k)) for k in ("samples_per_second", "peak_gb", "planned_gb")]
    at_once = str(row.get("micro_batch_size", ""))
    checkpoints = ", checkpointed" if row.get("gradient_checkpointing") else ""
    return table_row(base, how, *numbers, at_once + checkpoints)


def table_row(*cells: str) -> str:
    """Cells of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def number(value: float | None, digits: int = 2) -> str:
    """For a cell."""
    return "not measured" if value is None else f"{value:.{digits}f}"
