"""Sampling a model by each of the methods that are compared, always from the same seeds."""

import platform
import re
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from components.dataset import lines_of, own_prompts
from components.images import Recipe, Setting, Task, batches, guide_identity
from components.methods import METHODS, equal_cost_steps
from components.params import Evaluate, Model, Params, teacher_guider
from components.parquet import read_prompts
from components.paths import PREPARED
from pnp_core.bundle import GuideBundle
from pnp_core.conditions import Conditions
from pnp_core.cores import num_cores, share_out, side_by_side
from pnp_core.denoiser import CFGDenoiser, Denoiser, GuidedDenoiser, PlainDenoiser
from pnp_core.guiders import Guider
from pnp_core.metrics import (
    FvuTerms,
    count_flops,
    guidance_fvu_terms,
    median_times,
    one_thread,
    peak_bytes,
)
from pnp_core.models import added_conditions, encode_prompts
from pnp_core.precision import has_bf16, mixed_precision
from pnp_core.sample import decode, initial_noise, sample
from pnp_core.schedule import NoiseSchedule, sampling_timesteps

# Raised when this code makes other images than before of the same recipe: none is then reused. How
# many threads compute decides the last bits, and doesn't count.
SAMPLED_BY = 1
FVU_SHARE = 3  # `guidance_fvu` is of one task for so many images, at most NUM_FVU_PROMPTS
LEAST_FVU_TASKS = 16  # of fewer, parts are too much alike for an interval
NUM_FVU_PROMPTS = 128  # at most; the first 32 alone left 0.025 less unexplained on the base
NUM_NEGATIVE_IMAGES = 96  # at most, of each method, under a negative prompt
NUM_TIMED_STEPS = 2
TIMING_REPEATS = 5
MEGABYTE = 10**6
CPUINFO = Path("/proc/cpuinfo")


