"""Whether the review of guides holds: bad promotions tried, races, and what reviewing costs.

    python -m benchmarks.review --run            # with a real MLflow server on 127.0.0.1
    python -m benchmarks.review --run --only races
    python -m benchmarks.review --json           # what the committed results say

A measure is a function that is given a scratch folder and returns what it found, and its keys. It
is listed in `MEASURES`, and its result is kept in one file with those of the others.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import record, review_evaluation, review_promotion, review_report
from benchmarks.command import command_parser, errors_in_one_line
from components.environment import quiet
from components.lineage import git_commit
from pnp_core.files import read_json, write_json

RESULTS = Path("benchmarks/results/review.json")
Measure = Callable[[Path], tuple[Mapping[str, float], Any]]
"""Measures in a scratch folder; returns what `--json` says, by key, and what else was seen."""

MEASURES: dict[str, Measure] = {
    "bad_promotions": review_promotion.bad_promotions,
    "rightful_promotions": review_promotion.rightful_promotions,
    "races": review_promotion.races,
    "page": review_report.page,
    "resume": review_evaluation.resume,
    "ray": review_evaluation.ray,
}


@errors_in_one_line()
def main() -> None:
    """Print what was measured, with `--run` after measuring it."""
    parser = command_parser("review", __doc__)
    parser.add_argument("--run", action="store_true", help="measure; else read the results")
    parser.add_argument("--only", action="append", choices=MEASURES, help="of these measures")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    arguments = parser.parse_args()
    quiet()
    results = read_json(RESULTS) if RESULTS.exists() else {}
    for name in (arguments.only or MEASURES) if arguments.run else ():
        with tempfile.TemporaryDirectory() as scratch:
            keys, seen = MEASURES[name](Path(scratch))
        made_by = {"commit": git_commit(), "command": record.command()}
        results[name] = {"keys": keys, "seen": seen, "made_by": made_by}
        write_json(RESULTS, {each: results[each] for each in MEASURES if each in results})
        print(f"{name}: {json.dumps(keys)}", flush=True)
    if not results:
        sys.exit(f"error: no {RESULTS}: python -m benchmarks.review --run makes it")
    if arguments.json:
        print(json.dumps(summary(results)))
    else:
        print(json.dumps(results, indent=1))


def summary(results: Mapping[str, Any]) -> dict[str, float]:
    """All keys of all measures."""
    return {key: value for result in results.values() for key, value in result["keys"].items()}


if __name__ == "__main__":
    main()
