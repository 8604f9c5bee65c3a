"""What a guide costs on the true architectures of Stable Diffusion, with random weights.

    python -m benchmarks.cost --json                # parameters and FLOPs, in seconds
    python -m benchmarks.cost --json --run sd15     # real forwards too: minutes on a CPU

A CFG step is one UNet forward of two samples; a guided step is one forward of one sample and all
that the guide does for it, also what later steps of a run find done: reading the conditions, keys
and values of the negative prompt. FLOPs are counted by PyTorch on meta tensors. Wall times are
medians of forwards taken in turns in one process, in fp16 on a GPU and in fp32, a pipeline's
default, on a CPU; the `plain_time_ratio` is that of a forward with no guide, which no guide can go
below. Memory is the peak of a forward, weights included. With --json, the last line on stdout is
one JSON object; what was not run is null.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from benchmarks.command import command_parser, count, errors_in_one_line
from benchmarks.record import UNTRAINED, as_line, record
from pnp_core.conditions import AddedConditions, Conditions
from pnp_core.denoiser import GuidedDenoiser, PlainDenoiser
from pnp_core.guide import KINDS, Guide, GuideConfig
from pnp_core.metrics import count_flops, time_ratio
from pnp_core.model_files import LAYOUTS
from pnp_core.models import pooled_width
from pnp_core.schedule import NoiseSchedule

ARCHITECTURES = ("sd15", "sd21", "sdxl")
# SDXL's parameters lie where its pixels are few; a guide of 1 % would cost more than 1 % of FLOPs.
TINY_SHARE = {"sd15": 0.01, "sd21": 0.01, "sdxl": 0.005}


def unet_config(name: str) -> dict[str, Any]:
    """The UNet's config of one of the layouts, by its folder's name."""
    config: dict[str, Any] = UNet2DConditionModel.load_config(LAYOUTS / name / "unet")
    return config


def bare_twin(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A UNet with the same weights, which it shares, and without hooks."""
    with torch.device("meta"):
        twin = UNet2DConditionModel.from_config(unet.config)
    twin.load_state_dict(unet.state_dict(), assign=True)
    return twin.requires_grad_(False).eval()


class Forwards:
    """A plain and a CFG step of one architecture, on one device."""

    def __init__(self, config: Mapping[str, Any], device: str, dtype: torch.dtype) -> None:
        with torch.device(device):
            self.unet = UNet2DConditionModel.from_config(config).to(dtype).eval()
        self.device, self.dtype = device, dtype
        self.schedule = NoiseSchedule.from_scheduler(DDIMScheduler())  # of a base that predicts eps
        self.bare = PlainDenoiser(self.unet, self.schedule)
        self.inputs = {batch: self.make_inputs(batch) for batch in (1, 2)}

    def make_inputs(self, batch: int) -> tuple[torch.Tensor, torch.Tensor, Conditions]:
        """What a denoiser takes."""
        config = self.unet.config

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=self.device, dtype=self.dtype)

        z = normal(batch, config.in_channels, config.sample_size, config.sample_size)
        width, added = config.cross_attention_dim, None
        if config.addition_embed_type == "text_time":
            width_P = pooled_width(config)
            added = AddedConditions(
                normal(batch, width_P), normal(batch, width_P), normal(batch, 6)
            )
        c, n = normal(batch, 77, width), normal(1, 77, width)
        conditions = Conditions.at_scale(4.0, c_BLD=c, n_BLD=n, added=added)
        return z, torch.full((batch,), 500, device=self.device), conditions

    @torch.no_grad()
    def cfg(self) -> None:
        """The forward of two samples that CFG needs."""
        self.bare(*self.inputs[2])

    @torch.no_grad()
    def plain(self) -> None:
        """A forward with no guide."""
        self.bare(*self.inputs[1])

    def guided_by(self, kind: str, share: float) -> GuidedDenoiser:
        """A twin of the UNet, of the same weights, with a guide in it.

        Args:
            kind: of the guide.
            share: the most parameters of a tiny guide, over the UNet's.
        """
        config = GuideConfig(kind=kind, max_parameters_ratio=share)
        with torch.device(self.device):
            guide = Guide.from_unet(self.unet, config).to(self.dtype).eval()
        return GuidedDenoiser(bare_twin(self.unet), guide, self.schedule)


class Steps(Forwards):
    """A guided step besides."""

    def __init__(self, name: str, kind: str, device: str, dtype: torch.dtype) -> None:
        super().__init__(unet_config(name), device, dtype)
        self.student = self.guided_by(kind, TINY_SHARE[name])
        self.guide = self.student.guide

    @torch.no_grad()
    def guided(self) -> None:
        """The first step of a run, which has to do everything."""
        z, t, conditions = self.inputs[1]
        self.student(z, t, replace(conditions))

    def run(self, num_steps: int) -> list[Callable[[], None]]:
        """The steps of a run, to be called in turn."""
        z, _, conditions = self.inputs[1]
        conditions = replace(conditions)
        timesteps = torch.arange(num_steps, device=self.device).flip(0)[:, None]

        @torch.no_grad()
        def step(timestep: torch.Tensor) -> None:
            self.student(z, timestep, conditions)

        return [partial(step, timestep) for timestep in timesteps]


def peak_memory(step: Callable[[], object], device: str) -> int:
    """Bytes held at the most during one call, weights included."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # Linux: forget the peak so far
    step()
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def measure(name: str, kind: str, *, run: bool, repeats: int) -> dict[str, float | None]:
    """The row of one architecture and kind of guide."""
    steps = Steps(name, kind, "meta", torch.float32)
    num_parameters = [sum(p.numel() for p in m.parameters()) for m in (steps.guide, steps.unet)]
    row: dict[str, float | None] = {
        "params_ratio": num_parameters[0] / num_parameters[1],
        "flops_ratio": count_flops(steps.guided) / count_flops(steps.cfg),
        "time_ratio": None,
        "plain_time_ratio": None,
        "memory_ratio": None,
    }
    if run:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        steps = Steps(name, kind, device, torch.float16 if device == "cuda" else torch.float32)
        row["time_ratio"] = time_ratio(steps.guided, steps.cfg, repeats)[0]
        row["plain_time_ratio"] = time_ratio(steps.plain, steps.cfg, repeats)[0]
        # CFG needs no guide in memory.
        guided = peak_memory(steps.guided, device)
        steps.guide.to("meta")
        steps.student.last.call = None
        row["memory_ratio"] = guided / peak_memory(steps.cfg, device)
    return row


@errors_in_one_line()
def main() -> None:
    """The command."""
    parser = command_parser("cost", __doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--run", nargs="+", default=[], choices=[*ARCHITECTURES], metavar="NAME",
                        help=f"real forwards of these: {', '.join(ARCHITECTURES)}")  # fmt: skip
    parser.add_argument("--repeats", type=count, default=5, help="of each forward, with --run")
    arguments = parser.parse_args()
    precision = "fp16" if torch.cuda.is_available() else "fp32"
    made_by = record(guide=UNTRAINED, precision=precision)
    print(as_line(made_by), flush=True)
    results: dict[str, dict[str, Any]] = {}
    for name in ARCHITECTURES:
        for kind in KINDS:
            row = measure(name, kind, run=name in arguments.run, repeats=arguments.repeats)
            results.setdefault(name, {})[kind] = row
            shown = ", ".join(f"{k} {v:.4f}" for k, v in row.items() if v is not None)
            print(f"{name} {kind}: {shown}", flush=True)
    if arguments.json:
        print(json.dumps({**results, "record": made_by}))


if __name__ == "__main__":
    main()
