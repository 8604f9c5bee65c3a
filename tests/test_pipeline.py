"""The stages together: DVC's graph, and training on Ray."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file

from components import cache, distill, prepare
from components.cluster import run_training
from components.environment import quiet
from components.following import Report
from components.params import Params, load_params
from components.paths import DISTILLED
from tests import toy
from tests.commands import dvc

pytest_plugins = ["tests.toy"]
quiet()

ROOT = Path(__file__).parent.parent
STAGES = ("prepare", "cache", "distill", "halve", "evaluate", "register")
TRAINED = {"distill", "halve"}
CODE = ("components/", "pnp_core/")
# What can't change a stage's result: it carries parameters in and messages out.
PLUMBING = {"cli", "cluster", "disk", "environment", "errors", "following", "inputs", "interrupt"}
PLUMBING |= {"joining", "liveness", "mlflow_place", "params", "paths", "places", "progress"}
PLUMBING |= {"room", "rules", "section", "shipping", "snapshot"}
# Nor a guide: what records its training, and what brings shards, whose checksums are compared.
CHANGES_NO_GUIDE = {"components/storage.py", "components/tracking"}


def own_imports(path: Path) -> Iterator[Path]:
    """Modules of this repository that a module imports, wherever in its body."""
    nodes: list[ast.AST] = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        nodes += ast.iter_child_nodes(node)
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if not name.startswith(("components.", "pnp_core.")):
                continue
            place = ROOT / name.replace(".", "/")
            for file in (place.with_suffix(".py"), place / "__init__.py"):
                if file.exists() and file.stem not in PLUMBING:
                    yield file


def dependency(path: Path) -> str:
    """How `deps` name a module: by its file, or by the folder of its package."""
    return "/".join(path.relative_to(ROOT).parts[:2])


@pytest.mark.parametrize("stage", STAGES)
def test_deps_are_the_modules_that_the_stage_imports(stage: str) -> None:
    left_out = CHANGES_NO_GUIDE if stage in TRAINED else set()
    found, waiting = set(), [ROOT / f"components/{stage}.py"]
    while waiting:
        path = waiting.pop()
        if path not in found and dependency(path) not in left_out:
            found.add(path)
            waiting += own_imports(path)
    defined = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"][stage]
    deps = {dep for dep in defined.get("do", defined)["deps"] if dep.startswith(CODE)}
    assert deps == {dependency(path) for path in found}


def into_repository(folder: Path) -> None:
    """Put the code, DVC's graph and git around the toy world in `folder`."""
    for name in ("components", "pnp_core"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    (folder / ".dvc").mkdir()
    for name in ("dvc.yaml", ".dvcignore", ".gitignore", ".dvc/config", ".dvc/.gitignore"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / ".dvc/plots", folder / ".dvc/plots")
    git = ("git", "-c", "user.name=Test", "-c", "user.email=test@example.org")
    for command in (("init", "--quiet"), ("add", "."), ("commit", "--quiet", "--message", "Toy")):
        subprocess.run([*git, *command], cwd=folder, check=True)


@pytest.fixture
def repository(world: Path) -> Path:
    """A git and DVC repository around a toy world."""
    into_repository(world)
    return world


@pytest.fixture
def trained_repository(
    trained_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The same around a world in which all stages have run, with DVC told that they have."""
    folder = tmp_path / "world"
    shutil.copytree(trained_world, folder)
    monkeypatch.chdir(folder)
    into_repository(folder)
    dvc("commit", "--force", "--quiet")
    return folder


@pytest.mark.services
def test_dvc_runs_everything_once(repository: Path) -> None:
    output = dvc("repro")
    assert "| tuned " in output and "registered: pnp-guide version 1" in output
    assert "Traceback" not in output and "Warning" not in output
    assert "up to date" in dvc("status")
    assert "Running" not in dvc("repro")


def test_a_stages_command_is_run_by_dvc_and_a_bad_parameter_fails_it_in_one_line(
    repository: Path,
) -> None:
    output = dvc("repro", "prepare")
    assert "Running stage 'prepare':\n> python -m components.prepare\n" in output
    assert "prepare: images of 32 px: 20 train, 4 heldout" in output
    assert Path("data/prepared/manifest.json").exists()
    assert "Running" not in dvc("repro", "prepare")
    params = toy.toy_params()
    params["prepare"]["resolution"] = "fast"
    toy.write_params(repository, params)
    output = dvc("repro", "prepare", expected=255)
    assert "prepare.resolution: should be a valid integer, but is 'fast' (str)" in output
    assert "Traceback" not in output
    assert Path("data/prepared/manifest.json").exists(), "the last result stays"


def test_what_the_stages_write_is_all_that_dvc_looks_for(trained_repository: Path) -> None:
    assert "up to date" in dvc("status")
    changed = subprocess.run(["git", "status", "--short"], capture_output=True, text=True).stdout
    assert changed == "?? dvc.lock\n"
    metrics = dvc("metrics", "show")
    assert "results/evaluate/base/metrics.json" in metrics and "fvu" in metrics
    assert max(map(len, metrics.splitlines())) <= 100
    dvc("plots", "show", "--out", "plots")
    page = Path("plots/index.html").read_text()
    assert "Quality against cost" in page and "UNet forwards an image" in page
    assert "FID against CLIP score over guidance scales" in page and "grid.png" in page


def test_a_stage_is_out_of_date_where_what_it_reads_has_changed_and_no_other(
    trained_repository: Path,
) -> None:
    # Another server changes no result; other rules of promotion change what the report says.
    params = toy.toy_params()
    params["tracking"]["experiment"] = "other"
    toy.write_params(trained_repository, params)
    assert "up to date" in dvc("status")
    params["promote"]["min_images"] = 100
    toy.write_params(trained_repository, params)
    assert set(json.loads(dvc("status", "--json"))) == {"register"}

    # Code makes out of date what it can change: tracking no guide, training no teacher cache.
    for module, stages in (("components/tracking/lock.py", set()), ("pnp_core/soap.py", TRAINED)):
        Path(module).write_text(Path(module).read_text() + "# changed\n")
        changed = set(json.loads(dvc("status", "--json")))
        assert changed & {"cache", *TRAINED} == stages


def test_dvc_has_a_stage_for_a_model_of_any_name_that_params_yaml_may_have(
    repository: Path,
) -> None:
    params = toy.toy_params()
    for name in ("SDXL_Turbo-v2", "8Shaper"):
        params["models"][name] = params["models"]["tuned"]
        toy.write_params(repository, params)
        load_params(Path("params.yaml"))
        output = dvc("repro", "--dry", "--single-item", "--force", f"evaluate@{name}")
        assert f"python -m components.evaluate --model {name}\n" in output


def distill_and_lose_a_worker(params: Params, report: Report) -> None:
    """The distill stage's work; its second worker is killed once, after a checkpoint."""
    from pnp_core.train import rank_and_world

    def report_or_die(num_images: int, metrics: Mapping[str, float]) -> None:
        report(num_images, metrics)
        rank, world = rank_and_world()
        assert world == 2
        if num_images == 48 and rank == 1 and not Path("killed").exists():
            Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    distill.train_guide(params, report_or_die)


@pytest.mark.services
def test_two_ray_workers_of_which_one_dies_train_the_same_guide(world: Path) -> None:
    params = load_params(Path("params.yaml"))
    prepare.run(params)
    cache.run(params)
    reports: list[tuple[int, Mapping[str, Any]]] = []

    def train(num_workers: int, work: Any) -> dict[str, torch.Tensor]:
        values = toy.toy_params()
        values["cluster"]["num_workers"] = num_workers
        toy.write_params(world, values)
        shutil.rmtree("runs", ignore_errors=True)
        run_training(
            work,
            load_params(Path("params.yaml")),
            lambda num_images, metrics: reports.append((num_images, metrics)),
            name="distill",
        )
        return load_file(DISTILLED / "diffusion_pytorch_model.safetensors")

    alone = train(0, distill.train_guide)
    assert [num_images for num_images, _ in reports] == [16, 32, 48, 64]
    losses = [metrics["loss"] for _, metrics in reports]
    reports.clear()
    together = train(2, distill_and_lose_a_worker)
    assert Path("killed").exists()
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=0, atol=2e-3)
    # After the restart from the checkpoint at 32 images, 48 may be reported again.
    assert [num_images for num_images, _ in reports if num_images != 48] == [16, 32, 64]
    assert dict(reports)[64]["loss"] == pytest.approx(losses[-1], rel=1e-3)


def build_and_lose_a_worker(params: Params) -> Callable[[str], None]:
    """The cache stage's work; the worker that builds a certain shard is killed once."""
    build = cache.shard_building(params)

    def build_or_die(name: str) -> None:
        if name == "pairs-forward-00001" and not Path("killed").exists():
            Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        build(name)

    return build_or_die


@pytest.mark.services
def test_two_ray_workers_of_which_one_dies_build_the_cache_that_one_process_does(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    params = load_params(Path("params.yaml"))
    prepare.run(params)
    cache.run(params)
    alone = {path.name: path.read_bytes() for path in Path("data/cache").iterdir()}
    shutil.rmtree("data/cache")
    values = toy.toy_params()
    values["cluster"]["num_workers"] = 2
    toy.write_params(world, values)
    work = cache.run_tasks
    monkeypatch.setattr(
        cache,
        "run_tasks",
        lambda make, *rest, **named: work(build_and_lose_a_worker, *rest, **named),
    )
    capsys.readouterr()
    cache.run(load_params(Path("params.yaml")))
    assert Path("killed").exists()
    assert {path.name: path.read_bytes() for path in Path("data/cache").iterdir()} == alone
    assert re.search(r"cache: (\d+)/\1 pairs, 100%", capsys.readouterr().out)
