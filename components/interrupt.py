"""Ctrl-C before a command is under way, while its modules are imported: seconds, and often."""

import os
import sys
from types import TracebackType

SAID = "interrupted; the same command goes on from here"


def tell_in_one_line() -> None:
    """Have an interrupt that nothing catches end this process with one line, and no traceback."""
    sys.excepthook = _told


def _told(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt) and os.environ.get("PNP_TRACEBACK") != "1":
        print(SAID, file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)