def choose_tasks(config: Evaluate, row: Model | None = None) -> list[Task]:
    """The grid's prompts, then held-out and trained ones in turns; each image has its own seed.

    The same for every model but one that has prompts of its own, which come in their place.
    Prompts come again, with other seeds, where there are fewer than images. One that stands in both
    parts of the data is a trained one, and so is one of prompts.txt. Raises ValueError if there
    is no prepared data, or it holds no prompts of a kind.
    """
    found: dict[str, set[str]] = {}
    for split in ("train", "heldout"):
        path = PREPARED / f"{split}.parquet"
        if not path.exists():
            raise ValueError(f"there is no {path}: dvc repro prepare makes it")
        found[split] = set(read_prompts(path))
        if not found[split]:
            raise ValueError(
                f"evaluate: {path} has no prompts: images are sampled for held-out and for trained "
                "ones; change prepare.heldout_fraction, or the data's column `split`"
            )
    found["heldout"] -= found["train"]  # a caption may stand in both
    if not found["heldout"]:
        raise ValueError(
            f"evaluate: every prompt of {path} is also in train.parquet, so none is held out: "
            "change the data's column `split`, or leave it out"
        )
    chosen: dict[str, list[str]] = {}
    for split, among in found.items():
        prompts = sorted(among)
        order = np.random.default_rng(config.seed).permutation(len(prompts))
        chosen[split] = [prompts[i] for i in order]
    num_images = config.extent.num_images
    own = own_prompts(row) if row else ()
    if own:  # no prompt of the data is in prompts.txt, one of these may be
        found["train"] |= set(lines_of(PREPARED / "prompts.txt"))
        prompts = [own[number % len(own)] for number in range(num_images)]
    else:
        prompts = list(config.grid_prompts)
        for number in range(num_images - len(prompts)):
            turn = chosen["train" if number % 2 else "heldout"]
            prompts.append(turn[number // 2 % len(turn)])
    negative = row.negative_prompt if row else ""
    trained, heldout = found["train"], found["heldout"]
    return [
        Task(p, config.seed + number, p not in trained if own else p in heldout, negative)
        for number, p in enumerate(prompts)
    ]


def fvu_tasks(tasks: Sequence[Task]) -> list[Task]:
    """The held-out ones, which `guidance_fvu` is of; where there are few, trained ones besides."""
    found = [task for task in tasks if task.is_heldout]
    if len(found) < LEAST_FVU_TASKS:
        found += [task for task in tasks if not task.is_heldout]
    return found[: min(-(-len(tasks) // FVU_SHARE), NUM_FVU_PROMPTS)]


def count_prompts(tasks: Sequence[Task]) -> dict[str, int]:
    """How many prompts of these tasks are held out, and on how many the guide was trained."""
    prompts = {task.prompt: task.is_heldout for task in tasks}
    heldout = sum(prompts.values())
    return {"heldout": heldout, "trained": len(prompts) - heldout}


def settings_of(config: Evaluate, guidance_scale: float, forwards_per_step: float) -> list[Setting]:
    """All that is sampled at a model's guidance scale, and the further scales.

    At each number of steps the methods side by side, and CFG at the same cost, under the solver
    that is usual there.

    Args:
        config: says at which steps and further scales.
        guidance_scale: the model's.
        forwards_per_step: what a guided step costs, in plain forwards.
    """
    extent, w = config.extent, guidance_scale
    found = []
    for num_steps in extent.num_steps:
        found += [Setting(method, num_steps, "ddim", w) for method in METHODS]
        if num_steps > 1:
            steps = equal_cost_steps(num_steps, forwards_per_step)
            found.append(Setting("cfg", steps, "dpmsolver++", w))
    for scale in extent.guidance_scales:
        found += [Setting(m, extent.num_steps[0], "ddim", scale) for m in ("cfg", "guided")]
    return list(dict.fromkeys(found))


def with_negatives(tasks: Sequence[Task], negatives: Sequence[str]) -> list[Task]:
    """The first tasks again, each with one of these negative prompts added to its own."""
    first = tasks[:NUM_NEGATIVE_IMAGES] if negatives else ()
    return [
        task._replace(
            negative=", ".join(filter(None, (task.negative, negatives[number % len(negatives)])))
        )
        for number, task in enumerate(first)
    ]


class Sampler:
    """Samples one model by each method, always from the same seeds.

    Attributes:
        in_threads: denoisers may run in several threads at once: a part of a batch on each core.
    """

    in_threads = True

    def __init__(
        self,
        pipe: DiffusionPipeline,
        bundle: GuideBundle,
        params: Params,
        row: Model | None = None,
    ) -> None:
        self.pipe, self.bundle = pipe, bundle
        self.params, self.config = params, params.evaluate
        self.row = row or Model(path=params.base, reference="")
        self.guidance_scale = self.row.guidance_scale or self.config.guidance_scale
        self.spacing, self.guider = params.halve.timestep_spacing, teacher_guider(params)
        self.schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
        self.device = pipe.unet.device
        self.null = encode_prompts(pipe, [""])
        size = pipe.unet.config.sample_size
        self.shape = (pipe.unet.config.in_channels, size, size)

    @property
    def precision(self) -> str:
        """What is computed in on this device."""
        is_bf16 = self.config.precision == "bf16" and has_bf16(self.device.type)
        return "bf16" if is_bf16 else "fp32"

    def recipe(self, setting: Setting, model: str) -> Recipe:
        """All that a setting's images depend on, besides their tasks.

        Args:
            setting: by which they are made.
            model: the identity of the whole model.
        """
        found: dict[str, Any] = {
            **setting._asdict(),
            "model": model,
            "trigger": self.row.trigger,
            "clip_skip": self.row.clip_skip,
            "timestep_spacing": self.spacing,
            "precision": self.precision,
            "sampled_by": SAMPLED_BY,
        }
        match setting.method:
            case "unguided":
                del found["guidance_scale"]
            case "cfg":
                found["guider"] = teacher_name(self.params)
            case "guided":
                found["guide"] = guide_identity(self.bundle.for_steps(setting.num_steps))
                found["strength"] = self.row.strength
        return found

    def denoiser(self, method: str, num_steps: int) -> Denoiser:
        """A denoiser for "unguided", "cfg" or, under any other name, the bundle's guide."""
        match method:
            case "unguided":
                return PlainDenoiser(self.pipe.unet, self.schedule)
            case "cfg":
                return self.teacher()
        guide = self.bundle.for_steps(num_steps)
        return GuidedDenoiser(self.pipe.unet, guide, self.schedule, strength=self.row.strength)

    def teacher(self) -> CFGDenoiser:
        """CFG by the guider of params.yaml, which guides are measured against."""
        guider = Guider(self.guider, self.schedule.num_train_timesteps)
        return CFGDenoiser(self.pipe.unet, self.schedule, guider)

    def inputs(self, tasks: Sequence[Task], guidance_scale: float | None = None) -> dict[str, Any]:
        """Noise and conditions, by default at the model's guidance scale."""
        text = encode_prompts(
            self.pipe, [f"{self.row.trigger} {task.prompt}".strip() for task in tasks]
        )
        negatives = [task.negative for task in tasks]
        null = self.null
        if any(negatives):  # one for all is faster
            null = encode_prompts(
                self.pipe, negatives if len(set(negatives)) > 1 else negatives[:1]
            )
        added = added_conditions(self.pipe, text, null)
        conditions = Conditions.at_scale(
            guidance_scale or self.guidance_scale,
            c_BLD=text.states_NLD.to(self.device),
            n_BLD=null.states_NLD.to(self.device),
            added=None if added is None else added.to(self.device),
        )
        noise = initial_noise(self.shape, [task.seed for task in tasks])
        return {"z_T": noise.to(self.device), "conditions": conditions}

    def denoise(
        self, inputs: dict[str, Any], method: str, num_steps: int, solver: str = "ddim"
    ) -> torch.Tensor:
        """Latents (N, C, H, W)."""
        with self.computing():
            return sample(
                self.denoiser(method, num_steps),
                self.pipe.scheduler,
                num_steps=num_steps,
                timestep_spacing=self.spacing,
                solver=solver,
                **inputs,
            )

    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """uint8 images (N, height, width, 3)."""
        with self.computing():
            return decode(self.pipe, latents)

    def images(self, method: str, tasks: Sequence[Task], num_steps: int) -> np.ndarray:
        """Sampled uint8 images (N, height, width, 3), one for each task, from its seed."""
        return self.make(Setting(method, num_steps, "ddim", self.guidance_scale), tasks)

    def make(self, setting: Setting, tasks: Sequence[Task]) -> np.ndarray:
        """The same at any setting."""

        def made(inputs: dict[str, Any]) -> np.ndarray:
            latents = self.denoise(inputs, setting.method, setting.num_steps, setting.solver)
            return self.decode(latents)

        cores = self.cores(len(tasks))
        parts = [self.inputs(part, setting.guidance_scale) for part in shares(tasks, cores)]
        return np.concatenate(side_by_side(made, parts, cores))

    def cores(self, num_images: int) -> int:
        """How many parts of a batch are made at once."""
        return num_cores(num_images, self.device) if self.in_threads else 1

    def computing(self) -> Any:
        """A context in which to compute at `evaluate.precision` on this device."""
        return mixed_precision(self.device.type, self.config.precision)

    def guidance_fvu(self, tasks: Sequence[Task], method: str = "guided") -> float:
        """The share of guidance that a method, the guide before halving, leaves unexplained."""
        terms = self.fvu_terms(tasks, method)
        return float(np.sum(terms["unexplained"]) / np.sum(terms["total"]))

    def fvu_terms(self, tasks: Sequence[Task], method: str = "guided") -> dict[str, Any]:
        """Numerator and denominator of `guidance_fvu`, by task and timestep, as lists.

        Over states that guided sampling visits: CFG trajectories of the first of these prompts, at
        the timesteps of the sampler. Always in fp32: the rounding of bf16 would count as
        unexplained.
        """
        teacher = self.teacher()
        num_steps = self.config.extent.num_steps[0]
        grid = sampling_timesteps(self.pipe.scheduler, num_steps, self.spacing)

        @torch.no_grad()
        def terms_of(inputs: dict[str, Any]) -> list[FvuTerms]:
            z, conditions = inputs["z_T"], inputs["conditions"]
            guided = self.denoiser(method, self.bundle.num_steps[-1])
            steps = []
            for t, s in pairwise(grid):
                t_B = t.expand(len(z)).to(self.device)
                terms = guidance_fvu_terms(guided, teacher, z_t=z, t_B=t_B, conditions=conditions)
                steps.append(terms)
                z = self.schedule.ddim_step(z, terms.eps_w, t_B, s.expand(len(z)))
            return steps

        found: dict[str, list[list[float]]] = {"unexplained": [], "total": []}
        for batch in batches(tasks[:NUM_FVU_PROMPTS], self.config.batch_size):
            cores = self.cores(len(batch))
            parts = [self.inputs(part) for part in shares(batch, cores)]
            for steps in side_by_side(terms_of, parts, cores):
                of_steps = torch.stack([x.unexplained_B for x in steps], dim=1)
                found["unexplained"] += of_steps.tolist()
                found["total"] += torch.stack([x.total_B for x in steps], dim=1).tolist()
        return {"timesteps": grid[:-1].tolist(), **found}

    def unhalved(self) -> str:
        """Identity of the guide before halving, which `guidance_fvu` is of."""
        return guide_identity(self.bundle.guides[self.bundle.num_steps[-1]])

    def machine(self) -> dict[str, str]:
        """What times depend on besides the model and the size of the batch."""
        on_gpu = self.device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name() if on_gpu else processor(),
            "torch": torch.__version__,
        }

    def cost(self, tasks: Sequence[Task]) -> dict[str, float]:
        """What sampling costs by each method: arithmetic, time and memory.

        `flops_ratio` and `time_ratio` are of the denoising steps, guided over CFG,
        `image_time_ratio` of an image with its decoding, which they share. Times are medians, taken
        in turns, of a full batch of `timed_batch_size` (and of a single image where the name says
        so), at the first of `num_steps`; on a CPU on one thread: a small model's layers on several
        cost waiting rather than arithmetic.
        """
        size = self.config.timed_batch_size
        full = self.inputs([tasks[i % len(tasks)] for i in range(size)])
        one = self.inputs(tasks[:1])
        forwards = self.forwards_per_step(tasks)
        found = {"flops_ratio": forwards["guided"] / forwards["cfg"], "batch_size": float(size)}
        for method in METHODS:
            found[f"{method}_forwards_per_step"] = forwards[method]
            peak = peak_bytes(partial(self.denoise, full, method, 1))
            found[f"{method}_peak_mb"] = peak / MEGABYTE
        with one_thread():
            for inputs, label in ((full, ""), (one, "_batch_1")):
                found |= self._times(inputs, label)
        return found

    def forwards_per_step(self, tasks: Sequence[Task]) -> dict[str, float]:
        """What a step of each method costs in arithmetic, in plain forwards."""
        inputs = self.inputs(tasks[:1])
        flops = {m: count_flops(partial(self.denoise, inputs, m, 1)) for m in METHODS}
        return {method: counted / flops["unguided"] for method, counted in flops.items()}

    def _times(self, inputs: dict[str, Any], label: str) -> dict[str, float]:
        """Milliseconds an image by method, and their ratios."""
        latents = self.denoise(inputs, "guided", 1)
        calls = [partial(self.denoise, inputs, m, NUM_TIMED_STEPS) for m in METHODS]
        seconds = median_times([*calls, partial(self.decode, latents)], TIMING_REPEATS)
        steps = self.config.extent.num_steps[0] / NUM_TIMED_STEPS
        per_image = 1000 / len(latents)
        times = {m: s * steps * per_image for m, s in zip(METHODS, seconds[:-1], strict=True)}
        decoding = seconds[-1] * per_image
        found = {f"{m}_ms_per_image{label}": ms for m, ms in times.items()}
        found[f"decoding_ms_per_image{label}"] = decoding
        found[f"time_ratio{label}"] = times["guided"] / times["cfg"]
        whole = (times["guided"] + decoding) / (times["cfg"] + decoding)
        return found | {f"image_time_ratio{label}": whole}


def shares(tasks: Sequence[Task], num_parts: int) -> list[Sequence[Task]]:
    """The tasks in order, in so many parts."""
    return [tasks[part] for part in share_out(slice(0, len(tasks)), num_parts)]


def teacher_name(params: Params) -> str:
    """The teacher's rule with its arguments, as results name it."""
    return f"{params.teacher.guider} {dict(sorted(params.teacher.arguments.items()))}"


def processor() -> str:
    """This machine's processor by name; by its architecture where the system doesn't tell more."""
    text = CPUINFO.read_text(encoding="utf-8") if CPUINFO.exists() else ""
    models: list[str] = re.findall(r"^model name\s*: *(\S.*)", text, re.MULTILINE)
    return models[0] if models else platform.processor() or platform.machine()
