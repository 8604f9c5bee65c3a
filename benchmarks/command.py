"""The command of a benchmark that keeps rows in a file: make what is missing, print the table."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from components.environment import quiet
from components.params import Params, load_params
from pnp_core.files import read_json

Results = Mapping[str, Any]


def run_command(
    parser: argparse.ArgumentParser,
    path: Path,
    run: Callable[[Params, argparse.Namespace], None],
    *,
    table: Callable[[Results], str],
    figures: Callable[[Results], Mapping[str, Any]],
) -> None:
    """Read the command line, and do what it says. Ends with a line where there are no results.

    Args:
        parser: with what this benchmark alone has.
        path: of the results.
        run: makes them.
        table: shows them, in Markdown.
        figures: what ``--json`` prints of them, beside what made them.
    """
    parser.add_argument("--run", action="store_true", help="make the results that are missing")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    arguments = parser.parse_args()
    quiet()
    if arguments.run:
        run(load_params(Path("params.yaml")), arguments)
    if not path.exists():
        sys.exit(f"error: there is no {path} yet: run `dvc repro`, then this with --run")
    results = read_json(path)
    print(table(results))
    if arguments.json:
        print(json.dumps({**figures(results), "records": results.get("records")}))
