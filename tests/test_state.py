"""What is recorded is what ran: a stage's snapshot of its inputs, and the lineage of a run."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from components import lineage, paths, register, snapshot, tracking
from components.cli import main
from components.environment import quiet
from components.lineage import git_commit, lock_hash, run_commit
from components.params import Params, ParamsError, check_files, load_params
from pnp_core.files import atomic_file, write_text
from tests import toy

pytest_plugins = ["tests.toy"]
quiet()

ROOT = Path(__file__).parent.parent


def set_param(dotted: str, value: Any) -> None:
    values = YAML(typ="safe").load(Path("params.yaml"))
    *sections, key = dotted.split(".")
    place = values
    for section in sections:
        place = place[section]
    place[key] = value
    toy.write_params(Path(), values)


@pytest.fixture
def stage(world: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A world with stages that depend on the toy's parameters, a module and a folder."""
    Path("code.py").write_text("x = 1\n")
    deps = ["${base}", "code.py", "${prepare.files[0]}"]
    shared = {"params": ["base", "distill"], "deps": deps, "outs": ["out"]}
    Path("main.parquet").write_text("the toy's prepare.files[0]")
    each = {"cmd": "-", "params": ["models.${key}"], "deps": ["${item.reference}"]}
    stages = {
        "distill": {"cmd": f"{sys.executable} stage.py", **shared},
        "evaluate": {"foreach": "${models}", "do": each},
    }
    with open("dvc.yaml", "w") as file:
        YAML().dump({"stages": stages}, file)
    monkeypatch.setattr("components.cli.die_with_parent", lambda: None)
    monkeypatch.setattr(lineage, "run_commit", lambda: "none")
    monkeypatch.setenv("DVC_STAGE", "distill")
    yield world
    snapshot.begin(None)


