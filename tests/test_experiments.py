"""Runs with other parameters: in a workspace of their own, and the checkout stays as it was."""

import os
import re
import shutil
import subprocess
from contextlib import chdir, suppress
from pathlib import Path

import pytest
from dvc.config_schema import REMOTE_SCHEMAS
from ruamel.yaml import YAML

import flows.experiment
from components.mlflow_place import checkout
from components.overrides import overridden
from components.params import ParamsError, load_params
from flows import evaluate, room
from flows.experiment import bring, experiment
from flows.process import StageFailed, repro
from flows.start import check_left_out
from pnp_core.files import write_text
from tests import toy
from tests.cases import few_of
from tests.commands import dvc

pytest_plugins = ["tests.toy"]

WORKSPACES = Path(".dvc/tmp/exps")


def call(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def git(*arguments: str) -> str:
    return call("git", "-c", "user.name=a", "-c", "user.email=a@localhost", *arguments)


# Overrides


def test_an_override_changes_its_value_alone_and_comments_stay(tmp_path: Path) -> None:
    source = toy.ROOT / "params.yaml"
    text = overridden(source, ["distill.num_images=2000", "halve.learning_rate=1e-3"])
    (tmp_path / "params.yaml").write_text(text)
    was, now = load_params(source), load_params(tmp_path / "params.yaml")
    assert (now.distill.num_images, now.halve.learning_rate) == (2000, 1e-3)
    changed = {name for name in type(was).model_fields if getattr(was, name) != getattr(now, name)}
    assert changed == {"distill", "halve"}
    assert text.count("#") == source.read_text().count("#")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distill.num_imagse=2", "overrides: unknown key 'distill.num_imagse', did you mean"),
        ("distil.num_images=2", "overrides: unknown key 'distil', did you mean 'distill'"),
        ("distill.num_images=many", "overrides: distill.num_images: .*'many'"),
        ("distill.num_images", "write section.key=value"),
        ("base.x=1", "base has no keys below it"),
        ("distill.seed=[", "overrides: 'distill.seed=\\['"),
    ],
)
def test_a_misspelt_override_is_refused_before_anything_is_made(
    world: Path, override: str, message: str
) -> None:
    with pytest.raises(ParamsError, match=message), experiment([override], "a", print):
        pass
    assert not WORKSPACES.exists()


# Workspaces


