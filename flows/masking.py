"""Log records without the passwords of addresses: Prefect tells its server's as each run begins."""

import logging
from contextlib import suppress
from typing import Any

from components.mlflow_place import without_secrets


def begin() -> None:
    """Have all log records of this process, of whatever logger, made without passwords.

    So no handler has them, neither the terminal's nor the one that sends to Prefect's server.
    """
    make = logging.getLogRecordFactory()

    def masked(*arguments: Any, **named: Any) -> logging.LogRecord:
        record = make(*arguments, **named)
        with suppress(Exception):  # what it lacks is for the handler to tell
            said = record.getMessage()
            if (told := without_secrets(said)) != said:
                record.msg, record.args = told, ()
        if record.exc_info and record.exc_info[0]:
            traceback = logging.Formatter().formatException(record.exc_info)
            if (told := without_secrets(traceback)) != traceback:
                record.exc_text = told  # which formatters take in place of their own
        return record

    logging.setLogRecordFactory(masked)
