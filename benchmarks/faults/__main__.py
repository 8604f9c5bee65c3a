"""What happens when something breaks: told in one clear line, recovered from, or silent?

    python -m benchmarks.faults --run            # breaks the real thing, in toy checkouts
    python -m benchmarks.faults --run --only kill9_in_distill
    python -m benchmarks.faults --json           # what the committed results say

Each fault breaks one thing in a toy checkout of its own (a file, a process, a server on 127.0.0.1)
and then runs the same command again. It is `told` if the broken command ended in one line that says
what is wrong, or went on by itself, and the one after it came to the result of a run that nothing
happened to. Results are written after each fault, so a run that is cut short keeps what it has.
"""

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.command import command_parser, errors_in_one_line
from benchmarks.faults import (
    clusters,
    deployments,
    inputs,
    processes,
    servers,
    sharing,
    storage,
)
from benchmarks.faults.listing import FAULTS, Fault
from benchmarks.faults.workspace import TRACEBACK, UnexpectedError, Workspace
from components.environment import quiet
from pnp_core.files import read_json, write_json

RESULTS = Path("benchmarks/results/faults.json")
# An absolute path: not what follows a host, a bucket or `.`.
PLACE = re.compile(
    r"(?:(?<=:///)|(?<=file://)|(?<![\w.:/~}-]))/(?:[\w.+~@%-]+/)+(?P<name>[\w.+~@%-]*)"
)
# Importing them lists their faults.
MODULES = (clusters, deployments, inputs, processes, servers, sharing, storage)


@errors_in_one_line()
def main() -> None:
    """Print what each fault led to, with `--run` after making it happen."""
    parser = command_parser("faults", __doc__)
    parser.add_argument("--run", action="store_true", help="break things; else read the results")
    parser.add_argument("--only", metavar="NAME", action="append", help="of these faults")
    parser.add_argument("--scratch", type=Path, default=Path("build/faults"), help="for checkouts")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    arguments = parser.parse_args()
    if unknown := set(arguments.only or ()) - FAULTS.keys():
        sys.exit(f"error: no fault {', '.join(sorted(unknown))}; there are {', '.join(FAULTS)}")
    quiet()
    if arguments.run:
        run(arguments.only or list(FAULTS), arguments.scratch.absolute())
    if not RESULTS.exists():
        sys.exit(f"error: no {RESULTS}: python -m benchmarks.faults --run makes it")
    results = read_json(RESULTS)
    if arguments.json:
        print(json.dumps(summary(results)))
    else:
        print(table(results))


def run(names: list[str], scratch: Path) -> None:
    """Break these things one after another; results are written after each."""
    reference = Workspace.reference(scratch / "reference")
    results = read_json(RESULTS) if RESULTS.exists() else {}
    for number, name in enumerate(names, 1):
        results[name] = observe(FAULTS[name], reference, scratch / name)
        write_json(RESULTS, {name: results[name] for name in FAULTS if name in results})
        verdict = "told" if results[name]["told"] else "NOT TOLD"
        print(f"{number}/{len(names)} {name}: {verdict}: {results[name]['said']}", flush=True)


def observe(fault: Fault, reference: Workspace, folder: Path) -> dict[str, Any]:
    """Let one fault happen in a workspace of its own, and see what came of it."""
    began = time.monotonic()
    workspace = reference.copy_before(fault.before, folder)
    problem = None
    try:
        fault.breaks(workspace)
    except UnexpectedError as error:
        problem = str(error)
    except Exception as error:  # the fault itself is wrong, and has shown nothing
        problem = f"the benchmark fails: {type(error).__name__}: {error}"
    orphans = workspace.orphans()
    workspace.kill_everything()
    differs = [] if problem else workspace.differs_from(reference)
    return {
        "kind": fault.kind,
        "what": " ".join((fault.breaks.__doc__ or "").split()),
        "told": problem is None,
        "said": without_places(problem or workspace.said, folder),
        "tracebacks": sum(output.count(TRACEBACK) for output in workspace.outputs),
        "orphans": [without_places(command, folder) for command in orphans],
        "bytes_differ": differs,
        "runs_left_running": workspace.runs_left_running(),
        "lost_work_s": round(workspace.lost_work_s, 2),
        "seconds": round(time.monotonic() - began, 1),
    }


def without_places(text: str, folder: Path) -> str:
    """`text` in one line, without where on this machine things are.

    Paths in the workspace `folder` are relative to it; of others the last name is kept.
    """
    text = " ".join(text.replace(str(folder), ".").split())
    return PLACE.sub(r"\g<name>", text)


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """The numbers of `--json`."""
    rows = results.values()
    return {
        "faults": len(results),
        "told": sum(row["told"] for row in rows),
        "silent": sum(not row["told"] for row in rows),
        "tracebacks": sum(row["tracebacks"] for row in rows),
        "orphans": sum(len(row["orphans"]) for row in rows),
        "bytes_differ": sum(bool(row["bytes_differ"]) for row in rows),
        "runs_left_running": sum(row["runs_left_running"] for row in rows),
        "lost_work_s": {name: row["lost_work_s"] for name, row in results.items()},
    }


def table(results: dict[str, Any]) -> str:
    """A line for each fault."""
    lines = []
    for name, row in results.items():
        flaws = [key for key in ("tracebacks", "orphans", "bytes_differ") if row[key]]
        flaws += ["runs left running"] if row["runs_left_running"] else []
        verdict = ", ".join(flaws) or "told" if row["told"] else "SILENT"
        lines.append(f"{row['kind']:<12} {name:<44} {verdict:<10} {row['said'][:150]}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
