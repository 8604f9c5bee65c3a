"""What a preset will take before it is started: disk, memory, hours.

    python -m benchmarks.plan --preset sd15 --gpus 8     # computed; nothing is loaded
    python -m benchmarks.plan --preset sd15 --dry-run    # one real training step, random weights

FLOPs are counted by PyTorch on meta tensors and divided by the speed that `--tflops` says one GPU
sustains in bf16; memory for weights and optimizer is counted, that for activations is what a dry
run measures. A dry run takes one step of stage 1 at the true size with a batch of one on the GPU,
or without one on the CPU, and reports the peak.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from benchmarks.cache_cost import architecture_bytes
from benchmarks.cost import peak_memory, unet_config
from benchmarks.train_cost import cached_losses
from components.environment import quiet
from components.params import Params, load_params
from components.training import train_config
from pnp_core.cache import Pairs
from pnp_core.conditions import AddedConditions
from pnp_core.denoiser import GuidedDenoiser
from pnp_core.guide import Guide, GuideConfig
from pnp_core.halve import halving_rounds
from pnp_core.metrics import count_flops
from pnp_core.schedule import NoiseSchedule
from pnp_core.soap import sides
from pnp_core.train import TrainConfig, train

PRESETS = Path("presets")
NAMES = ("sd15", "sdxl")
TOKENS = 77


class Step:
    """A training step of stage 1 on random weights and one random sample."""

    def __init__(self, name: str, params: Params, device: str) -> None:
        config = unet_config(name)
        size, width = config["sample_size"], config["cross_attention_dim"]
        with torch.device(device):
            self.unet = UNet2DConditionModel.from_config(config).requires_grad_(False).eval()
            guide_config = GuideConfig(**params.distill.guide.model_dump())
            self.guide = Guide.from_unet(self.unet, guide_config)
            latents = [torch.randn(1, config["in_channels"], size, size) for _ in range(3)]
            texts = [torch.randn(1, TOKENS, width) for _ in range(2)]
            added = None
            if config.get("addition_embed_type") == "text_time":
                added = AddedConditions(
                    torch.randn(1, 1280), torch.randn(1, 1280), torch.ones(1, 6)
                )
            timestep, self.w_B = torch.full((1,), 500), torch.full((1,), 4.0)
        z_t, eps_c, eps_n = latents
        self.pairs = Pairs(z_t, timestep, eps_c, eps_n, texts[0], texts[1], added)
        self.student = GuidedDenoiser(
            self.unet, self.guide, NoiseSchedule.from_scheduler(DDIMScheduler())
        )

    def losses(self) -> torch.Tensor:
        """The student's losses on its cached pair, `(1,)`."""
        return cached_losses(self.student, self.pairs, self.w_B)

    @torch.no_grad()
    def forward(self) -> None:
        """The same without a graph for gradients."""
        self.losses()

    def train(self, precision: str) -> None:
        """One step of the real training loop."""
        config = TrainConfig(num_images=1, batch_size=1, precision=precision)
        train(lambda *_: self.losses(), self.guide, config, run_hash="dry run")


def plan(name: str, params: Params, *, gpus: int, tflops: float) -> dict[str, float]:
    """Bytes, FLOPs and hours of every stage but evaluation."""
    step = Step(name, params, "meta")
    forward = count_flops(step.forward)
    trained = count_flops(lambda: step.losses().sum().backward())
    cache = params.cache
    num_trajectories = math.ceil(cache.num_trajectory / cache.trajectory_steps)
    num_pairs = cache.num_forward + num_trajectories * cache.trajectory_steps
    rounds = halving_rounds(params.halve.start_steps, params.halve.end_steps)
    flops = {
        # TF32, where fp32 is asked for, is half as fast as bf16
        "cache": num_pairs * 2 * forward * (2 if cache.precision == "fp32" else 1),
        "distill": params.distill.num_images * trained,
        # the teacher's two steps, then the student's
        "halve": len(rounds) * params.halve.num_images * (2 * forward + trained),
    }
    hours = {f"{stage}_hours": f / (gpus * tflops * 1e12) / 3600 for stage, f in flops.items()}
    num_base, num_guide = (
        sum(p.numel() for p in module.parameters()) for module in (step.unet, step.guide)
    )
    # fp32: the base; the guide with its gradients, SOAP's mean and square and the averaged weights;
    # the moments along the guide's sides, and their bases
    num_turned = sum(2 * side**2 for p in step.guide.parameters() for side in sides(p))
    return {
        **hours,
        "hours": sum(hours.values()),
        "cache_gb": num_pairs * architecture_bytes(name).pair / 1e9,
        "weights_and_optimizer_gb": (num_base + 5 * num_guide + num_turned) * 4 / 1e9,
        "companion_gb": num_base * 4 / 1e9,
        "guide_parameters": num_guide,
        "params_ratio": num_guide / num_base,
    }


def dry_run(name: str, params: Params) -> dict[str, Any]:
    """One training step at the true size."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    step = Step(name, params, device)
    before = {k: v.clone() for k, v in step.guide.state_dict().items() if k.endswith("up.weight")}
    precision = train_config(params.distill).precision
    peak = peak_memory(lambda: step.train(precision), device)
    moved = any(not torch.equal(step.guide.state_dict()[k], v) for k, v in before.items())
    if not moved:
        raise RuntimeError("the step changed nothing")
    return {"device": device, "batch_size": 1, "peak_memory_gb": peak / 1e9}


def main() -> None:
    """Print what a preset's stages would cost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=NAMES, required=True)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--tflops", type=float, default=100, help="sustained, of one GPU")
    parser.add_argument("--dry-run", action="store_true", help="take one real training step too")
    arguments = parser.parse_args()
    quiet()
    params = load_params(PRESETS / f"{arguments.preset}.yaml")
    result: dict[str, Any] = plan(
        arguments.preset, params, gpus=arguments.gpus, tflops=arguments.tflops
    )
    print(f"{arguments.preset} on {arguments.gpus} GPUs that sustain {arguments.tflops:g} TFLOP/s:")
    for stage in ("cache", "distill", "halve"):
        print(f"  {stage}: {result[f'{stage}_hours']:.1f} hours")
    print(f"  cache on disk: {result['cache_gb']:.0f} GB")
    print(f"  weights, gradients, optimizer: {result['weights_and_optimizer_gb']:.1f} GB a GPU")
    print(f"  each companion: {result['companion_gb']:.1f} GB more while distilling")
    print(f"  guide: {result['guide_parameters']:,} parameters, {result['params_ratio']:.2%}")
    if arguments.dry_run:
        result |= dry_run(arguments.preset, params)
        print(
            f"  one training step of batch 1, {result['device']}: "
            f"{result['peak_memory_gb']:.1f} GB at the peak"
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
