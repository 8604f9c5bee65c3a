"""What the pipeline keeps on disk, what nothing needs any more, and its removal.

    python -m components.cleanup             # what each thing takes, and what could go
    python -m components.cleanup --remove    # removes what could go

Never removed is what a version, an alias (`champion`, `previous`), a commit, an experiment or the
lock of this checkout needs; where that can't be told, nothing of the kind is.
"""

import argparse
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from components.cli import main
from components.disk import megabytes
from components.lineage import hash_of
from components.params import Params
from components.paths import CACHE, EVALUATED, JUDGED, RUNS, SAMPLED
from components.reevaluation import REEVALUATED
from components.references import files_hash, judge_hash, kept_at
from components.storage import Mirror

DVC = (sys.executable, "-m", "dvc")
WORKSPACES = Path(".dvc/tmp/exps")
# Of DVC's cache, what these need stays.
KEEP = ("--workspace", "--all-commits", "--all-experiments")
SEEN_BY_DVC = ("HEAD", "--branches", "--tags", "--remotes")  # in git log's terms; and experiments:
TIPS = ("for-each-ref", "--format=%(objectname)", "refs/exps/??/*/*")  # not what they began with
TRAINED = ("distill", "halve")


@dataclass
class Pile:
    """Something that grows.

    Attributes:
        name: what it is, and where.
        num_bytes: that all of it takes.
        unneeded: bytes of it that could go.
        note: what it is for, or why it stays.
        remove: removes what could go.
    """

    name: str
    num_bytes: int
    unneeded: int = 0
    note: str = ""
    remove: Callable[[], None] = field(default=lambda: None, repr=False)


def run(params: Params, *, remove: bool = False) -> None:
    """Print what each pile takes and what of it could go; with `remove`, let that go.

    Raises TrackingError if MLflow can't tell what it needs, OSError if `storage` isn't there;
    nothing is removed then.
    """
    piles = [
        Pile(f"teacher cache, {CACHE}", size(CACHE), note="training reads it; `cache` makes it"),
        *storage(params),
        checkpoints(),
        reevaluated(params),
        Pile(f"results, {EVALUATED}", size(EVALUATED), note="of the last evaluations"),
        images(params),
        features(params),
        workspaces(),
        mlflow(params),
        dvc_cache(params),
    ]
    for pile in piles:
        print(
            f"{pile.name:<34} {megabytes(pile.num_bytes):>10}, not needed "
            f"{megabytes(pile.unneeded):>10}   {pile.note}"
        )
    total = sum(pile.unneeded for pile in piles)
    if not remove:
        print(f"{megabytes(total)} could go: python -m components.cleanup --remove")
        return
    for pile in piles:
        if pile.unneeded:
            pile.remove()
    print(f"{megabytes(total)} removed")


def storage(params: Params) -> Iterator[Pile]:
    """Teacher caches, and what was sent to nodes that do not see this folder."""
    if not params.storage:
        return
    mirror = Mirror(params.storage)
    mirror.check()
    note = "others may use it: left alone; what is deleted there is made and sent again"
    yield Pile(f"storage, {params.storage}", mirror.num_bytes(), note=note)


def checkpoints() -> Pile:
    """Checkpoints of training, which a finished stage needs no more."""
    told = ask(*DVC, "status", "--json", *TRAINED)
    # beside DVC's warnings; without an answer, nothing is finished
    answers = [line for line in (told or "").splitlines() if line.startswith("{")]
    changed = json.loads(answers[-1]) if answers else dict.fromkeys(TRAINED)
    done = [RUNS / stage for stage in TRAINED if stage not in changed]
    return Pile(
        f"checkpoints, {RUNS}",
        size(RUNS) - size(REEVALUATED),
        sum(map(size, done)),
        "of stages that are finished" if done else "training goes on from them",
        partial(delete, done),
    )


def reevaluated(params: Params) -> Pile:
    """Images of versions that were judged anew; a second time goes on from them.

    Raises TrackingError if MLflow can't tell which versions matter.
    """
    from components.tracking import Registry
    from components.tracking.garbage import SECONDS_UNTOUCHED, last_change

    others = []
    for folder in sorted(REEVALUATED.iterdir()) if REEVALUATED.is_dir() else ():
        name, _, version = folder.name.rpartition("-")
        registry = Registry(params.tracking, name)
        needed = {registry.newest(), registry.champion(), registry.previous()}
        is_young = time.time() - last_change(folder) < SECONDS_UNTOUCHED  # it may be judged now
        if needed != {None} and version not in needed and not is_young:
            others.append(folder)
    return Pile(
        f"judged anew, {REEVALUATED}",
        size(REEVALUATED),
        sum(map(size, others)),
        "of versions that are not champion, previous or newest",
        partial(delete, others),
    )


