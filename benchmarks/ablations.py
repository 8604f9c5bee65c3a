"""Which choices make the best guide: one change each to the default.

    dvc exp run -S cache.num_forward=8000 -S cache.num_trajectory=40000 cache
    python -m benchmarks.ablations --run            # trains some twenty guides: hours on a CPU
    python -m benchmarks.ablations --json           # what the committed results say

`--run` needs a cache with both kinds of pairs, and takes everything not named here from
params.yaml. A row that is in benchmarks/results/ablations.json is not made again: delete the file
after a change of training. Rows of another base are dropped.

`guidance_fvu` is along CFG trajectories of held-out prompts, at the scale of
`evaluate.guidance_scale`; what a variant's training loss is says nothing about it.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from benchmarks.guides import (
    External,
    FeatureReading,
    Shape,
    TextResidual,
    WithoutEntrances,
    WithoutGains,
    WithoutModulations,
    WithoutText,
    shaped_guide,
)
from benchmarks.quality import models_of, pipe_of, results_so_far
from components.device import load_base, load_companions
from components.environment import quiet
from components.params import Model, Params, companion_paths, load_params
from components.paths import CACHE
from components.progress import Progress
from components.sampling import Sampler, choose_tasks
from components.training import train_config
from pnp_core.bundle import GuideBundle
from pnp_core.cache import TeacherCache
from pnp_core.denoiser import CFGDenoiser, Denoiser, GuidedDenoiser, PlainDenoiser
from pnp_core.distill import FLOOR, guidance_power, turn_of
from pnp_core.files import read_json, write_json, write_text
from pnp_core.guide import (
    Guide,
    GuideConfig,
    Modulation,
    hold_offsets,
    modulated_layers,
    text_attentions,
)
from pnp_core.identity import base_identity
from pnp_core.inject import injecting
from pnp_core.models import AddedConditions, load_unet, weights_hash
from pnp_core.schedule import NoiseSchedule, cfg_target, sampling_timesteps
from pnp_core.train import TrainConfig, step_generator, train

RESULTS = Path("benchmarks/results/ablations.json")
NUM_IMAGES = 12_000  # training samples of each variant
NUM_PROMPTS = 32  # the same for every row
PERTURBATION = 0.05  # of a weight tensor's root mean square
NUM_PERTURBED = 3
PAIRS_PERTURBED = 2_000  # of each perturbed base


class Weights(NamedTuple):
    """What an error of eps counts, by timestep: functions of alpha_t^2, averaging 1."""

    eps: Callable[[Tensor], Tensor] = staticmethod(torch.ones_like)
    v: Callable[[Tensor], Tensor] = staticmethod(lambda alpha2: 1 / alpha2)
    x: Callable[[Tensor], Tensor] = staticmethod(lambda alpha2: (1 - alpha2) / alpha2)
    # Hang et al., ICCV 2023: an error of x counts min(SNR, 5)
    min_snr: Callable[[Tensor], Tensor] = staticmethod(
        lambda alpha2: (5 * (1 - alpha2) / alpha2).clamp(max=1)
    )


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One guide to train.

    Attributes:
        shape: of the guide's network; None: the tiny guide's.
        size: parameters of the tiny guide, over those that params.yaml allows.
        in_decoder: what acts on the text acts in the decoder alone.
        states: which of the base's pairs: ``trajectory``, ``forward`` or ``mixed``.
        weight: of an error of eps, a field of :class:`Weights`.
        relative: errors count relative to the guidance of the same pair.
        guidance_scale: range of w in training.
        power: w is drawn as ``low + (high - low) u**power``.
        w_weighted: errors count ``1 / max(w - 1, 1)^2``.
        companions: train on the cache's companions in turns in every other step, else on the base.
        perturbed: train on the base and on copies with noise in their weights in turns.
    """

    shape: Shape | None = None
    size: float = 1.0
    in_decoder: bool = False
    states: str = "trajectory"
    weight: str = "eps"
    relative: bool = True
    guidance_scale: tuple[float, float] = (1.0, 8.0)
    power: float = 1.0
    w_weighted: bool = True
    companions: bool = True
    perturbed: bool = False


