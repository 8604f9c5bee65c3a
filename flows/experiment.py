"""A run with other parameters: a DVC experiment in a workspace of its own.

The workspace is a git worktree under `.dvc/tmp/exps` of what is in the checkout now, committed with
the overrides in its params.yaml. It shares DVC's cache and the checkout's MLflow store. What comes
out is saved as an experiment of the checkout's commit (`dvc exp show`, `dvc exp apply NAME`); the
checkout and its params.yaml stay as they were.
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from ruamel.yaml import YAML

from components.overrides import overridden
from components.paths import BUNDLE, EVALUATED, PREPARED
from flows.process import DVC, StageFailed, ask
from pnp_core.files import write_text

Log = Callable[[str], None]

PARAMS, LOCK = Path("params.yaml"), Path("dvc.lock")
PLACE = Path(".dvc/tmp/exps")  # components.mlflow_place knows it too
REFS = "refs/pnp-guide"  # keep the commits that lineages name
OUTPUTS = {path.parts[0] for path in (PREPARED, BUNDLE, EVALUATED)}
# For whoever has told git no name, as in a container.
NOBODY = {
    f"GIT_{who}_{what}": value
    for who in ("AUTHOR", "COMMITTER")
    for what, value in (("NAME", "pnp-guide"), ("EMAIL", "pnp-guide@localhost"))
}


@contextmanager
def experiment(overrides: Sequence[str], name: str, log: Log) -> Iterator[None]:
    """While open, the working directory is a workspace of an experiment with these overrides.

    One that fails or is cancelled is kept, and the same overrides go on in it. Without overrides
    nothing is done: the run is the checkout's own.

    Raises ParamsError for an override that can't be, StageFailed where git or DVC refuse, in one
    line and before anything is computed.
    """
    if not overrides:
        yield
        return
    params = overridden(PARAMS, overrides)
    with workspace(params, f"{name}: {' '.join(overrides)}", log) as here:
        yield
        saved = _save(name, here.commit)
        _git("update-ref", f"{REFS}/{saved}", here.commit)
        log(f"Saved as the experiment {saved}: dvc exp show, dvc exp apply {saved}")
        here.is_done = True


class Workspace:
    """A place to run in.

    Attributes:
        commit: what runs there, with the parameters.
        is_done: whether the place can go.
    """

    def __init__(self, commit: str) -> None:
        self.commit, self.is_done = commit, False


@contextmanager
def workspace(params: str, title: str, log: Log) -> Iterator[Workspace]:
    """Work in a git worktree of what is here, with `params` as its params.yaml."""
    checkout = Path.cwd()
    top = _git("rev-parse", "--show-toplevel")  # the checkout may be a folder of it
    source = _git("stash", "create") or _git("rev-parse", "HEAD")
    tree = _git("rev-parse", f"{source}^{{tree}}")
    key = hashlib.sha256(f"{tree}\n{params}".encode()).hexdigest()[:12]
    place = checkout / PLACE / f"pnp-{key}"
    inside = place / checkout.relative_to(top)
    place.parent.mkdir(parents=True, exist_ok=True)
    with _alone(place.with_suffix(".lock")) as note:
        commit = note.read()  # written when the workspace is complete
        if commit and inside.exists():
            log("An earlier run with these overrides broke off: going on with what it made")
            _git("reset", "--soft", commit, cwd=place)
        else:
            note.truncate(0)
            commit = _make(place, inside, source, params, title)
            note.write(commit)
            note.flush()
        here = Workspace(commit)
        os.chdir(inside)
        try:
            yield here
        finally:
            os.chdir(checkout)
            if here.is_done:
                _git("worktree", "remove", "--force", str(place))
                note.truncate(0)
            else:
                log("The experiment's workspace is kept: the same overrides go on in it")


def _make(place: Path, inside: Path, source: str, params: str, title: str) -> str:
    """Make the worktree, and bring into it what git does not know; returns its commit."""
    checkout = Path.cwd()
    shutil.rmtree(place, ignore_errors=True)  # one that was being made
    _git("worktree", "prune")
    _git("worktree", "add", "--quiet", "--detach", str(place), "HEAD")
    _git("restore", f"--source={source}", "--worktree", "--staged", ".", cwd=place)
    write_text(inside / PARAMS, params)
    cache = ask([*DVC, "cache", "dir"])
    if cache is None:
        raise StageFailed("start", 1, ["error: `dvc cache dir` fails: see what it says"])
    local = checkout / ".dvc/config.local"
    if local.exists():
        shutil.copy(local, inside / ".dvc/config.local")
    _dvc("config", "--local", "cache.dir", str((checkout / cache).resolve()), cwd=inside)
    if LOCK.exists():
        shutil.copy(LOCK, inside / LOCK)
    made = [Path(name) for name in OUTPUTS if Path(name).exists()]
    for path in (*_inputs(YAML(typ="safe", pure=True).load(params)), *made):
        bring(checkout / path, inside / path)
    _git("commit", "--all", "--allow-empty", "--no-verify", "--quiet", "-m", title, cwd=place)
    return _git("rev-parse", "HEAD", cwd=place)


def _inputs(value: Any) -> Iterator[Path]:
    """What params.yaml names that is here, outside of what the pipeline writes."""
    if isinstance(value, Mapping):
        for below in value.values():
            yield from _inputs(below)
    elif isinstance(value, list):
        for below in value:
            yield from _inputs(below)
    elif isinstance(value, str):
        path = Path(value)
        inside = path.parts and not path.is_absolute() and ".." not in path.parts
        if inside and path.parts[0] not in OUTPUTS and path.exists():
            yield path


def bring(source: Path, target: Path) -> None:
    """Have the files of a file or folder at `target` too, where there is none of the name.

    Without a second copy where the disk allows. Nothing that is brought is ever written into: the
    pipeline replaces files.
    """
    for file in source.rglob("*") if source.is_dir() else (source,):
        place = target / file.relative_to(source) if file != source else target
        if file.is_dir() or place.exists():
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, place)
        except OSError:  # another disk
            shutil.copy2(file, place)


def _save(name: str, commit: str) -> str:
    """Save the workspace as an experiment of the checkout's commit; returns its name."""
    _git("reset", "--soft", f"{commit}~1")
    name = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-") or "experiment"
    taken = _git("for-each-ref", "--format=%(refname:lstrip=-1)", "refs/exps").splitlines()
    number = next(n for n in range(1, len(taken) + 2) if _numbered(name, n) not in taken)
    saved = _numbered(name, number)
    untracked = ["--include-untracked", str(LOCK)] if not _git("ls-files", str(LOCK)) else []
    _dvc("exp", "save", "--name", saved, *untracked)
    return saved


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name}-{number}"