def images(params: Params) -> Pile:
    """Sampled images; `evaluate` itself keeps those of its last results alone."""
    folders = SAMPLED.iterdir() if SAMPLED.is_dir() else ()
    others = sorted(folder for folder in folders if folder.name not in params.models)
    return Pile(
        f"images, {SAMPLED}",
        size(SAMPLED),
        sum(map(size, others)),
        "of models that params.yaml does not name",
        partial(delete, others),
    )


def features(params: Params) -> Pile:
    """What judges saw in real images; each is kept for every model and run."""
    references = {Path(model.reference) for model in params.models.values()}
    judges = {Path(judge) for judge in params.evaluate.judges}
    others: list[Path] = []
    absent = [str(path) for path in sorted(references | judges) if not path.exists()]
    note = f"there is no {absent[0]}: left alone" if absent else "of no judge and reference here"
    if not absent:
        seen = {files_hash(reference) for reference in references}
        needed = {kept_at(judge_hash(str(judge)), hash_) for judge in judges for hash_ in seen}
        others = sorted({*JUDGED.glob("*.safetensors")} - needed)
    return Pile(
        f"judged references, {JUDGED}",
        size(JUDGED),
        sum(map(size, others)),
        note,
        partial(delete, others),
    )


def workspaces() -> Pile:
    """Experiments that broke off; the same overrides would go on in them."""
    kept = sorted(path for path in WORKSPACES.glob("pnp-*") if path.is_dir())

    def remove() -> None:
        delete([part for path in kept for part in (path, path.with_suffix(".lock"))])
        forget_worktrees()

    in_use = [path for path in kept if is_locked(path.with_suffix(".lock"))]
    kept = [path for path in kept if path not in in_use]
    return Pile(
        f"experiments, {WORKSPACES}",
        size(WORKSPACES),
        sum(map(size, kept)),
        f"{len(kept)} broke off, {len(in_use)} run",
        remove,
    )


def forget_worktrees() -> None:
    """Have git forget workspaces that are gone, and no worktree of others, which may be away."""
    for line in (ask("git", "worktree", "list", "--porcelain") or "").splitlines():
        kind, _, root = line.partition(" ")
        ours = Path(root).is_relative_to(WORKSPACES.resolve())
        if kind == "worktree" and ours and not Path(root).exists():
            ask("git", "worktree", "remove", "--force", root)


def mlflow(params: Params) -> Pile:
    """Artifacts of deleted runs, and of uploads that no version was made of."""
    from components.tracking import Store
    from components.tracking.garbage import artifacts_of, unneeded

    store = Store(params.tracking)
    folder = artifacts_of(store)
    if folder is None:
        return Pile("MLflow's artifacts", 0, note=f"kept by {store.name}: `mlflow gc` there")
    paths = unneeded(store)
    return Pile(
        f"MLflow's artifacts, {folder.name}",
        size(folder),
        sum(map(size, paths)),
        "of deleted runs, and uploads that broke off",
        partial(delete, paths),
    )


def dvc_cache(params: Params) -> Pile:
    """What no commit, experiment or this checkout's dvc.lock names."""
    told = ask(*DVC, "cache", "dir")
    if told is None:
        return Pile("DVC's cache", 0, note="DVC can't tell where it is: left alone")
    cache = Path(told).resolve()
    name, there = "DVC's cache", size(cache)
    if not cache.is_relative_to(Path.cwd()):
        return Pile(name, there, note="shared with others (cache.dir): left alone")
    if lacking := unknown_locks(params):
        return Pile(name, there, note=f"{lacking}: commit its dvc.lock first; left alone")
    try:
        dry = ask(*DVC, "gc", *keeping(sharers(cache)), "--dry")
    except ValueError as error:
        return Pile(name, there, note=f"{error}; left alone")
    if dry is None:
        return Pile(name, there, note="DVC can't tell what is needed: left alone")
    would_go = re.findall(r"Removing (.+)", dry)
    unneeded = sum(size(Path(path)) for path in set(would_go))

    def remove() -> None:
        # Experiments that broke off have gone meanwhile.
        done = called(*DVC, "gc", *keeping(sharers(cache)), "--force")
        if done.returncode != 0:
            raise ValueError(f"`dvc gc` fails: {' '.join(f'{done.stdout}{done.stderr}'.split())}")

    return Pile(name, there, unneeded, "of no commit, experiment, or lock", remove)


