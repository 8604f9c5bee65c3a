"""What every `python -m components.<stage>` shares: parameters first, errors in one line.

Exit codes: 0 done, 1 a mistake that the message explains, 2 a mistake in params.yaml, 3 (promote
only) refused. `PNP_TRACEBACK=1` shows where an error came from.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from components.environment import quiet
from components.params import Params, ParamsError, check_files, load_params
from components.paths import DISTILLED, EVALUATED, PREPARED, REPORT
from pnp_core.files import recover_all


def main(run: Callable[[Params], None]) -> None:
    """Read and check params.yaml in the working directory, then `run` a stage with it."""
    quiet()
    try:
        params = load_params(Path("params.yaml"))
        check_files(params)
        for folder in (PREPARED.parent, DISTILLED.parent, EVALUATED, REPORT.parent):
            for path in recover_all(folder):
                print(f"{path}: put back; a run was stopped while replacing it", flush=True)
        run(params)
    except ParamsError as error:
        stop(error, exit_code=2)
    except (ValueError, OSError) as error:
        stop(error, exit_code=1)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


def stop(error: Exception, *, exit_code: int) -> None:
    """Print `error` as one line and leave with `exit_code`."""
    if os.environ.get("PNP_TRACEBACK") == "1":
        raise error
    print("error: " + " ".join(str(error).split()), file=sys.stderr, flush=True)
    sys.exit(exit_code)
