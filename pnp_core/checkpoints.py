"""Reading the file that a run in progress goes on from."""

import pickle
from pathlib import Path
from typing import Any

import torch


def read_checkpoint(checkpoint: Path, device: torch.device) -> dict[str, Any]:
    """What :meth:`pnp_core.train.State.save` wrote; empty if there is no file.

    Raises:
        ValueError: it is damaged.
    """
    try:
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        missing = {"run_hash", "step"} - state.keys()
    except FileNotFoundError:
        return {}
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, EOFError, pickle.UnpicklingError, AttributeError) as error:
        raise damaged(checkpoint, str(error).partition(".")[0]) from None
    if missing:
        raise damaged(checkpoint, f"it lacks {', '.join(sorted(missing))}")
    return dict(state)


def damaged(checkpoint: Path, why: str) -> ValueError:
    """The error for a checkpoint that can't be read."""
    return ValueError(
        f"{checkpoint} is damaged ({why}): delete it, and training begins anew, or put a copy of "
        "an earlier one in its place."
    )
