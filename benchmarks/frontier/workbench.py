"""Samples a model at any setting, and keeps what it made.

Images lie in runs/frontier/images/<identity>, a file a batch: a run that was stopped goes on where
it was, and another judge needs no new sampling. The identity is a hash of all that they depend on,
the code of the rivals by VERSION.
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from benchmarks.frontier.rivals import (
    Coefficients,
    LinearAG,
    PartialCFG,
    ReusedGuidance,
    fit_linear,
)
from benchmarks.frontier.settings import (
    FORMER,
    GUIDES,
    HALVED,
    LCM,
    MOST,
    TRAINED_LABELS,
    Setting,
)
from benchmarks.frontier.trained import Trained, generators
from benchmarks.peers.lcm import sample_consistent
from components.images import Task, batches
from components.params import Model, Params
from components.paths import RUNS
from components.rows import load_row
from components.sampling import Sampler, choose_tasks
from pnp_core.bundle import GuideBundle
from pnp_core.denoiser import Denoiser, GuidedDenoiser, PlainDenoiser
from pnp_core.exact import ExactDenoiser
from pnp_core.files import write_json, write_tensors
from pnp_core.guide import Guide
from pnp_core.metrics import count_flops
from pnp_core.model_files import weights_hash
from pnp_core.sample import sample

VERSION = 1
KEPT = RUNS / "frontier/images"
BATCH_SIZE = 96
NUM_FITTED = 200  # trajectories that LinearAG is fitted on
FIT_SEED = 2_000_000


class Workbench:
    """One model, and all methods on it.

    Args:
        name: of the model.
        model: where it lies.
        params: of the run; `evaluate` says in what precision.
        bundles: guides, by their names in `GUIDES`.
        rivals: trained methods, by name.
    """

    def __init__(
        self,
        name: str,
        model: Model,
        params: Params,
        bundles: dict[str, GuideBundle],
        rivals: Mapping[str, Trained] | None = None,
    ) -> None:
        self.rivals = dict(rivals or {})
        self.name, self.model, self.params, self.bundles = name, model, params, bundles
        pipe = load_row(model, params.base)
        self.samplers = {
            method: Sampler(pipe, bundle.to(pipe.unet.device), params)
            for method, bundle in bundles.items()
        }
        self.sampler = self.samplers["guided"]
        self.identity = {
            "version": VERSION,
            "base": weights_hash(params.base),
            "model": weights_hash(model.path),
            "precision": params.evaluate.precision,
            "spacing": self.sampler.spacing,
        }
        self._coefficients: dict[Setting, Coefficients] = {}
        self._flops: dict[str, tuple[float, float]] = {}
        self._inputs: dict[tuple[Task, ...], dict[str, Any]] = {}  # settings share their batches

    def images(self, setting: Setting, tasks: Sequence[Task]) -> tuple[np.ndarray, float]:
        """Images (N, height, width, 3) of these tasks, made if they are not kept.

        Also the milliseconds of processor time that one takes without its decoding.
        """
        folder = self._folder(setting)
        found, seconds = [], 0.0
        for batch in batches(tasks, BATCH_SIZE):
            path = folder / f"{_hash([list(task) for task in batch])}.safetensors"
            if not path.exists():
                self._make(setting, batch, path)
            with safe_open(path, "np") as file:
                found.append(file.get_tensor("images"))
                seconds += float(file.metadata()["seconds"])
        return np.concatenate(found), 1000 * seconds / len(tasks)

    def identity_of(self, setting: Setting) -> str:
        """Of a setting's images: a hash of all that they depend on but prompts and seeds."""
        return _hash(self._depends_on(setting))

    def _depends_on(self, setting: Setting) -> dict[str, Any]:
        values = {**self.identity, "setting": setting.text}
        if (own := self.digest([setting])) is not None:
            values["guide"] = own
        return values

    def _folder(self, setting: Setting) -> Path:
        folder = KEPT / self.identity_of(setting)
        if not (folder / "identity.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "identity.json", self._depends_on(setting))
        return folder

    def _make(self, setting: Setting, batch: Sequence[Task], path: Path) -> None:
        run = self._run(setting, batch)
        with self.sampler.computing():
            denoiser, scheduler = self.denoiser(setting), self.sampler.pipe.scheduler
            began = time.process_time()
            if setting.solver == LCM:
                of = {key: run[key] for key in ("z_T", "conditions", "num_steps")}
                noise = generators([task.seed for task in batch])
                latents = sample_consistent(denoiser, scheduler, **of, generators=noise)
            else:
                latents = sample(denoiser, scheduler, **run)
            seconds = time.process_time() - began
        images = torch.from_numpy(self.sampler.decode(latents))
        write_tensors(path, {"images": images}, {"seconds": str(seconds)})

    def _run(self, setting: Setting, batch: Sequence[Task]) -> dict[str, Any]:
        tasks = tuple(batch)
        if tasks not in self._inputs:
            self._inputs[tasks] = self.sampler.inputs(batch)
        run = self._inputs[tasks]
        scale_B = torch.full_like(run["conditions"].w_B, setting.scale)
        return {
            "z_T": run["z_T"],
            "conditions": run["conditions"].with_scale(scale_B),
            "num_steps": setting.num_steps,
            "timestep_spacing": self.sampler.spacing,
            "solver": setting.solver,
        }

    def denoiser(self, setting: Setting) -> Denoiser:
        """A fresh denoiser for one run.

        Guides are halved under DDIM, under others those of the methods in `HALVED` alone.
        """
        unet, schedule = self.sampler.pipe.unet, self.sampler.schedule
        teacher = self.sampler.teacher()
        match setting.method:
            case "unguided":
                return PlainDenoiser(unet, schedule)
            case "cfg" | "first" | "interval":
                return PartialCFG(teacher, setting.full)
            case "reuse":
                return ReusedGuidance(teacher, setting.full)
            case "linear":
                return LinearAG(teacher, setting.full, self._fitted(setting))
        if setting.method in self.rivals:
            peer = self.rivals[setting.method].peer(setting.num_steps, setting.solver)
            return peer.denoiser(unet, schedule)
        guided = GuidedDenoiser(unet, self.guide(setting), schedule)
        if setting.full:
            return ExactDenoiser(guided, teacher, setting.full, setting.num_steps)
        return guided

    def guide(self, setting: Setting) -> Guide:
        """The one of its method's bundle that a setting takes."""
        bundle = self.bundles[GUIDES[setting.method]]
        is_halved = setting.solver == "ddim" or setting.method in HALVED
        steps = setting.num_steps if is_halved else bundle.num_steps[-1]
        return bundle.for_steps(steps)

    def has(self, method: str) -> bool:
        """Whether there is what a method has trained, if it has."""
        if method in GUIDES:
            return GUIDES[method] in self.bundles
        return method in self.rivals or method not in (*TRAINED_LABELS, *FORMER)

    def digest(self, settings: Sequence[Setting]) -> str | None:
        """Of the weights that these settings of a method take; None where none are trained."""
        method = settings[0].method
        if method in self.rivals:
            return self.rivals[method].digest
        if method not in GUIDES:
            return None
        return _hash(sorted({self.guide(setting).weights_digest() for setting in settings}))

    def _fitted(self, setting: Setting) -> Coefficients:
        if setting not in self._coefficients:
            tasks = tasks_of(self.params, NUM_FITTED, FIT_SEED)
            self._coefficients[setting] = fit_linear(
                self.sampler.teacher(),
                self.sampler.pipe.scheduler,
                setting.full,
                [self._run(setting, batch) for batch in batches(tasks, BATCH_SIZE)],
            )
        return self._coefficients[setting]

    def forwards(self, setting: Setting) -> float:
        """What an image costs, in plain forwards, by FLOPs."""
        first, later = self._step_costs(setting.method)
        num_cheap = setting.num_steps - len(setting.full)
        return first + (num_cheap - 1) * later + 2 * len(setting.full)

    def most_steps(self, method: str, num_forwards: int) -> int:
        """How many steps of a trained rival there are at a cost."""
        first, later = self._step_costs(method)
        return max(0, 1 + int((MOST * num_forwards - first) / later))

    def _step_costs(self, method: str) -> tuple[float, float]:
        """Of a run's first step, which reads the prompt, and of each later one, in forwards."""
        own = GUIDES.get(method, method)
        if own not in {*self.bundles, *self.rivals}:
            return 1.0, 1.0
        if own in self.rivals and self.rivals[own].merges:
            return 1.0, 1.0
        if own not in self._flops:
            task = tasks_of(self.params, NUM_FITTED, FIT_SEED)[:1]
            plain, one, two = (
                self._flops_of(Setting(method=m, solver="ddim", num_steps=n, scale=3.0), task)
                for m, n in (("unguided", 1), (own, 1), (own, 2))
            )
            self._flops[own] = one / plain, (two - one) / plain
        return self._flops[own]

    def _flops_of(self, setting: Setting, task: Sequence[Task]) -> int:
        run, scheduler = self._run(setting, task), self.sampler.pipe.scheduler  # reads the prompt
        return count_flops(lambda: sample(self.denoiser(setting), scheduler, **run))


def tasks_of(params: Params, num_images: int, seed: int) -> list[Task]:
    """Held-out and trained prompts in turns, as `evaluate` takes them; seeds from `seed` on."""
    changes = {"num_images": num_images, "seed": seed, "review": "quick"}
    return choose_tasks(params.evaluate.model_copy(update=changes))


def _hash(values: Any) -> str:
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
