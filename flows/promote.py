"""Promotion: a registered guide becomes champion if it passes the rules in params.yaml."""

import sys

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE

from flows.process import log_without_tracebacks, run


@task(task_run_name="promote", cache_policy=NO_CACHE)
def promote(version: int | None) -> None:
    """Compare the candidate with the champion; move the alias, or fail with the reasons."""
    candidate = [] if version is None else ["--version", str(version)]
    command = [sys.executable, "-m", "components.promote", *candidate]
    run("promote", command, get_run_logger().info)


@flow(name="promote")
def promote_flow(version: int | None = None) -> None:
    """Promote a registered version, by default the newest."""
    log_without_tracebacks()
    promote(version)
