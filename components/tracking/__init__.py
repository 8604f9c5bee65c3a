"""MLflow: one run for each stage that has something to say, and the registry of guides.

`store` says where it is and asks it, `journal` keeps on disk what a run has to say, `delivery`
brings that to MLflow, `pipeline` is what runs belong to, `runs` and `registry` are what stages use,
`decisions` and `lock` what `registry` uses. Only the driving process writes; workers report through
it.
"""

from components.tracking.decisions import FORCED, PROMOTED, REFUSED, ROLLED_BACK, Decision
from components.tracking.pipeline import Pipeline, current_pipeline, finish_pipeline
from components.tracking.registry import CHAMPION, PREVIOUS, TRAINING, Registry
from components.tracking.runs import Run, TrainingRun, flat
from components.tracking.store import LostError, Store, TrackingError, UnjudgedError

__all__ = [
    "CHAMPION",
    "FORCED",
    "PREVIOUS",
    "PROMOTED",
    "REFUSED",
    "ROLLED_BACK",
    "TRAINING",
    "Decision",
    "LostError",
    "Pipeline",
    "Registry",
    "Run",
    "Store",
    "TrackingError",
    "TrainingRun",
    "UnjudgedError",
    "current_pipeline",
    "finish_pipeline",
    "flat",
]
