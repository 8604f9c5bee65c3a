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

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from benchmarks.command import command_parser, run_command
from benchmarks.guides import InDecoder, shaped_guide
from benchmarks.peers import Ours
from benchmarks.quality import Methods, models_of, results_so_far
from benchmarks.record import header, note, precision_on, record
from benchmarks.variants import VARIANTS, Variant, Weights
from components.device import device, load_base, load_companions
from components.params import Params, companion_paths
from components.paths import CACHE
from components.progress import Progress
from components.rows import load_row
from components.sampling import choose_tasks
from components.training import train_config
from pnp_core.bundle import GuideBundle
from pnp_core.cache import TeacherCache
from pnp_core.denoiser import CFGDenoiser, Denoiser, GuidedDenoiser
from pnp_core.distill import FLOOR, guidance_power, turn_of
from pnp_core.files import read_json, write_json, write_text
from pnp_core.guide import Guide, GuideConfig
from pnp_core.guide.guide import hold_offsets
from pnp_core.identity import base_identity
from pnp_core.model_files import weights_hash
from pnp_core.schedule import NoiseSchedule, cfg_target
from pnp_core.seeds import step_generator
from pnp_core.train import TrainConfig, train

RESULTS = Path("benchmarks/results/ablations.json")
NUM_IMAGES = 12_000  # training samples of each variant
NUM_PROMPTS = 32  # the same for every row
PERTURBATION = 0.05  # of a weight tensor's root mean square
NUM_PERTURBED = 3
PAIRS_PERTURBED = 2_000  # of each perturbed base


class Student(Ours):
    """A variant's guide, as a method."""

    def __init__(self, unet: UNet2DConditionModel, guide: Guide, variant: Variant) -> None:
        super().__init__(unet, guide)
        self.variant = variant

    def denoiser(self, unet: UNet2DConditionModel, schedule: NoiseSchedule) -> Denoiser:
        """The guide at work in `unet`, in the decoder alone where the variant says so."""
        kind = InDecoder if self.variant.in_decoder else GuidedDenoiser
        return kind(unet, self.guide, schedule)


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
    starts = cache.starts.tolist()
    num_forward = read_json(CACHE / "index.json")["config"]["num_forward"]  # they come first
    start, stop = {
        "mixed": (0, starts[1]),
        "forward": (0, num_forward),
        "trajectory": (num_forward, starts[1]),
    }[variant.states]

    def stretch(teacher: UNet2DConditionModel, first: int, last: int) -> Pairs:
        return Pairs(teacher, lambda i: cache.pairs(first + i, unet.device), last - first)

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
            w_B = torch.ones(len(batch), device=unet.device)
            eps.append(teacher.pair(p.z_t, p.timestep, p.conditions(w_B)))
    eps_c, eps_n = (torch.cat(part) for part in zip(*eps, strict=True))

    def rows(i: Tensor) -> Any:
        return cache.pairs(indices[i], unet.device)._replace(eps_c=eps_c[i], eps_n=eps_n[i])

    return Pairs(unet, rows, len(indices))


