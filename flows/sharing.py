"""How a result gets to others: DVC's remote, and dvc.lock."""

import os
import re
import subprocess
from pathlib import Path

from components.cli import MAY_PASS
from components.mlflow_place import without_secrets
from flows.process import DVC, StageFailed, ask

SECONDS_TO_ANSWER = 60.0
SILENT = f"it has not answered in {SECONDS_TO_ANSWER:.0f} seconds"
# How DVC begins to say that a place answers and has no such folder, which a push makes.
NOTHING_THERE = re.compile(r"The path '[^']*' does not exist: ")
# What follows where it is the bucket that is not there, which nobody makes.
NO_BUCKET = re.compile(r"NoSuchBucket|ContainerNotFound|(bucket|container) does not", re.I)
TO_DO_WITHOUT = "or do without it here: dvc config --local core.remote ''"


def dvc_settings(step: str) -> dict[str, str]:
    """DVC's settings of all its files, with whole paths. Raises StageFailed if DVC can't tell."""
    told = ask([*DVC, "config", "--list"])
    if told is None:
        raise StageFailed(step, 1, ["error: `dvc config --list` fails: see what it says"])
    return dict(line.partition("=")[::2] for line in told.splitlines())


def check_remote() -> str | None:
    """The name of DVC's default remote, which has been looked at; None if the settings have none.

    DVC looks, with its own settings and keys. Nothing is written: whether that is allowed, a push
    tells. A web server is not looked at, as those that take files need not list them.

    Raises StageFailed, in one line, if DVC can't tell, or results could not be sent there.
    """
    settings = dvc_settings("start")
    name = settings.get("core.remote")
    if not name:
        return None
    url = settings.get(f"remote.{name.lower()}.url") or settings.get(f"remote.{name}.url")
    if url is None:
        line = f"error: DVC's settings have no remote {name!r}: dvc remote add {name} URL, "
        raise StageFailed("start", 1, [line + TO_DO_WITHOUT])
    place = Path(url.removeprefix("file://"))
    if place.is_absolute():
        why = _unwritable(place)
    elif url.startswith(("http://", "https://")):
        why = None
    else:
        why = _unreachable(name)
    if why:
        code = MAY_PASS if why == SILENT else 1
        line = (
            f"error: DVC's remote {name!r}, {without_secrets(url)}, where results would be sent at "
            f"the end: {why}. Correct it (dvc remote modify {name}, or its keys), {TO_DO_WITHOUT}"
        )
        raise StageFailed("start", code, [line])
    return name


def _unwritable(folder: Path) -> str | None:
    """Why DVC can't make or write a folder of this machine; None if it can."""
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not there.is_dir():
        return f"{there} is a file"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"{there} can't be written"
    return None


def _unreachable(name: str) -> str | None:
    """Why a remote can't be looked at, or has no bucket; None if it can and has."""
    error = _listing_error(name)
    if not error:
        return None
    why = error.removeprefix("unexpected error - ").rstrip(".")
    found = NOTHING_THERE.match(why)
    if found and not NO_BUCKET.search(why):
        return None
    return without_secrets(why[found.end() :] if found else why)


def _listing_error(name: str) -> str | None:
    """What DVC complains of as it lists the folder that it makes at a remote; None if of nothing.

    Keys for a prefix may look at what is below it, and not at the prefix itself.
    """
    command = [*DVC, "list-url", f"remote://{name}/files"]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS_TO_ANSWER,
        )
    except subprocess.TimeoutExpired:
        return SILENT
    if done.returncode == 0:
        return None
    said = done.stderr.splitlines()
    errors = [line.removeprefix("ERROR: ") for line in said if line.startswith("ERROR: ")]
    return (errors or [f"dvc list-url ends with {done.returncode}"])[-1]


def to_commit(remote: str | None, *, is_sent: bool = True) -> list[str]:
    """The closing lines of a run: what to commit and push so that others have its result.

    `is_sent`: whether its files are at the DVC remote.
    """
    changed = ask(["git", "status", "--porcelain", "--", "dvc.lock"])
    if changed is None:
        return []  # outside git
    lines = []
    if changed:
        lines.append("To keep this result: git add dvc.lock && git commit -m 'New guide'")
    if remote is None:
        lines.append("To share it: dvc remote add --default NAME URL, dvc push (docs/sharing.md)")
    elif not is_sent:
        lines.append("To share it: dvc push --run-cache, then git push")
    elif changed:
        lines.append(f"To share it: git push (its files are at the DVC remote {remote!r} already)")
    return lines
