"""What a preset will take before it is started: disk, memory, hours.

    python -m benchmarks.plan --preset sd15 --gpus 8 --memory 24   # computed; nothing is loaded
    python -m benchmarks.plan --preset sd15 --dry-run    # one real training step, random weights
    python -m benchmarks.plan --json                     # all presets, and checks of what they say

FLOPs are counted by PyTorch on meta tensors and divided by the speed that `--tflops` says one GPU
sustains in bf16; the peak of a training step's memory is counted on meta tensors too
(pnp_core/memory.py). With `--memory`, a preset that does not fit a GPU of so many GB is refused.
A dry run takes one step of stage 1 at the true size with a batch of one on the GPU, or without one
on the CPU, and reports the peak. With --json, the last line on stdout is one JSON object: of a
preset that is named its plan, else every preset's plan and:

    sd15_24gb, sdxl_24gb  peak of a training step of the preset, GB
    accumulation_error    norm of the difference of a step's gradient, in parts, to that of one
                          batch, over its norm; fp32, the embedded base
    disk_ratio            disk that a plan says over what a cache takes; the embedded base
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from benchmarks.cache_cost import architecture_bytes
from benchmarks.command import amount, command_parser, count, count_from_0, errors_in_one_line
from benchmarks.cost import peak_memory, unet_config
from components.dataset import read_records
from components.device import load_base
from components.environment import quiet
from components.params import Params, load_params
from components.training import train_config
from pnp_core.cache import (
    CacheBuilder,
    CacheConfig,
    CachePlan,
    Example,
    TeacherCache,
    build_cache,
    plan_shards,
)
from pnp_core.denoiser import GuidedDenoiser
from pnp_core.distill import DistillConfig, distillation_objective
from pnp_core.guide import Guide, GuideConfig
from pnp_core.halve import halving_rounds
from pnp_core.identity import BaseIdentity
from pnp_core.memory import AsOnCuda, Step, check_fits, num_bytes
from pnp_core.metrics import count_flops
from pnp_core.shards import SHARDS_SHUFFLED
from pnp_core.train import State, TrainConfig, parts_of, train

PRESETS = Path("presets")
NAMES = ("sd15", "sdxl")
IMAGES = 100_000  # as the presets' comments have them, each with a caption of its own


def step_of(config: Mapping[str, Any], params: Params, device: str) -> Step:
    """A training step of a preset on a base with a UNet of this config."""
    guide = GuideConfig(**params.distill.guide.model_dump())
    return Step(config, guide, train_config(params.distill), device)


def take(step: Step, precision: str) -> None:
    """One step of the real training loop."""
    config = TrainConfig(num_images=1, batch_size=1, precision=precision)
    train(lambda *_: step.losses(), step.guide, config, run_hash="dry run")


def disk(name: str, params: Params, *, num_images: int, num_prompts: int) -> CachePlan:
    """The cache of a preset."""
    return plan_shards(
        architecture_bytes(name),
        num_images=num_images,
        num_prompts=num_images + num_prompts,
        config=params.cache,
    )


def storage_gb(name: str, cache: CachePlan, shard_size: int) -> dict[str, float]:
    """Disk of a cache by kind of shard, and host memory that a worker holds of it.

    Text states are memory-mapped: the system keeps of them what it has room for.
    """
    row = architecture_bytes(name)
    by_kind = {"pairs": 0, "moments": 0, "text": 0}
    for shard, size in cache.num_bytes.items():
        by_kind[shard.partition("-")[0]] += size
    # the shards that rows are shuffled among and as many read ahead, as shards.py has them
    ahead = 2 * SHARDS_SHUFFLED * shard_size
    shards = {
        "pairs": min(by_kind["pairs"], ahead * row.pair),
        "moments": min(by_kind["moments"], ahead * row.image),
    }
    return {
        **{f"{kind}_gb": size / 1e9 for kind, size in by_kind.items()},
        "cache_gb": sum(by_kind.values()) / 1e9,
        "host_gb": max(shards.values()) / 1e9,
    }


def plan(  # noqa: PLR0913, a preset, then by name what is known of machine and data
    name: str,
    params: Params,
    *,
    gpus: int,
    tflops: float,
    memory: float | None = None,
    num_images: int = IMAGES,
    num_prompts: int = 0,
) -> dict[str, float]:
    """Bytes, FLOPs and hours of every stage but evaluation.

    Raises:
        ValueError: a training step does not fit a GPU of `memory` GB; says what does.
    """
    step = step_of(unet_config(name), params, "meta")
    settings = step.settings
    rows = min(settings.micro_batch_size or settings.batch_size, -(-settings.batch_size // gpus))
    peak_gb = step.peak_gb(rows, checkpoints=settings.gradient_checkpointing)
    if memory is not None:
        check_fits(f"The preset {name}", step, peak_gb, memory)
    with AsOnCuda(mixed=step.mixed):
        with torch.no_grad():
            forward = count_flops(step.losses)
        trained = count_flops(lambda: step.losses().sum().backward())
    step.guide.zero_grad(set_to_none=True)
    again = forward if settings.gradient_checkpointing else 0
    cache = disk(name, params, num_images=num_images, num_prompts=num_prompts)
    rounds = halving_rounds(params.halve.start_steps, params.halve.end_steps)
    flops = {
        # TF32, where fp32 is asked for, is half as fast as bf16
        "cache": cache.num_forwards * forward * (2 if params.cache.precision == "fp32" else 1),
        "distill": params.distill.num_images * (trained + again),
        # the teacher's two steps, then the student's
        "halve": len(rounds) * params.halve.num_images * (2 * forward + trained + again),
    }
    hours = {f"{stage}_hours": f / (gpus * tflops * 1e12) / 3600 for stage, f in flops.items()}
    num_base, num_guide = (
        sum(p.numel() for p in module.parameters()) for module in (step.unet, step.guide)
    )
    return {
        **hours,
        "hours": sum(hours.values()),
        **storage_gb(name, cache, params.cache.shard_size),
        "weights_and_optimizer_gb": (step.held() + num_bytes(step.guide)) / 1e9,
        "companion_gb": num_bytes(step.unet) / 1e9,
        "samples_at_once": rows,
        "peak_gb": peak_gb,
        "guide_parameters": num_guide,
        "params_ratio": num_guide / num_base,
    }


def checks(num_images: int = 64, num_pairs: int = 320) -> dict[str, float]:
    """`accumulation_error` and `disk_ratio`, on a small cache of the embedded base."""
    params = load_params(Path("params.yaml"))
    records = read_records(
        Path(params.prepare.dataset, params.prepare.files[0]),
        image_column=params.prepare.image_column,
        caption_column=params.prepare.caption_column,
    )[:num_images]
    pipe = load_base(params.base)
    config = CacheConfig(num_forward=num_pairs, num_trajectory=0, precision="fp32")
    with tempfile.TemporaryDirectory() as folder:
        builder = CacheBuilder(
            pipe,
            [Example(image=record.image, prompt=record.caption) for record in records],
            config,
            Path(folder),
            base=BaseIdentity(base_hash="base", unet="", scheduler="", text="", vae=""),
            data_hash="data",
        )
        build_cache(builder)
        taken = sum(path.stat().st_size for path in Path(folder).iterdir())
        error = accumulation_error(pipe.unet, TeacherCache.open(Path(folder)))
    return {
        "accumulation_error": error,
        "disk_ratio": sum(builder.plan.num_bytes.values()) / taken,
    }


def accumulation_error(unet: UNet2DConditionModel, cache: TeacherCache) -> float:
    """Of a step's gradient in parts of 5 of 32, relative to that of one batch, in fp32."""
    training = TrainConfig(num_images=32, batch_size=32, precision="fp32", max_grad_norm=1e9)
    config = DistillConfig(train=training, guide=GuideConfig())
    torch.manual_seed(0)
    guide = Guide.from_unet(unet.requires_grad_(False), config.guide)
    with torch.no_grad():  # untrained, most of it has no gradient
        for p in guide.parameters():
            p.add_(0.02 * torch.randn_like(p))
    student = GuidedDenoiser(unet, guide, cache.schedule)
    losses = distillation_objective([student], cache, config, unet.device)

    def gradient(size: int | None) -> Tensor:
        state = State(guide, training)
        state.accumulate(losses, parts_of(slice(0, training.batch_size), size))
        return torch.cat([p.grad.flatten() for p in state.parameters if p.grad is not None])

    parts, whole = gradient(5), gradient(None)
    return float((parts - whole).norm() / whole.norm())


