"""What every `python -m components.<stage>` shares: parameters first, errors in one line.

Exit codes: 0 done, 1 a mistake that the message explains, 2 a mistake in params.yaml, 3 (promote
only) refused, 75 something outside is away and the same command goes on when it is back, 130 and
143 stopped by Ctrl-C and SIGTERM. `PNP_TRACEBACK=1` shows where an error came from.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from errno import ENOSPC
from pathlib import Path
from typing import Any

from components import interrupt, lineage, mlflow_place, snapshot
from components.environment import die_with_parent, keep_freed_memory, quiet
from components.errors import MayPassError
from components.params import Params, ParamsError, check_files, load_params
from components.paths import CACHE, DISTILLED, EVALUATED, JUDGED, PREPARED, REPORT, RUNS
from pnp_core.files import WriteError, recover_all

MAY_PASS = os.EX_TEMPFAIL
IN_BATCHES = ("cache", "evaluate")  # stages whose batch_size is what is computed at once
# Where a stage that was killed may have left something half replaced or half written.
WRITTEN_IN = (
    *(PREPARED.parent, CACHE, DISTILLED.parent, EVALUATED, JUDGED, REPORT.parent),
    *(RUNS, RUNS / "distill", RUNS / "halve"),
)


def main(run: Callable[[Params], None], *, reads_inputs: bool = True) -> None:
    """Read and check params.yaml in the working directory, then `run` a stage with it.

    What it points at, data and models, is checked too, unless `reads_inputs` is false.

    A stage that DVC runs ends with an error if what it started from was changed meanwhile, so that
    DVC does not record it, and ends when DVC does, however that ends.
    """
    quiet()
    keep_freed_memory()
    signal.signal(signal.SIGTERM, leave)
    stage = os.environ.get("DVC_STAGE")
    try:
        params = load_params(Path("params.yaml"))
        if stage:
            die_with_parent()
            lineage.run_commit()  # as the run begins: register may come hours later
            snapshot.begin(stage)
            params = load_params(Path("params.yaml"))  # no older than the snapshot
        if reads_inputs:
            check_files(params)
        mlflow_place.resolve(params.tracking.uri)  # one that can't be is told before the work
        for folder in WRITTEN_IN:
            for path in recover_all(folder):
                print(f"{path}: put back; a run was stopped while replacing it", flush=True)
        run(params)
        snapshot.check_unchanged()
    except ParamsError as error:
        stop(error, exit_code=2)
    except MayPassError as error:
        stop(error, exit_code=MAY_PASS)
    except (ValueError, OSError) as error:
        stop(error if getattr(error, "errno", None) != ENOSPC else disk_full(error), exit_code=1)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # PyTorch's, which is not loaded for this
            raise
        stop(out_of_memory(error), exit_code=1)
    except KeyboardInterrupt:
        print(interrupt.SAID, file=sys.stderr)
        sys.exit(130)


def without_arguments(name: str, doc: str) -> None:
    """Refuse what a command that takes no arguments is given; tell what it does where asked.

    Args:
        name: of its module, in `components`.
        doc: its docstring.
    """
    argparse.ArgumentParser(
        prog=f"python -m components.{name}",
        description=doc.partition("\n\n")[0],
        epilog="It takes no arguments. Stages go by params.yaml, in the working directory.",
    ).parse_args()


def out_of_memory(error: RuntimeError) -> RuntimeError:
    """The same error, saying what to lower. Training says it by itself."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    stage = spec.name.rpartition(".")[2] if spec is not None else ""
    lower = f"lower {stage}.batch_size in params.yaml, or " if stage in IN_BATCHES else ""
    said = str(error).partition(".")[0]
    told = RuntimeError(
        f"the GPU's memory does not suffice ({said}): {lower}end what else computes on it"
    )
    return told.with_traceback(error.__traceback__)


def disk_full(error: Exception) -> OSError:
    """The same error, saying what to do, and where there is no room: who writes often doesn't."""
    if isinstance(error, WriteError):
        return WriteError(f"{error} Make room there: the same command goes on from here")
    places = [folder for folder in (*WRITTEN_IN, Path(tempfile.gettempdir())) if folder.exists()]
    free, fullest = min((shutil.disk_usage(place).free, place) for place in places)
    told = OSError(
        f"a disk is full ({error}). {fullest} has {free / 1e6:,.0f} MB left, the least of where a "
        "stage writes: make room there; the same command goes on from here"
    )
    return told.with_traceback(error.__traceback__)


def leave(*_: Any) -> None:
    """At SIGTERM, end as after Ctrl-C: runs are closed and nothing is left half written."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
    print("stopped; the same command goes on from here", file=sys.stderr)
    sys.exit(128 + signal.SIGTERM)


def stop(error: Exception, *, exit_code: int) -> None:
    """Print `error` as one line and leave with `exit_code`."""
    if os.environ.get("PNP_TRACEBACK") == "1":
        raise error
    said = " ".join(mlflow_place.without_secrets(str(error)).split())
    print(f"error: {said}", file=sys.stderr, flush=True)
    sys.exit(exit_code)


def utf8(given: str) -> str:
    """What is UTF-8. Python has odd characters for the bytes of an argument that are none."""
    try:
        given.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(
            f"it is not UTF-8 from character {error.start + 1} on: {given[: error.start]!r} is "
            "what can be read"
        ) from None
    return given