VARIANTS = {
    "the default": {"every other step the base, companions in turns": Variant()},
    "the guide's shape, at equal parameters": {
        "external: reads the latent": Variant(shape=External),
        "reads features alone": Variant(shape=FeatureReading),
        "text residual alone": Variant(shape=TextResidual),
        "without gains on attention": Variant(shape=WithoutGains),
        "without text residual": Variant(shape=WithoutText),
        "without modulating layers": Variant(shape=WithoutModulations),
        "without adapters at the decoder's entrances": Variant(shape=WithoutEntrances),
        "in the decoder alone": Variant(in_decoder=True),
        "up to 2.5 times as large": Variant(size=2.5),
    },
    "loss: not relative to each pair's guidance": {
        "on eps": Variant(relative=False),
        "on v": Variant(relative=False, weight="v"),
        "on x": Variant(relative=False, weight="x"),
        "on x, min-SNR 5": Variant(relative=False, weight="min_snr"),
    },
    "guidance scales in training": {
        "uniform in [1, 5]": Variant(guidance_scale=(1.0, 5.0)),
        "more low ones: 1 + 7 u^2": Variant(power=2.0),
        "errors not divided by (w - 1)^2": Variant(w_weighted=False),
    },
    "trained on the base alone": {
        "trajectories": Variant(companions=False),
        "noised images": Variant(companions=False, states="forward"),
        "both": Variant(companions=False, states="mixed"),
        "trajectories, also with noise in the weights": Variant(companions=False, perturbed=True),
    },
}


