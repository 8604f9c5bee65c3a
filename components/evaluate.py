"""Stage evaluate: one model sampled without guidance, with CFG and with the guide, side by side.

Reads guides/bundle, data/prepared and the model's reference images. Writes
results/evaluate/<model>: metrics.json, grid.png and images.parquet, which keeps every image so that
a new metric needs no new sampling.
"""

import argparse
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from components.cli import main
from components.dataset import encode, fit, read_records
from components.params import Evaluate, Params, teacher_guider
from components.paths import BUNDLE, EVALUATED, PREPARED
from components.progress import Progress
from components.storage import atomic_folder, read_json, write_json

if TYPE_CHECKING:
    import numpy as np
    import torch
    from diffusers import DiffusionPipeline

    from pnp_core.bundle import GuideBundle
    from pnp_core.denoiser import CFGDenoiser, Denoiser

METHODS = {"unguided": "unguided", "cfg": "CFG", "guided": "guided"}  # name -> label
NUM_FVU_PROMPTS = 128  # at most; the first 32 alone left 0.025 less unexplained on the base
NUM_TIMED_STEPS = 2
TIMING_REPEATS = 5


class Task(NamedTuple):
    """An image to make."""

    prompt: str
    seed: int
    is_heldout: bool


def run(params: Params, model: str) -> None:
    """Write results/evaluate/<model>.

    Raises ValueError if params.yaml has no such model, or if guide and model don't fit.
    """
    if model not in params.models:
        raise ValueError(
            f"params.yaml has no model {model!r}; its models are {', '.join(params.models)}"
        )
    import numpy as np

    from components.device import device, frozen, load_base
    from components.judging import Judge, fid, kid
    from components.pictures import grid
    from pnp_core.bundle import GuideBundle
    from pnp_core.metrics import psnr
    from pnp_core.models import load_unet

    config, row = params.evaluate, params.models[model]
    pipe = load_base(params.base)
    if row.path != params.base:
        pipe.unet = load_unet(row.path, base=pipe)
        frozen(pipe)
    bundle = GuideBundle.load(BUNDLE).to(device())
    judge = Judge(config.judge, device())
    tasks = choose_tasks(config)
    sampler = Sampler(pipe, bundle, params)

    images: dict[tuple[str, int], np.ndarray] = {}
    total = len(tasks) * len(METHODS) * len(config.num_steps)
    progress = Progress(f"evaluate {model}", total, "images")
    for num_steps in config.num_steps:
        for method in METHODS:
            finished = []
            for batch in batches(tasks, config.batch_size):
                finished.append(sampler.images(method, batch, num_steps))
                progress(
                    len(images) * len(tasks) + sum(map(len, finished)),
                    f"{method}, {num_steps} steps",
                )
            images[method, num_steps] = np.concatenate(finished)

    scoring = Progress(f"evaluate {model}", len(images) + 3, "measurements")
    scoring(0)
    references = judge.features(reference_images(row.reference, params))
    scoring(1, "features of the reference")
    prompts = [task.prompt for task in tasks]
    steps: dict[str, Any] = {}
    for number, ((method, num_steps), made) in enumerate(images.items(), 2):
        features = judge.features(made)
        scores = {
            "fid": fid(features, references),
            "kid": kid(features, references),
            "clip_score": judge.clip_score(made, prompts),
            "cfg_psnr": float(psnr(made, images["cfg", num_steps]).mean()),
        }
        if method == "cfg":
            del scores["cfg_psnr"]
        steps.setdefault(str(num_steps), {})[method] = scores
        scoring(number, f"{method}, {num_steps} steps")
    for scores in steps.values():
        scores["fid_ratio"] = scores["guided"]["fid"] / scores["cfg"]["fid"]
    unexplained = sampler.guidance_fvu([task for task in tasks if task.is_heldout])
    scoring(len(images) + 2, "guidance_fvu")
    cost = sampler.cost(tasks[: config.batch_size])
    scoring(len(images) + 3, "cost")

    metrics = {
        "model": model,
        "judge": judge.name,
        "num_images": len(tasks),
        "num_reference_images": len(references),
        "guidance_scale": config.guidance_scale,
        "guidance_fvu": unexplained,
        "cost": cost,
        "steps": steps,
    }
    columns = len(config.grid_prompts)
    rows = {f"{METHODS[m]}, {n} steps": made[:columns] for (m, n), made in images.items()}
    with atomic_folder(EVALUATED / model) as folder:
        title = f"{model}, guidance scale {config.guidance_scale:g}"
        grid(rows, prompts[:columns], title=title).save(folder / "grid.png")
        write_images(folder / "images.parquet", images, tasks)
        write_json(folder / "metrics.json", metrics)
    fids = ", ".join(f"{m} {steps[str(config.num_steps[0])][m]['fid']:.4g}" for m in METHODS)
    print(
        f"evaluate {model}: guidance_fvu {metrics['guidance_fvu']:.3f}, "
        f"FID at {config.num_steps[0]} steps: {fids}"
    )