def keeping(projects: Sequence[str]) -> list[str]:
    """What `dvc gc` is told to keep, beside what the dvc.lock of these needs."""
    return [*KEEP, *(["--projects", *projects] if projects else [])]


def sharers(cache: Path) -> list[str]:
    """Experiments' workspaces and other git worktrees whose dvc.lock may need what is in `cache`.

    Raises ValueError if it can't be told of a worktree.
    """
    found = sorted(str(path.parent) for path in WORKSPACES.glob("pnp-*/**/dvc.lock"))
    below = ask("git", "rev-parse", "--show-prefix") or ""
    for line in (ask("git", "worktree", "list", "--porcelain") or "").splitlines():
        kind, _, root = line.partition(" ")
        project = Path(root, below).resolve()
        here = (Path.cwd().resolve(), WORKSPACES.resolve())
        if kind != "worktree" or project == here[0] or project.is_relative_to(here[1]):
            continue
        if not Path(root).is_dir():
            raise ValueError(f"git's worktree {root} is not there: bring it, or git worktree prune")
        if not (project / ".dvc").is_dir():
            continue  # of a time before DVC
        told = ask(*DVC, "--cd", str(project), "cache", "dir")
        if told is None:
            raise ValueError(f"DVC can't tell which cache {project} has")
        if Path(project, told).resolve() == cache:
            found.append(str(project))
    return found


def unknown_locks(params: Params) -> str | None:
    """The first alias, or part of git's stash, with a dvc.lock that DVC would not see.

    It looks at this checkout's, and at those of commits that a branch, tag or experiment has.
    """
    from components.tracking import Store
    from components.tracking.garbage import locks_of_aliases

    needed = locks_of_aliases(Store(params.tracking), params.register_.name)
    stashed = (ask("git", "stash", "list", "--format=%gd %H") or "").splitlines()
    for name, _, commit in (line.partition(" ") for line in stashed):
        needed |= {f"git's {name}": lock for lock in hashes(locks_of([commit]))}
    known: set[str] = set()
    if needed:
        here = Path("dvc.lock")
        commits = ask("git", "log", *SEEN_BY_DVC, "--format=%H", "--", "dvc.lock") or ""
        commits += f"\n{ask('git', *TIPS) or ''}"
        known = hashes([here.read_text(encoding="utf-8")] if here.exists() else [])
        known |= hashes(locks_of(commits.split()))
    return next((name for name, lock in needed.items() if lock not in known), None)


def hashes(texts: Iterable[str]) -> set[str]:
    """Of what dvc.lock says; one in the middle of a merge says nothing."""
    found: set[str] = set()
    for text in texts:
        with suppress(ValueError):
            found.add(hash_of(text))
    return found


def locks_of(commits: Iterable[str]) -> Iterator[str]:
    """What dvc.lock said in these commits."""
    for commit in commits:
        if (text := ask("git", "show", f"{commit}:./dvc.lock")) is not None:
            yield text


def size(path: Path) -> int:
    """Bytes below a path; a file with several names is counted once."""
    files = path.rglob("*") if path.is_dir() else [path]
    seen = {}
    for file in files:
        try:
            about = file.lstat()
        except OSError:
            continue  # it went meanwhile, or was never there
        if not file.is_dir():
            seen[about.st_dev, about.st_ino] = about.st_size
    return sum(seen.values())


def delete(paths: Sequence[Path]) -> None:
    """Remove files and folders."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of an experiment's workspace."""
    try:
        with path.open(encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def ask(*command: str) -> str | None:
    """What a command prints, on both streams; None if it fails."""
    done = called(*command)
    return f"{done.stdout}{done.stderr}".strip() if done.returncode == 0 else None


def called(*command: str) -> subprocess.CompletedProcess[str]:
    """A command that has ended, with what it printed."""
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(command, env=os.environ | {"PATH": tools}, capture_output=True, text=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m components.cleanup")
    parser.add_argument("--remove", action="store_true", help="remove what could go")
    arguments = parser.parse_args()
    main(partial(run, remove=arguments.remove), reads_inputs=False)
