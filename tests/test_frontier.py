"""The benchmark at equal cost: rivals, costs, settings, what is kept, and what the table says."""

import subprocess
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from ruamel.yaml import YAML
from torch import Tensor

from benchmarks.frontier import final, run, table, training, workbench
from benchmarks.frontier.judges import ForeignJudge, as_json, from_json
from benchmarks.frontier.page import as_markdown
from benchmarks.frontier.rivals import LinearAG, PartialCFG, ReusedGuidance, fit_linear
from benchmarks.frontier.settings import (
    FORWARDS,
    FREE,
    GUIDES,
    LABELS,
    NUM_LARGE,
    OWN,
    SCALES,
    Setting,
    climb,
    layouts,
    row_name,
)
from components import prepare
from components.dataset import read_records
from components.evaluation import Estimate
from components.fitting import fit
from components.images import Task
from components.params import checked, load_params
from pnp_core.bundle import GuideBundle
from pnp_core.conditions import Conditions
from pnp_core.denoiser import CFGDenoiser, GuidedDenoiser, PlainDenoiser
from pnp_core.files import read_json, write_json
from pnp_core.guide import Guide, GuideConfig
from pnp_core.guiders import Guider
from pnp_core.metrics import count_flops
from pnp_core.models import load_pipeline
from pnp_core.sample import initial_noise, sample
from pnp_core.schedule import NoiseSchedule, sampling_timesteps
from tests.conftest import roused

pytest_plugins = ["tests.toy"]
ROOT = Path(__file__).parent.parent
STEPS = 6
NOBODY: Any = None  # in place of a judge who is not asked


def run_of(pipe: StableDiffusionPipeline, scale: float = 5.0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    c, n = torch.randn(2, 2, 7, 32, generator=generator)
    return {
        "z_T": initial_noise((4, 4, 4), [3, 4]),
        "conditions": Conditions.at_scale(scale, c_BLD=c, n_BLD=n),
        "num_steps": STEPS,
    }


def teacher_of(pipe: StableDiffusionPipeline) -> CFGDenoiser:
    return CFGDenoiser(pipe.unet, NoiseSchedule.from_scheduler(pipe.scheduler))


def by_hand(
    pipe: StableDiffusionPipeline, full: Collection[int], *, reuses: bool
) -> tuple[Tensor, int]:
    """DDIM written out, and how many forwards of one sample it took."""
    of = run_of(pipe)
    conditions, z = of["conditions"], of["z_T"]
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    guidance: Tensor | None = None
    forwards = 0
    grid = sampling_timesteps(pipe.scheduler, STEPS)
    with torch.no_grad():
        for step in range(STEPS):
            t_B, s_B = grid[step].expand(2), grid[step + 1].expand(2)
            eps = pipe.unet(z, t_B, conditions.c_BLD).sample
            forwards += 1
            if step in full:
                guidance = eps - pipe.unet(z, t_B, conditions.n_BLD).sample
                forwards += 1
            if guidance is not None and (step in full or reuses):
                eps = eps + 4.0 * guidance
            z = schedule.ddim_step(z, eps, t_B, s_B)
    return z, forwards


@pytest.mark.parametrize("full", [(), (0, 1), (2, 3), (0, 3), tuple(range(STEPS))])
def test_partial_cfg_guides_at_its_steps_alone(
    full: tuple[int, ...], pipe: StableDiffusionPipeline
) -> None:
    made = sample(PartialCFG(teacher_of(pipe), full), pipe.scheduler, **run_of(pipe))
    expected, _ = by_hand(pipe, full, reuses=False)
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("full", [(0, 3), (0, 2, 4)])
def test_reused_guidance_is_that_of_the_last_full_step(
    full: tuple[int, ...], pipe: StableDiffusionPipeline
) -> None:
    made = sample(ReusedGuidance(teacher_of(pipe), full), pipe.scheduler, **run_of(pipe))
    expected, _ = by_hand(pipe, full, reuses=True)
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-4)
    without, _ = by_hand(pipe, full, reuses=False)
    assert not torch.allclose(made, without, atol=1e-3)


class LinearTeacher:
    """Its eps_n is a combination of two predictions under the prompt, of this step and the last."""

    guider = Guider()

    def __init__(self) -> None:
        self.before: Tensor | None = None
        self.negatives = 0

    def plain(self, z_BCHW: Tensor, t_B: Tensor, conditions: Conditions) -> Tensor:
        eps = torch.sin(3 * z_BCHW + t_B[:, None, None, None] / 200)
        self.now, self.before = (self.before if self.before is not None else eps), eps
        return eps

    def pair(self, z_BCHW: Tensor, t_B: Tensor, conditions: Conditions) -> tuple[Tensor, Tensor]:
        self.negatives += 1
        eps_c = self.plain(z_BCHW, t_B, conditions)
        return eps_c, 0.7 * eps_c + 0.2 * self.now


def test_linear_ag_is_cfg_where_the_negative_prediction_is_linear_in_earlier_ones(
    pipe: StableDiffusionPipeline,
) -> None:
    of = run_of(pipe)
    teachers = [LinearTeacher() for _ in range(3)]
    known = fit_linear(teachers[0], pipe.scheduler, (0, 2), [of])  # type: ignore[arg-type]
    assert known.keys() == {1, 3, 4, 5}
    cheap = sample(LinearAG(teachers[1], (0, 2), known), pipe.scheduler, **of)  # type: ignore[arg-type]
    exact = sample(PartialCFG(teachers[2], range(STEPS)), pipe.scheduler, **of)  # type: ignore[arg-type]
    torch.testing.assert_close(cheap, exact, atol=1e-3, rtol=1e-3)
    assert teachers[1].negatives == 2


