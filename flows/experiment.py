"""A run with other parameters: a DVC experiment in a workspace of its own.

The workspace is a git worktree under `.dvc/tmp/exps` of what is in the checkout now, committed with
the overrides in its params.yaml. It shares DVC's cache and remotes, `storage` and the checkout's
MLflow store, and relative paths in params.yaml lead to the same files as in the checkout. What
comes out is saved as an experiment of the checkout's commit (`dvc exp show`, `dvc exp apply NAME`);
the checkout and its params.yaml stay as they were.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from ruamel.yaml import YAML

from components.mlflow_place import without_secrets
from components.overrides import overridden
from components.paths import BUNDLE, EVALUATED, PREPARED
from flows.process import DVC, StageFailed, ask
from flows.sharing import dvc_settings
from pnp_core.files import sha256_file, write_text

Log = Callable[[str], None]

PARAMS, LOCK = Path("params.yaml"), Path("dvc.lock")
PLACE = Path(".dvc/tmp/exps")  # components.mlflow_place knows it too
DEEPER = "checkout"
REFS = "refs/pnp-guide"  # keep the commits that lineages name
# How settings of DVC's remotes are called that are paths, which it tells whole; and those that it
# leaves as they are: paths from where it runs, if not something else.
PATHS = (
    *(".url", ".credentialpath", ".configpath", ".keyfile", ".cert_path", ".key_path"),
    *(".gdrive_user_credentials_file", ".gdrive_service_account_json_file_path"),
)
PATHS_FROM_HERE = (".ssl_verify", ".kerb_ticket")
OUTPUTS = {path.parts[0] for path in (PREPARED, BUNDLE, EVALUATED)}
# For whoever has told git no name, as in a container.
NOBODY = {
    f"GIT_{who}_{what}": value
    for who in ("AUTHOR", "COMMITTER")
    for what, value in (("NAME", "pnp-guide"), ("EMAIL", "pnp-guide@localhost"))
}


@contextmanager
def experiment(overrides: Sequence[str], name: str, log: Log) -> Iterator[str | None]:
    """While open, the working directory is a workspace of an experiment with these overrides.

    Yields the name that it will be saved by. One that fails or is cancelled is kept, and the same
    overrides go on in it. Without overrides nothing is done, and None is yielded: the run is the
    checkout's own.

    Raises ParamsError for an override that can't be, StageFailed where git or DVC refuse, in one
    line and before anything is computed.
    """
    if not overrides:
        yield None
        return
    params = overridden(PARAMS, overrides)
    with workspace(params, f"{name}: {' '.join(overrides)}", log) as here:
        name = _free(name, here.commit)
        # At once: what is registered names the commit, however the run ends.
        _git("update-ref", f"{REFS}/{name}", here.commit)
        yield name
        _save(name, here.commit)
        log(f"Saved as the experiment {name}: dvc exp show, dvc exp apply {name}")
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
    ask(["git", "update-index", "-q", "--refresh"])  # touched alone, files are in stash's way
    source = _git("stash", "create") or _git("rev-parse", "HEAD")
    tree = _git("rev-parse", f"{source}^{{tree}}")
    place = checkout / PLACE / f"pnp-{_key(tree, params)}"
    # So deep that what lies outside of the checkout can be linked into `place`.
    worktree = place.joinpath(*[DEEPER] * max((_ups(path) for path in _outside(params)), default=0))
    inside = worktree / checkout.relative_to(top)
    place.parent.mkdir(parents=True, exist_ok=True)
    with _alone(place.with_suffix(".lock")) as note:
        commit = note.read()  # written when the workspace is complete
        if commit and inside.exists():
            log("An earlier run with these overrides broke off: going on with what it made")
            _git("reset", "--soft", commit, cwd=worktree)
            _bring_all(_inputs(params), inside)  # one that was at fault may have been mended
            _link(params, inside)
        else:
            note.truncate(0)
            shutil.rmtree(place, ignore_errors=True)  # one that was being made
            commit = _make(worktree, inside, source, params, title)
            note.write(commit)
            note.flush()
        here = Workspace(commit)
        os.chdir(inside)
        try:
            yield here
        finally:
            os.chdir(checkout)
            if here.is_done:
                _git("worktree", "remove", "--force", str(worktree))
                shutil.rmtree(place, ignore_errors=True)
                note.truncate(0)
            else:
                log("The experiment's workspace is kept: the same overrides go on in it")


def _key(tree: str, params: str) -> str:
    """Names a workspace by what is measured or trained in it: a change of that begins anew."""
    key = hashlib.sha256(f"{tree}\n{params}".encode())
    for path in (LOCK, *sorted(BUNDLE.rglob("*"))):  # git may know neither
        if path.is_file():
            key.update(f"{path} {sha256_file(path)}\n".encode())
    return key.hexdigest()[:12]


def _make(worktree: Path, inside: Path, source: str, params: str, title: str) -> str:
    """Make the worktree, and bring into it what git does not know; returns its commit."""
    checkout = Path.cwd()
    # By force, also where git knows of one here that was deleted.
    _git("worktree", "add", "--force", "--quiet", "--detach", str(worktree), "HEAD")
    _git("restore", f"--source={source}", "--worktree", "--staged", ".", cwd=worktree)
    write_text(inside / PARAMS, params)
    cache = ask([*DVC, "cache", "dir"])
    if cache is None:
        raise StageFailed("start", 1, ["error: `dvc cache dir` fails: see what it says"])
    local = checkout / ".dvc/config.local"
    if local.exists():
        shutil.copy(local, inside / ".dvc/config.local")
    places = {"cache.dir": str((checkout / cache).resolve())}
    for name, value in dvc_settings("start").items():
        if name.startswith("remote.") and _leads_elsewhere(name, Path(value)):
            places[name] = value
    for name, value in places.items():
        _set_path(name, Path(value), inside)
    if LOCK.exists():
        shutil.copy(LOCK, inside / LOCK)
    made = [Path(name) for name in OUTPUTS if Path(name).exists()]
    _bring_all([*_inputs(params), *made], inside)
    _link(params, inside)
    _git("commit", "--all", "--allow-empty", "--no-verify", "--quiet", "-m", title, cwd=worktree)
    return _git("rev-parse", "HEAD", cwd=worktree)


def _leads_elsewhere(name: str, value: Path) -> bool:
    """Whether a setting of a remote is a path that a copy of the settings would lose."""
    if name.endswith(PATHS_FROM_HERE):
        return not value.is_absolute() and value.is_file()
    return name.endswith(PATHS) and value.is_absolute()


def _set_path(name: str, path: Path, inside: Path) -> None:
    """Set a path of DVC's settings in a workspace. Raises StageFailed if DVC can't write it.

    As seen from there: DVC writes no letters but ASCII's, which the way here may have.
    """
    relative = os.path.relpath(path, inside)
    if not relative.isascii():
        line = (
            f"error: DVC's setting {name} is {path}: a run with overrides has DVC write it, which "
            "can write ASCII's letters alone: name a path without others, such as a link to it"
        )
        raise StageFailed("start", 1, [line])
    _dvc("config", "--local", name, relative, cwd=inside)


def _link(params: str, inside: Path) -> None:
    """Have in a workspace, and around it, what is not to be brought."""
    for path in (*sorted(_outside(params)), *_storage(params)):  # a folder before what is in it
        link = Path(os.path.normpath(inside / path))
        if not os.path.lexists(link):
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to((Path.cwd() / path).resolve())


def _inputs(params: str) -> Iterator[Path]:
    """What the text of a params.yaml names in the checkout, but for what the pipeline writes."""
    storage = set(_storage(params))
    for path in _named(_values(params)):
        if not _ups(path) and path.parts[0] not in OUTPUTS and path not in storage:
            yield path


def _storage(params: str) -> Iterator[Path]:
    """The folder `storage` of the checkout: what is sent there stays when the workspace goes."""
    return (path for path in _named(_values(params).get("storage")) if not _ups(path))


def _outside(params: str) -> Iterator[Path]:
    """What the text of a params.yaml names by a path that leads out of the checkout."""
    return (path for path in _named(_values(params)) if _ups(path))


def _ups(path: Path) -> int:
    """How many folders above the checkout a path leads."""
    return Path(os.path.normpath(path)).parts.count("..")


def _values(params: str) -> Mapping[str, Any]:
    values: Mapping[str, Any] = YAML(typ="safe", pure=True).load(params)
    return values


def _named(value: Any) -> Iterator[Path]:
    """The relative paths among the values that lead to something."""
    if isinstance(value, Mapping):
        for below in value.values():
            yield from _named(below)
    elif isinstance(value, list):
        for below in value:
            yield from _named(below)
    elif isinstance(value, str):
        path = Path(value)
        if path.parts and not path.is_absolute() and os.path.exists(path):
            yield path
            if path.is_file() and (beside := path.with_suffix("")).is_dir():
                yield beside  # the configs of a single-file model


def _bring_all(paths: Iterable[Path], inside: Path) -> None:
    """Have in a workspace what is at these paths of the checkout now."""
    tracked = {inside / name for name in _git("ls-files", "-z", cwd=inside).split("\0")}
    for path in paths:
        bring(Path.cwd() / path, inside / path, tracked)


def bring(source: Path, target: Path, tracked: Set[Path] = frozenset()) -> None:
    """Have at `target` what a file or folder is, but for files that git has there.

    Without a second copy where the disk allows; a link to a folder becomes a link to that folder.
    Nothing that is brought is ever written into: the pipeline replaces files.
    """
    if target in tracked:
        return
    is_link, is_folder = source.is_symlink() and source.is_dir(), source.is_dir()
    if target.is_symlink() or (target.exists() and (is_link or target.is_dir() != is_folder)):
        _remove(target, tracked)
    target.parent.mkdir(parents=True, exist_ok=True)
    if is_link and not target.exists():
        target.symlink_to(source.resolve())
    elif is_folder:
        target.mkdir(exist_ok=True)
        for path in source.iterdir():
            bring(path, target / path.name, tracked)
        for path in [path for path in target.iterdir() if not (source / path.name).exists()]:
            _remove(path, tracked)
    elif not _is_same(source, target):
        target.unlink(missing_ok=True)
        try:
            os.link(source.resolve(), target)
        except OSError:  # another disk
            shutil.copy2(source, target)


def _is_same(source: Path, target: Path) -> bool:
    """Whether a file is there as it was brought, as far as can be told without reading it."""
    if not target.exists():
        return False
    own, other = source.stat(), target.stat()
    if (own.st_dev, own.st_ino) == (other.st_dev, other.st_ino):
        return True
    return (own.st_size, own.st_mtime_ns) == (other.st_size, other.st_mtime_ns)


def _remove(path: Path, tracked: Set[Path]) -> None:
    """Delete a file, a link, or a folder, but for what git has there."""
    if path.is_dir() and not path.is_symlink():
        for each in path.iterdir():
            _remove(each, tracked)
        if not any(path.iterdir()):
            path.rmdir()
    elif path not in tracked:
        path.unlink()


def _save(name: str, commit: str) -> None:
    """Save the workspace as an experiment of the checkout's commit.

    DVC records anew what it saves, as if that had run now. So only stages that DVC finds unchanged,
    as those are that ran, are saved: what others were made with stays as dvc.lock has it.
    """
    stages = _dvc("stage", "list", "--all", "--name-only").split()
    changed = json.loads(_dvc("status", "--json", *stages)) if stages else {}
    same = [stage for stage in stages if stage not in changed]
    if stages and not same:  # without a name, DVC would save them all
        raise StageFailed("save", 1, ["error: no stage is up to date: there is nothing to save"])
    _git("reset", "--soft", f"{commit}~1")
    untracked = ["--include-untracked", str(LOCK)] if not _git("ls-files", str(LOCK)) else []
    _dvc("exp", "save", "--name", name, *untracked, *same)


def _free(name: str, commit: str) -> str:
    """A name that no experiment of another commit has, as near to this one as DVC allows."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-") or "experiment"
    saved = _git("for-each-ref", "--format=%(refname:lstrip=-1)", "refs/exps")
    kept = _git("for-each-ref", f"--no-contains={commit}", "--format=%(refname:lstrip=-1)", REFS)
    taken = [*saved.splitlines(), *kept.splitlines()]
    number = next(n for n in range(1, len(taken) + 2) if _numbered(name, n) not in taken)
    return _numbered(name, number)


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name}-{number}"


@contextmanager
def _alone(path: Path) -> Iterator[TextIO]:
    """The lock of a workspace, open. Raises StageFailed if another run is at it."""
    with path.open("a+", encoding="utf-8") as file:
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
        said = " ".join(without_secrets(done.stderr or done.stdout).split())
        said = said or f"nothing, and ends with {done.returncode} ({' '.join(command[:3])})"
        line = f"error: overrides need git and DVC here, and {Path(command[0]).name} says: {said}"
        raise StageFailed("start", 1, [line])
    return done.stdout.strip()