@pytest.fixture
def repository(world: Path) -> Path:
    """A git and DVC repository whose one stage writes what params.yaml says of `distill`."""
    show = "mkdir -p guides && python -c \"print(open('params.yaml').read())\" > guides/distilled"
    note = "echo ran >> ../../../../ran 2>/dev/null || true"
    fails = "test ! -e ../../../../fails"
    stages = {
        "distill": {
            "cmd": f"{note} && {fails} && {show}",
            "params": ["distill"],
            "deps": ["models/base"],
            "outs": ["guides/distilled"],
        }
    }
    with (world / "dvc.yaml").open("w") as file:
        YAML().dump({"stages": stages}, file)
    # The base is neither in git nor in DVC, as where it was downloaded.
    (world / ".gitignore").write_text("/models\n/guides\n/ran\n/fails\n/mlflow.db\n")
    call("git", "init", "--quiet")
    dvc("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "toy")
    return world


def run(*overrides: str, name: str = "funny name") -> None:
    with experiment(overrides, name, print):
        repro("distill", print)


def test_an_experiment_leaves_the_checkout_as_it_was_and_is_saved_under_the_runs_name(
    repository: Path,
) -> None:
    repro("distill", print)
    git("add", "dvc.lock")
    git("commit", "--quiet", "--message", "result")
    before = {p: p.read_bytes() for p in map(Path, ("params.yaml", "dvc.lock", "guides/distilled"))}
    head = git("rev-parse", "HEAD")
    os.utime("params.yaml", (1, 1))  # git then takes it for changed, until it looks
    run("distill.seed=7")
    assert {p: p.read_bytes() for p in before} == before
    assert git("rev-parse", "HEAD") == head and not git("status", "--porcelain").strip()
    assert len(git("worktree", "list").splitlines()) == 1
    assert "funny-name" in dvc("exp", "list")
    ran = git("show", "refs/pnp-guide/funny-name:params.yaml")
    assert YAML(typ="safe").load(ran)["distill"]["seed"] == 7, "what a lineage names is kept"

    run("distill.seed=8")
    assert "funny-name-2" in dvc("exp", "list"), "nothing is overwritten"
    dvc("exp", "apply", "funny-name")
    assert YAML(typ="safe").load(Path("guides/distilled"))["distill"]["seed"] == 7


def test_an_experiment_that_failed_goes_on_in_its_workspace(repository: Path) -> None:
    Path("fails").touch()
    with pytest.raises(StageFailed):
        run("distill.seed=7")
    (kept,) = (repository / WORKSPACES).glob("pnp-*/")
    (kept / "runs").mkdir()
    Path("fails").unlink()
    with experiment(["distill.seed=7"], "again", print):
        assert Path.cwd() == kept and Path("runs").exists(), "with its checkpoints"
        assert checkout() == repository, "where runs and versions are registered"
        repro("distill", print)
    assert not kept.exists() and Path.cwd() == repository


@pytest.mark.services
def test_an_experiment_that_could_not_be_saved_is_saved_by_the_next_run(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = flows.experiment._dvc

    def refuse(*arguments: str, cwd: Path | None = None) -> str:
        if arguments[:2] == ("exp", "save"):
            raise StageFailed("start", 1, ["error: no space left"])
        return save(*arguments, cwd=cwd)

    monkeypatch.setattr(flows.experiment, "_dvc", refuse)
    with pytest.raises(StageFailed, match="no space left"):
        run("distill.seed=7")
    monkeypatch.undo()
    monkeypatch.chdir(repository)
    run("distill.seed=7")
    ran = git("show", "refs/pnp-guide/funny-name:params.yaml")
    assert YAML(typ="safe").load(ran)["distill"]["seed"] == 7
    assert len(Path("ran").read_text().split()) == 1, "and nothing is made twice"


@pytest.mark.services
def test_a_clone_without_the_teacher_cache_saves_its_experiments(repository: Path) -> None:
    """As after `dvc pull`, which does not bring what DVC's cache does not keep.

    And of a stage that did not run, dvc.lock says by which code it ran.
    """
    stages = YAML(typ="safe").load(Path("dvc.yaml"))["stages"]
    cached = {"cmd": "mkdir -p data/cache", "outs": [{"data/cache": {"cache": False}}]}
    stages["distill"]["deps"].append("data/cache")
    measured = {"cmd": "echo 1 > score", "params": ["evaluate"], "outs": ["score"]}
    before = {"cmd": "mkdir -p guides && echo 1 > guides/a", "deps": ["code"], "outs": ["guides/a"]}
    Path("code").write_text("old")
    with Path("dvc.yaml").open("w") as file:
        all_stages = {"prepare": before, "cache": cached, **stages, "evaluate": measured}
        YAML().dump({"stages": all_stages}, file)
    for stage in ("prepare", "cache", "distill"):
        repro(stage, print)
    git("add", ".")
    git("commit", "--quiet", "--message", "trained")
    Path("data/cache").rmdir()
    lock = YAML().load(Path("dvc.lock"))
    lock["stages"]["evaluate@renamed"] = {"cmd": "true", "outs": []}  # DVC forgets none
    with Path("dvc.lock").open("w") as file:
        YAML().dump(lock, file)
    Path("code").write_text("new")
    with experiment(["evaluate.seed=7"], "measured", print):
        repro("evaluate", print)
        commit = git("rev-parse", "HEAD")
        assert git("rev-parse", "refs/pnp-guide/measured") == commit, "kept however it ends"
    assert "measured" in dvc("exp", "list")
    (saved,) = git("for-each-ref", "--format=%(refname)", "refs/exps/*/*/measured").split()
    made = YAML(typ="safe").load(git("show", f"{saved}:dvc.lock"))["stages"]
    assert made["evaluate"]["outs"][0]["path"] == "score"
    assert made["prepare"] == YAML(typ="safe").load(Path("dvc.lock"))["stages"]["prepare"]


def test_a_setting_of_a_stage_that_is_left_out_is_refused_by_name(repository: Path) -> None:
    repro("distill", print)
    changed = overridden(Path("params.yaml"), ["distill.seed=7", "evaluate.seed=7"])
    with pytest.raises(StageFailed, match="distill.seed is 7, and distill, .* run with 0: start"):
        check_left_out(changed, "evaluate")
    check_left_out(changed, "distill")
    often = overridden(Path("params.yaml"), ["distill.report_every_images=7"])
    check_left_out(often, "evaluate")
    check_left_out(overridden(Path("params.yaml"), ["evaluate.seed=7"]), "evaluate")


def test_edits_that_are_not_committed_are_part_of_an_experiment(repository: Path) -> None:
    text = Path("params.yaml").read_text().replace("batch_size: 16", "batch_size: 8")
    Path("params.yaml").write_text(text)
    with experiment(["distill.seed=7"], "a", print):
        params = load_params(Path("params.yaml"))
        assert (params.distill.batch_size, params.distill.seed) == (8, 7)
        assert not git("status", "--porcelain", "--untracked-files=no").strip(), "all is committed"
        repro("distill", print)
    assert Path("params.yaml").read_text() == text
    assert git("status", "--porcelain").split()[:2] == ["M", "params.yaml"]


def test_two_runs_with_the_same_overrides_are_not_in_one_workspace_at_once(
    repository: Path,
) -> None:
    with experiment(["distill.seed=7"], "a", print):
        inside = Path.cwd()
        os.chdir(repository)
        with pytest.raises(StageFailed, match="another run has the same overrides"):
            run("distill.seed=7")
        os.chdir(inside)
        repro("distill", print)


@pytest.mark.services
def test_a_checkout_in_a_subfolder_of_a_larger_repository_with_a_space_and_accents_in_its_path(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    larger = tmp_path / "a larger één"
    larger.mkdir()
    (world / "dvc.yaml").write_text("stages: {}\n")
    world.rename(larger / "the guide")
    monkeypatch.chdir(larger / "the guide")
    call("git", "init", "--quiet", "..")
    dvc("init", "--quiet", "--subdir")
    git("add", "params.yaml", "dvc.yaml", ".dvc")
    git("commit", "--quiet", "--message", "toy")
    with experiment(["distill.seed=7"], "a", print):
        assert Path.cwd().name == "the guide" and checkout() == larger / "the guide"
        assert load_params(Path("params.yaml")).distill.seed == 7
        assert Path("models/base").is_dir() and Path("art/main.parquet").exists()
        Path("dvc.lock").write_text("schema: '2.0'\nstages: {}\n")
    assert "a" in dvc("exp", "list")


def test_a_path_that_dvc_can_not_write_is_told_by_the_name_of_its_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StageFailed, match="setting cache.dir is .*/é: .* ASCII's letters alone"):
        flows.experiment._set_path("cache.dir", tmp_path / "é", tmp_path)


@pytest.mark.services
def test_a_workspace_that_was_deleted_is_made_again_and_no_other_worktree_is_forgotten(
    repository: Path,
) -> None:
    """Which may be away, on a drive."""
    other = repository.with_name("other")
    git("worktree", "add", "--quiet", "--detach", str(other))
    other.rename(other.with_name("away"))
    with suppress(RuntimeError), experiment(["distill.seed=7"], "a", print):
        raise RuntimeError("of the stage")
    (kept,) = (repository / WORKSPACES).glob("pnp-*/")
    shutil.rmtree(kept)
    with suppress(RuntimeError), experiment(["distill.seed=7"], "a", print):
        assert load_params(Path("params.yaml")).distill.seed == 7
        raise RuntimeError("of the stage")
    assert str(other) in git("worktree", "list")


def test_outside_git_it_is_one_line_that_says_so(world: Path) -> None:
    with pytest.raises(StageFailed, match=r"start: overrides need git and DVC here, and git says"):
        run("distill.seed=7")


def test_what_is_brought_is_not_a_second_copy_and_replacing_it_leaves_the_first(
    tmp_path: Path,
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/file").write_text("old")
    bring(tmp_path / "a", tmp_path / "there/a")
    there = tmp_path / "there/a/file"
    assert there.stat().st_ino == (tmp_path / "a/file").stat().st_ino
    write_text(there, "new")
    assert (tmp_path / "a/file").read_text() == "old"


def test_what_was_mended_since_comes_with_the_next_go_and_what_git_has_stays(
    tmp_path: Path,
) -> None:
    source, target = tmp_path / "a", tmp_path / "there/a"
    source.mkdir()
    for name in ("bad", "deleted", "tracked"):
        (source / name).write_text(f"old {name}")
    bring(source, target)
    write_text(source / "bad", "good")  # a new file of the name
    write_text(source / "tracked", "changed")
    (source / "deleted").unlink()
    (source / "new").write_text("new")
    bring(source, target, {target / "tracked"})
    assert {path.name: path.read_text() for path in target.iterdir()} == {
        "bad": "good",
        "new": "new",
        "tracked": "old tracked",
    }


def test_empty_folders_and_links_are_brought(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_text("far")
    source, target = tmp_path / "a", tmp_path / "there/a"
    (source / "empty").mkdir(parents=True)
    (source / "folder").symlink_to("../elsewhere")
    (source / "file").symlink_to("../elsewhere/file")
    for _ in range(2):
        bring(source, target)
        assert (target / "empty").is_dir() and not list((target / "empty").iterdir())
        assert (target / "folder").resolve() == elsewhere
        assert (target / "file").read_text() == "far"


@pytest.mark.services
def test_a_failed_run_goes_on_with_an_input_that_was_mended(repository: Path) -> None:
    reference = Path("models/base/reference.parquet")
    for content in ("bad", "good"):
        write_text(repository / reference, content)
        with suppress(RuntimeError), experiment(["distill.seed=7"], "a", print):
            assert reference.read_text() == content
            raise RuntimeError("of the stage")


# GPUs


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine with the GPUs 2 and 5."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    monkeypatch.setattr(room.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(room, "SECONDS_BETWEEN_LOOKS", 0.01)


def test_of_gpus_a_run_has_all_that_it_needs_or_none(two_gpus: None) -> None:

    def refused(count: int) -> None:
        with (
            pytest.raises(StageFailed, match="are taken"),
            room.room("b", count, 0.01, print),
        ):
            pass

    def one_is_free(line: str) -> None:
        with room.room("c", 1, 0.0, print):
            waiting.append(line)

    waiting: list[str] = []
    with (
        room.room("a", 1, 1.0, print),
        pytest.raises(StageFailed, match="are taken"),
        room.room("b", 2, 0.01, one_is_free),
    ):
        pass
    assert waiting, "the one that is free is nobody's while another waits for both"
    with room.room("d", 2, 1.0, print):
        refused(1)


def test_a_gpu_is_one_runs_at_a_time_and_the_wait_for_it_is_told_and_ends(
    two_gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    with room.room("a", 1, 1.0, lines.append) as first, room.room("b", 1, 1.0, print) as second:
        assert [first, second] == [{"CUDA_VISIBLE_DEVICES": n} for n in ("2", "5")]
        with (
            pytest.raises(StageFailed, match="the GPUs of this machine are taken; waited 0:01"),
            room.room("c", 1, 0.01, lines.append),
        ):
            pass
        assert lines == ["c: waiting for a GPU, 0:01 at most"]
    with room.room("d", 8, 1.0, print) as all_of_them:
        assert all_of_them == {"CUDA_VISIBLE_DEVICES": "2,5"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with room.room("e", 1, 0.0, print) as none:
        assert none == {}


def test_a_path_outside_the_checkout_is_named_in_full(world: Path) -> None:
    assert evaluate._placed("models/tuned") == "models/tuned"
    assert evaluate._placed("../x") == str(world.parent / "x")


@pytest.mark.services
def test_paths_that_leave_the_checkout_lead_to_the_same_in_its_workspace(
    repository: Path,
) -> None:
    (repository / "models/base").rename(repository.parent / "far")
    text = Path("params.yaml").read_text()
    Path("params.yaml").write_text(re.sub(r"^base: .*$", "base: ../far", text, flags=re.MULTILINE))
    stages = YAML(typ="safe").load(Path("dvc.yaml"))
    stages["stages"]["distill"] |= {
        "cmd": f"echo ran >> '{repository}/ran' && ls ../far > guides/distilled",
        "deps": ["../far"],
        "params": ["distill", "base"],
    }
    with Path("dvc.yaml").open("w") as file:
        YAML().dump(stages, file)
    Path("guides").mkdir()
    repro("distill", print)
    git("add", ".")
    git("commit", "--quiet", "--message", "far")
    with experiment(["evaluate.seed=7"], "a", print):
        assert Path(load_params(Path("params.yaml")).base).samefile(repository.parent / "far")
        repro("distill", print)
        assert not Path("ran").exists()
    assert Path("ran").read_text() == "ran\n", "nothing that DVC looks at is another"
    assert (repository.parent / "far/model_index.json").exists(), "the link alone is removed"
    assert not list(WORKSPACES.glob("pnp-*/")) and len(git("worktree", "list").splitlines()) == 1
    dvc("exp", "apply", "a")
    assert load_params(Path("params.yaml")).base == "../far"


def test_a_long_text_is_no_path_and_configs_come_with_their_single_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_text(Path("models/one.safetensors"), "")
    write_text(Path("models/one/model_index.json"), "{}")
    params = f"base: models/one.safetensors\nevaluate: {{grid_prompts: ['{'word ' * 100}', none]}}"
    assert set(flows.experiment._inputs(params)) == {
        Path("models/one.safetensors"),
        Path("models/one"),
    }


@pytest.mark.services
def test_what_a_workspace_sends_stays_when_it_goes(repository: Path) -> None:
    """To `storage` and to DVC's remote, also where they are relative and in the checkout.

    And no other remote, or what it is reached with, is another there.
    """
    Path("shared").mkdir()
    values = toy.toy_params() | {"storage": "shared"}
    toy.write_params(Path(), values)
    dvc("remote", "add", "--default", "team", "sent")
    with Path(".dvc/config").open("a") as file:
        for name, url in (("bucket", "s3://bucket/prefix"), ("file", f"file://{repository}/far")):
            file.write(f"['remote \"{name}\"']\nurl = {url}\n")
        file.write("['remote \"other\"']\nurl = ssh://other/place\nkeyfile = ../key\n")
    git("add", ".dvc/config")
    remotes = {line for line in dvc("config", "--list").split() if line.startswith("remote.")}
    with experiment(["distill.seed=7"], "a", print):
        Path("shared/shard").write_text("new")
        repro("distill", print)
        dvc("push")
        there = dict(line.split("=") for line in dvc("config", "--list").split())
        assert {f"{name}={there[name]}" for name in there if name.startswith("remote.")} == remotes
    assert Path("shared/shard").read_text() == "new"
    assert [path for path in Path("sent").rglob("*") if path.is_file()]


def test_what_settings_of_remotes_name_by_relative_paths_is_the_same_in_a_workspace(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of DVC's: where it takes one for a path, it tells it whole."""

    def dvc_in(*arguments: str, cwd: Path) -> None:
        with chdir(cwd):
            dvc(*arguments)

    kinds = {kind: keys for kind, keys in REMOTE_SCHEMAS.items() if kind not in ("", "remote")}
    from_here = {("ssl_verify", "certificates.pem"), ("kerb_ticket", "ticket")}
    for _, name in from_here:
        Path(name).touch()
    with Path(".dvc/config").open("a") as file:
        for kind, keys in kinds.items():
            texts = [str(key) for key, value in keys.items() if value is str and key != "url"]
            given = {key: f"../of/{key}" for key in texts} | dict(from_here)
            file.write(f"['remote \"{kind}\"']\nurl = {kind}://place/prefix\n")
            file.writelines(
                f"{key} = {given[key]}\n" for key in (*texts, "ssl_verify") if key in keys
            )
        file.write("['remote \"plain\"']\nurl = https://place/prefix\nssl_verify = false\n")
    git("add", ".dvc/config")

    def settings() -> dict[str, str]:
        told = dict(line.partition("=")[::2] for line in dvc("config", "--list").splitlines())
        for name, value in told.items():
            if (name.rpartition(".")[2], Path(value).name) in from_here:
                told[name] = str(Path(value).resolve())
        return {name: value for name, value in told.items() if name.startswith("remote.")}

    here = settings()
    assert here["remote.gdrive.gdrive_user_credentials_file"].startswith(f"{repository}/of/")
    monkeypatch.setattr(flows.experiment, "_dvc", dvc_in)  # a process for each takes seconds
    with flows.experiment.workspace(Path("params.yaml").read_text(), "a", print):
        assert Path.cwd() != repository and settings() == here


@pytest.mark.parametrize(
    "path", few_of(["guides/bundle/guide.safetensors", "dvc.lock"], "dvc.lock")
)
def test_another_guide_is_measured_anew_and_not_the_one_of_a_run_that_failed(
    repository: Path, path: str
) -> None:
    """Though git knows nothing of either."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    for content in ("schema: '2.0'\n# old\n", "schema: '2.0'\n# new\n"):
        write_text(repository / path, content)
        with suppress(RuntimeError), experiment(["distill.seed=7"], "a", print):
            assert Path(path).read_text() == content
            raise RuntimeError("of the stage")
