"""The sections of params.yaml that say where things are done and recorded."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from components.mlflow_place import secrets_of
from components.section import CountOrZero, Positive, Section


class Tracking(Section, frozen=True):
    """Where runs are recorded."""

    uri: str | None  # None: MLFLOW_TRACKING_URI, and without that mlflow.db in this folder
    experiment: Annotated[str, Field(min_length=1)]

    @model_validator(mode="after")
    def _no_password(self) -> Self:
        if self.uri and ":" in secrets_of(self.uri):
            raise ValueError(
                "uri has a password in it, and this file is for everybody: give the whole address "
                "as MLFLOW_TRACKING_URI, or a server's user and password as "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        return self


class Cluster(Section, frozen=True):
    """The Ray workers that the cache and training are spread over."""

    num_workers: CountOrZero  # 0: in this process, without Ray
    address: str | None = None  # host:port to join; None: RAY_ADDRESS, without it this machine
    shared_folder: bool = True  # whether workers see this folder; else files go by `storage`
    wait_for_gpus: bool = False  # though the cluster has none yet, as an autoscaler brings them
    max_failures: CountOrZero  # how many lost workers a training run survives
    wait_minutes: Positive  # for workers that lack or do not answer, or another's lock