class InDecoder:
    """A guided forward in which the guide acts in the decoder alone, and so do gradients."""

    def __init__(self, unet: UNet2DConditionModel, guide: Guide, schedule: NoiseSchedule) -> None:
        self.plain = PlainDenoiser(unet, schedule)
        self.guide = guide

    def __call__(
        self,
        z_BCHW: Tensor,
        t_B: Tensor,
        c_BLD: Tensor,
        w_B: Tensor,
        n_BLD: Tensor,
        added: AddedConditions | None = None,
    ) -> Tensor:
        found = self.guide(z_BCHW, t_B, c_BLD, w_B, n_BLD)
        steered = self.guide.steer(c_BLD, found)
        unet = self.plain.unet
        in_decoder = {id(m) for m in (*unet.up_blocks.modules(), unet.conv_norm_out)}

        if found.attention_gains:
            gains = tuple(
                gain if id(layer) in in_decoder else torch.zeros_like(gain)
                for layer, gain in zip(text_attentions(unet), found.attention_gains, strict=True)
            )
            found = found._replace(attention_gains=gains)
        if found.modulations:
            modulations = tuple(
                modulation
                if id(layer) in in_decoder
                else Modulation(
                    torch.ones_like(modulation.factor), torch.zeros_like(modulation.shift)
                )
                for layer, modulation in zip(modulated_layers(unet), found.modulations, strict=True)
            )
            found = found._replace(modulations=modulations)

        def with_text(module: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
            return args, {**kwargs, "encoder_hidden_states": steered}

        blocks = [block for block in unet.up_blocks if hasattr(block, "attentions")]
        handles = [b.register_forward_pre_hook(with_text, with_kwargs=True) for b in blocks]
        try:
            with injecting(unet, self.guide, found):
                return self.plain(z_BCHW, t_B, c_BLD, w_B, n_BLD, added)
        finally:
            for handle in handles:
                handle.remove()


class Pairs(NamedTuple):
    """Teacher pairs of one base."""

    unet: UNet2DConditionModel
    rows: Callable[[Tensor], Any]  # indices -> pairs of the cache
    num_rows: int


def pairs_of(
    cache: TeacherCache,
    unet: UNet2DConditionModel,
    variant: Variant,
    companions: Sequence[UNet2DConditionModel] = (),
) -> list[Pairs]:
    """The pairs that a variant trains on, base by base."""
    device = unet.device
    starts = cache.starts.tolist()
    num_forward = read_json(CACHE / "index.json")["config"]["num_forward"]  # they come first
    start, stop = {
        "mixed": (0, starts[1]),
        "forward": (0, num_forward),
        "trajectory": (num_forward, starts[1]),
    }[variant.states]

    def stretch(teacher: UNet2DConditionModel, first: int, last: int) -> Pairs:
        return Pairs(teacher, lambda i: cache.pairs(first + i, device), last - first)

    own = stretch(unet, start, stop)
    if variant.companions:
        return [own, *map(stretch, companions, starts[1:-1], starts[2:])]
    if not variant.perturbed:
        return [own]
    perturbed = []
    for number in range(NUM_PERTURBED):
        generator = torch.Generator().manual_seed(number)
        other = perturb(unet, generator)
        chosen = start + torch.randint(stop - start, (PAIRS_PERTURBED,), generator=generator)
        perturbed.append(repaired(other, cache, chosen))
    return [own, *perturbed]


def perturb(unet: UNet2DConditionModel, generator: torch.Generator) -> UNet2DConditionModel:
    """A copy with noise in every weight."""
    other = copy.deepcopy(unet)
    with torch.no_grad():
        for p in other.parameters():
            noise = torch.randn(p.shape, generator=generator).to(p)
            p.add_(PERTURBATION * p.square().mean().sqrt() * noise)
    return other


def repaired(unet: UNet2DConditionModel, cache: TeacherCache, indices: Tensor) -> Pairs:
    """The cache's pairs at ``indices`` as this UNet predicts them."""
    teacher = CFGDenoiser(unet, cache.schedule)
    eps: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for batch in indices.split(64):
            p = cache.pairs(batch, unet.device)
            eps.append(teacher.pair(p.z_t, p.timestep, p.text, p.negative_text))
    eps_c, eps_n = (torch.cat(part) for part in zip(*eps, strict=True))

    def rows(i: Tensor) -> Any:
        return cache.pairs(indices[i], unet.device)._replace(eps_c=eps_c[i], eps_n=eps_n[i])

    return Pairs(unet, rows, len(indices))


def objective(
    variant: Variant,
    pairs: Sequence[Pairs],
    students: Sequence[Denoiser],
    schedule: NoiseSchedule,
    config: TrainConfig,
    power: float,
) -> Callable[[int, slice], Tensor]:
    """As :func:`pnp_core.distill.distillation_objective`, with the variant's changes."""
    weight = getattr(Weights(), variant.weight)
    alpha2 = schedule.alphas_cumprod.float()
    weight_t = weight(alpha2) / weight(alpha2).mean()
    low, high = variant.guidance_scale

    def loss_fn(step: int, part: slice) -> Tensor:
        turn, _ = turn_of(step, len(pairs))
        generator = step_generator(config.seed, step)
        rows = torch.randint(pairs[turn].num_rows, (config.batch_size,), generator=generator)
        drawn = torch.rand(config.batch_size, generator=generator) ** variant.power
        p = pairs[turn].rows(rows[part])
        w_B = (low + (high - low) * drawn)[part].to(p.z_t)
        target = cfg_target(eps_c=p.eps_c, eps_n=p.eps_n, guidance_scale_B=w_B)
        eps = students[turn](p.z_t, p.timestep, p.text, w_B, p.negative_text, p.added)
        error = (eps.float() - target).square().mean(dim=(1, 2, 3)) / power
        error = error * weight_t[p.timestep.cpu()].to(error)
        if variant.relative:
            own = (p.eps_c - p.eps_n).square().mean(dim=(1, 2, 3)) / power
            error = error / (own + FLOOR)
        return error / (w_B - 1).clamp(min=1).square() if variant.w_weighted else error / 16

    return loss_fn


class Probe(NamedTuple):
    """States that CFG visits on one model from held-out prompts, and its predictions there."""

    c_BLD: Tensor
    n_BLD: Tensor
    states: list[tuple[Tensor, Tensor, Tensor, Tensor]]  # z_t, t, eps_c, eps_w


@torch.no_grad()
def probe(row: Model, params: Params) -> Probe:
    pipe = pipe_of(row, params)
    fresh = Guide.from_unet(pipe.unet, GuideConfig(**params.distill.guide.model_dump()))
    sampler = Sampler(pipe, GuideBundle({1: fresh}), params)  # only CFG samples here
    tasks = [task for task in choose_tasks(params.evaluate) if task.is_heldout][:NUM_PROMPTS]
    inputs = sampler.inputs(tasks)
    z, c, n = inputs["z_T"], inputs["c_BLD"], inputs["n_BLD"]
    teacher = sampler.teacher()
    grid = sampling_timesteps(pipe.scheduler, params.evaluate.num_steps[0], sampler.spacing)
    w_B = torch.full((len(z),), params.evaluate.guidance_scale, device=z.device)
    states = []
    for t, s in zip(grid[:-1], grid[1:], strict=True):
        t_B = t.expand(len(z)).to(z.device)
        eps_c, eps_n = teacher.pair(z, t_B, c, n)
        eps_w = teacher.guider(eps_c, eps_n, t_B, w_B)
        states.append((z, t_B, eps_c, eps_w))
        z = sampler.schedule.ddim_step(z, eps_w, t_B, s.expand(len(z)))
    return Probe(c, n, states)


@torch.no_grad()
def unexplained(student: Denoiser, found: Probe, guidance_scale: float) -> float:
    """``guidance_fvu`` at the probe's states."""
    left = total = 0.0
    for z, t_B, eps_c, eps_w in found.states:
        w_B = torch.full((len(z),), guidance_scale, device=z.device)
        eps = student(z, t_B, found.c_BLD, w_B, found.n_BLD)
        left += float((eps - eps_w).square().sum())
        total += float((eps_c - eps_w).square().sum())
    return left / total


def student_of(
    variant: Variant, unet: UNet2DConditionModel, guide: Guide, at: NoiseSchedule
) -> Any:
    return (InDecoder if variant.in_decoder else GuidedDenoiser)(unet, guide, at)


def train_variant(variant: Variant, params: Params, name: str) -> Guide:
    pipe = load_base(params.base)
    unet = pipe.unet
    cache = TeacherCache.open(CACHE, base=base_identity(params.base))
    settings = vars(train_config(params.distill)) | {
        "num_images": NUM_IMAGES,
        "warmup_images": NUM_IMAGES // 6,
        "ema_halflife_images": NUM_IMAGES // 8,
    }
    config = TrainConfig(**settings)
    torch.manual_seed(config.seed)
    ratio = variant.size * params.distill.guide.max_parameters_ratio
    guide = Guide.from_unet(unet, GuideConfig(max_parameters_ratio=ratio))
    if variant.shape:
        guide = hold_offsets(shaped_guide(variant.shape, unet, guide)).to(unet.device)
    companions = load_companions(companion_paths(params), pipe) if variant.companions else {}
    pairs = pairs_of(cache, unet, variant, list(companions.values()))
    students = [student_of(variant, p.unet, guide, cache.schedule) for p in pairs]
    progress = Progress(name, NUM_IMAGES, "images")
    power = guidance_power(cache, config.seed)
    return train(
        objective(variant, pairs, students, cache.schedule, config, power),
        guide,
        config,
        run_hash="",
        report=lambda done, metrics: progress(done, f"loss {metrics['loss']:.4f}"),
    )


def run(params: Params) -> None:
    """Fill in what the results lack.

    Raises ValueError if there is no cache of this base, or if it lacks a kind of pairs.
    """
    TeacherCache.open(CACHE, base=base_identity(params.base))
    made = read_json(CACHE / "index.json")["config"]
    if not (made["num_forward"] and made["num_trajectory"]):
        raise ValueError(
            f"{CACHE} has {made['num_forward']} pairs at noised images and "
            f"{made['num_trajectory']} along trajectories; the ablations compare the two. Set "
            "cache.num_forward and cache.num_trajectory, and run `dvc repro cache`."
        )
    setting = {
        "guidance_scale": params.evaluate.guidance_scale,
        "images_seen": NUM_IMAGES,
        "base_hash": weights_hash(params.base)[:16],
    }
    results = results_so_far(RESULTS, setting)
    rows = results.setdefault("rows", {})
    models = models_of(params)
    probes: dict[str, Probe] = {}
    for group, variants in VARIANTS.items():
        for label, variant in variants.items():
            if label in rows.get(group, {}):
                continue
            probes = probes or {model: probe(row, params) for model, row in models.items()}
            started = time.monotonic()
            guide = train_variant(variant, params, label)
            seconds = time.monotonic() - started
            pipe = load_base(params.base)
            fvu = {}
            for model, row in models.items():
                is_base = row.path == params.base
                unet = pipe.unet if is_base else load_unet(row.path, base=pipe)
                at = NoiseSchedule.from_scheduler(pipe.scheduler)
                student = student_of(variant, unet, guide, at)
                fvu[model] = unexplained(student, probes[model], params.evaluate.guidance_scale)
            base = sum(p.numel() for p in pipe.unet.parameters())
            rows.setdefault(group, {})[label] = {
                "params_ratio": sum(p.numel() for p in guide.parameters()) / base,
                "images_per_second": NUM_IMAGES / seconds,
                "guidance_fvu": fvu,
            }
            print(f"{label}: {fvu}", flush=True)
            write_json(RESULTS, results)
            write_text(RESULTS.with_suffix(".md"), as_markdown(results))


def as_markdown(results: Mapping[str, Any]) -> str:
    setting = results["setting"]
    lines = [
        f"`guidance_fvu` at guidance scale {setting['guidance_scale']:g} on held-out prompts after "
        f"{setting['images_seen']:,} training samples; the base of the first column was trained on,"
        " the fine-tunes never.",
        "",
    ]
    for group, known in VARIANTS.items():
        made = results["rows"].get(group, {})
        variants = {label: made[label] for label in known if label in made}
        if not variants:
            continue
        models = list(next(iter(variants.values()))["guidance_fvu"])
        titles = [group, "parameters", "samples/s", *models, "mean of fine-tunes"]
        lines += [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
        for label, row in variants.items():
            fvu = row["guidance_fvu"]
            cells = [label, f"{row['params_ratio']:.2%}", f"{row['images_per_second']:.0f}"]
            cells += [f"{value:.3f}" for value in fvu.values()]
            cells.append(f"{of_finetunes(fvu):.3f}")
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def of_finetunes(fvu: Mapping[str, float]) -> float:
    return mean(value for model, value in fvu.items() if model != "base")


def summary(results: Mapping[str, Any]) -> dict[str, Any]:
    """Base and mean of fine-tunes for each variant, group by group."""
    return {
        group: {
            label: {
                "fvu_base": row["guidance_fvu"]["base"],
                "fvu_finetunes": of_finetunes(row["guidance_fvu"]),
            }
            for label, row in variants.items()
        }
        for group, variants in results["rows"].items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="store_true", help="make the results that are missing")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    arguments = parser.parse_args()
    quiet()
    if arguments.run:
        run(load_params(Path("params.yaml")))
    if not RESULTS.exists():
        sys.exit(f"error: there is no {RESULTS} yet: --run makes it")
    results = read_json(RESULTS)
    print(as_markdown(results))
    if arguments.json:
        print(json.dumps(summary(results)))


if __name__ == "__main__":
    main()
