"""Rivals that train, in the table at equal cost: trained alike, kept, sampled, told straight."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.frontier import run, table, trained, training, workbench
from benchmarks.frontier.page import as_markdown
from benchmarks.frontier.settings import (
    CONSISTENT,
    LABELS,
    LARGE,
    MOST,
    TRAINED_LABELS,
    Setting,
    layouts,
)
from benchmarks.peers import TRAINED, Peer
from benchmarks.peers.training import Trainer, fingerprint
from components import cache, prepare
from components.params import Params, load_params
from pnp_core.bundle import GuideBundle
from pnp_core.files import read_json
from pnp_core.guide import Guide, GuideConfig
from pnp_core.model_files import weights_hash
from pnp_core.models import load_pipeline
from pnp_core.sample import initial_noise
from tests import toy
from tests.conftest import roused
from tests.test_frontier import cell

pytest_plugins = ["tests.toy"]


@pytest.fixture(scope="module")
def cached_world(untouched_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy world with a cache."""
    with toy.inside_copy(untouched_world, tmp_path_factory.mktemp("cached")) as folder:
        values = toy.toy_params()
        values["distill"] |= {"num_images": 480, "report_every_images": 16}
        values["halve"] |= {"num_images": 32}
        toy.write_params(folder, values)
        found = load_params(Path("params.yaml"))
        prepare.run(found)
        cache.run(found)
    return folder


@pytest.fixture
def params(cached_world: Path, tmp_path: Path) -> Iterator[Params]:
    with toy.inside_copy(cached_world, tmp_path):
        yield load_params(Path("params.yaml"))


def bench_of(params: Params) -> workbench.Workbench:
    unet = load_pipeline(params.base).unet
    guide = roused(Guide.from_unet(unet, GuideConfig(max_parameters_ratio=0.2)))
    bundles = {"guided": GuideBundle({8: guide})}
    model = params.models["base"]
    rivals = trained.trained(unet, params)
    return workbench.Workbench("base", model, params, bundles, rivals)


def index_of(name: str) -> dict[str, Any]:
    about: dict[str, Any] = read_json(trained.FOLDER / name / trained.INDEX)
    return about


def test_all_rivals_that_there_are_can_be_trained_and_have_a_name(params: Params) -> None:
    names = trained.methods(params).keys()
    assert names == training.FIRST_RATES.keys() == TRAINED_LABELS.keys() == {"ours", *TRAINED}
    assert names <= LABELS.keys()
    jobs = [name.split() for _, name, _ in run.jobs(["base"], [8], final=False)]
    assert {words[1] for words in jobs if words[-1] == "trained"} == names


@pytest.mark.parametrize("method", TRAINED_LABELS)
@pytest.mark.parametrize("most_steps", [16, 15, 10, 8, 5, 1, 0])
def test_a_trained_rival_takes_as_many_steps_as_it_can_or_as_it_is_halved_to(
    method: str, most_steps: int
) -> None:
    found = {(s.solver, s.num_steps) for s in layouts(method, 16, most_steps=most_steps)}
    if method in CONSISTENT:
        assert found == ({("lcm", most_steps)} if 1 <= most_steps <= 8 else set())
    elif most_steps == 0:
        assert not found
    else:
        power = max(n for n in (16, 8, 4, 2, 1) if n <= most_steps)
        others = {(solver, most_steps) for solver in ("dpmsolver++", "unipc")}
        assert found == {("ddim", most_steps), ("ddim", power), *others}


def test_a_method_is_trained_once_halved_and_sampled_by_its_own_weights(params: Params) -> None:
    training.train_all(["agd"], params)
    folder, about = trained.FOLDER / "agd", index_of("agd")
    assert about["num_steps"] == [4, 8]
    assert about["learning_rate"] in training.RATES and len(about["tried"]) >= 2
    assert about["num_images"] == 480 and about["params_ratio"] > 0
    assert about["tried"][f"{about['learning_rate']:g}"] == min(about["tried"].values())
    written = (folder / "steps-4.safetensors").stat().st_mtime_ns
    training.train_all(["agd"], params)
    assert (folder / "steps-4.safetensors").stat().st_mtime_ns == written

    bench = bench_of(params)
    tasks = workbench.tasks_of(params, 4, 0)
    of = {
        solver: Setting(method="agd", solver=solver, num_steps=4, scale=4.0)
        for solver in ("ddim", "unipc")
    }
    rival = bench.rivals["agd"]
    assert rival.peer(4, "ddim") is rival.peers[4]
    assert rival.peer(4, "unipc") is rival.peers[8]
    assert rival.peer(7, "ddim") is rival.peers[8]
    halved, unhalved = (
        torch.cat([p.flatten() for p in x.parameters()]) for x in rival.peers.values()
    )
    assert not torch.equal(halved, unhalved)
    images, _ = bench.images(of["ddim"], tasks)
    plain = Setting(method="unguided", solver="ddim", num_steps=4, scale=1.0)
    assert not np.array_equal(images, bench.images(plain, tasks)[0])
    assert bench.digest(list(of.values())) == about["digest"]
    assert bench.has("agd") and bench.has("cfg") and not bench.has("dice")