def objective(  # noqa: PLR0913, a variant, and what every variant shares
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
        eps = students[turn](p.z_t, p.timestep, p.conditions(w_B))
        error = (eps.float() - target).square().mean(dim=(1, 2, 3)) / power
        error = error * weight_t[p.timestep.cpu()].to(error)
        if variant.relative:
            own = (p.eps_c - p.eps_n).square().mean(dim=(1, 2, 3)) / power
            error = error / (own + FLOOR)
        return error / (w_B - 1).clamp(min=1).square() if variant.w_weighted else error / 16

    return loss_fn


def train_variant(variant: Variant, params: Params, name: str) -> Student:
    """The variant, trained on the cache."""
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
    student = Student(unet, guide, variant)
    companions = load_companions(companion_paths(params), pipe) if variant.companions else {}
    pairs = pairs_of(cache, unet, variant, list(companions.values()))
    students = [student.denoiser(p.unet, cache.schedule) for p in pairs]
    progress = Progress(name, NUM_IMAGES, "images")
    power = guidance_power(cache, config.seed)
    return train(
        objective(variant, pairs, students, cache.schedule, config, power),
        student,
        config,
        run_hash="",
        report=lambda done, metrics: progress(done, f"loss {metrics['loss']:.4f}"),
    )


def check_cache(params: Params) -> None:
    """Raise ValueError if there is no cache of this base, or if it lacks a kind of pairs."""
    TeacherCache.open(CACHE, base=base_identity(params.base))
    made = read_json(CACHE / "index.json")["config"]
    if not (made["num_forward"] and made["num_trajectory"]):
        raise ValueError(
            f"{CACHE} has {made['num_forward']} pairs at noised images and "
            f"{made['num_trajectory']} along trajectories; the ablations compare the two. Set "
            "cache.num_forward and cache.num_trajectory, and run `dvc repro cache`."
        )


def run(params: Params) -> None:
    """Fill in what the results lack.

    Raises ValueError if there is no cache of this base, or if it lacks a kind of pairs.
    """
    check_cache(params)
    setting = {
        "guidance_scale": params.evaluate.guidance_scale,
        "images_seen": NUM_IMAGES,
        "base_hash": weights_hash(params.base)[:16],
    }
    results = results_so_far(RESULTS, setting)
    precision = precision_on(device().type, params.distill.precision)
    made_by = record(guide="of each row in the JSON file", precision=precision)
    rows = results.setdefault("rows", {})
    for group, variants in VARIANTS.items():
        for label, variant in variants.items():
            if label in rows.get(group, {}):
                continue
            row = row_of(variant, params, label)
            rows.setdefault(group, {})[label] = row
            print(f"{label}: {row['guidance_fvu']}", flush=True)
            note(results, label, made_by)
            write_json(RESULTS, results)
            write_text(RESULTS.with_suffix(".md"), as_markdown(results))


def row_of(variant: Variant, params: Params, label: str) -> dict[str, Any]:
    """Train a variant and measure it on every model."""
    started = time.monotonic()
    student = train_variant(variant, params, label)
    seconds = time.monotonic() - started
    tasks = [task for task in choose_tasks(params.evaluate) if task.is_heldout][:NUM_PROMPTS]
    fvu, bundle = {}, GuideBundle({1: student.guide})
    for model, row in models_of(params).items():
        methods = Methods(load_row(row, params.base), bundle, params, peers={label: student})
        fvu[model] = methods.guidance_fvu(tasks, label)
    base = sum(p.numel() for p in methods.pipe.unet.parameters())
    return {
        "guide": student.guide.weights_digest()[:16],
        "params_ratio": sum(p.numel() for p in student.parameters()) / base,
        "images_per_second": NUM_IMAGES / seconds,
        "guidance_fvu": fvu,
    }


def as_markdown(results: Mapping[str, Any]) -> str:
    """The results as a page: a table of `guidance_fvu` for each group of variants."""
    setting, rows = results["setting"], results["rows"]
    names = [
        label
        for group, known in VARIANTS.items()
        for label in known
        if label in rows.get(group, {})
    ]
    lines = [
        header(results, names),
        "",
        f"`guidance_fvu` at guidance scale {setting['guidance_scale']:g} on held-out prompts after "
        f"{setting['images_seen']:,} training samples; the base of the first column was trained on,"
        " the fine-tunes never.",
        "",
    ]
    for group, known in VARIANTS.items():
        made = rows.get(group, {})
        variants = {label: made[label] for label in known if label in made}
        if not variants:
            continue
        models = sorted(next(iter(variants.values()))["guidance_fvu"])
        titles = [group, "parameters", "samples/s", *models, "mean of fine-tunes"]
        lines += [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
        for label, row in variants.items():
            fvu = row["guidance_fvu"]
            cells = [label, f"{row['params_ratio']:.2%}", f"{row['images_per_second']:.0f}"]
            cells += [f"{fvu[model]:.3f}" for model in models]
            cells.append(f"{of_finetunes(fvu):.3f}")
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def of_finetunes(fvu: Mapping[str, float]) -> float:
    """Mean over the fine-tunes: every model but the base."""
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
    """Print the results, with `--run` after making those that are missing."""
    parser = command_parser("ablations", __doc__)
    run_command(parser, RESULTS, lambda params, _: run(params), table=as_markdown, figures=summary)


if __name__ == "__main__":
    main()
