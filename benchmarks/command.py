"""What the commands of the benchmarks share: parsers, numbers, errors in one line.

And the command of those that keep rows in a file: make what is missing, print the table. Mistakes
end with exit code 1, and those in the command line itself with 2, as argparse has it.
`PNP_TRACEBACK=1` shows where an error came from.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from components.cli import stop
from components.environment import quiet
from components.params import Params, load_params
from pnp_core.files import read_json

Results = Mapping[str, Any]
MOST = 1_000_000_000  # GPUs, images, rounds: what no one has, and floats can still be made of


def command_parser(name: str, doc: str) -> argparse.ArgumentParser:
    """A parser that is called what people type.

    Args:
        name: of the module, in `benchmarks`.
        doc: its docstring; the first paragraph says what the command is for.
    """
    description = " ".join(doc.partition("\n\n")[0].split())
    return argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)


def count(text: str) -> int:
    """How many, as an argument. Raises ArgumentTypeError if it is not from 1 to MOST."""
    return _whole(text, least=1)


def count_from_0(text: str) -> int:
    """How many, as an argument. Raises ArgumentTypeError if it is not from 0 to MOST."""
    return _whole(text, least=0)


def _whole(text: str, *, least: int) -> int:
    """A whole number. Raises ArgumentTypeError if it is not from `least` to MOST."""
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if not least <= number <= MOST:
        raise argparse.ArgumentTypeError(
            f"a whole number from {least} to {MOST:,} is needed, not {text}"
        )
    return number


def amount(text: str) -> float:
    """How much of something, as an argument. Raises ArgumentTypeError if not above 0 and finite."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"a finite number above 0 is needed, not {text}")
    return number


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """End with one line and exit code 1 at what a stage would: a wrong setting, a missing file.

    Raises:
        SystemExit: in place of ValueError and OSError.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        stop(error, exit_code=1)


@errors_in_one_line()
def run_command(
    parser: argparse.ArgumentParser,
    path: Path,
    run: Callable[[Params, argparse.Namespace], None],
    *,
    table: Callable[[Results], str],
    figures: Callable[[Results], Mapping[str, Any]],
) -> None:
    """Read the command line, and do what it says.

    Args:
        parser: with what this benchmark alone has.
        path: of the results.
        run: makes them.
        table: shows them, in Markdown.
        figures: what ``--json`` prints of them, beside what made them.

    Raises:
        SystemExit: there are no results, a setting is wrong, or what is needed is missing.
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
