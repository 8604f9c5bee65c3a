"""One place for what third parties should not do: phone home, chatter, draw bars, spin."""

import ctypes
import logging
import os
import signal
import sys
import warnings

ENVIRONMENT = {
    # Nobody is told that this ran.
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Spinning at OpenMP barriers costs up to ten times the work on cores that others use too.
    "OMP_WAIT_POLICY": "PASSIVE",
    # Only our own lines on the terminal.
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
# What a flow tells its stages: its run's name and, where a server shows it, its page.
FLOW_RUN, FLOW_RUN_URL = "PNP_FLOW_RUN", "PNP_FLOW_RUN_URL"


def quiet() -> None:
    """Set the opt-outs above (a variable that the user set wins) and hide libraries' warnings."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore")
    for name in ("alembic", "ray", "diffusers", "transformers", "botocore"):
        logging.getLogger(name).setLevel(logging.ERROR)


PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
# Of glibc's malloc.h: no block is mapped by itself, and less than 2 GB is not given back.
MALLOPT = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, 2**31 - 1), "M_TOP_PAD": (-2, 2**26)}


def keep_freed_memory() -> None:
    """Have this process keep the memory that it frees; on Linux, with glibc.

    Otherwise each step on a CPU gives its large tensors back, and has them cleared again page by
    page: 5 to 15 % of its time. Whoever has set glibc's allocator by its own variables is left to
    that.
    """
    is_set = "GLIBC_TUNABLES" in os.environ or any(n.startswith("MALLOC_") for n in os.environ)
    if _libc is None or is_set or not hasattr(_libc, "mallopt"):
        return
    for option, value in MALLOPT.values():
        _libc.mallopt(option, value)


def die_with_parent() -> None:
    """Have this process interrupted when the one that started it ends, even by `kill -9`.

    Linux only. Elsewhere a stage whose DVC was killed runs on to its end.
    """
    if _libc is not None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