@pytest.mark.parametrize("name", TRAINED_LABELS)
def test_weights_of_every_method_are_read_as_they_were_written(name: str, params: Params) -> None:
    torch.manual_seed(0)
    unet = load_pipeline(params.base).unet
    peer = trained.methods(params)[name](unet)
    with torch.no_grad():
        for p in peer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    base = weights_hash(params.base)[:16]
    trained.save(trained.FOLDER / name, {8: peer}, {"base_hash": base})
    ((found, read),) = trained.trained(unet, params).items()
    assert found == name and read.peers.keys() == {8}
    for ours, theirs in zip(
        peer.state_dict().values(), read.peers[8].state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.services
def test_training_that_was_interrupted_goes_on_without_trying_rates_again(
    params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits: list[tuple[float, bool]] = []
    fit = training.fit

    def counted(name: str, trainer: Any, rate: float, **more: Any) -> Peer:
        fits.append((rate, "losses" in more))
        return fit(name, trainer, rate, **more)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "fit", counted)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "halve", killed)
        training.train_all(["lora-1"], params)
    num_trials = sum(is_trial for _, is_trial in fits)
    assert num_trials >= 2
    training.train_all(["lora-1"], params)
    assert sum(is_trial for _, is_trial in fits) == num_trials
    assert f"{fits[-1][0]:g}" in index_of("lora-1")["tried"]


@pytest.mark.services
def test_another_setting_trains_anew_and_other_bases_weights_are_not_taken(
    params: Params, tmp_path: Path
) -> None:
    training.train_all(["dice"], params)
    first = index_of("dice")
    values = toy.toy_params()
    values["distill"] |= {"num_images": 480, "report_every_images": 16}
    values["halve"] |= {"num_images": 32, "learning_rate": 2e-3}
    toy.write_params(Path(), values)
    other = load_params(Path("params.yaml"))
    training.train_all(["dice"], other)
    second = index_of("dice")
    assert first["settings"] != second["settings"] and first["digest"] != second["digest"]
    unet = load_pipeline(params.base).unet
    assert trained.trained(unet, params).keys() == {"dice"}
    moved = params.model_copy(update={"base": "models/tuned"})
    assert not trained.trained(unet, moved)


@pytest.mark.services
def test_what_a_run_fixes_is_paid_for_once(params: Params) -> None:
    training.train_all(["dice"], params)
    bench = bench_of(params)
    first, later = bench._step_costs("dice")
    assert first > later == pytest.approx(1.0)  # it sharpens the text once
    of = Setting(method="dice", solver="ddim", num_steps=8, scale=4.0)
    assert bench.forwards(of) == pytest.approx(first + 7)
    most = bench.most_steps("dice", 8)
    assert bench.forwards(replace(of, num_steps=most)) <= MOST * 8
    assert bench.forwards(replace(of, num_steps=most + 1)) > MOST * 8
    task = workbench.tasks_of(params, 8, 0)[:1]
    plain = Setting(method="unguided", solver="ddim", num_steps=1, scale=1.0)
    spent = bench._flops_of(of, task) / bench._flops_of(plain, task)
    assert bench.forwards(of) == pytest.approx(spent, rel=1e-3)


