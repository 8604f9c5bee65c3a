"""How a result gets to others, and theirs here: DVC's remote, dvc.lock, and what needs no cache."""

import json

from components.paths import CACHE
from flows.process import DVC, StageFailed, ask


def dvc_remote() -> str | None:
    """The name of DVC's default remote; None if there is none."""
    return ask([*DVC, "config", "core.remote"]) or None


def needs_no_cache() -> bool:
    """Whether the teacher cache is not here and nothing is to be trained on it.

    Raises StageFailed if DVC can't say.
    """
    if (CACHE / "index.json").exists():
        return False
    told = ask([*DVC, "status", "--json", "distill", "halve"])
    if told is None:
        raise StageFailed("start", 1, ["error: `dvc status distill halve` fails: see what it says"])
    only_the_cache = {"changed deps": {CACHE.as_posix(): "deleted"}}
    changes = [change for stage in json.loads(told).values() for change in stage]
    return all(change == only_the_cache for change in changes)


def to_commit(remote: str | None) -> list[str]:
    """The closing lines of a run: what to commit and push so that others have its result."""
    changed = ask(["git", "status", "--porcelain", "--", "dvc.lock"])
    if changed is None:
        return []  # outside git
    lines = []
    if changed:
        lines.append("To keep this result: git add dvc.lock && git commit -m 'New guide'")
    if remote is None:
        lines.append("To share it: dvc remote add --default NAME URL, dvc push (docs/sharing.md)")
    elif changed:
        lines.append(f"To share it: git push (its files are at the DVC remote {remote!r} already)")
    return lines
