"""The guide at equal cost beside everything that costs as much, by two judges.

    python -m benchmarks.frontier --json              # what the committed results say
    python -m benchmarks.frontier --run               # makes what is missing: days on two cores
    python -m benchmarks.frontier --run --model base --forwards 8
    python -m benchmarks.frontier --train             # the rivals that train, for their rows
    python -m benchmarks.frontier --run --final       # the final models, once, at the end

A row is written as it is made; a run that was stopped goes on, and several may run side by side.
docs/frontier.md says what is compared and how settings are chosen.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from benchmarks.command import command_parser, errors_in_one_line
from benchmarks.frontier.final import final_models
from benchmarks.frontier.page import as_markdown
from benchmarks.frontier.run import RESULTS, run
from benchmarks.frontier.settings import FORWARDS
from benchmarks.frontier.table import summary
from benchmarks.frontier.training import train_all
from benchmarks.quality import models_of
from components.environment import quiet
from components.params import load_params
from pnp_core.files import read_json, write_text


@errors_in_one_line()
def main() -> None:
    """The command."""
    parser = command_parser("frontier", __doc__)
    parser.add_argument("--run", action="store_true", help="make what the results lack")
    parser.add_argument("--model", action="append", default=[], help="with --run: of these models")
    parser.add_argument(
        "--forwards", type=int, action="append", choices=FORWARDS, help="with --run: at these costs"
    )
    parser.add_argument(
        "--jobs", type=pattern, default="", help="with --run: whose names this pattern is in"
    )
    parser.add_argument(
        "--train", nargs="*", metavar="METHOD", help="these trained rivals, or all; needs a cache"
    )
    parser.add_argument("--final", action="store_true", help="with --run: of the final models")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    arguments = parser.parse_args()
    quiet()
    params = load_params(Path("params.yaml"))
    if arguments.train is not None:
        train_all(arguments.train, params)
    if arguments.run:
        forwards = arguments.forwards or FORWARDS
        run(params, arguments.model, forwards, arguments.jobs, final=arguments.final)
    if arguments.train is not None and not arguments.run:
        return
    if not RESULTS.exists():
        sys.exit(f"error: there is no {RESULTS} yet: --run makes it")
    results = read_json(RESULTS)
    write_text(RESULTS.with_suffix(".md"), as_markdown(results))
    tuned = [name for name in models_of(params) if name != "base"]
    found = summary(results, tuned, list(final_models()))
    print(json.dumps(found) if arguments.json else json.dumps(found, indent=2))


def pattern(text: str) -> str:
    """A regular expression, as an argument. Raises ArgumentTypeError if it is none."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text} is no regular expression: {error}") from error
    return text


if __name__ == "__main__":
    main()
