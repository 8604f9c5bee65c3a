"""Where results come from: the guide, the precision, the commit and the command.

Rows of one file may be made by several runs, so a file holds the records of each of its methods or
variants, ``results["records"][name]``. Rows older than the records have what git and the log know:
``first in`` names the commits that have them first, and the guides of single rows were not kept.
"""

import hashlib
import shlex
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from components.lineage import git_commit
from pnp_core.bundle import GuideBundle
from pnp_core.precision import has_bf16

UNTRAINED = "untrained"

Record = dict[str, str]


def record(*, guide: str, precision: str) -> Record:
    """What this run is.

    Args:
        guide: its digest, see :func:`digest`, or what there is in place of one.
        precision: see :func:`precision_on`.
    """
    return {"guide": guide, "precision": precision, "commit": git_commit(), "command": command()}


def command() -> str:
    """The command line of this process, as it is typed in the project's folder."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = spec.name.removesuffix(".__main__") if spec is not None else None
    program = ["-m", module] if module is not None else [sys.argv[0]]
    return shlex.join(["python", *program, *sys.argv[1:]])


def digest(bundle: GuideBundle) -> str:
    """Identity of a bundle: a short SHA-256 over its step counts and its guides' weights."""
    parts = [f"{n} {guide.weights_digest()}" for n, guide in bundle.guides.items()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def precision_on(device_type: str, precision: str) -> str:
    """What is computed in where ``precision`` is asked for: bf16 needs hardware that has it."""
    return precision if has_bf16(device_type) else "fp32"


def note(results: dict[str, Any], name: str, made_by: Record) -> None:
    """Write down that this run has made rows of ``name``."""
    known = results.setdefault("records", {}).setdefault(name, [])
    if made_by not in known:
        known.append(made_by)


def forget(results: dict[str, Any], name: str) -> None:
    """All rows of ``name`` are to be made anew."""
    results.get("records", {}).pop(name, None)


def as_line(made_by: Record) -> str:
    """One record as a sentence."""
    return (
        f"Guide {made_by['guide']}, {made_by['precision']}, commit {made_by['commit']}, "
        f"`{made_by['command']}`."
    )


def header(results: Mapping[str, Any], names: Iterable[str]) -> str:
    """The records of a table with rows of these names: a line, or one for each that differs."""
    by_line: dict[str, list[str]] = {}
    for name in names:
        line = " ".join(map(as_line, results["records"][name]))
        by_line.setdefault(line, []).append(name)
    if len(by_line) == 1:
        return next(iter(by_line))
    return "\n".join(f"- {', '.join(found)}: {line}" for line, found in by_line.items())
