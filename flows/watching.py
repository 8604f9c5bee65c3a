"""For those who follow a run with `--watch`, which shows events and no log."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from prefect.events import emit_event
from prefect.events.worker import EventsWorker
from prefect.runtime import flow_run

from components.mlflow_place import without_secrets

FAILED = "pnp-guide.failed"
SECONDS_TO_SEND = 10.0


@contextmanager
def saying_why() -> Iterator[None]:
    """If the block fails, say with which error and where its log is, before Prefect says Failed."""
    try:
        yield
    except Exception as error:
        why = " ".join(without_secrets(str(error)).split())
        emit_event(
            event=FAILED,
            resource={
                "prefect.resource.id": f"{FAILED}.{flow_run.id}",
                "prefect.resource.name": f"{why} (prefect flow-run logs {flow_run.id})",
            },
        )
        # Else the run has failed before it is sent. Prefect's wait has no limit, and does not end
        # where events can't be sent, such as behind a proxy that refuses websockets.
        sent = threading.Thread(target=EventsWorker.instance().wait_until_empty, daemon=True)
        sent.start()
        sent.join(SECONDS_TO_SEND)
        raise