def choose_tasks(config: Evaluate) -> list[Task]:
    """The grid's prompts, then held-out and trained ones in turns; each image has its own seed.

    The same for every model. Prompts come again, with other seeds, where there are fewer than
    images.
    """
    import numpy as np

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
    return (tasks[start : start + size] for start in range(0, len(tasks), size))


class Sampler:
    """Samples one model by each method, always from the same seeds."""

    def __init__(self, pipe: "DiffusionPipeline", bundle: "GuideBundle", params: Params) -> None:
        from pnp_core.models import encode_prompts
        from pnp_core.schedule import NoiseSchedule

        self.pipe, self.bundle, self.config = pipe, bundle, params.evaluate
        self.spacing, self.guider = params.halve.timestep_spacing, teacher_guider(params)
        self.schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
        self.device = pipe.unet.device
        self.null = encode_prompts(pipe, [""])
        size = pipe.unet.config.sample_size
        self.shape = (pipe.unet.config.in_channels, size, size)

    def denoiser(self, method: str, num_steps: int) -> "Denoiser":
        from pnp_core.denoiser import GuidedDenoiser, PlainDenoiser

        match method:
            case "unguided":
                return PlainDenoiser(self.pipe.unet, self.schedule)
            case "cfg":
                return self.teacher()
        return GuidedDenoiser(self.pipe.unet, self.bundle.for_steps(num_steps), self.schedule)

    def teacher(self) -> "CFGDenoiser":
        from pnp_core.denoiser import CFGDenoiser
        from pnp_core.guiders import Guider

        guider = Guider(self.guider, self.schedule.num_train_timesteps)
        return CFGDenoiser(self.pipe.unet, self.schedule, guider)

    def inputs(self, tasks: Sequence[Task]) -> dict[str, Any]:
        """Noise and conditions."""
        from pnp_core.conditions import Conditions
        from pnp_core.models import added_conditions, encode_prompts
        from pnp_core.sample import initial_noise

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

    def denoise(self, inputs: dict[str, Any], method: str, num_steps: int) -> "torch.Tensor":
        """Latents (N, C, H, W)."""
        from pnp_core.sample import sample

        with self.computing():
            return sample(
                self.denoiser(method, num_steps),
                self.pipe.scheduler,
                num_steps=num_steps,
                timestep_spacing=self.spacing,
                **inputs,
            )

    def decode(self, latents: "torch.Tensor") -> "np.ndarray":
        """uint8 images (N, height, width, 3)."""
        from pnp_core.sample import decode

        with self.computing():
            return decode(self.pipe, latents)

    def images(self, method: str, tasks: Sequence[Task], num_steps: int) -> "np.ndarray":
        return self.decode(self.denoise(self.inputs(tasks), method, num_steps))

    def computing(self) -> Any:
        from pnp_core.precision import mixed_precision

        return mixed_precision(self.device.type, self.config.precision)

    def guidance_fvu(self, tasks: Sequence[Task], method: str = "guided") -> float:
        """The share of guidance that a method, the guide before halving, leaves unexplained.

        Over states that guided sampling visits: CFG trajectories of held-out prompts, at the
        timesteps of the sampler. Always in fp32: the rounding of bf16 would count as unexplained.
        """
        import torch

        from pnp_core.metrics import guidance_fvu_terms
        from pnp_core.schedule import sampling_timesteps

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
        from pnp_core.metrics import count_flops, one_thread, time_ratio

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


def reference_images(reference: str, params: Params) -> "np.ndarray":
    """Every image that `reference` holds, in the resolution of the prepared ones: uint8."""
    import numpy as np

    if Path(reference) == PREPARED:
        columns = {"image_column": "image", "caption_column": "prompt"}
    else:
        columns = {
            "image_column": params.prepare.image_column,
            "caption_column": params.prepare.caption_column,
        }
    records = read_records(Path(reference), **columns)
    if len(records) < 2:
        raise ValueError(f"models: the reference {reference} has {len(records)} images: too few")
    resolution = read_json(PREPARED / "manifest.json")["resolution"]
    return np.stack([np.asarray(fit(record, resolution)[0]) for record in records])


def write_images(
    path: Path, images: "dict[tuple[str, int], np.ndarray]", tasks: Sequence[Task]
) -> None:
    """Every image, with what it takes to make it again."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    rows = [
        {
            "image": {"bytes": encode(Image.fromarray(image)), "path": None},
            "method": method,
            "num_steps": num_steps,
            **task._asdict(),
        }
        for (method, num_steps), made in images.items()
        for task, image in zip(tasks, made, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m components.evaluate")
    parser.add_argument("--model", required=True, help="a name among `models` in params.yaml")
    arguments = parser.parse_args()
    main(partial(run, model=arguments.model))