def dry_run(name: str, params: Params) -> dict[str, Any]:
    """One training step at the true size."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    step = step_of(unet_config(name), params, device)
    before = {k: v.clone() for k, v in step.guide.state_dict().items() if k.endswith("up.weight")}
    precision = train_config(params.distill).precision
    peak = peak_memory(lambda: take(step, precision), device)
    moved = any(not torch.equal(step.guide.state_dict()[k], v) for k, v in before.items())
    if not moved:
        raise RuntimeError("the step changed nothing")
    return {"device": device, "batch_size": 1, "peak_memory_gb": peak / 1e9}


def show(name: str, result: dict[str, Any], *, gpus: int, tflops: float) -> None:
    """Print a plan."""
    print(f"{name} on {gpus} GPUs that sustain {tflops:g} TFLOP/s:")
    for stage in ("cache", "distill", "halve"):
        print(f"  {stage}: {result[f'{stage}_hours']:.1f} hours")
    print(
        f"  cache on disk: {result['cache_gb']:.1f} GB: pairs {result['pairs_gb']:.1f}, latents "
        f"{result['moments_gb']:.1f}, text states {result['text_gb']:.1f}"
    )
    print(f"  host memory of each worker for what it reads: {result['host_gb']:.1f} GB")
    print(f"  weights, gradients, optimizer: {result['weights_and_optimizer_gb']:.1f} GB a GPU")
    print(
        f"  peak of a training step, {result['samples_at_once']} samples at once: "
        f"{result['peak_gb']:.1f} GB a GPU"
    )
    print(f"  each companion: {result['companion_gb']:.1f} GB more while distilling")
    print(f"  guide: {result['guide_parameters']:,} parameters, {result['params_ratio']:.2%}")


@errors_in_one_line()
def main() -> None:
    """Print what a preset's stages would cost."""
    parser = command_parser("plan", __doc__)
    parser.add_argument("--preset", choices=NAMES, help="without: all")
    parser.add_argument("--gpus", type=count, default=1, help="of all machines")
    parser.add_argument("--memory", type=amount, help="GB of one GPU; refuses what does not fit")
    parser.add_argument("--tflops", type=amount, default=100, help="sustained, of one GPU")
    parser.add_argument("--images", type=count, default=IMAGES, help="of the data, with captions")
    parser.add_argument("--prompts", type=count_from_0, default=0, help="further ones")
    parser.add_argument("--dry-run", action="store_true", help="take one real training step too")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    arguments = parser.parse_args()
    quiet()
    options = {"gpus": arguments.gpus, "tflops": arguments.tflops}
    results: dict[str, dict[str, Any]] = {}
    for name in [arguments.preset] if arguments.preset else NAMES:
        params = load_params(PRESETS / f"{name}.yaml")
        results[name] = plan(
            name,
            params,
            **options,
            memory=arguments.memory,
            num_images=arguments.images,
            num_prompts=arguments.prompts,
        )
        show(name, results[name], **options)
        if arguments.dry_run:
            results[name] |= dry_run(name, params)
            print(
                f"  one training step of batch 1, {results[name]['device']}: "
                f"{results[name]['peak_memory_gb']:.1f} GB at the peak"
            )
    if not arguments.json:
        return
    if arguments.preset:
        print(json.dumps(results[arguments.preset]))
    else:
        peaks = {f"{name}_24gb": result["peak_gb"] for name, result in results.items()}
        print(json.dumps({**results, **peaks, **checks()}))


if __name__ == "__main__":
    main()
