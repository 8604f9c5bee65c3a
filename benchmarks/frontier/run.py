"""Makes the table's cells, one job after another; each is written as it is made.

A job chooses each method's setting on a model at a cost, or makes its cells. Several processes may
run side by side: a job that another one has in hand is left to it.
"""

import fcntl
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.frontier import judges as judging
from benchmarks.frontier.final import models_to_run
from benchmarks.frontier.settings import (
    AFTER_FINAL,
    CONSISTENT,
    FREE,
    GUIDES,
    NEAR_BEST,
    NUM_LARGE,
    OWN,
    PLACES,
    TRAINED_LABELS,
    Setting,
    climb,
    contenders,
    forwards_of,
    large,
    layouts,
    row_name,
)
from benchmarks.frontier.table import Found, best_of_large
from benchmarks.frontier.trained import trained
from benchmarks.frontier.workbench import Workbench, tasks_of
from benchmarks.quality import precision_of
from benchmarks.record import Record, digest, note, record
from components.dataset import reference_images
from components.device import device, load_base
from components.images import Task
from components.judging import Judge
from components.params import Params
from components.paths import RUNS
from components.scores import RealImages, fid
from pnp_core.bundle import GuideBundle
from pnp_core.files import read_json, write_json, write_tensors
from pnp_core.model_files import weights_hash
from pnp_core.sample import SOLVERS

RESULTS = Path("benchmarks/results/frontier.json")
NUM_IMAGES = 576
NUM_CHOOSING = 192
CHOOSING_SEED = 1_000_000
NUM_CLOSE = 192  # PSNR is a mean over images: it needs fewer
CLOSE_STEPS = 64
MANY_STEPS = 50  # CFG of 100 forwards
EQUAL_STEPS = (16, 8)  # where the guide, CFG and no guidance stand side by side at one scale
BUNDLES = {"guided": Path("zoo/guide"), "guided-2": Path("zoo/guide-2")}
RUN = RUNS / "frontier"


