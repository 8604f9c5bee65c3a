"""What a flow run looks at before anything heavy begins."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

from components import mlflow_place
from components.lineage import COMMIT, git_commit
from components.params import Params, load_params
from components.storage import Mirror
from flows.process import StageFailed

Stage = Literal["prepare", "cache", "distill", "halve", "evaluate", "register"]
STAGES: tuple[Stage, ...] = get_args(Stage)  # in the order of the graph


@contextmanager
def begin() -> Iterator[Params]:
    """Read and check params.yaml and `storage`; while open, this is one run.

    What params.yaml points at is not looked at: where DVC finds nothing changed, all of it is
    there, and looking takes as long as loading PyTorch. The stages name the commit that is checked
    out now, whatever is by the time they are reached.

    Raises ParamsError, or StageFailed in one line.
    """
    params = load_params(Path("params.yaml"))
    try:
        mlflow_place.resolve(params.tracking.uri)
        if params.storage:
            Mirror(params.storage).check()
        commit = git_commit()
    except (ValueError, OSError) as error:
        raise StageFailed("start", 1, [f"error: {error}"]) from None
    before = os.environ.get(COMMIT)
    os.environ[COMMIT] = commit
    try:
        yield params
    finally:
        os.environ.pop(COMMIT)
        if before is not None:
            os.environ[COMMIT] = before
