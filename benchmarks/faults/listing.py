"""The list of faults: each a function that breaks a workspace and judges what comes of it."""

from collections.abc import Callable
from typing import NamedTuple

from benchmarks.faults.workspace import Workspace

Breaks = Callable[[Workspace], None]


class Fault(NamedTuple):
    """One way to break things.

    Attributes:
        name: what is broken, with underscores.
        kind: of which sort it is.
        before: the stage that the workspace is made up to; None: everything is made.
        breaks: breaks it, and raises UnexpectedError if what comes of it is not what should.
    """

    name: str
    kind: str
    before: str | None
    breaks: Breaks


FAULTS: dict[str, Fault] = {}


def fault(kind: str, *, before: str | None = None) -> Callable[[Breaks], Breaks]:
    """Add a function to the list under its own name."""

    def add(breaks: Breaks) -> Breaks:
        name = breaks.__name__
        FAULTS[name] = Fault(name, kind, before, breaks)
        return breaks

    return add