@contextmanager
def _alone(path: Path) -> Iterator[TextIO]:
    """The lock of a workspace, open. Raises StageFailed if another run is at it."""
    with path.open("a+") as file:
        file.seek(0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StageFailed(
                "start", 1, ["error: another run has the same overrides: wait until it ends"]
            ) from None
        yield file


def _git(*arguments: str, cwd: Path | None = None) -> str:
    """What git prints. Raises StageFailed with what it complains of."""
    is_known = ask(["git", "config", "user.email"])
    return _call(["git", *arguments], cwd, {} if is_known else NOBODY)


def _dvc(*arguments: str, cwd: Path | None = None) -> str:
    return _call([*DVC, *arguments], cwd, {})


def _call(command: Sequence[str], cwd: Path | None, environment: Mapping[str, str]) -> str:
    try:
        done = subprocess.run(
            command, cwd=cwd, env=dict(environment) | os.environ, capture_output=True, text=True
        )
    except FileNotFoundError:
        raise StageFailed("start", 1, [f"error: {command[0]} is not installed"]) from None
    if done.returncode != 0:
        said = " ".join((done.stderr or done.stdout).split())
        line = f"error: overrides need git and DVC here, and {Path(command[0]).name} says: {said}"
        raise StageFailed("start", 1, [line])
    return done.stdout.strip()