@pytest.mark.parametrize("method", [*FREE, "halved", "mixed"])
@pytest.mark.parametrize("num_forwards", FORWARDS)
def test_every_layout_costs_what_it_stands_under(method: str, num_forwards: int) -> None:
    for setting in layouts(method, num_forwards):
        assert setting.forwards == num_forwards
        assert sorted(set(setting.full)) == list(setting.full)
        assert all(0 <= step < setting.num_steps for step in setting.full)
        if method in ("reuse", "linear", "mixed"):
            assert setting.full[0] == 0
    assert layouts(method, num_forwards) or num_forwards == 2


@torch.no_grad()
def test_flops_of_a_run_are_those_of_its_forwards(pipe: StableDiffusionPipeline) -> None:
    of, teacher = run_of(pipe), teacher_of(pipe)
    plain = PlainDenoiser(pipe.unet, teacher.plain.schedule)
    one = count_flops(lambda: plain(of["z_T"], torch.full((2,), 500), of["conditions"]))
    for setting in layouts("reuse", 8):
        kind = ReusedGuidance(teacher, setting.full)
        of["num_steps"] = setting.num_steps
        spent = count_flops(lambda kind=kind: sample(kind, pipe.scheduler, **of))  # type: ignore[misc]
        assert spent == pytest.approx(setting.forwards * one, rel=1e-6)


def test_a_setting_is_read_from_its_own_words() -> None:
    for method in (*FREE, "guided", "mixed"):
        for setting in layouts(method, 16):
            assert Setting.parse(setting.at(2.5).text) == setting.at(2.5)


@pytest.mark.parametrize("best", SCALES)
def test_climbing_finds_the_bottom_of_a_valley_and_asks_each_scale_once(best: float) -> None:
    asked: list[float] = []

    def cost(scale: float) -> float:
        asked.append(scale)
        return abs(scale - best)

    assert climb(3.0, cost) == best
    assert len(asked) == len(set(asked))
    assert climb(best, lambda scale: abs(scale - best)) == best


# What is kept


@pytest.fixture
def bench(world: Path, monkeypatch: pytest.MonkeyPatch) -> workbench.Workbench:
    params = load_params(Path("params.yaml"))
    prepare.run(params)
    monkeypatch.setattr(workbench, "BATCH_SIZE", 4)
    monkeypatch.setattr(workbench, "NUM_FITTED", 8)
    return bench_of(params)


def bench_of(params: Any, seed: int = 1) -> workbench.Workbench:
    torch.manual_seed(seed)
    unet = load_pipeline(params.base).unet
    config = GuideConfig(max_parameters_ratio=0.2)
    bundle = GuideBundle({n: roused(Guide.from_unet(unet, config), 0.1 * seed) for n in (4, 8)})
    return workbench.Workbench("base", params.models["base"], params, {"guided": bundle})


