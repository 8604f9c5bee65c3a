"""Ends what `python -m flows` leaves when it is killed: Prefect's server of that run.

It waits beside the flow until that is gone, however it went, and then ends every process that has
inherited its mark.
"""

import os
import subprocess
import sys
import uuid

import psutil

MARK = "PNP_FLOW"
# Kept as long as this process lives: the guard waits for the end of its pipe.
_guard: "subprocess.Popen[bytes] | None" = None


def start() -> None:
    """Mark what this process starts from now on, and have it end with this process."""
    global _guard
    os.environ[MARK] = uuid.uuid4().hex
    _guard = subprocess.Popen(
        [sys.executable, "-m", "flows.guard"], stdin=subprocess.PIPE, start_new_session=True
    )


def main() -> None:
    """Wait until nobody can write to standard input, then end those with the mark."""
    sys.stdin.buffer.read()
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(MARK) == os.environ[MARK]:
                process.terminate()
        except psutil.Error:
            continue


if __name__ == "__main__":
    main()
