"""Rivals that train, in the table at equal cost: trained alike, kept, sampled, told straight."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.frontier import run, table, trained, workbench
from benchmarks.frontier.settings import (
    CONSISTENT,
    LABELS,
    MOST,
    TRAINED_LABELS,
    Setting,
    layouts,
)
from benchmarks.frontier.trained import METHODS, RATES
from benchmarks.peers import TRAINED
from components import cache, prepare
from components.params import Params, load_params
from pnp_core.bundle import GuideBundle
from pnp_core.files import read_json
from pnp_core.guide import Guide, GuideConfig
from pnp_core.models import load_pipeline
from tests import toy
from tests.conftest import roused
from tests.test_frontier import cell

pytest_plugins = ["tests.toy"]


@pytest.fixture
def params(world: Path) -> Params:
    values = toy.toy_params()
    values["distill"] |= {"num_images": 480, "report_every_images": 16}
    values["halve"] |= {"num_images": 32}
    toy.write_params(world, values)
    found = load_params(Path("params.yaml"))
    prepare.run(found)
    cache.run(found)
    return found


def bench_of(params: Params) -> workbench.Workbench:
    unet = load_pipeline(params.base).unet
    guide = roused(Guide.from_unet(unet, GuideConfig(max_parameters_ratio=0.2)))
    bundles = {"guided": GuideBundle({8: guide})}
    model = params.models["base"]
    return workbench.Workbench("base", model, params, bundles, trained.trained(unet))


def test_all_rivals_that_there_are_can_be_trained_and_have_a_name() -> None:
    assert METHODS.keys() == TRAINED_LABELS.keys() == {"ours", *TRAINED}
    assert TRAINED_LABELS.keys() <= LABELS.keys()
    assert {name.split()[1] for _, name, _ in run.jobs(["base"], [8]) if "trained" in name} == {
        *TRAINED_LABELS
    }


@pytest.mark.parametrize("method", TRAINED_LABELS)
@pytest.mark.parametrize("num_forwards", [16, 8, 4, 2])
@pytest.mark.parametrize("step_cost", [1.0, 1.03, 1.49, 3.0])
def test_a_trained_rival_takes_as_many_steps_as_its_cost_allows(
    method: str, num_forwards: int, step_cost: float
) -> None:
    found = layouts(method, num_forwards, step_cost=step_cost)
    costs = [setting.num_steps * step_cost for setting in found]
    assert all(cost <= MOST * num_forwards for cost in costs)
    if method in CONSISTENT:
        assert {setting.solver for setting in found} <= {"lcm"}
        assert bool(found) == (1 <= int(MOST * num_forwards / step_cost) <= 8)
    elif costs:
        assert max(costs) + step_cost > MOST * num_forwards
        halved = {setting.num_steps for setting in found if setting.solver == "ddim"}
        assert any(steps & (steps - 1) == 0 for steps in halved)  # a power of two
    else:
        assert step_cost > MOST * num_forwards


def test_a_method_is_trained_once_halved_and_sampled_by_its_own_weights(params: Params) -> None:
    trained.train_method("agd", params)
    folder = trained.FOLDER / "agd"
    about = read_json(folder / trained.INDEX)
    assert about["num_steps"] == [4, 8]
    assert about["learning_rate"] in RATES and len(about["tried"]) >= 2
    assert about["num_images"] == 480 and about["params_ratio"] > 0
    assert about["tried"][f"{about['learning_rate']:g}"] == min(about["tried"].values())
    written = (folder / "steps-4.safetensors").stat().st_mtime_ns
    trained.train_method("agd", params)
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
    assert bench.forwards(of["ddim"]) == pytest.approx(4 * bench.step_cost("agd"))
    assert 1.0 < bench.step_cost("agd") < 2.0
    assert bench.digest("agd") == about["digest"] and bench.digest("dice") is None


def test_a_consistency_lora_is_not_halved_and_costs_its_steps(params: Params) -> None:
    trained.train_method("lcm-1", params)
    bench = bench_of(params)
    assert list(bench.rivals["lcm-1"].peers) == [8]
    (setting,) = layouts("lcm-1", 4)
    tasks = workbench.tasks_of(params, 4, 0)
    images, _ = bench.images(setting, tasks)
    assert images.shape == (4, 32, 32, 3)
    assert bench.forwards(setting) == 4.0


def test_a_method_that_there_is_not_is_refused_by_name(params: Params) -> None:
    with pytest.raises(ValueError, match="no method lora; there are ours, meng"):
        trained.train_method("lora", params)


# What the table says


def with_rivals(ours: float, theirs: float, models: tuple[str, ...] = ("a", "b")) -> dict[str, Any]:
    """Results in which every rival has the same FID on every model at every cost."""
    about = {
        name: {"params_ratio": 0.5 if name in ("meng", "paper-full") else 0.01, "num_images": 160}
        | {"num_images_in_a_round": 32}
        for name in TRAINED_LABELS
    }
    cells = {
        at: {
            name: cell(name, ours if name == "ours" else theirs)
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
            found["cells"][model]["8"][name] = cell(name, 3.9)
    (named,) = table.summary(found, ["a", "b"], [])["behind_trained_rivals"]
    assert named.startswith("agd at 8: 1.026 (")
    page = table.as_markdown(found)
    (line,) = [
        line for line in page.splitlines() if line.startswith("| AGD (Jensen") and "%" in line
    ]
    assert [part.strip()[:5] for part in line.split("|")[2:6]] == [
        "1.0 %",
        "0.800",
        "1.026",
        "0.800",
    ]


@pytest.mark.parametrize("lacks", ["row", "model", "training"])
def test_the_list_waits_for_every_row(lacks: str) -> None:
    found = with_rivals(4.0, 5.0)
    if lacks == "row":
        del found["cells"]["b"]["4"]["lcm-8"]
    elif lacks == "model":
        del found["cells"]["b"]
    else:
        del found["trained"]["dice"]
    summed = table.summary(found, ["a", "b"], [])
    assert summed["behind_trained_rivals"] is None
    assert "behind_trained_rivals" in summed["missing"]


def test_a_rival_that_costs_more_a_step_is_too_dear_only_over_what_it_stands_under() -> None:
    found = with_rivals(4.0, 5.0, ("a",))
    found["cells"]["a"]["8"]["paper-full"] |= {"forwards": 8.1, "setting": "paper-full unipc 5 4"}
    found["cells"]["a"]["8"]["agd"] |= {"forwards": 8.6}
    page = table.as_markdown(found).split("## a, 8 forwards")[1].split("\n## ")[0]
    dear = [line.split("|")[1].strip() for line in page.splitlines() if "too dear" in line]
    assert dear == [LABELS["agd"]]
