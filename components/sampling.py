"""Sampling a model by each of the methods that are compared, always from the same seeds."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DiffusionPipeline

from components.dataset import read_records
from components.params import Evaluate, Params, teacher_guider
from components.paths import PREPARED
from pnp_core.bundle import GuideBundle
from pnp_core.conditions import Conditions
from pnp_core.denoiser import CFGDenoiser, Denoiser, GuidedDenoiser, PlainDenoiser
from pnp_core.guiders import Guider
from pnp_core.metrics import count_flops, guidance_fvu_terms, one_thread, time_ratio
from pnp_core.models import added_conditions, encode_prompts
from pnp_core.precision import mixed_precision
from pnp_core.sample import decode, initial_noise, sample
from pnp_core.schedule import NoiseSchedule, sampling_timesteps

NUM_FVU_PROMPTS = 128  # at most; the first 32 alone left 0.025 less unexplained on the base
NUM_TIMED_STEPS = 2
TIMING_REPEATS = 5


class Task(NamedTuple):
    """An image to make."""

    prompt: str
    seed: int
    is_heldout: bool


def choose_tasks(config: Evaluate) -> list[Task]:
    """The grid's prompts, then held-out and trained ones in turns; each image has its own seed.

    The same for every model. Prompts come again, with other seeds, where there are fewer than
    images.
    """
    chosen: dict[str, list[str]] = {}
    for split in ("heldout", "train"):
        records = read_records(
            PREPARED / f"{split}.parquet", image_column="image", caption_column="prompt"
        )
        prompts = sorted({record.caption for record in records})
        order = np.random.default_rng(config.seed).permutation(len(prompts))
        chosen[split] = [prompts[i] for i in order]
    prompts = list(config.grid_prompts)
    for number in range(config.num_images - len(prompts)):
        among = chosen["train" if number % 2 else "heldout"]
        prompts.append(among[number // 2 % len(among)])
    heldout = set(chosen["heldout"])
    return [Task(p, config.seed + number, p in heldout) for number, p in enumerate(prompts)]


def batches(tasks: Sequence[Task], size: int) -> Iterable[Sequence[Task]]:
    """The tasks in order, `size` at a time; the last batch may be smaller."""
    return (tasks[start : start + size] for start in range(0, len(tasks), size))


class Sampler:
    """Samples one model by each method, always from the same seeds."""

    def __init__(self, pipe: DiffusionPipeline, bundle: GuideBundle, params: Params) -> None:
        self.pipe, self.bundle = pipe, bundle
        self.params, self.config = params, params.evaluate
        self.spacing, self.guider = params.halve.timestep_spacing, teacher_guider(params)
        self.schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
        self.device = pipe.unet.device
        self.null = encode_prompts(pipe, [""])
        size = pipe.unet.config.sample_size
        self.shape = (pipe.unet.config.in_channels, size, size)

    def denoiser(self, method: str, num_steps: int) -> Denoiser:
        """A denoiser for "unguided", "cfg" or, under any other name, the bundle's guide."""
        match method:
            case "unguided":
                return PlainDenoiser(self.pipe.unet, self.schedule)
            case "cfg":
                return self.teacher()
        return GuidedDenoiser(self.pipe.unet, self.bundle.for_steps(num_steps), self.schedule)

    def teacher(self) -> CFGDenoiser:
        """CFG by the guider of params.yaml, which guides are measured against."""
        guider = Guider(self.guider, self.schedule.num_train_timesteps)
        return CFGDenoiser(self.pipe.unet, self.schedule, guider)

    def inputs(self, tasks: Sequence[Task]) -> dict[str, Any]:
        """Noise and conditions."""
        text = encode_prompts(self.pipe, [task.prompt for task in tasks])
        added = added_conditions(self.pipe, text, self.null)
        conditions = Conditions.at_scale(
            self.config.guidance_scale,
            c_BLD=text.states_NLD.to(self.device),
            n_BLD=self.null.states_NLD.to(self.device),
            added=None if added is None else added.to(self.device),
        )
        noise = initial_noise(self.shape, [task.seed for task in tasks])
        return {"z_T": noise.to(self.device), "conditions": conditions}

    def denoise(self, inputs: dict[str, Any], method: str, num_steps: int) -> torch.Tensor:
        """Latents (N, C, H, W)."""
        with self.computing():
            return sample(
                self.denoiser(method, num_steps),
                self.pipe.scheduler,
                num_steps=num_steps,
                timestep_spacing=self.spacing,
                **inputs,
            )

    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """uint8 images (N, height, width, 3)."""
        with self.computing():
            return decode(self.pipe, latents)

    def images(self, method: str, tasks: Sequence[Task], num_steps: int) -> np.ndarray:
        """Sampled uint8 images (N, height, width, 3), one for each task, from its seed."""
        return self.decode(self.denoise(self.inputs(tasks), method, num_steps))

    def computing(self) -> Any:
        """A context in which to compute at `evaluate.precision` on this device."""
        return mixed_precision(self.device.type, self.config.precision)

    def guidance_fvu(self, tasks: Sequence[Task], method: str = "guided") -> float:
        """The share of guidance that a method, the guide before halving, leaves unexplained.

        Over states that guided sampling visits: CFG trajectories of held-out prompts, at the
        timesteps of the sampler. Always in fp32: the rounding of bf16 would count as unexplained.
        """
        guided = self.denoiser(method, self.bundle.num_steps[-1])
        teacher = self.teacher()
        grid = sampling_timesteps(self.pipe.scheduler, self.config.num_steps[0], self.spacing)
        unexplained = total = 0.0
        for batch in batches(tasks[:NUM_FVU_PROMPTS], self.config.batch_size):
            inputs = self.inputs(batch)
            z, conditions = inputs["z_T"], inputs["conditions"]
            with torch.no_grad():
                for t, s in zip(grid[:-1], grid[1:], strict=True):
                    t_B = t.expand(len(batch)).to(self.device)
                    terms = guidance_fvu_terms(
                        guided, teacher, z_t=z, t_B=t_B, conditions=conditions
                    )
                    unexplained, total = unexplained + terms[0], total + terms[1]
                    eps_w = teacher(z, t_B, conditions).float()
                    z = self.schedule.ddim_step(z, eps_w, t_B, s.expand(len(batch)))
        return unexplained / total

    def cost(self, tasks: Sequence[Task]) -> dict[str, float]:
        """What sampling costs with the guide, over with CFG.

        `flops_ratio` and `time_ratio` are of the denoising steps, `image_time_ratio` of an image
        with its decoding, which CFG and guide share. Times are medians, taken in turns, of a whole
        batch, and on a CPU on one thread: a single small image costs overhead, and a small model's
        layers on several threads cost waiting, rather than arithmetic.
        """
        one, inputs = self.inputs(tasks[:1]), self.inputs(tasks[: self.config.batch_size])
        flops = {m: count_flops(partial(self.denoise, one, m, 1)) for m in ("guided", "cfg")}
        with one_thread():
            ratio, guided, cfg = time_ratio(
                partial(self.denoise, inputs, "guided", NUM_TIMED_STEPS),
                partial(self.denoise, inputs, "cfg", NUM_TIMED_STEPS),
                repeats=TIMING_REPEATS,
            )
            latents = self.denoise(inputs, "guided", 1)
            _, decoding, _ = time_ratio(partial(self.decode, latents), lambda: None, repeats=1)
        per_image = 1000 / len(latents)
        guided_ms, cfg_ms = (
            seconds * per_image * self.config.num_steps[0] / NUM_TIMED_STEPS
            for seconds in (guided, cfg)
        )
        decoding_ms = decoding * per_image
        return {
            "flops_ratio": flops["guided"] / flops["cfg"],
            "time_ratio": ratio,
            "image_time_ratio": (guided_ms + decoding_ms) / (cfg_ms + decoding_ms),
            "guided_ms_per_image": guided_ms,
            "cfg_ms_per_image": cfg_ms,
            "decoding_ms_per_image": decoding_ms,
        }
