"""Where a result came from: the commit that its run began with, and what dvc.lock said.

`python -m components.lineage` prints both of a checkout, to compare with a registered version.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import psutil
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from components.environment import FLOW_RUN
from components.paths import RUNS
from pnp_core.files import read_json, write_json

COMMIT = "PNP_GIT_COMMIT"  # what a flow tells its stages
DIRTY = "-dirty"
# What can be changed and committed without any result being another. The pipeline writes dvc.lock.
NO_MATTER = (
    *("dvc.lock", ".dvc", ".dvcignore", ".gitignore", "Makefile", "prefect.yaml"),
    *("docs", "tests", "benchmarks", "*.md"),
)


def git_commit(no_matter: Sequence[str] = NO_MATTER) -> str:
    """The commit checked out now, or `none` outside git.

    `-dirty` follows if tracked files differ from it that could matter to a result: none of
    `no_matter`, and nothing outside this folder. Raises ValueError if git is missing or fails.
    """
    if not shutil.which("git"):
        raise ValueError("git is not installed: the guide's lineage names the commit")
    inside = _git("rev-parse", "--is-inside-work-tree")
    if inside.returncode != 0:
        if "not a git repository" in inside.stderr:
            return "none"
        raise ValueError(f"git can't tell which commit this is: {' '.join(inside.stderr.split())}")
    head = _git("rev-parse", "--verify", "--quiet", "HEAD")
    if head.returncode != 0:
        return "none"  # nothing is committed yet
    changed = _git(
        "status", "--porcelain", "--untracked-files=no", "--", ".", *_excluded(no_matter)
    )
    if changed.returncode != 0:
        raise ValueError(f"git status: {' '.join(changed.stderr.split())}")
    return head.stdout.strip() + (DIRTY if changed.stdout.strip() else "")


def run_commit() -> str:
    """`git_commit()` as it was when the run began that this process is a part of.

    A flow says so in the environment. The stages of one `dvc repro` find what the first of them
    noted. Outside of both it is the commit now. Once a stage has found files that could matter to
    a result to be others than in that commit, `-dirty` follows in this and all later stages.
    """
    told = os.environ.get(COMMIT)
    run = None if told else _dvc_process()
    if run is not None:
        identity = {"pid": run.pid, "started": run.create_time()}
    elif told:
        identity = {"told": told, "flow": os.environ.get(FLOW_RUN)}
    else:
        return git_commit()
    note, noted = RUNS / "began.json", None
    with suppress(FileNotFoundError, ValueError):
        there = read_json(note)
        if there.items() >= identity.items():
            noted = str(there["commit"])
    known = noted or told
    commit = _compared(known) if known else git_commit()
    if commit != noted:
        write_json(note, identity | {"commit": commit})
    return commit


def _compared(commit: str) -> str:
    """The same, with `-dirty` if tracked files that could matter are not as they were in it."""
    if commit == "none" or commit.endswith(DIRTY):
        return commit
    changed = _git("diff", "--quiet", commit, "--", ".", *_excluded(NO_MATTER))
    if changed.returncode not in (0, 1):
        raise ValueError(f"git diff {commit}: {' '.join(changed.stderr.split())}")
    return commit + (DIRTY if changed.returncode else "")


def _excluded(no_matter: Sequence[str]) -> list[str]:
    """For git, all but these."""
    return [f":(exclude){pattern}" for pattern in no_matter]


def lock_hash(path: Path = Path("dvc.lock")) -> str:
    """SHA-256 of what dvc.lock says of every stage before `register`; `none` without one.

    Of the content, not of the file: `register` itself is added to it at the end.
    """
    return hash_of(path.read_text(encoding="utf-8")) if path.exists() else "none"


def hash_of(lock: str) -> str:
    """`lock_hash` of what a dvc.lock said."""
    stages = locked_stages(lock)
    stages.pop("register", None)
    return sha256(json.dumps(stages, sort_keys=True).encode()).hexdigest()


def locked_stages(lock: str) -> dict[str, Any]:
    """What a dvc.lock said of each stage.

    Raises ValueError if it can't be read, such as after a merge with conflicts.
    """
    try:
        return dict(YAML(typ="safe", pure=True).load(lock)["stages"])
    except (YAMLError, TypeError, KeyError):
        raise ValueError(
            "dvc.lock can't be read: resolve its conflicts, or bring back the one of a commit (git "
            "checkout dvc.lock)"
        ) from None


def _git(*arguments: str) -> "subprocess.CompletedProcess[str]":
    # In English, as its words are read.
    environment = os.environ | {"LC_ALL": "C"}
    return subprocess.run(["git", *arguments], env=environment, capture_output=True, text=True)


def _dvc_process() -> psutil.Process | None:
    """The `dvc` that runs this stage; None if none does."""
    if "DVC_STAGE" not in os.environ:
        return None
    for parent in psutil.Process().parents():
        try:
            words = parent.cmdline()[:3]
        except psutil.Error:
            continue
        if any(Path(word).name == "dvc" for word in words):
            return parent
    return None


if __name__ == "__main__":
    from components.cli import without_arguments

    without_arguments("lineage", __doc__)
    if not Path("params.yaml").exists():
        sys.exit(f"error: no params.yaml in {Path.cwd()}: run this from the repository's root")
    try:
        print(f"git_commit {git_commit()}\nlock_hash  {lock_hash()}")
    except ValueError as error:
        sys.exit(f"error: {error}")
