"""`python -m benchmarks.bare <stage>`: one stage alone, with nothing told to MLflow.

The checkout's params.yaml is read as the stage itself reads it; `evaluate@<model>` names a model.
"""

import sys
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any, Self

from components.cli import main

MODULES = ("prepare", "cache", "distill", "halve")  # and `evaluate`, for each model


class Untold:
    """Stands in for a run of MLflow: takes curves and forgets them."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def curve(self, num_images: int, metrics: Any) -> None:
        """Take a point of each curve."""


def run(stage: str) -> None:
    """Run a stage as its command would, without `components.tracking` and so without MLflow."""
    untracked: Any = ModuleType("components.tracking")
    untracked.TrainingRun = Untold
    untracked.current_pipeline = lambda params: None  # noqa: ARG005, as the true one is called
    sys.modules["components.tracking"] = untracked
    name, _, model = stage.partition("@")
    work = import_module(f"components.{name}").run
    main(partial(work, model=model) if model else work)


if __name__ == "__main__":
    run(sys.argv[1])
