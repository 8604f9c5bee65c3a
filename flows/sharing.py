"""How a result gets to others: DVC's remote, and dvc.lock."""

from flows.process import DVC, StageFailed, ask


def dvc_settings(step: str) -> dict[str, str]:
    """DVC's settings of all its files, with whole paths. Raises StageFailed if DVC can't tell."""
    told = ask([*DVC, "config", "--list"])
    if told is None:
        raise StageFailed(step, 1, ["error: `dvc config --list` fails: see what it says"])
    return dict(line.partition("=")[::2] for line in told.splitlines())


def dvc_remote() -> str | None:
    """The name of DVC's default remote; None if DVC's settings have none.

    Raises StageFailed if DVC can't tell.
    """
    return dvc_settings("push").get("core.remote")


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