@pytest.mark.services
def test_a_consistency_lora_goes_by_its_images_is_not_halved_and_costs_its_steps(
    params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fid_of(name: str, peer: Peer, trainer: Any) -> float:
        asked.append(fingerprint(peer))
        return abs(len(asked) - 2.0)  # the second one tried is the best

    monkeypatch.setattr(training, "fid_in_few_steps", fid_of)
    training.train_all(["lcm-1"], params)
    assert len(set(asked)) == len(asked) >= 3
    assert min(index_of("lcm-1")["tried"].values()) == 0.0
    bench = bench_of(params)
    assert list(bench.rivals["lcm-1"].peers) == [8]
    (setting,) = layouts("lcm-1", 4)
    tasks = workbench.tasks_of(params, 4, 0)
    images, _ = bench.images(setting, tasks)
    assert images.shape == (4, 32, 32, 3)
    assert bench.forwards(setting) == 4.0
    seeds = [task.seed for task in tasks]
    noise = torch.stack(
        [torch.randn(bench.sampler.shape, generator=one) for one in trained.generators(seeds)]
    )
    start = initial_noise(bench.sampler.shape, seeds)
    assert all(not torch.equal(a, b) for a in noise for b in start)


def test_a_method_that_there_is_not_is_refused_before_any_is_trained(params: Params) -> None:
    with pytest.raises(ValueError, match="no method lora; there are ours, meng"):
        training.train_all(["agd", "lora"], params)
    assert not trained.FOLDER.exists()


def test_only_the_large_rivals_have_more_than_eight_percent_of_the_parameters() -> None:
    unet = load_pipeline("zoo/models/base").unet
    base = sum(p.numel() for p in unet.parameters())
    for name, make in trained.methods(load_params(Path("params.yaml"))).items():
        own = sum(p.numel() for p in make(unet).parameters() if p.requires_grad)
        assert (own / base > 0.08) == (name in LARGE), name


# What the table says


def with_rivals(ours: float, theirs: float, models: tuple[str, ...] = ("a", "b")) -> dict[str, Any]:
    """Results in which every rival has the same FID on every model at every cost."""
    about = {
        name: {
            "first": {"params_ratio": 0.5 if name in LARGE else 0.01, "num_images": 160}
            | {"num_images_in_a_round": 32, "base_hash": "b", "settings": "s"}
        }
        for name in TRAINED_LABELS
    }
    cells = {
        at: {
            name: cell(name, ours if name == "ours" else theirs) | {"guide": "first"}
            for name in TRAINED_LABELS
            if name not in CONSISTENT or at != "16"
        }
        for at in table.COSTS
    }
    setting = {"num_images": 576, "num_close": 192, "num_choosing": 144, "judge": "j"}
    setting |= {"foreign_judge": "f"}
    results = {"setting": setting, "choices": {}, "trained": about}
    return results | {"cells": {model: {at: dict(cells[at]) for at in cells} for model in models}}


def test_where_the_guide_is_ahead_of_all_rivals_the_list_is_empty() -> None:
    assert table.summary(with_rivals(4.0, 5.0), ["a", "b"], [])["behind_trained_rivals"] == []


def test_where_it_is_not_surely_ahead_rival_and_cost_are_named_but_not_the_large_ones() -> None:
    found = with_rivals(4.0, 5.0)
    for model in ("a", "b"):
        for name in ("agd", "meng"):
            found["cells"][model]["8"][name] = cell(name, 3.9) | {"guide": "first"}
    (named,) = table.summary(found, ["a", "b"], [])["behind_trained_rivals"]
    assert named.startswith("agd at 8: 1.026 (")
    page = as_markdown(found)
    (line,) = [
        line for line in page.splitlines() if line.startswith("| AGD (Jensen") and "%" in line
    ]
    assert [part.strip()[:5] for part in line.split("|")[2:6]] == [
        "1.0 %",
        "0.800",
        "1.026",
        "0.800",
    ]


@pytest.mark.parametrize("lacks", ["row", "model", "training", "weights", "settings"])
def test_a_rival_without_all_its_rows_is_on_the_list_as_not_measured(lacks: str) -> None:
    found = with_rivals(4.0, 5.0)
    if lacks == "row":
        del found["cells"]["b"]["4"]["lcm-8"]
    elif lacks == "model":
        del found["cells"]["b"]
    elif lacks == "training":
        del found["trained"]["dice"]
    elif lacks == "weights":  # trained again since its rows were made
        found["trained"]["ours"] = {"second": found["trained"]["ours"]["first"]}
    else:
        found["trained"]["agd"]["first"]["settings"] = "others"
    summed = table.summary(found, ["a", "b"], [])
    places = summed["behind_trained_rivals"]
    expected = {
        "row": ["lcm-8 at 4"],
        "training": ["dice at 16", "dice at 8", "dice at 4"],
        "settings": ["agd at 16", "agd at 8", "agd at 4"],
    }
    everywhere = [
        f"{name} at {at}"
        for name in TRAINED_LABELS
        if name not in ("ours", *LARGE)
        for at in table.COSTS
        if name not in CONSISTENT or at != "16"
    ]
    assert places == [f"{place}: not measured" for place in expected.get(lacks, everywhere)]
    assert "behind_trained_rivals" in summed["missing"]


@pytest.mark.parametrize("replaced", [("a", "b"), ("b",)])
def test_rows_of_a_later_training_are_compared_among_themselves_alone(
    replaced: tuple[str, ...],
) -> None:
    found = with_rivals(4.0, 5.0)
    for trainings in found["trained"].values():
        trainings["second"] = trainings["first"] | {"settings": "of the second"}
    for model in replaced:
        cells = found["cells"][model]["16"]
        cells |= {name: made | {"guide": "second"} for name, made in cells.items()}
    places = table.summary(found, ["a", "b"], [])["behind_trained_rivals"]
    if replaced == ("a", "b"):
        assert places == []
        assert "what stands at 16 forwards is of another training" in as_markdown(found)
        assert "another training" not in as_markdown(with_rivals(4.0, 5.0))
    else:  # a mean over two trainings is none of either
        assert {place.split(":")[0].split()[-1] for place in places} == {"16"}
        assert all(place.endswith("not measured") for place in places)


def test_a_rival_that_costs_more_a_step_is_too_dear_only_over_what_it_stands_under() -> None:
    found = with_rivals(4.0, 5.0, ("a",))
    found["cells"]["a"]["8"]["paper-full"] |= {"forwards": 8.1, "setting": "paper-full unipc 5 4"}
    found["cells"]["a"]["8"]["agd"] |= {"forwards": 8.6}
    page = as_markdown(found).split("## a, 8 forwards")[1].split("\n## ")[0]
    dear = [line.split("|")[1].strip() for line in page.splitlines() if "too dear" in line]
    assert dear == [LABELS["agd"]]