class Table:
    """The results on disk, which other processes may be writing too."""

    def __init__(self, path: Path, setting: dict[str, Any]) -> None:
        self.path, self.setting = path, setting
        if path.exists() and read_json(path)["setting"] != setting:
            raise ValueError(
                f"{path} is of another base, judge or count: move it away to make all anew"
            )

    def read(self) -> dict[str, Any]:
        """All there is so far."""
        if not self.path.exists():
            return {"setting": self.setting, "choices": {}, "cells": {}}
        results: dict[str, Any] = read_json(self.path)
        return results

    def change(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Read, change and write, while no other process does."""
        with held(RUN / "table.lock"):
            results = self.read()
            change(results)
            write_json(self.path, results)


@contextmanager
def held(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a file's lock; without waiting, tell whether it was to be had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


class Maker:
    """Fills the table for one model."""

    def __init__(self, bench: Workbench, table: Table, judge: Judge, foreign: Any) -> None:
        self.bench, self.table, self.judge, self.foreign = bench, table, judge, foreign
        self.tasks = tasks_of(bench.params, NUM_IMAGES, bench.params.evaluate.seed)
        self.few = tasks_of(bench.params, NUM_CHOOSING, CHOOSING_SEED)
        self.many = tasks_of(bench.params, NUM_IMAGES, CHOOSING_SEED)
        self.large = tasks_of(bench.params, NUM_LARGE, bench.params.evaluate.seed)
        self.large_choosing = tasks_of(bench.params, NUM_LARGE, CHOOSING_SEED)
        self._references: dict[str, np.ndarray] = {}

    def references(self, key: str) -> np.ndarray:
        """Features of the real images, by the judge "world" or "foreign"; kept on disk."""
        if key not in self._references:
            sees = self.judge if key == "world" else self.foreign
            path = RUN / "references" / f"{self.bench.name}-{key}.safetensors"
            if not path.exists():
                real = reference_images(self.bench.model.reference, self.bench.params)
                found = torch.from_numpy(sees.features(real))
                write_tensors(path, {"features": found}, {"judge": sees.name})
            from safetensors.numpy import load_file

            self._references[key] = load_file(path)["features"]
        return self._references[key]

    def choose(self, method: str, num_forwards: int) -> Setting | None:
        """The method's best setting at a cost, by FID of few images of other seeds.

        None where the method needs more forwards, or there is no such guide. What saves some of
        CFG's forwards takes CFG's best solver. On a fine-tune only layouts are tried that were good
        on the base; the scale is always the model's own.
        """
        name, at = self.bench.name, str(num_forwards)
        known = self.table.read()["choices"]
        if not self.bench.has(method):
            return None
        guide = self.trained_for(method, num_forwards)
        mine = known.get(name, {}).get(at, {}).get(method)
        if mine and mine.get("guide") == guide:
            return Setting.parse(mine["setting"])
        solvers = tuple(SOLVERS)
        if method in PLACES and method in FREE:
            cfg = self.choose("cfg", num_forwards)
            assert cfg
            solvers = (cfg.solver,)
        most = self.bench.most_steps(method, num_forwards) if method in TRAINED_LABELS else None
        wanted = layouts(method, num_forwards, solvers, most)
        base = known.get("base", {}).get(at, {}).get(method)
        from_base = base and base.get("guide") == guide and name != "base"
        if from_base:
            wanted = starts_from(base)
        if not wanted:
            return None
        tried: dict[Setting, float] = {}
        kept = self._still_good(mine)
        if method in CONSISTENT:  # not told the scale
            return self._chosen(
                method, num_forwards, {s: self._try(s, tried, kept) for s in wanted}
            )
        # at one scale halved ones pull more; those of the base's choice have each its own
        if method in FREE or (method in TRAINED_LABELS and from_base):
            first = {start: self._try(start, tried, kept) for start in wanted}
            wanted = [s for s in wanted if first[s] <= NEAR_BEST * min(first.values())]
        for start in wanted:
            climb(start.scale, lambda w, s=start: self._try(s.at(w), tried, kept))  # type: ignore[misc]
        return self._chosen(method, num_forwards, tried)

    def trained_for(self, method: str, num_forwards: int) -> str | None:
        """Identity of all weights that a method may take at a cost."""
        everything = layouts(method, num_forwards)
        return self.bench.digest(everything) if everything else None

    def _still_good(self, choice: Mapping[str, Any] | None) -> dict[Setting, float]:
        """What was tried before on the images that would be made now."""
        if choice is None:
            return {}
        images = choice.get("images", {})
        tried = [(Setting.parse(text), text) for text in images]
        return {
            setting: choice["tried"][text]
            for setting, text in tried
            if images[text] == self.bench.identity_of(setting)
        }

    def _chosen(self, method: str, num_forwards: int, tried: dict[Setting, float]) -> Setting:
        """The best of what was tried, written down with all of it."""
        name, at = self.bench.name, str(num_forwards)
        best = min(tried, key=lambda setting: tried[setting])
        choice = {
            "guide": self.trained_for(method, num_forwards),
            "setting": best.text,
            "tried": {setting.text: judging.rounded(found) for setting, found in tried.items()},
            "images": {setting.text: self.bench.identity_of(setting) for setting in tried},
        }

        def change(results: dict[str, Any]) -> None:
            results["choices"].setdefault(name, {}).setdefault(at, {})[method] = choice

        self.table.change(change)
        return best

    def compare_ways(self, num_forwards: int, ways: Sequence[str], *, is_large: bool) -> None:
        """FID of each way to take the guide, of as many images as a row has, or a large one.

        So few as settings are chosen by can't tell methods apart.
        """
        name, at = self.bench.name, str(num_forwards)
        key, tasks = ("of_large", self.large_choosing) if is_large else ("of_many", self.many)
        for method in ways:
            setting = self.choose(method, num_forwards)
            if setting is None:
                continue
            if key in self.table.read()["choices"][name][at][method]:
                continue
            found = judging.rounded(self._fid_of(setting, tasks))

            def change(
                results: dict[str, Any], setting: Setting = setting, found: Any = found
            ) -> None:
                choice = results["choices"][name][at][setting.method]
                if choice["setting"] == setting.text:  # another process may choose anew
                    choice[key] = found

            self.table.change(change)

    def is_contender(self, method: str, num_forwards: int) -> bool:
        """Whether a method's row is worth making before others, by what was tried on the base."""
        of_base = self.table.read()["choices"].get("base", {}).get(str(num_forwards), {})
        return method == "cfg" or method in GUIDES or method in contenders(of_base)

    def large_rows(self, num_forwards: int, made_by: Record) -> None:
        """What keys compare: the way that the guide is taken in, and the strongest free rivals."""
        name, at = self.bench.name, str(num_forwards)
        for method in FREE:
            if setting := self.choose(method, num_forwards):
                self.cell(at, setting, made_by)
        self.compare_ways(num_forwards, OWN, is_large=True)
        results = self.table.read()
        best = best_of_large(results["choices"][name][at], num_forwards)
        for method in (best, *sorted(Found(results, [name]).strongest(name, at))):
            setting = self.choose(method, num_forwards)
            assert setting
            self.cell(large(num_forwards), setting, made_by)

    def _try(
        self, setting: Setting, tried: dict[Setting, float], kept: Mapping[Setting, float]
    ) -> float:
        if setting not in tried:
            known = kept.get(setting)
            tried[setting] = self.fid_of_few(setting) if known is None else known
        return tried[setting]

    def fid_of_few(self, setting: Setting) -> float:
        """Of the images that settings are chosen by."""
        return self._fid_of(setting, self.few)

    def _fid_of(self, setting: Setting, tasks: Sequence[Task]) -> float:
        images, _ = self.bench.images(setting, tasks)
        return float(fid(self.judge.features(images), self.references("world")))

    def cell(self, place: str, setting: Setting, made_by: Record) -> None:
        """Make a cell of the table, if it is not there.

        Args:
            place: a number of forwards, "large 16" for large cells, or "equal 16" for cells at
                equal steps.
            setting: of the cell.
            made_by: the record of this run.
        """
        name = self.bench.name
        known = self.table.read()["cells"].get(name, {}).get(place, {}).get(setting.method)
        guide = self.bench.digest([setting])
        tasks = self.tasks if place == forwards_of(place) else self.large
        wanted = guide, setting.text, len(tasks)
        if known and tuple(known[key] for key in ("guide", "setting", "num_images")) == wanted:
            return
        images, milliseconds = self.bench.images(setting, tasks)
        judges: dict[str, tuple[judging.Sees, RealImages]] = {
            "world": (self.judge, RealImages(self.references("world"))),
            "foreign": (self.foreign, RealImages(self.references("foreign"))),
        }
        prompts = [task.prompt for task in tasks]
        found = judging.score(images, prompts, self.judge, judges)
        cell = {
            "guide": guide,
            "setting": setting.text,
            "num_images": len(images),
            "forwards": judging.rounded(self.bench.forwards(setting)),
            "cpu_ms": judging.rounded(milliseconds),
            "scores": {
                judge: {key: judging.as_json(key, value) for key, value in scores.items()}
                for judge, scores in found.items()
            },
        }

        def change(results: dict[str, Any]) -> None:
            results["cells"].setdefault(name, {}).setdefault(place, {})[setting.method] = cell
            note(results, row_name(name, place, setting.method), made_by)

        self.table.change(change)

    def cfg100(self, made_by: Record) -> None:
        """CFG of 50 DDIM steps, at its best scale."""
        if "100" in self.table.read()["cells"].get(self.bench.name, {}):
            return
        every = tuple(range(MANY_STEPS))
        start = Setting(method="cfg", solver="ddim", num_steps=MANY_STEPS, scale=3.0, full=every)
        scale = climb(3.0, lambda scale: self._try(start.at(scale), {}, {}))
        self.cell("100", start.at(scale), made_by)

    def unexplained(self, made_by: Record) -> None:
        """`guidance_fvu` of the guides, over the prompts that benchmarks.quality takes."""
        heldout = [task for task in self.tasks if task.is_heldout]
        known = self.table.read().get("fvu", {}).get(self.bench.name, {})
        for method, sampler in self.bench.samplers.items():
            bundle = self.bench.bundles[method]
            guide = bundle.guides[bundle.num_steps[-1]].weights_digest()[:16]
            if known.get(method, {"guide": -1})["guide"] == guide:
                continue
            value = judging.rounded(sampler.guidance_fvu(heldout, method))

            def change(
                results: dict[str, Any],
                method: str = method,
                value: Any = value,
                guide: Any = guide,
            ) -> None:
                fvu = results.setdefault("fvu", {}).setdefault(self.bench.name, {})
                fvu[method] = {"value": value, "guide": guide}
                note(results, "guidance_fvu", made_by)

            self.table.change(change)

    def closeness(self, made_by: Record) -> None:
        """PSNR of cells to CFG of 64 steps at their scales and seeds, where it is missing.

        Cells are left whose weights are not here, or not any more.
        """
        name = self.bench.name
        cells = self.table.read()["cells"].get(name, {})
        for place, method in [(at, method) for at in cells for method in cells[at]]:
            cell = cells[place][method]
            setting = Setting.parse(cell["setting"])
            if place != forwards_of(place) or "cfg64_psnr" in cell or not self.bench.has(method):
                continue
            if self.bench.digest([setting]) != cell["guide"]:
                continue
            every = tuple(range(CLOSE_STEPS))
            cfg = replace(setting, method="cfg", solver="ddim", num_steps=CLOSE_STEPS, full=every)
            tasks = self.tasks[:NUM_CLOSE]
            wanted, _ = self.bench.images(cfg, tasks)
            made, _ = self.bench.images(setting, tasks)
            value = judging.as_json("psnr", judging.closeness(made, wanted))

            def change(
                results: dict[str, Any], at: str = place, method: str = method, value: Any = value
            ) -> None:
                results["cells"][name][at][method]["cfg64_psnr"] = value
                note(results, f"{name}, PSNR", made_by)

            self.table.change(change)


def starts_from(base: dict[str, Any]) -> list[Setting]:
    """A fine-tune's first tries: the base's good layouts, each at the scale that was best there."""
    best: dict[str, tuple[float, Setting]] = {}
    for text, fid_of_few in base["tried"].items():
        setting = Setting.parse(text)
        if setting.layout not in best or fid_of_few < best[setting.layout][0]:
            best[setting.layout] = fid_of_few, setting
    least = min(found for found, _ in best.values())
    return [setting for found, setting in best.values() if found <= NEAR_BEST * least]


Job = Callable[[Maker, Record], None]


def jobs(
    models: Sequence[str], forwards: Sequence[int], *, final: bool
) -> Iterator[tuple[str, str, Job]]:
    """What is to be done, in this order: model, the job's name, and the job."""
    left_out = ("guided", "cfg", *(AFTER_FINAL if final else ()))
    methods = ("guided", "cfg", *(m for m in (*FREE, *GUIDES) if m not in left_out))

    def choice(method: str, n: int) -> Job:
        def job(maker: Maker, made_by: Record) -> None:
            del made_by
            maker.choose(method, n)

        return job

    def ways(n: int) -> Job:
        def job(maker: Maker, made_by: Record) -> None:
            del made_by
            maker.compare_ways(n, [way for way in OWN if way in methods], is_large=False)

        return job

    def row(method: str, n: int, *, of_contenders: bool = False) -> Job:
        def job(maker: Maker, made_by: Record) -> None:
            if of_contenders and not maker.is_contender(method, n):
                return
            chosen = maker.choose(method, n)
            if chosen:
                maker.cell(str(n), chosen, made_by)

        return job

    def large_rows(n: int) -> Job:
        def job(maker: Maker, made_by: Record) -> None:
            maker.large_rows(n, made_by)

        return job

    def equal(steps: int) -> Job:
        def job(maker: Maker, made_by: Record) -> None:
            scale = maker.bench.params.evaluate.guidance_scale
            for method in ("unguided", "cfg", "guided"):
                full = tuple(range(steps)) if method == "cfg" else ()
                setting = Setting(
                    method=method, solver="ddim", num_steps=steps, scale=scale, full=full
                )
                maker.cell(f"equal {steps}", setting, made_by)

        return job

    main = [n for n in forwards if n in (16, 8, 4)]
    for model in models:
        for n in main:
            if model == "base":
                for method in methods:
                    yield model, f"choose {n} {method}", choice(method, n)
            yield model, f"choose {n} ways", ways(n)  # before a row makes one of them count
            for method in methods:
                yield model, f"{n} {method} first", row(method, n, of_contenders=True)
    for model in models:
        for steps in EQUAL_STEPS:
            yield model, f"equal {steps}", equal(steps)
        yield model, "100", Maker.cfg100
        yield model, "unexplained", Maker.unexplained
    for model in models:
        for n in main:
            for method in TRAINED_LABELS:
                yield model, f"{n} {method} trained", row(method, n)
    for model in models:
        for n in (*main, *(n for n in forwards if n not in main)):
            for method in methods:
                yield model, f"{n} {method}", row(method, n)
    for model in models:
        yield model, "psnr", Maker.closeness
    if final:  # looked at once
        return
    for model in models:
        for n in main:
            yield model, f"{n} large", large_rows(n)


def run(
    params: Params,
    models: Sequence[str],
    forwards: Sequence[int],
    pattern: str = "",
    *,
    final: bool,
) -> None:
    """Make what the table lacks of these models at these costs.

    Args:
        params: all of them.
        models: by name; none: all.
        forwards: the costs.
        pattern: a regular expression; jobs are left out in whose name it is not found.
        final: of the final models instead.

    Raises ValueError for a model that there is not or that is final, for results of another
    setting, or without the foreign judge's packages.
    """
    with held(RUN / "table.lock"):  # it writes, and another process may be starting too
        there = models_to_run(params, RESULTS, final=final)
    if unknown := [name for name in models if name not in there]:
        raise ValueError(f"no model {', '.join(unknown)}; there are {', '.join(there)}")
    judge, foreign = Judge(params.evaluate.judges[0], device()), judging.ForeignJudge(device())
    table = Table(RESULTS, setting_of(params, judge.name, foreign.name))
    bundles = {name: GuideBundle.load(path) for name, path in BUNDLES.items() if path.exists()}
    guide = ", ".join(digest(bundle) for bundle in bundles.values())
    made_by = record(guide=guide, precision=precision_of(params).split(", ")[-1])
    makers: dict[str, Maker] = {}
    rivals = trained(load_base(params.base).unet, params)

    def introduce(results: dict[str, Any]) -> None:
        for method, rival in rivals.items():
            of_method = results.setdefault("trained", {}).setdefault(method, {})
            of_method[rival.digest] = rival.about

    table.change(introduce)
    for model, name, job in jobs(models or list(there), forwards, final=final):
        if not re.search(pattern, name):
            continue
        with held(RUN / "jobs" / f"{model}-{name.replace(' ', '-')}", wait=False) as mine:
            if not mine:
                continue
            if model not in makers:
                makers.clear()  # one model in memory
                bench = Workbench(model, there[model], params, bundles, rivals)
                makers[model] = Maker(bench, table, judge, foreign)
            job(makers[model], made_by)
            print(f"{model}: {name} (process {os.getpid()})", flush=True)


def setting_of(params: Params, judge: str, foreign: str) -> dict[str, Any]:
    """What all cells have in common."""
    return {
        "judge": judge,
        "foreign_judge": foreign,
        "base_hash": weights_hash(params.base)[:16],
        "num_images": NUM_IMAGES,
        "num_choosing": NUM_CHOOSING,
        "num_close": NUM_CLOSE,
        "guidance_scale_at_equal_steps": params.evaluate.guidance_scale,
        "spacing": params.halve.timestep_spacing,
    }
