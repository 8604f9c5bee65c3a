"""What a flow run looks at before anything heavy begins."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

from components import mlflow_place
from components.cli import MAY_PASS
from components.environment import FLOW_RUN, FLOW_RUN_URL
from components.errors import MayPassError
from components.lineage import COMMIT, git_commit
from components.params import Params, load_params
from components.paths import BUNDLE, DISTILLED, EVALUATED, PREPARED
from components.storage import Mirror
from flows.process import StageFailed

Stage = Literal["prepare", "cache", "distill", "halve", "evaluate", "register"]
STAGES: tuple[Stage, ...] = get_args(Stage)  # in the order of the graph
# What a stage reads of those before it. Where nothing is to be trained, the teacher cache may lack.
READS: dict[Stage, tuple[Path, ...]] = {
    "cache": (PREPARED,),
    "distill": (PREPARED,),
    "halve": (DISTILLED,),
    "evaluate": (PREPARED, BUNDLE),
    "register": (PREPARED, BUNDLE, EVALUATED),
}


def check_start(stage: Stage) -> None:
    """Raises StageFailed if a stage that a run starts at lacks what those before it make."""
    for path in READS.get(stage, ()):
        if not path.exists():
            line = f"error: there is no {path}: bring it (dvc pull), or start at an earlier stage"
            raise StageFailed(stage, 1, [line])


@contextmanager
def begin() -> Iterator[Params]:
    """Read and check params.yaml and `storage`; while open, this is one run.

    What params.yaml points at is not looked at: where DVC finds nothing changed, all of it is
    there, and looking takes as long as loading PyTorch. The stages name the commit that is checked
    out now, whatever is by the time they are reached.

    Raises ParamsError, or StageFailed in one line.
    """
    # Prefect reads its environment when it is imported, so only now.
    from prefect.runtime import flow_run
    from prefect.settings import PREFECT_API_URL

    params = load_params(Path("params.yaml"))
    try:
        mlflow_place.resolve(params.tracking.uri)
        if params.storage:
            Mirror(params.storage).check()
        commit = git_commit()
    except (ValueError, OSError) as error:
        code = MAY_PASS if isinstance(error, MayPassError) else 1
        raise StageFailed("start", code, [f"error: {error}"]) from None
    told = {COMMIT: commit}
    if name := flow_run.name:
        told[FLOW_RUN] = str(name)
    if PREFECT_API_URL.value() and (url := flow_run.ui_url):  # a server that stays shows it
        told[FLOW_RUN_URL] = str(url)
    before = dict(os.environ)
    os.environ.update(told)
    try:
        yield params
    finally:
        for name in told:
            os.environ.pop(name, None)
            if name in before:
                os.environ[name] = before[name]