def test_images_that_are_kept_are_not_made_again(
    bench: workbench.Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = workbench.tasks_of(bench.params, 12, 0)
    made: list[int] = []
    make = bench._make

    def counted(setting: Setting, batch: Sequence[Task], path: Path) -> None:
        made.append(len(batch))
        make(setting, batch, path)

    monkeypatch.setattr(bench, "_make", counted)
    setting = layouts("guided", 4)[0]
    first, _ = bench.images(setting, tasks[:8])
    again, milliseconds = bench.images(setting, tasks)
    assert made == [4, 4, 4] and milliseconds > 0
    assert np.array_equal(first, again[:8])
    bench.images(setting.at(6.0), tasks[:4])
    assert len(made) == 4
    other = bench_of(bench.params, seed=2)  # another guide
    assert not np.array_equal(other.images(setting, tasks[:4])[0], first[:4])


def test_another_guide_for_one_number_of_steps_leaves_the_rows_of_others_as_they_are(
    bench: workbench.Workbench,
) -> None:
    other = bench_of(bench.params)
    other.bundles["guided"].guides[4] = bench_of(bench.params, seed=2).bundles["guided"].guides[4]

    def rows(solver: str, num_steps: int) -> list[Setting]:
        return [Setting(method="guided", solver=solver, num_steps=num_steps, scale=3.0)]

    assert bench.digest(rows("ddim", 8)) == other.digest(rows("ddim", 8))
    assert bench.digest(rows("unipc", 4)) == other.digest(rows("unipc", 4))  # not halved
    assert bench.digest(rows("ddim", 4)) != other.digest(rows("ddim", 4))
    assert bench.digest(rows("ddim", 4) + rows("ddim", 8)) != bench.digest(rows("ddim", 8))
    assert bench.digest(layouts("cfg", 8)) is None


def test_what_was_tried_with_weights_that_are_still_there_is_not_tried_again(
    bench: workbench.Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Setting] = []

    def maker_of(bench: workbench.Workbench) -> run.Maker:
        maker = run.Maker(bench, run.Table(tmp_path / "results.json", {}), NOBODY, NOBODY)

        def fid_of_few(setting: Setting) -> float:
            asked.append(setting)
            return abs(setting.scale - 4) + (setting.solver != "unipc")

        monkeypatch.setattr(maker, "fid_of_few", fid_of_few)
        return maker

    monkeypatch.setattr(run, "RUN", tmp_path)
    chosen = maker_of(bench).choose("guided", 4)
    assert chosen and chosen.solver == "unipc"
    assert {setting.solver for setting in asked} == {"ddim", "dpmsolver++", "unipc"}
    asked.clear()
    other = bench_of(bench.params)
    other.bundles["guided"].guides[4] = bench_of(bench.params, seed=2).bundles["guided"].guides[4]
    assert maker_of(other).choose("guided", 4) == chosen
    assert {setting.solver for setting in asked} == {"ddim"}  # which takes the guide for 4 steps


@pytest.mark.parametrize("is_large", [False, True])
def test_the_ways_to_take_the_guide_are_compared_by_as_many_images_as_a_row_has(
    is_large: bool, bench: workbench.Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "RUN", tmp_path)
    maker = run.Maker(bench, run.Table(tmp_path / "results.json", {}), NOBODY, NOBODY)
    monkeypatch.setattr(maker, "fid_of_few", lambda setting: abs(setting.scale - 5))
    asked: list[tuple[str, float, int]] = []

    def fid_of(setting: Setting, tasks: Sequence[Task]) -> float:
        asked.append((setting.method, setting.scale, len(tasks)))
        return 7.0

    monkeypatch.setattr(maker, "_fid_of", fid_of)
    for _ in range(2):  # the second time it is all there
        maker.compare_ways(4, OWN, is_large=is_large)
    num_images = NUM_LARGE if is_large else run.NUM_IMAGES
    ways = ("guided", "halved", "mixed")
    assert asked == [(method, 5.0, num_images) for method in ways]
    seeds = [{task.seed for task in tasks} for tasks in (maker.large_choosing, maker.large)]
    assert not seeds[0] & seeds[1]
    assert maker.large[: len(maker.tasks)] == maker.tasks
    assert maker.large_choosing[: len(maker.many)] == maker.many


def test_a_row_of_another_setting_than_the_chosen_one_is_made_anew(
    bench: workbench.Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "RUN", tmp_path)
    setting = layouts("cfg", 4)[0]
    there = {"cfg": {"guide": None, "setting": setting.text, "num_images": run.NUM_IMAGES}}
    write_json(tmp_path / "results.json", {"setting": {}, "cells": {"base": {"4": there}}})
    maker = run.Maker(bench, run.Table(tmp_path / "results.json", {}), NOBODY, NOBODY)
    made: list[Setting] = []

    class Made(Exception):
        pass

    def images(setting: Setting, tasks: Sequence[Task]) -> None:
        made.append(setting)
        raise Made

    monkeypatch.setattr(bench, "images", images)
    made_by = {"guide": "", "precision": "", "commit": "", "command": ""}
    maker.cell("4", setting, made_by)
    assert not made
    with pytest.raises(Made):
        maker.cell("4", setting.at(9.0), made_by)


def test_closeness_leaves_the_rows_of_weights_that_are_not_here(
    bench: workbench.Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "RUN", tmp_path)
    monkeypatch.setattr(run, "CLOSE_STEPS", 2)
    monkeypatch.setattr(run, "NUM_CLOSE", 4)
    settings = {method: layouts(method, 4)[0] for method in ("guided", "halved", "guided-2", "cfg")}
    settings["exact"] = Setting.parse("exact ddim 3 3 0")
    cells = {
        method: {"setting": setting.text, "guide": "another" if method in GUIDES else None}
        for method, setting in settings.items()
    }
    cells["guided"]["guide"] = bench.digest([settings["guided"]])
    write_json(tmp_path / "results.json", {"setting": {}, "cells": {"base": {"4": cells}}})
    maker = run.Maker(bench, run.Table(tmp_path / "results.json", {}), NOBODY, NOBODY)
    made_by = {"guide": "", "precision": "", "commit": "", "command": ""}
    maker.closeness(made_by)
    made = read_json(tmp_path / "results.json")["cells"]["base"]["4"]
    assert {method for method in made if "cfg64_psnr" in made[method]} == {"guided", "cfg"}


def test_what_was_tried_before_counts_only_where_it_would_be_tried_now(
    bench: workbench.Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "RUN", tmp_path)
    bench.name = "a fine-tune"
    wanted = {setting.solver: setting for setting in layouts("guided", 4)}
    best, once_good = wanted["ddim"], wanted["unipc"]
    of_base = {"guide": bench.digest(layouts("guided", 4)), "tried": {best.text: 1.0}}
    before = {
        "guide": "another",
        "setting": once_good.text,
        "tried": {once_good.text: 0.5, best.text: 9.0},
        "images": {s.text: bench.identity_of(s) for s in (once_good, best)},
    }
    choices = {
        name: {"4": {"guided": of}} for name, of in (("base", of_base), (bench.name, before))
    }
    write_json(tmp_path / "results.json", {"setting": {}, "choices": choices, "cells": {}})
    maker = run.Maker(bench, run.Table(tmp_path / "results.json", {}), NOBODY, NOBODY)
    monkeypatch.setattr(maker, "fid_of_few", lambda setting: 20.0)
    assert maker.choose("guided", 4) == best
    tried = read_json(tmp_path / "results.json")["choices"][bench.name]["4"]["guided"]["tried"]
    assert tried[best.text] == 9.0 and once_good.text not in tried


@pytest.mark.parametrize("method", ["cfg", "linear", "guided", "mixed"])
def test_each_method_makes_images_of_its_own(method: str, bench: workbench.Workbench) -> None:
    tasks = workbench.tasks_of(bench.params, 4, 0)
    setting = layouts(method, 8)[0]
    plain = Setting(method="unguided", solver="ddim", num_steps=setting.num_steps, scale=1.0)
    images, _ = bench.images(setting, tasks)
    assert images.shape == (4, 32, 32, 3) and images.dtype == np.uint8
    assert not np.array_equal(images, bench.images(plain, tasks)[0])


def test_a_guide_is_halved_under_ddim_and_unhalved_under_other_solvers(
    bench: workbench.Workbench,
) -> None:
    guides = bench.bundles["guided"].guides
    for setting in layouts("guided", 4):
        denoiser: Any = bench.denoiser(setting)
        assert denoiser.guide is guides[4 if setting.solver == "ddim" else 8]
    for setting in (*layouts("halved", 4), *layouts("mixed", 4)):
        assert setting.solver != "ddim" and setting.forwards == 4
        denoiser = bench.denoiser(setting)
        guided = denoiser.guided if setting.method == "mixed" else denoiser
        assert guided.guide is guides[4]


def test_what_a_guided_step_costs_is_counted(bench: workbench.Workbench) -> None:
    setting = layouts("guided", 4)[0]
    unet, guide = bench.sampler.pipe.unet, bench.bundles["guided"].for_steps(4)
    of = bench._run(setting, workbench.tasks_of(bench.params, 8, 0)[:1])
    z, t_B = of["z_T"], torch.tensor([500])
    with torch.no_grad():
        guided, plain = (
            count_flops(lambda one=one: one(z, t_B, of["conditions"]))  # type: ignore[misc]
            for one in (
                GuidedDenoiser(unet, guide, bench.sampler.schedule),
                PlainDenoiser(unet, bench.sampler.schedule),
            )
        )
    one_step = bench.forwards(replace(setting, num_steps=1))
    assert one_step == pytest.approx(guided / plain, rel=0.01)  # computes the run's end ahead
    assert 4 < bench.forwards(setting) <= 4 * one_step
    assert bench.forwards(layouts("cfg", 4)[0]) == 4


@torch.no_grad()
def test_exact_steps_cost_two_forwards_of_a_guided_run(bench: workbench.Workbench) -> None:
    setting = layouts("mixed", 8)[0]
    plain = Setting(method="unguided", solver="ddim", num_steps=1, scale=1.0)
    task = workbench.tasks_of(bench.params, 8, 0)[:1]
    spent = {of: bench._flops_of(of, task) for of in (plain, setting)}
    assert setting.num_steps == 6 and len(setting.full) == 2
    assert bench.forwards(setting) == pytest.approx(spent[setting] / spent[plain], rel=1e-3)


def test_kept_images_of_other_methods_are_told_by_what_they_ever_were(
    bench: workbench.Workbench,
) -> None:
    ever = {"version", "base", "model", "precision", "spacing", "setting"}
    more_of: dict[str, set[str]] = {"cfg": set(), "guided": {"guide"}, "mixed": {"guide"}}
    for method, more in more_of.items():
        kept = read_json(bench._folder(layouts(method, 8)[0]) / "identity.json")
        assert kept.keys() == ever | more


# Final models


def test_final_models_are_refused_but_in_a_final_run_that_is_noted_before_it_begins(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = load_params(Path("params.yaml"))
    monkeypatch.setattr(final, "FINAL", Path("final"))
    results = Path("results.json")
    write_json(results, {"setting": {}})
    with pytest.raises(ValueError, match="no final model in final"):
        final.models_to_run(params, results, final=True)
    Path("final").mkdir()
    Path("models/tuned").rename("final/tuned")
    with pytest.raises(ValueError, match="models.tuned: it is a final model"):
        hidden = params.models | {
            "tuned": params.models["tuned"].model_copy(update={"path": "final/tuned"})
        }
        final.models_to_run(params.model_copy(update={"models": hidden}), results, final=False)
    params = params.model_copy(update={"models": {"base": params.models["base"]}})
    assert list(final.models_to_run(params, results, final=False)) == ["base"]
    monkeypatch.setattr(final, "git_commit", lambda no_matter: "abc-dirty")
    with pytest.raises(ValueError, match="this is abc-dirty: commit first"):
        final.models_to_run(params, results, final=True)
    assert "final_runs" not in read_json(results)
    monkeypatch.setattr(final, "git_commit", lambda no_matter: "abc")
    assert list(final.models_to_run(params, results, final=True)) == ["tuned"]
    (noted,) = read_json(results)["final_runs"]
    assert noted["commit"] == "abc" and noted["models"] == ["tuned"] and noted["when"]


@pytest.mark.usefixtures("world")
def test_the_note_of_a_final_run_is_written_while_no_other_process_writes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def noting(*args: Any, **kwargs: Any) -> dict[str, Any]:
        with run.held(run.RUN / "table.lock", wait=False) as mine:
            assert not mine
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "models_to_run", noting)
    with pytest.raises(KeyboardInterrupt):
        run.run(load_params(Path("params.yaml")), [], [16], final=True)


def test_a_final_run_wants_the_benchmark_committed_but_not_the_results_it_writes(
    world: Path,
) -> None:
    def git(*arguments: str) -> None:
        who = ("-c", "user.name=t", "-c", "user.email=t@localhost")
        subprocess.run(["git", *who, *arguments], check=True, capture_output=True)

    params = load_params(Path("params.yaml"))
    Path("zoo/final").mkdir(parents=True)
    Path("models/tuned").rename("zoo/final/tuned")
    params = params.model_copy(update={"models": {"base": params.models["base"]}})
    code, results = Path("benchmarks/frontier/run.py"), Path("benchmarks/results/frontier.json")
    for path in (code, results):
        path.parent.mkdir(parents=True)
    code.write_text("one\n")
    write_json(results, {"setting": {}})
    git("init", "--quiet")
    git("add", "benchmarks")
    git("commit", "--quiet", "--message", "one")
    for _ in range(2):  # the second time after the first has written
        assert list(final.models_to_run(params, results, final=True)) == ["tuned"]
    assert len(read_json(results)["final_runs"]) == 2
    code.write_text("two\n")
    with pytest.raises(ValueError, match="-dirty: commit first"):
        final.models_to_run(params, results, final=True)


# What the table says


def cell(method: str, fid: float, clip: float = 40.0, noise: float = 0.1) -> dict[str, Any]:
    """Replicates go up and down together in all cells, as resamples of the same images do."""
    waves = [noise * ((k % 5) - 2) for k in range(50)]
    scores = {
        "fid": Estimate(value=fid, replicates=tuple(fid * (1 + wave) for wave in waves)),
        "kid": Estimate(value=0.01),
        "diversity": Estimate(value=0.5),
    }
    world = scores | {"clip_score": Estimate(value=clip, replicates=tuple(clip + w for w in waves))}
    judged = {"world": world, "foreign": scores}
    return {
        "guide": None,
        "setting": Setting(method=method, solver="ddim", num_steps=8, scale=3.0).text,
        "num_images": 576,
        "forwards": 8.0,
        "cpu_ms": 30.0,
        "scores": {
            judge: {name: as_json(name, found) for name, found in all_of_it.items()}
            for judge, all_of_it in judged.items()
        },
    }


def results(models: Collection[str] = ("base", "a", "b")) -> dict[str, Any]:
    places = {
        at: {
            "guided": cell("guided", 4.0, 41.0),
            "cfg": cell("cfg", 6.0, 42.0),
            "reuse": cell("reuse", 5.0, 40.5),
        }
        for at in ("16", "8", "4", "2")
    }
    equal = {
        "unguided": cell("unguided", 9.0, 30.0),
        "cfg": cell("cfg", 5.0, 40.0),
        "guided": cell("guided", 5.0, 38.0),
    }
    places |= {"equal 16": equal, "equal 8": equal, "100": {"cfg": cell("cfg", 3.2)}}
    setting = {"num_images": 576, "num_close": 192, "num_choosing": 144, "judge": "j"}
    setting |= {"foreign_judge": "f"}
    return {"setting": setting, "choices": {}, "cells": {model: dict(places) for model in models}}


def test_the_guide_is_compared_with_the_free_rival_of_least_fid() -> None:
    found = table.summary(results(), ["a", "b"], [])
    assert found["fid_8_base"] == pytest.approx(4 / 5)
    assert found["clip_8_base"] == pytest.approx(41 - 40.5)
    assert found["fid_16_mean"] == found["foreign_fid_16_mean"] == pytest.approx(4 / 5)
    assert found["fid_4_over_cfg100"] == pytest.approx(4 / 3.2)
    assert found["clip_gain_worst"] == pytest.approx(0.8)


def test_intervals_are_paired_so_what_all_cells_share_cancels() -> None:
    low, high = table.summary(results(), ["a", "b"], [])["intervals"]["fid_8_base"]
    assert low == pytest.approx(0.8, abs=1e-3) and high == pytest.approx(0.8, abs=1e-3)


def test_what_final_models_say_has_intervals_too() -> None:
    summed = table.summary(results(), ["a"], ["b"])
    assert summed["intervals"]["final"]["fid_8_mean"] == pytest.approx([0.8, 0.8], abs=1e-3)


def test_the_worst_model_decides() -> None:
    found = results()
    found["cells"]["b"]["4"] = found["cells"]["b"]["4"] | {"guided": cell("guided", 7.0)}
    summed = table.summary(found, ["a", "b"], [])
    assert summed["fid_worst"] == pytest.approx(7 / 5)
    assert summed["fid_4_mean"] == pytest.approx((4 / 5 + 7 / 5) / 2)
    assert summed["fid_4_over_cfg100"] == pytest.approx(7 / 3.2)


def test_what_can_not_be_answered_yet_is_null_and_named() -> None:
    part = results(["base", "a"])
    del part["cells"]["base"]["16"]["cfg"]
    found = table.summary(part, ["a", "b"], [])
    for key in ("fid_16_base", "fid_8_mean", "fid_worst", "fvu_base", "final"):
        assert found[key] is None and key in found["missing"]
    assert found["fid_8_base"] is not None and "fid_8_base" not in found["missing"]
    half = table.summary(results(["base", "a", "b"]), ["a"], ["b"])
    assert half["final"]["fid_8_mean"] is not None and "final" not in half["missing"]
    part = results(["base", "a", "b"])
    del part["cells"]["b"]["16"]["cfg"]
    half = table.summary(part, ["a"], ["b"])
    assert half["final"]["fid_16_mean"] is None and "final" in half["missing"]


def test_a_number_waits_for_the_row_of_every_rival_that_may_be_the_best() -> None:
    found = results(["base"])
    tried = {"cfg": 23.1, "reuse": 22.9, "linear": 23.0, "first": 24.0}
    found["choices"] = {"base": {"8": {name: {"tried": {"": x}} for name, x in tried.items()}}}
    assert table.summary(found, [], [])["fid_8_base"] is None  # linear has no row
    found["cells"]["base"]["8"] = found["cells"]["base"]["8"] | {"linear": cell("linear", 4.8)}
    assert table.summary(found, [], [])["fid_8_base"] == pytest.approx(4 / 4.8)


def test_the_page_has_a_table_for_each_model_and_cost() -> None:
    page = as_markdown(results(["base"]))
    assert page.count("| this guide |") == 6
    assert "## base, 8 forwards" in page and "## base, 16 steps" in page
    taken = "For this guide (what is taken, by the images for choosing): FID over"
    assert f"{taken} the best free rival's 0.800 (0.800 to 0.800)" in page


def test_the_page_holds_the_guide_against_cfg_of_100_on_each_model_and_on_their_mean() -> None:
    found = results()
    found["cells"]["b"]["4"] = found["cells"]["b"]["4"] | {"guided": cell("guided", 8.0, 39.0)}
    page = as_markdown(found).split("## Beside CFG of 100 forwards")[1].split("\n## ")[0]
    by_name = {
        line.split(" | ")[0][2:]: line.split(" | ")[1:] for line in page.splitlines() if line
    }
    lead = 41 - cell("cfg", 3.2)["scores"]["world"]["clip_score"]["value"]
    assert by_name["a"][1].startswith("1.250 (") and by_name["a"][1].endswith(f"; {lead:+.1f}")
    assert by_name["b"][1].startswith("2.500 (") and by_name["b"][1].endswith(f"; {lead - 2:+.1f}")
    mean = by_name["mean of the development fine-tunes"][1]
    assert mean.startswith("1.875 (") and mean.endswith(f"; {lead - 1:+.1f}")
    assert "mean of the final models" not in by_name


def test_two_trainings_of_the_guide_stand_side_by_side() -> None:
    found = results(["base", "a", "b"])
    for name, fid in (("base", 4.4), ("a", 4.0), ("b", 3.6)):
        places = found["cells"][name]
        places["8"] = places["8"] | {"guided-2": cell("guided-2", fid, 40.0)}
    assert table.summary(found, ["a", "b"], [])["trainings"] == {
        "fid_8_base": [0.8, 0.88],
        "fid_8_mean": [0.8, 0.76],
    }
    page = as_markdown(found).split("## The guide trained a second time")[1].split("\n## ")[0]
    lines = {line.split(" | ")[0][2:]: line.split(" | ")[1:] for line in page.splitlines() if line}
    assert lines["base"] == ["", "1.100 (1.100 to 1.100); -1.0; 0.800, 0.880", " |"]
    mean_of = lines["mean of the development fine-tunes"]
    assert mean_of[1].startswith("0.950 (") and mean_of[1].endswith("; 0.800, 0.760")
    assert "second time" not in as_markdown(results())
    assert table.summary(results(), ["a", "b"], [])["trainings"] is None


def test_the_page_says_where_cfg_of_100_forwards_is_of_another_precision_than_the_guide() -> None:
    found = results(["base", "a"])
    precisions = {("base", "100", "cfg"): "fp32", ("base", "8", "guided"): "bf16 in sampling"}
    precisions |= {("base", "2", "guided"): "fp32"}
    precisions |= {
        ("a", place, method): "bf16" for place, method in (("100", "cfg"), ("8", "guided"))
    }
    found["records"] = {
        row_name(*row): [{"guide": "g", "precision": precision, "commit": "c", "command": "x"}]
        for row, precision in precisions.items()
    }
    page = as_markdown(found)
    assert page.count("compares precisions besides") == 1
    of_base = page.split("## base, 100 forwards")[1].split("\n## ")[0]
    assert "This row is in fp32, the guide's of 8 forwards in bf16: what compares" in of_base


@pytest.mark.parametrize(
    ("tried", "taken", "clip"), [((11.0, 11.5), "this guide", 41), ((11.5, 11.0), "in some", 42)]
)
def test_whether_the_guide_has_exact_steps_is_chosen_by_other_images_than_the_tables(
    tried: tuple[float, float], taken: str, clip: float
) -> None:
    found = results(["base"])
    found["cells"]["base"]["8"] |= {"mixed": cell("mixed", 3.9, 42.0)}
    by_method = zip(("guided", "mixed"), tried, strict=True)
    found["choices"] = {"base": {"8": {name: {"tried": {"": x}} for name, x in by_method}}}
    found["choices"]["base"]["8"]["cfg"] = {"tried": {"": 12.0}}
    summed = table.summary(found, [], [])
    assert summed["clip_8_base"] == pytest.approx(clip - 40.5)
    assert summed["fid_8_over_cfg100"] == pytest.approx((4 if clip == 41 else 3.9) / 3.2)
    page = as_markdown(found).split("## base, 8 forwards")[1].split("\n## ")[0]
    (line,) = [line for line in page.splitlines() if "is taken, by" in line]
    assert taken in line


def test_the_way_of_guiding_goes_by_many_images_where_all_ways_have_them() -> None:
    found = results(["base"])
    found["cells"]["base"]["8"] |= {"mixed": cell("mixed", 3.9)}
    ways = {
        "guided": {"tried": {"a": 11.0}, "of_many": 5.0},
        "mixed": {"tried": {"b": 11.5}, "of_many": 4.9},
    }
    found["choices"] = {"base": {"8": ways}}
    assert table.Found(found, ["base"]).own("base", "8") == "mixed"
    del ways["mixed"]["of_many"]
    assert table.Found(found, ["base"]).own("base", "8") == "guided"


def test_former_ways_never_count() -> None:
    found = results(["base"])
    found["cells"]["base"]["8"] |= {"exact": cell("exact", 3.0)}
    ways = {"guided": {"tried": {"a": 11.0}, "of_many": 5.0}}
    found["choices"] = {"base": {"8": {**ways, "exact": {"tried": {"b": 9.0}, "of_many": 4.0}}}}
    assert table.Found(found, ["base"]).own("base", "8") == "guided"


def test_ways_to_take_the_guide_stand_beside_one_another_as_means_over_the_models() -> None:
    found = results(["base", "tuned"])
    for name, fid, clip in (("base", 3.0, 40.0), ("tuned", 3.6, 41.0)):
        made = {"cfg": cell("cfg", 4.0, 40.0), "mixed": cell("mixed", fid, clip)}
        found["cells"][name]["8"] = found["cells"][name]["8"] | made  # models share their cells
    page = as_markdown(found).split("## Ways to take the guide")[1].split("\n## ")[0]
    (line,) = [one for one in page.splitlines() if one.startswith("| `mixed` | `cfg` |")]
    at_8 = line.split("|")[4]
    assert at_8.strip().startswith("0.825 (") and at_8.strip().endswith("; +0.50")
    del found["cells"]["tuned"]["8"]["mixed"]
    assert "| `mixed` | `cfg` |  |  |  |" in as_markdown(found)


def test_the_tables_in_the_repository_are_of_the_results_there() -> None:
    assert run.RESULTS.with_suffix(".md").read_text() == as_markdown(read_json(run.RESULTS))


def test_each_way_to_take_the_guide_has_a_label_and_runs_of_its_own() -> None:
    assert len(set(LABELS.values())) == len(LABELS)
    found = results(["base"])
    ways = ("exact", "mixed")
    found["cells"]["base"]["8"] |= {method: cell(method, 3.9) for method in ways}
    found["records"] = {
        row_name("base", "8", method): [
            {"guide": "g", "precision": "fp32", "commit": "c", "command": f"makes {method}"}
        ]
        for method in ways
    }
    page = as_markdown(found)
    of_base = page.split("## base, 8 forwards")[1].split("\n## ")[0]
    for number, method in enumerate(ways, 1):
        assert f"{number}. Guide g, fp32, commit c, `makes {method}`." in page
        (row,) = [line for line in of_base.splitlines() if line.startswith(f"| {LABELS[method]} |")]
        assert row.endswith(f"| {number} |")
        assert f"For {LABELS[method]}: FID over the best free rival's" in of_base


def with_large(models: Collection[str] = ("base", "a", "b")) -> dict[str, Any]:
    """Results with large rows at 8 forwards: of the guide and two rivals that are near the best."""
    found = results(models)
    for name in models:
        few = {"first": 7.0, "interval": 7.0, "linear": 5.2}  # beside "reuse" with 5.0
        rows = {method: cell(method, fid) for method, fid in few.items()}
        found["cells"][name]["8"] = found["cells"][name]["8"] | rows
        many = {"guided": (2.0, 43.0), "reuse": (3.0, 40.0), "linear": (2.5, 42.0)}
        rows = {method: cell(method, *scores) for method, scores in many.items()}
        found["cells"][name]["large 8"] = rows
        setting = rows["guided"]["setting"]
        way = {"setting": setting, "tried": {setting: 11.0}, "of_large": 3.0}
        others = {method: {"tried": {"": 12.0}, "of_large": 3.5} for method in ("halved", "mixed")}
        found["choices"][name] = {"8": {"guided": way, **others}}
    return found


def test_keys_are_of_large_rows_where_all_are_there_that_they_need() -> None:
    found = with_large()
    summed = table.summary(found, ["a", "b"], [])
    assert summed["of_large_rows"] == {"base": [8], "fine-tunes": [8], "fid_worst": False}
    assert summed["fid_8_base"] == summed["fid_8_mean"] == pytest.approx(2 / 2.5)
    assert summed["foreign_fid_8_mean"] == pytest.approx(2 / 2.5)
    assert summed["clip_8_base"] == pytest.approx(43 - 42)
    assert summed["fid_16_base"] == pytest.approx(4 / 5), "which has no large rows"
    found["cells"]["base"]["8"] |= {"guided": cell("guided", 5.0)}
    assert table.summary(found, ["a", "b"], [])["fid_worst"] == 1.0, "not of large rows alone yet"
    for name in ("base", "a", "b"):
        for at in ("16", "4"):
            found["cells"][name][at] = found["cells"][name]["8"]
            found["cells"][name][f"large {at}"] = found["cells"][name]["large 8"]
            found["choices"][name][at] = found["choices"][name]["8"]
    summed = table.summary(found, ["a", "b"], [])
    assert summed["of_large_rows"]["fid_worst"]
    assert summed["fid_worst"] == pytest.approx(2 / 2.5)


@pytest.mark.parametrize(
    "lacks", ["large rival", "small rival", "guide", "choice", "way", "setting"]
)
def test_until_then_they_are_of_the_others(lacks: str) -> None:
    found = with_large()
    cells, choice = found["cells"]["b"], found["choices"]["b"]["8"]["guided"]
    match lacks:
        case "large rival":
            del cells["large 8"]["linear"]
        case "small rival":  # which may be among the strongest
            del cells["8"]["first"]
        case "guide":
            del cells["large 8"]["guided"]
        case "choice":
            del choice["of_large"]
        case "way":
            del found["choices"]["b"]["8"]["mixed"]
        case "setting":  # was chosen anew
            choice["setting"] = "guided ddim 8 4"
    summed = table.summary(found, ["a", "b"], [])
    assert summed["of_large_rows"] == {"base": [8], "fine-tunes": [], "fid_worst": False}
    assert summed["fid_8_base"] == pytest.approx(2 / 2.5)
    assert summed["fid_8_mean"] == pytest.approx(4 / 5)


def test_the_strongest_free_rivals_are_those_near_the_best_by_either_judge() -> None:
    found = with_large(["base"])
    of = table.Found(found, ["base"])
    assert of.strongest("base", "8") == {"reuse", "linear"}
    judged = found["cells"]["base"]["8"]["first"]["scores"]["foreign"]
    judged["fid"] = as_json("fid", Estimate(value=4.9))
    assert of.strongest("base", "8") == {"reuse", "linear", "first"}


def test_the_way_of_guiding_of_large_rows_goes_by_as_many_images() -> None:
    found = with_large(["base"])
    mixed = cell("mixed", 3.9)
    found["cells"]["base"]["8"] |= {"mixed": mixed}
    found["cells"]["base"]["large 8"] |= {"mixed": mixed}
    way = {"setting": mixed["setting"], "tried": {"b": 11.5}, "of_large": 2.9, "of_many": 9.0}
    found["choices"]["base"]["8"] |= {"mixed": way}
    assert table.Found(found, ["base"]).own("base", "large 8") == "mixed"
    assert table.Found(found, ["base"]).own("base", "8") == "guided"
    del way["of_large"]
    assert table.Found(found, ["base"]).ratio("base", "large 8") is None


def test_large_rows_are_made_of_the_best_way_and_of_the_strongest_rivals(
    bench: workbench.Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "RUN", tmp_path)
    maker = run.Maker(bench, run.Table(tmp_path / "results.json", {}), NOBODY, NOBODY)
    monkeypatch.setattr(maker, "fid_of_few", lambda setting: abs(setting.scale - 5))
    fids = {"guided": 5.0, "halved": 4.8, "mixed": 4.9}
    monkeypatch.setattr(maker, "_fid_of", lambda setting, tasks: fids[setting.method])
    free = {"cfg": 6.0, "first": 5.0, "interval": 7.0, "reuse": 5.2, "linear": 8.0}
    made: dict[str, list[str]] = {"4": [], "large 4": []}

    def make(place: str, setting: Setting, made_by: Any) -> None:
        made[place].append(setting.method)
        row = {setting.method: cell(setting.method, free.get(setting.method, 1.0))}
        maker.table.change(
            lambda results: (
                results["cells"].setdefault("base", {}).setdefault(place, {}).update(row)
            )
        )

    monkeypatch.setattr(maker, "cell", make)
    maker.large_rows(4, {"guide": "", "precision": "", "commit": "", "command": ""})
    assert made == {"4": [*FREE], "large 4": ["halved", "first", "reuse"]}


def test_large_rows_have_a_table_of_their_own_beneath_the_other() -> None:
    page = as_markdown(with_large(["base"]))
    headings = [line for line in page.splitlines() if line.startswith("## base, 8")]
    assert headings == [
        "## base, 8 forwards",
        f"## base, 8 forwards, {NUM_LARGE} images",
        "## base, 8 steps",
    ]
    of_large = page.split(headings[1])[1].split("\n## ")[0]
    assert "FID over the best free rival's 0.800" in of_large and "too dear" not in of_large


def test_rivals_are_trained_alike_if_all_settings_are_that_bear_on_their_training() -> None:
    values = YAML(typ="safe").load(Path("params.yaml"))

    class Cache:
        companions = ("one", "another")
        prompts = ("red apple",)

    def settings(section: str, cache: Any = Cache, **changed: Any) -> str:
        params = checked({**values, section: {**values[section], **changed}}, "params.yaml")
        return str(training.settings_of(params, cache)["settings"])

    same = settings("halve")
    for name, value in (("match_images", 1280), ("end_steps", 4), ("report_every_images", 8)):
        assert settings("halve", **{name: value}) == same, f"{name} does not bear on it"
    for name in ("companions", "prompts"):
        assert settings("halve", type("Other", (Cache,), {name: ("one",)})) != same
    for section, name, value in (
        ("halve", "guidance_gain", 1.0),
        ("distill", "num_images", 2000),
        ("cache", "num_trajectory", 1000),
        ("prepare", "heldout_fraction", 0.2),
    ):
        assert settings(section, **{name: value}) != same


def test_the_page_begins_with_the_guide_beside_the_best_free_rival_of_the_most_images() -> None:
    found = with_large()
    del found["cells"]["b"]["large 8"]["linear"]
    found["cells"]["b"]["8"] |= {"guided": cell("guided", 4.5, 41.0)}
    first = as_markdown(found).split("\n## ")[1]
    assert first.startswith("Beside the best free rival\n")
    rows = [line.split(" | ") for line in first.splitlines() if " | " in line]
    lines = {row[0][2:]: row[2] for row in rows}
    told = {name: lines[name] for name in ("a", "b", "mean of the development fine-tunes")}
    assert told["a"] == "0.800 (0.800 to 0.800); 0.800; +1.0; 2304, `guided`"
    assert told["b"] == "0.900 (0.900 to 0.900); 0.900; +0.5; 576, `guided`"
    of_mean = told["mean of the development fine-tunes"]
    assert of_mean.startswith("0.850 (") and of_mean.endswith("; +0.5; 576"), "of few alone"


def test_the_page_says_how_each_method_with_the_guide_stands_to_the_rival() -> None:
    found = results(["base"])
    cells = found["cells"]["base"]["8"]
    cells["mixed"] = {**cells["guided"], "setting": "mixed unipc 6 3 0,3"}
    page = as_markdown(found)
    assert page.count("CFG in some steps: FID over the best free rival's 0.800") == 1


def test_scores_are_read_as_they_were_written() -> None:
    found = Estimate(value=4.25, replicates=(4.0, 4.5))
    assert from_json(as_json("fid", found)) == found
    assert from_json(as_json("kid", found)).replicates == ()


def test_a_table_of_another_setting_is_not_written_over(tmp_path: Path) -> None:
    write_json(tmp_path / "t.json", {"setting": {"num_images": 1}})
    with pytest.raises(ValueError, match="another base, judge or count"):
        run.Table(tmp_path / "t.json", {"num_images": 2})


def test_a_job_that_another_process_has_in_hand_is_left_to_it(tmp_path: Path) -> None:
    with run.held(tmp_path / "lock", wait=False) as mine:
        assert mine
        with run.held(tmp_path / "lock", wait=False) as other:
            assert not other
    with run.held(tmp_path / "lock", wait=False) as mine:
        assert mine


def test_fine_tunes_try_what_was_good_on_the_base_at_its_best_scale() -> None:
    tried = {
        "cfg ddim 4 3 0,1,2,3": 6.0,
        "cfg dpmsolver++ 4 3 0,1,2,3": 5.2,
        "cfg dpmsolver++ 4 2 0,1,2,3": 5.0,
        "cfg unipc 4 2.5 0,1,2,3": 5.05,
    }
    found = {setting.text for setting in run.starts_from({"tried": tried})}
    assert found == {"cfg dpmsolver++ 4 2 0,1,2,3", "cfg unipc 4 2.5 0,1,2,3"}


def test_every_method_of_the_jobs_has_a_label() -> None:
    jobs = [name.split() for _, name, _ in run.jobs(["base"], [8], final=False)]
    names = {words[1] for words in jobs if words[0] == "8" and words[1] != "large"}
    assert names <= LABELS.keys() and names >= {*FREE, *OWN}
    assert [words for words in jobs if words[-1] == "large"] == [["8", "large"]]


def test_a_final_run_makes_no_large_rows_and_tries_nothing_that_came_later() -> None:
    names = [name for _, name, _ in run.jobs(["a"], [8], final=True)]
    assert "8 halved" in names
    assert not any("large" in name or "mixed" in name for name in names)


# ImageNet's classes of what the world draws too
CLASSES = {"umbrella": 879, "trolleybus": 874, "volcano": 980, "snail": 113, "koala": 105}
CLASSES |= {"hourglass not done": 604, "violin": 889, "strawberry": 949, "lemon": 951}


def test_the_foreign_judge_knows_things_it_was_never_shown_as_drawings() -> None:
    records = read_records(
        ROOT / "zoo/data/noto.parquet", image_column="image", caption_column="caption"
    )
    shown = [record for record in records if record.caption in CLASSES]
    images = np.stack([np.asarray(fit(record, 64)[0]) for record in shown])
    judge = ForeignJudge(torch.device("cpu"))
    best = np.argsort(-judge.classes(images), axis=1)[:, :10]
    right = [CLASSES[one.caption] in row for one, row in zip(shown, best, strict=True)]
    assert len(right) > 5 and np.mean(right) > 0.3  # by chance 0.01
    assert judge.features(images).shape == (len(images), 1280)
