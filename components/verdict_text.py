"""A verdict as text: for a terminal, for Markdown, for a table of MLflow's."""

from collections.abc import Sequence
from typing import Any

from components.verdict import Check

COLUMNS = ("model", "steps", "rule", "limit", "candidate", "95 %", "champion", "holds", "note")
HOLDS = {True: "yes", False: "**no**"}


def as_lines(checks: Sequence[Check]) -> list[str]:
    """Every rule in a line of its own, those that don't hold first."""
    ordered = sorted(checks, key=lambda check: check.passed)
    return [f"{'holds' if check.passed else 'FAILS'}  {check}" for check in ordered]


def as_rows(checks: Sequence[Check]) -> list[dict[str, Any]]:
    """A row for each rule, every column in each."""
    return [
        {
            "model": check.model,
            "steps": check.num_steps,
            "rule": check.rule,
            "limit": check.limit,
            "limit is": "the least" if check.is_least else "the most",
            "candidate": check.value,
            "low": check.interval[0] if check.interval else None,
            "high": check.interval[1] if check.interval else None,
            "champion": check.champion,
            "holds": check.passed,
            "note": check.note,
        }
        for check in checks
    ]


def as_table(checks: Sequence[Check]) -> str:
    """A table in Markdown, those that don't hold first."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    for check in sorted(checks, key=lambda check: check.passed):
        limit = "" if check.limit is None else f"{'≥' if check.is_least else '≤'} {check.limit:g}"
        interval = "{:z.3f} to {:z.3f}".format(*check.interval) if check.interval else ""
        cells = [
            check.model,
            "" if check.num_steps is None else str(check.num_steps),
            f"`{check.rule}`",
            limit,
            number(check.value),
            interval,
            number(check.champion),
            HOLDS[check.passed],
            check.note.replace("|", "\\|"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def number(value: float | None) -> str:
    """Three decimals; nothing for None."""
    return "" if value is None else f"{value:z.3f}"