def fails_with(change: Callable[[], Any], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a stage ends with during which `change` happens."""

    def run(params: Params) -> None:
        change()

    with pytest.raises(SystemExit) as left:
        main(run)
    assert left.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


CHANGES: list[tuple[Callable[[], Any], str]] = [
    (lambda: set_param("distill.seed", 7), "params.yaml: distill.seed was 0, is 7"),
    (lambda: set_param("distill.guide.kind", "full"), "distill.guide.kind was 'tiny', is 'full'"),
    (lambda: Path("code.py").write_text("x = 2\n"), "code.py has changed"),
    (lambda: Path("code.py").unlink(), "code.py is gone"),
    (lambda: Path("main.parquet").write_text("x"), "main.parquet has changed"),
    (lambda: Path("models/base/new").touch(), "models/base/new is new"),
    (lambda: Path("params.yaml").write_text("a: ["), "params.yaml can't be read"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES, ids=[message for _, message in CHANGES])
def test_a_stage_ends_with_an_error_if_what_it_depends_on_changed_meanwhile(
    stage: Path, change: Callable[[], Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = fails_with(change, capsys)
    assert line.startswith("error: distill: what it works from was changed while it ran: ")
    assert message in line


def test_nothing_is_uploaded_of_what_changed_meanwhile(
    stage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot.begin("distill")
    set_param("distill.seed", 7)
    monkeypatch.setattr(tracking, "Run", lambda *_, **__: pytest.fail("a run was begun"))
    nothing: Any = None
    with pytest.raises(ValueError, match="was changed while it ran"):
        register.upload(load_params(Path("params.yaml")), nothing, "key", nothing)


@pytest.mark.parametrize(
    "change",
    [
        lambda: None,
        lambda: set_param("promote.min_images", 3),
        lambda: set_param("halve.seed", 7),
        lambda: Path("code.py").write_text("x = 1\n"),  # touched, not changed
        lambda: Path("elsewhere").touch(),
        lambda: write_text(Path("models/base/__pycache__/code.pyc"), "what Python compiled"),
    ],
)
def test_a_stage_does_not_mind_changes_of_what_it_does_not_depend_on(
    stage: Path, change: Callable[[], Any]
) -> None:
    main(lambda params: change())


def test_each_model_depends_on_its_own_row(
    stage: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DVC_STAGE", "evaluate@tuned")
    main(lambda params: set_param("models.base.reference", "art/tuned.parquet"))
    line = fails_with(lambda: set_param("models.tuned.path", "models/base"), capsys)
    assert "evaluate@tuned: " in line and "models.tuned.path was 'models/tuned'" in line
    line = fails_with(lambda: Path("art/tuned.parquet").write_bytes(b""), capsys)
    assert "art/tuned.parquet has changed" in line


def test_a_large_file_is_known_by_its_time_of_change(
    stage: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(snapshot, "MOST_BYTES_HASHED", 10_000)
    weights = Path("models/base/unet/diffusion_pytorch_model.safetensors")
    assert "has changed" in fails_with(lambda: os.utime(weights), capsys)
    main(lambda params: os.utime("code.py"))


def run(*command: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    tools = Path(sys.executable).parent
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    settings = {"PATH": path, "PYTHONPATH": str(ROOT)} | environment
    kept = {name: value for name, value in os.environ.items() if name != "DVC_STAGE"}
    return subprocess.run(command, env=kept | settings, capture_output=True, text=True)


def git(*arguments: str) -> str:
    done = run("git", "-c", "user.name=t", "-c", "user.email=t@localhost", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.services
def test_dvc_records_nothing_of_a_stage_whose_parameters_were_edited_and_all_of_the_next(
    stage: Path,
) -> None:
    Path("stage.py").write_text("""
from pathlib import Path
from components import cli
cli.check_files = lambda params: None  # which takes its time
def run(params):
    Path("out").write_text(str(params.distill.seed))
    if Path("edit").exists():
        Path("edit").unlink()
        text = Path("params.yaml").read_text()
        head, _, rest = text.partition("distill:")
        Path("params.yaml").write_text(head + "distill:" + rest.replace("seed: 0", "seed: 7", 1))
cli.main(run)
""")
    Path("edit").touch()
    git("init", "--quiet")
    assert run("dvc", "init", "--quiet").returncode == 0
    failed = run("dvc", "repro", "distill")
    assert failed.returncode != 0 and "distill.seed was 0, is 7" in failed.stderr
    assert not Path("dvc.lock").exists()
    assert run("dvc", "repro", "distill").returncode == 0
    lock = YAML(typ="safe").load(Path("dvc.lock"))["stages"]["distill"]
    assert lock["params"]["params.yaml"]["distill"]["seed"] == 7
    assert Path("out").read_text() == "7"


# Lineage


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A repository with one commit, which is the working directory; returns the commit."""
    monkeypatch.chdir(tmp_path)
    git("init", "--quiet")
    for name in ("params.yaml", "README.md", "dvc.lock", "docs/page.txt", "components/a.py"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("stages: {}\n")
    git("add", ".")
    git("commit", "--quiet", "--message", "one")
    return git("rev-parse", "HEAD")


def test_only_changes_that_could_matter_make_a_commit_dirty(checkout: str) -> None:
    assert git_commit() == checkout
    for name in ("dvc.lock", "README.md", "docs/page.txt", "new.py"):
        Path(name).write_text("stages: {a: 1}\n")
    assert git_commit() == checkout
    for name in ("params.yaml", "components/a.py"):
        Path(name).write_text("other\n")
        assert git_commit() == f"{checkout}-dirty"
        git("checkout", "--quiet", name)


def test_a_folder_of_a_larger_repository_is_not_dirty_by_its_neighbours(
    checkout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("params.yaml").write_text("other\n")
    monkeypatch.chdir("components")
    assert git_commit() == checkout


def test_outside_git_there_is_no_commit_and_without_git_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert git_commit() == "none"
    git("init", "--quiet")
    assert git_commit() == "none", "nothing is committed yet"
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="git is not installed"):
        git_commit()


def test_a_git_that_refuses_to_answer_is_not_taken_for_no_git(
    checkout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # as in a container
    with pytest.raises(ValueError, match="git can't tell which commit this is: .*ownership"):
        git_commit()


def test_edits_during_a_run_make_its_commit_dirty_from_then_on(
    checkout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PNP_GIT_COMMIT", checkout)
    monkeypatch.setenv("PNP_FLOW_RUN", "first")
    assert run_commit() == checkout
    git("commit", "--quiet", "--allow-empty", "--message", "two")
    Path("README.md").write_text("other\n")
    assert run_commit() == checkout, "nothing that could matter"
    Path("components/a.py").write_text("other\n")
    assert run_commit() == f"{checkout}-dirty"
    git("checkout", "--quiet", "components/a.py")
    assert run_commit() == f"{checkout}-dirty", "a stage has run with it"
    monkeypatch.setenv("PNP_FLOW_RUN", "second")
    assert run_commit() == checkout
    Path("components/a.py").write_text("other\n")
    git("commit", "--quiet", "--all", "--message", "three")
    assert run_commit() == f"{checkout}-dirty", "committed, but not in that commit"


def test_a_commit_that_git_does_not_know_is_not_taken_for_an_unchanged_one(
    checkout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PNP_GIT_COMMIT", "0" * 40)
    with pytest.raises(ValueError, match="git diff 0000"):
        run_commit()


def test_stages_of_one_run_name_the_commit_that_it_began_with(checkout: str) -> None:
    Path("dvc.lock").unlink()
    assert run("dvc", "init", "--quiet").returncode == 0
    show = f"{sys.executable} -c 'from components.lineage import *; print(run_commit())'"
    commit = "git -c user.name=t -c user.email=t@t commit --quiet --allow-empty -m two"
    stages = {
        "first": {"cmd": f"{show} > first && {commit}", "outs": ["first"]},
        "second": {"cmd": f"{show} > second", "deps": ["first"], "outs": ["second"]},
    }
    with open("dvc.yaml", "w") as file:
        YAML().dump({"stages": stages}, file)
    done = run("dvc", "repro")
    assert done.returncode == 0, done.stderr
    assert Path("first").read_text() == Path("second").read_text() == f"{checkout}\n"
    assert git("rev-parse", "HEAD") != checkout
    done = run("dvc", "repro", "--force", "--single-item", "second")
    assert Path("second").read_text().strip() == git("rev-parse", "HEAD"), "of the run after it"
    run("dvc", "repro", "--force", "--single-item", "second", PNP_GIT_COMMIT=checkout)
    assert Path("second").read_text() == f"{checkout}\n", "what the flow says"


def test_the_hash_of_the_lock_is_of_what_the_guide_was_made_with(tmp_path: Path) -> None:
    lock = tmp_path / "dvc.lock"
    assert lock_hash(lock) == "none"
    lock.write_text("schema: '2.0'\nstages:\n  distill: {cmd: a}\n")
    before = lock_hash(lock)
    lock.write_text("schema: '2.0'\nstages:\n  register: {cmd: b}\n  distill: {cmd: a}\n")
    assert lock_hash(lock) == before
    lock.write_text("schema: '2.0'\nstages:\n  distill: {cmd: other}\n")
    assert lock_hash(lock) != before


def test_a_tracking_store_that_cannot_be_is_told_before_the_work(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    set_param("tracking.uri", "file:runs-of-mlflow")
    with pytest.raises(SystemExit):
        main(lambda params: pytest.fail("it begins"))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "error: MLflow keeps nothing at 'file:runs-of-mlflow': give tracking.uri"
    )


def test_of_a_full_disk_it_is_told_which_and_what_to_do(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("results").mkdir(exist_ok=True)

    def free_of(path: Any) -> Any:
        return shutil._ntuple_diskusage(0, 0, 2_000_000 if Path(path) == Path("results") else 10**9)

    monkeypatch.setattr(shutil, "disk_usage", free_of)

    def fill(params: Params) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(SystemExit):
        main(fill)
    assert capsys.readouterr().err == (
        "error: a disk is full ([Errno 28] No space left on device). results has 2 MB left, the "
        "least of where a stage writes: make room there; the same command goes on from here\n"
    )


def test_of_a_file_that_could_not_be_written_for_want_of_room_that_file_is_told(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill(params: Params) -> None:
        with atomic_file(Path("out.png")):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(SystemExit):
        main(fill)
    told = capsys.readouterr().err
    assert told.startswith("error: Could not write out.png: [Errno 28] No space left on device")
    assert told.endswith(
        "There was nothing before. Make room there: the same command goes on from here\n"
    )


# How a stage is ended


def test_sigterm_ends_a_stage_as_ctrl_c_does_once_and_in_one_line(tmp_path: Path) -> None:
    Path(tmp_path, "stage.py").write_text("""
import os, signal, sys, time
from unittest.mock import MagicMock
from contextlib import contextmanager
from components import cli
cli.load_params = cli.check_files = cli.mlflow_place = MagicMock()
@contextmanager
def run_in_mlflow():
    try:
        yield
    finally:
        os.kill(os.getpid(), signal.SIGTERM)  # an impatient one
        time.sleep(0.1)
        print("closed", flush=True)
def run(params):
    with run_in_mlflow():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
cli.main(run)
""")
    done = run(sys.executable, str(tmp_path / "stage.py"))
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stdout == "closed\n"
    assert done.stderr == "stopped; the same command goes on from here\n"


# Names and places


@pytest.mark.parametrize("name", ["DreamShaper_8", "base-2", "SDXL"])
def test_names_of_models_are_as_people_have_them(world: Path, name: str) -> None:
    values = toy.toy_params()
    values["models"][name] = values["models"].pop("tuned")
    toy.write_params(world, values)
    assert name in load_params(Path("params.yaml")).models


@pytest.mark.parametrize("key", ["base", "models.tuned.path"])
def test_the_name_of_a_model_on_a_hub_is_refused_at_the_start(world: Path, key: str) -> None:
    set_param(key, "someone/some-model")
    with pytest.raises(ParamsError, match=rf"{key}: someone/some-model .*hub.*hf download"):
        check_files(load_params(Path("params.yaml")))


def test_of_a_misspelt_key_the_message_says_what_was_meant(world: Path) -> None:
    values = toy.toy_params()
    values["distill"]["learning_rat"] = values["distill"].pop("learning_rate")
    toy.write_params(world, values)
    with pytest.raises(ParamsError, match="'distill.learning_rat', did you mean 'learning_rate'"):
        load_params(Path("params.yaml"))


def test_make_works_in_a_path_with_a_space(tmp_path: Path) -> None:
    folder = tmp_path / "a checkout"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    git("init", "--quiet", str(folder))
    said = run("make", "-C", str(folder), "demo", "INSTALLED=Makefile", "PY=echo")
    assert said.returncode == 0, said.stderr
    assert "-m flows distill" in said.stdout


def test_the_demo_has_none_of_the_users_prefect_and_mlflow_settings(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    git("init", "--quiet", str(tmp_path))
    theirs = {
        "MLFLOW_TRACKING_URI": "https://mlflow.company",
        "MLFLOW_EXPERIMENT_NAME": "of the team",
        "PREFECT_API_URL": "https://prefect.company/api",
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": "postgresql://company/prefect",
        "HTTPS_PROXY": "http://proxy.company",
    }
    said = subprocess.run(
        ["make", "-C", tmp_path, "demo", "INSTALLED=Makefile", "PY=env #"],
        env=os.environ | theirs,
        capture_output=True,
        text=True,
        check=True,
    )
    found = dict(line.split("=", 1) for line in said.stdout.splitlines() if "=" in line)
    assert found["HTTPS_PROXY"] == theirs["HTTPS_PROXY"], "what a network needs is left"
    assert {name for name in found if name.startswith(("PREFECT_", "MLFLOW_"))} == {"PREFECT_HOME"}


def test_make_clean_and_git_take_no_input_for_what_stages_write(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt", ".gitignore"):
        shutil.copy(ROOT / name, tmp_path)
    inputs = ["data/captioned/0.parquet", "data/references/comics/0.png", "data/prompts.txt"]
    written = [path for path in vars(paths).values() if isinstance(path, Path)]
    assert paths.PREPARED in written and paths.CACHE in written
    written += [f"data/.{name}.{end}" for name in ("prepared", "cache") for end in ("old", "1.new")]
    for name in (*inputs, *(Path(path, "file") for path in written)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")

    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    listed = ["git", "-C", str(tmp_path), "ls-files", "--others", "--exclude-standard", "data"]
    assert sorted(run(*listed).stdout.split()) == sorted(inputs)
    assert run("make", "-C", str(tmp_path), "clean").returncode == 0
    assert all((tmp_path / name).exists() for name in inputs)
    assert not any((tmp_path / name).exists() for name in written)


ROOM, FULL = (f"echo; echo '//a server/disk 9 9 {free} 9% /'" for free in (99999999, 4999999))


@pytest.mark.parametrize(
    ("df", "is_installed", "is_told"),
    [(FULL, False, True), (ROOM, False, False), ("false", False, False), (FULL, True, False)],
    ids=["full", "room", "unknown", "only an update"],
)
def test_a_disk_that_is_too_full_is_told_before_anything_is_installed(
    tmp_path: Path, df: str, is_installed: bool, is_told: bool
) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "bin").mkdir()
    for name, does in (("df", df), ("python", "true"), ("installed", "true")):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    path = f"PATH={tmp_path / 'bin'}:{os.environ['PATH']}"
    python = tmp_path / "bin" / ("installed" if is_installed else "not-yet")
    given = (f"PY={python}", f"PYTHON={tmp_path / 'bin/python'}")
    said = run("env", path, "make", "-C", str(tmp_path), "install", *given)
    assert ("Installing into" in said.stdout) == (not is_told)
    assert ("4 GB free, and installing takes 9 GB" in said.stderr) == is_told


STUB = """#!/bin/sh
given=$(env | grep -E '^(UV_[A-Z_]*(INDEX|URL|LINKS)|SSL_CERT_FILE)=' | sort | tr '\\n' ' ')
echo "$given: $*" >> {log}
case "$*" in
    *"pip config list") cat {said} ;;
    "-m uv"*) exit {uv} ;;
esac
"""
ONE, TWO = "https://one/simple", "https://two/simple"


@pytest.mark.parametrize("uv", [0, 1], ids=["uv works", "uv fails"])
@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ("", ""),
        (f":env:.index-url='{ONE}'\nglobal.index-url='{TWO}'", f"UV_DEFAULT_INDEX={ONE} "),
        (
            f"download.index-url='{ONE}'\nglobal.index-url='{TWO}'\n",
            f"UV_DEFAULT_INDEX={TWO} ",
        ),
        (
            f"global.index-url='{ONE}'\ninstall.index-url='{TWO}'",
            f"UV_DEFAULT_INDEX={TWO} ",
        ),
        ("global.cert='/a ca'\nglobal.client-cert='/b'", "SSL_CERT_FILE=/a ca "),
        (
            f"global.extra-index-url='\\n{ONE}\\n{TWO}'\nglobal.find-links='/wheels'",
            f"UV_EXTRA_INDEX_URL= {ONE} {TWO} UV_FIND_LINKS=/wheels ",
        ),
        ("global.no-index='true'\nglobal.find-links='/wheels'", None),
    ],
)
def test_everything_is_installed_by_uv_as_pip_is_configured_and_else_by_pip(
    tmp_path: Path, uv: int, settings: str, told: str | None
) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python, log, said = tmp_path / "python", tmp_path / "log", tmp_path / "said"
    (tmp_path / ".venv").mkdir()
    said.write_text(settings)
    python.write_text(STUB.format(log=log, said=said, uv=uv))
    python.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("UV_", "SSL_"))}
    subprocess.run(
        ["make", "-C", tmp_path, "install", f"PY={python}", "GB=0"], env=environment, check=True
    )
    asked = log.read_text().splitlines()
    by_uv = [line for line in asked if "-m uv pip install" in line]
    assert [line.split(": ")[0] for line in by_uv] == ([] if told is None else [told])
    by_pip = [line for line in asked if "-m pip install" in line and "--editable" in line]
    assert len(by_pip) == (1 if told is None else uv)
    assert all("--constraint constraints.txt" in line for line in by_uv + by_pip)
    assert list((tmp_path / ".venv").glob(".installed-*"))
