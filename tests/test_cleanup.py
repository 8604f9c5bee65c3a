"""What nothing needs any more can go, and what is needed stays."""

import fcntl
import shutil
import subprocess
from pathlib import Path

import pytest
from mlflow import MlflowClient
from ruamel.yaml import YAML

from components import cleanup
from components.params import load_params
from components.references import files_hash, judge_hash, kept_at
from components.storage import Mirror
from components.tracking import Run, Store, garbage
from components.tracking.journal import KEY
from pnp_core.files import write_text
from tests import stores, toy
from tests.commands import dvc
from tests.stores import NAME, TOY, folder_of

pytest_plugins = ["tests.toy", "tests.stores"]


def git(*arguments: str) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@localhost")
    subprocess.run(["git", *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def checkout(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git and DVC repository whose one stage writes the seed; nothing is run yet."""
    monkeypatch.setattr(garbage, "SECONDS_UNTOUCHED", 0.0)
    write = "mkdir -p guides && cat params.yaml > guides/distilled"
    stage = {"cmd": write, "params": ["distill.seed"], "outs": ["guides/distilled"]}
    with open("dvc.yaml", "w") as file:
        YAML().dump({"stages": {"distill": stage}}, file)
    Path(".gitignore").write_text("/guides\n/mlflow.db\n/mlartifacts\n/guide-*\n/runs\n")
    git("init", "--quiet")
    dvc("init", "--quiet")
    return place


def make(seed: int) -> None:
    params = toy.toy_params()
    params["distill"]["seed"] = seed
    toy.write_params(Path(), params)
    dvc("repro")


def commit(message: str) -> None:
    git("add", ".")
    git("commit", "--quiet", "--message", message)


def register_as(alias: str) -> None:
    """A version that the present dvc.lock made, with this alias."""
    version, client = stores.register(0.5), MlflowClient()
    client.set_model_version_tag(NAME, version, "lock_hash", cleanup.hash_of(_lock()))
    client.set_registered_model_alias(NAME, alias, version)


def clean(*, remove: bool = False) -> None:
    cleanup.run(load_params(Path("params.yaml")), remove=remove)


def cached() -> set[str]:
    return {p.read_text() for p in Path(".dvc/cache/files").rglob("*") if p.is_file()}


def seeds() -> set[int]:
    return {YAML(typ="safe").load(text)["distill"]["seed"] for text in cached()}


def test_of_dvcs_cache_what_neither_a_commit_nor_the_lock_has_can_go(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (1, 2, 3):
        make(seed)
        if seed == 1:
            commit("one")
    capsys.readouterr()
    clean()
    assert "could go: python -m components.cleanup --remove" in capsys.readouterr().out
    assert seeds() == {1, 2, 3}, "nothing goes unasked"
    clean(remove=True)
    assert seeds() == {1, 3}


@pytest.mark.services
def test_a_champion_whose_lock_no_commit_has_keeps_dvcs_cache(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(1)
    register_as("previous")
    make(2)
    make(3)
    clean(remove=True)
    assert seeds() == {1, 2, 3}
    assert "previous: commit its dvc.lock first; left alone" in capsys.readouterr().out


def test_what_git_stash_has_keeps_dvcs_cache(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(1)
    commit("one")
    make(2)
    git("stash")
    dvc("checkout")
    clean(remove=True)
    assert "git's stash@{0}: commit its dvc.lock first; left alone" in capsys.readouterr().out
    git("stash", "pop")
    dvc("checkout")
    assert seeds() == {1, 2}
    make(3)
    git("stash")
    git("stash", "drop")
    dvc("checkout")
    clean(remove=True)
    assert seeds() == {1}


def test_a_champion_whose_lock_only_an_experiment_began_with_keeps_dvcs_cache(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(1)
    commit("one")
    register_as("champion")
    clean()
    assert "left alone" not in capsys.readouterr().out.split("DVC's cache")[1]
    make(2)
    commit("an experiment")
    git("update-ref", "refs/exps/ab/cdef/tried", "HEAD")
    git("checkout", "--quiet", "--orphan", "anew")
    git("commit", "--quiet", "--message", "anew")
    git("branch", "--quiet", "-D", "master")
    clean(remove=True)
    assert "champion: commit its dvc.lock first; left alone" in capsys.readouterr().out
    assert seeds() == {1, 2}


def test_a_link_goes_alone_and_what_is_after_it_too(checkout: Path) -> None:
    make(1)
    Path("results/sampled/zz").mkdir(parents=True)
    Path("results/sampled/zz/image").write_text("made")
    Path("elsewhere").mkdir()
    Path("elsewhere/kept").write_text("of somebody")
    Path("results/sampled/old").symlink_to(Path("elsewhere").resolve())
    clean(remove=True)
    assert not list(Path("results/sampled").iterdir()) and Path("elsewhere/kept").exists()


def _lock() -> str:
    return Path("dvc.lock").read_text()


def test_what_a_workspaces_lock_has_stays_however_deep_it_lies_and_goes_with_it(
    checkout: Path,
) -> None:
    make(1)
    commit("one")
    place = Path(".dvc/tmp/exps/pnp-0123456789ab")
    inside = place / "checkout/checkout"  # as where params.yaml leads two folders up
    git("worktree", "add", "--quiet", "--detach", str(inside), "HEAD")
    make(2)
    shutil.copy("dvc.lock", inside)
    make(1)
    lock = place.with_suffix(".lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)  # a run is in it
    clean(remove=True)
    assert seeds() == {1, 2} and inside.exists()
    lock.close()
    clean(remove=True)
    clean(remove=True)
    assert seeds() == {1} and not place.exists()
    worktrees = subprocess.run(["git", "worktree", "list"], capture_output=True, text=True)
    assert len(worktrees.stdout.splitlines()) == 1


@pytest.mark.services
def test_an_experiment_that_broke_off_and_what_is_unneeded_beside_it_go_in_one_call(
    checkout: Path,
) -> None:
    make(1)
    commit("one")
    place = Path(".dvc/tmp/exps/pnp-0123456789ab")
    git("worktree", "add", "--quiet", "--detach", str(place), "HEAD")
    other = checkout.with_name("other")
    git("worktree", "add", "--quiet", "--detach", str(other), "HEAD")
    for seed in (2, 3):
        make(seed)
    clean(remove=True)
    assert not place.exists() and seeds() == {1, 3}
    other.rename(other.with_name("away"))
    place.mkdir()
    git("worktree", "add", "--force", "--quiet", "--detach", str(place), "HEAD")
    clean(remove=True)
    known = cleanup.ask("git", "worktree", "list") or ""
    assert str(other) in known and str(place) not in known, "a drive may be away"


def test_what_dvc_says_is_told_where_it_removes_nothing(
    checkout: Path,
) -> None:
    commit("one")
    for seed in (1, 2):
        make(seed)
    pile = cleanup.dvc_cache(load_params(Path("params.yaml")))
    Path("dvc.yaml").write_text("stages: 1\n")
    with pytest.raises(ValueError, match=r"dvc gc` fails: .*dvc\.yaml"):
        pile.remove()


@pytest.mark.services
def test_what_another_git_worktree_needs_of_the_cache_stays(
    checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(1)
    commit("one")
    other = tmp_path / "other"
    git("worktree", "add", "--quiet", "--detach", str(other), "HEAD")
    make(2)
    shutil.copy("dvc.lock", other)
    make(3)
    cleanup.ask(*cleanup.DVC, "--cd", str(other), "cache", "dir", "--local", ".dvc/own")
    assert cleanup.sharers(Path(".dvc/cache").resolve()) == []
    ours = str(Path(".dvc/cache").resolve())
    cleanup.ask(*cleanup.DVC, "--cd", str(other), "cache", "dir", "--local", ours)
    make(4)
    clean(remove=True)
    assert seeds() == {1, 2, 4}
    other.rename(tmp_path / "away")
    make(5)
    clean(remove=True)
    assert seeds() == {1, 2, 4, 5} and "is not there: bring it, or" in capsys.readouterr().out


def test_of_versions_judged_anew_the_champion_the_one_before_and_the_newest_stay(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(1)
    for number in range(1, 5):
        assert stores.register(number / 10) == str(number)
    client = MlflowClient()
    client.set_registered_model_alias(NAME, "previous", "1")
    client.set_registered_model_alias(NAME, "champion", "2")
    folders = [f"{NAME}-{number}" for number in range(1, 5)] + ["unknown-1"]
    for folder in folders:
        write_text(Path("runs/reevaluated", folder, "image"), "image")
    monkeypatch.setattr(garbage, "SECONDS_UNTOUCHED", 60.0)
    assert cleanup.reevaluated(load_params(Path("params.yaml"))).unneeded == 0, "they are young"
    monkeypatch.setattr(garbage, "SECONDS_UNTOUCHED", 0.0)
    clean(remove=True)
    left = {path.name for path in Path("runs/reevaluated").iterdir()}
    assert left == set(folders) - {f"{NAME}-3"}


def test_a_cache_that_others_share_is_left_alone(
    checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dvc("cache", "dir", "--local", str(tmp_path / "shared"))
    for seed in (1, 2):
        make(seed)
    before = sorted((tmp_path / "shared").rglob("*"))
    clean(remove=True)
    assert sorted((tmp_path / "shared").rglob("*")) == before
    assert "shared with others" in capsys.readouterr().out


def test_of_mlflow_what_belongs_to_no_run_and_no_version_can_go(checkout: Path) -> None:
    make(1)
    kept = stores.register(0.5)
    store = Store(TOY)
    with Run(store, TOY, "register", params={}) as alive, Run(store, TOY, "x", params={}) as gone:
        for run in (alive, gone):
            run.file(Path("params.yaml"))
    store.client.delete_run(gone.id)
    broken = upload_that_broke_off(store)
    clean(remove=True)
    assert not broken.exists()
    assert not any(gone.id in path.parts for path in Path("mlartifacts").rglob("*"))
    assert any(alive.id in path.parts for path in Path("mlartifacts").rglob("params.yaml"))
    assert (folder_of(kept) / "summary.json").exists()


def test_a_guide_whose_version_another_registry_has_stays(
    checkout: Path, fresh_database: Path
) -> None:
    make(1)
    files = folder_of(stores.register(0.5))
    shutil.copy(fresh_database, "other.db")
    elsewhere = MlflowClient(registry_uri="sqlite:///other.db")
    elsewhere.create_registered_model(NAME)
    made = MlflowClient().get_model_version(NAME, "1")
    version = elsewhere.create_model_version(NAME, made.source, made.run_id)
    elsewhere.set_registered_model_alias(NAME, "champion", version.version)
    MlflowClient().delete_registered_model(NAME)
    clean(remove=True)
    assert (files / "summary.json").exists()


def test_what_judges_saw_goes_unless_params_yaml_names_judge_and_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    toy.write_params(Path(), toy.toy_params())
    params = load_params(Path("params.yaml"))
    for name in ("models/judge/config.json", "data/prepared/train.parquet", "art/tuned.parquet"):
        Path(name).parent.mkdir(parents=True)
        Path(name).write_text(name)
    judge = judge_hash("models/judge")
    paths = {
        of: kept_at(judge, files_hash(Path(of))) for of in ("data/prepared", "art/tuned.parquet")
    }
    paths["another judge"] = kept_at("another", files_hash(Path("data/prepared")))
    paths["other pictures"] = kept_at(judge, "other")
    for path in paths.values():
        write_text(path, "features")
    Path("art/tuned.parquet").rename("away")
    pile = cleanup.features(params)
    assert pile.unneeded == 0 and "no art/tuned.parquet: left alone" in pile.note
    Path("away").rename("art/tuned.parquet")
    pile = cleanup.features(params)
    assert (pile.num_bytes, pile.unneeded) == (32, 16)
    pile.remove()
    there = {of for of, path in paths.items() if path.exists()}
    assert there == {"data/prepared", "art/tuned.parquet"}


def upload_that_broke_off(store: Store, **tags: str) -> Path:
    """A guide's files in MLflow of which no version was made."""
    tags = tags or {KEY: "key"}
    model = store.client.create_logged_model(store.experiment("toy"), name="guide", tags=tags)
    Path("half").mkdir(exist_ok=True)
    Path("half/file").touch()
    store.client.log_model_artifacts(model.model_id, "half")
    return Path("mlartifacts/models", model.model_id)


def test_what_is_young_may_be_a_registration_under_way(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(1)
    monkeypatch.setattr(garbage, "SECONDS_UNTOUCHED", 60.0)
    young = upload_that_broke_off(Store(TOY))
    clean(remove=True)
    assert young.exists()


def test_files_that_the_database_does_not_know_stay(checkout: Path, fresh_database: Path) -> None:
    """They are another program's, or of this database before it was lost."""
    make(1)
    theirs = upload_that_broke_off(Store(TOY), owner="another program")
    version = folder_of(stores.register(0.5))
    Path("mlartifacts/7/trace").mkdir(parents=True)
    clean(remove=True)
    shutil.copy(fresh_database, "mlflow.db")
    clean(remove=True)
    assert theirs.exists() and version.exists() and Path("mlartifacts/7/trace").exists()


def test_checkpoints_stay_until_their_stage_is_finished(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cleanup, "TRAINED", ("distill",))
    make(1)
    checkpoint = Path("runs/distill/checkpoint.pt")
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text("state")
    shutil.copy("params.yaml", "before.yaml")
    params = Path("params.yaml").read_text().replace("seed: 1", "seed: 2", 1)
    Path("params.yaml").write_text(params)
    clean(remove=True)
    assert checkpoint.exists()
    shutil.copy("before.yaml", "params.yaml")
    clean(remove=True)
    assert not checkpoint.exists()


def test_what_storage_takes_is_told_and_stays(
    checkout: Path, s3: str, capsys: pytest.CaptureFixture[str]
) -> None:
    toy.write_params(Path(), toy.toy_params() | {"storage": s3})
    mirror = Mirror(s3)
    Path("shard").write_bytes(bytes(3_000_000))
    for name in ("cache/key/shard", "files/sha256"):
        mirror.send(Path("shard"), name)
    clean(remove=True)
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith(f"storage, {s3}"))
    assert " 6 MB, not needed       0 MB" in line and len(mirror.names()) == 2
