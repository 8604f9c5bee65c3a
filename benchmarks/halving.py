"""Is a guide for each step count better than one guide that is told the step count?

    python -m benchmarks.halving --run
    python -m benchmarks.halving --json

`--run` needs what `dvc repro` leaves. The one guide starts from the distilled guide, reads the step
count beside t and w, and learns all counts at once, each from the next larger one (as shortcut
models do: Frans et al., ICLR 2025); its teacher is a frozen copy, renewed once for each count. It
sees as many images as all rounds of `halve` together. Both are measured by the relative error of
the final latents to CFG's with the largest step count, over held-out prompts.
"""

import argparse
import copy
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quality import methods_on, models_of
from components.device import load_base
from components.environment import quiet
from components.params import Params, load_params
from components.paths import BUNDLE, CACHE
from components.progress import Progress
from components.sampling import choose_tasks
from components.training import train_config
from pnp_core.bundle import GuideBundle
from pnp_core.cache import TeacherCache
from pnp_core.denoiser import CFGDenoiser, Denoiser, GuidedDenoiser
from pnp_core.distill import draw_guidance_scale
from pnp_core.files import read_json, write_json, write_text
from pnp_core.guide import EMBEDDING_DIM, Guide, TinyGuide, sinusoidal
from pnp_core.halve import (
    halving_rounds,
    halving_target,
    raised_guidance_scale,
    truncated_snr_loss,
)
from pnp_core.identity import base_identity
from pnp_core.models import AddedConditions, weights_hash
from pnp_core.sample import sample
from pnp_core.schedule import sampling_timesteps
from pnp_core.train import TrainConfig, step_generator, train

RESULTS = Path("benchmarks/results/halving.json")
NUM_PROMPTS = 48
LABELS = {
    "unhalved": "the guide before halving",
    "each": "a guide for each count",
    "one": "one guide, told the count",
    "cfg": "CFG",
}


class ToldSteps(nn.Module):
    """A tiny guide's embedding of t and w, told log2 of the number of steps as well."""

    def __init__(self, embed: nn.Sequential) -> None:
        super().__init__()
        self.embed = embed
        first = embed[0]
        assert isinstance(first, nn.Linear)
        self.steps = nn.Linear(EMBEDDING_DIM, first.out_features, bias=False)
        nn.init.zeros_(self.steps.weight)
        self.log2_steps_B = torch.zeros(1)

    def forward(self, embedding_B2: Tensor) -> Tensor:
        told_BE = sinusoidal(self.log2_steps_B, 100).to(embedding_B2)
        h: Tensor = self.embed[0](embedding_B2) + self.steps(told_BE)
        for layer in self.embed[1:]:
            h = layer(h)
        return h


class OneGuide:
    """A guided forward for samples that each have a number of steps of their own."""

    def __init__(self, guided: GuidedDenoiser, num_steps_B: Tensor) -> None:
        self.guided = guided
        self.log2_steps_B = num_steps_B.float().log2()

    def __call__(
        self,
        z_BCHW: Tensor,
        t_B: Tensor,
        c_BLD: Tensor,
        w_B: Tensor,
        n_BLD: Tensor,
        added: AddedConditions | None = None,
    ) -> Tensor:
        told_steps(self.guided.guide).log2_steps_B = self.log2_steps_B
        return self.guided(z_BCHW, t_B, c_BLD, w_B, n_BLD, added)


def told_steps(guide: Guide) -> ToldSteps:
    assert isinstance(guide.net, TinyGuide) and isinstance(guide.net.embed, ToldSteps)
    return guide.net.embed


def one_guide(distilled: Guide) -> Guide:
    """A copy that does the same until it is trained."""
    guide = copy.deepcopy(distilled).requires_grad_(True)
    assert isinstance(guide.net, TinyGuide)
    guide.net.embed = ToldSteps(guide.net.embed)  # type: ignore[assignment]
    return guide


def train_one_guide(params: Params, distilled: Guide) -> Guide:
    pipe = load_base(params.base)
    cache = TeacherCache.open(CACHE, base=base_identity(params.base))
    section, device, schedule = params.halve, pipe.unet.device, cache.schedule
    counts = halving_rounds(section.start_steps, section.end_steps)
    settings = vars(train_config(section))
    config = TrainConfig(**{**settings, "num_images": len(counts) * section.num_images})
    grids = {
        n: sampling_timesteps(pipe.scheduler, n, section.timestep_spacing)
        for n in (section.start_steps, *counts)
    }
    guide = one_guide(distilled.to(device))
    frozen = copy.deepcopy(guide).requires_grad_(False).eval()
    student = GuidedDenoiser(pipe.unet, guide, schedule)
    renewed = GuidedDenoiser(pipe.unet, frozen, schedule)
    first = GuidedDenoiser(pipe.unet, copy.deepcopy(frozen), schedule)
    phase_steps = config.num_steps // len(counts)

    def loss_fn(step: int, part: slice) -> Tensor:
        if step > 0 and step % phase_steps == 0:
            frozen.load_state_dict(guide.state_dict())
        generator = step_generator(config.seed, step)
        indices = cache.latent_indices(batch_size=config.batch_size, seed=config.seed, step=step)
        w_B = draw_guidance_scale(params.distill.guidance_scale, config.batch_size, generator)
        # in phase k the counts down to the k-th are learnt: each has a teacher by then
        known = counts[: min(step // phase_steps + 1, len(counts))]
        num_steps = known[int(torch.randint(len(known), (1,), generator=generator))]
        interval_B = torch.randint(num_steps, (config.batch_size,), generator=generator)[part]
        latents = cache.latents(indices, generator, part, device)
        grid, fine = grids[num_steps], grids[2 * num_steps]
        t_B, s_B = grid[interval_B], grid[interval_B + 1]
        w_B, t_B, s_B = w_B[part].to(device), t_B.to(device), s_B.to(device)
        z_t = schedule.add_noise(latents.x, latents.noise, t_B)
        steps_B = torch.full((len(z_t),), num_steps, device=device)
        is_first = 2 * num_steps == section.start_steps
        teacher = first if is_first else renewed
        gain, highest = section.guidance_gain if is_first else 1.0, params.distill.guidance_scale[1]
        with torch.no_grad():
            target = halving_target(
                OneGuide(teacher, 2 * steps_B), schedule, z_t=z_t, t_B=t_B, s_B=s_B,
                m_B=fine[2 * interval_B + 1].to(device), c_BLD=latents.text,
                w_B=raised_guidance_scale(w_B, gain, highest),
                n_BLD=latents.negative_text, added=latents.added,
            )  # fmt: skip
        own = OneGuide(student, steps_B)
        eps = own(z_t, t_B, latents.text, w_B, latents.negative_text, latents.added)
        return truncated_snr_loss(schedule, eps, target, z_t, t_B)

    progress = Progress("one guide", config.num_images, "images")
    return train(
        loss_fn,
        guide,
        config,
        run_hash="",
        report=lambda done, metrics: progress(done, f"loss {metrics['loss']:.4f}"),
    )


def run(params: Params) -> None:
    """Train the one guide and measure."""
    bundle = GuideBundle.load(BUNDLE)
    start = bundle.num_steps[-1]
    one = train_one_guide(params, bundle.guides[start])
    counts = halving_rounds(params.halve.start_steps, params.halve.end_steps)
    models: dict[str, Any] = {}
    for model, row in models_of(params).items():
        methods = methods_on(row, params, {})
        tasks = [task for task in choose_tasks(params.evaluate) if task.is_heldout][:NUM_PROMPTS]
        inputs = methods.inputs(tasks)
        unet, schedule = methods.pipe.unet, methods.schedule

        def latents(denoiser: Denoiser, num_steps: int, methods: Any = methods) -> Tensor:
            with methods.computing():
                return sample(
                    denoiser,
                    methods.pipe.scheduler,
                    guidance_scale=params.evaluate.guidance_scale,
                    num_steps=num_steps,
                    timestep_spacing=params.halve.timestep_spacing,
                    **inputs,  # noqa: B023
                )

        reference = latents(CFGDenoiser(unet, schedule), start)
        models[model] = {label: {} for label in LABELS}
        for num_steps in counts:
            steps_B = torch.full((len(tasks),), num_steps, device=unet.device)
            denoisers: dict[str, Denoiser] = {
                "unhalved": GuidedDenoiser(unet, bundle.guides[start], schedule),
                "each": GuidedDenoiser(unet, bundle.guides[num_steps], schedule),
                "one": OneGuide(GuidedDenoiser(unet, one, schedule), steps_B),
                "cfg": CFGDenoiser(unet, schedule),
            }
            for label, denoiser in denoisers.items():
                error = (latents(denoiser, num_steps) - reference).square().mean()
                models[model][label][str(num_steps)] = float(error / reference.square().mean())
        print(f"{model}: {models[model]}", flush=True)
    setting = {
        "guidance_scale": params.evaluate.guidance_scale,
        "reference_steps": start,
        "images_seen": len(counts) * params.halve.num_images,
        "base_hash": weights_hash(params.base)[:16],
    }
    results = {"setting": setting, "models": models}
    write_json(RESULTS, results)
    write_text(RESULTS.with_suffix(".md"), as_markdown(results))


def as_markdown(results: Mapping[str, Any]) -> str:
    setting, models = results["setting"], results["models"]
    counts = list(next(iter(models.values()))["cfg"])
    titles = ["model", "", *(f"{n} steps" for n in counts)]
    lines = [
        f"Relative error of the final latents to CFG's with {setting['reference_steps']} steps, "
        f"guidance scale {setting['guidance_scale']:g}, held-out prompts; "
        f"{setting['images_seen']:,} images seen in halving.",
        "",
        f"| {' | '.join(titles)} |",
        "|---" * len(titles) + "|",
    ]
    for model, rows in models.items():
        for name, label in LABELS.items():
            cells = [f"{rows[name][n]:.4f}" for n in counts]
            lines.append(f"| {' | '.join([model, label, *cells])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="store_true", help="make the results")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    arguments = parser.parse_args()
    quiet()
    if arguments.run:
        run(load_params(Path("params.yaml")))
    if not RESULTS.exists():
        sys.exit(f"error: there is no {RESULTS} yet: run `dvc repro`, then this with --run")
    results = read_json(RESULTS)
    print(as_markdown(results))
    if arguments.json:
        print(json.dumps(results["models"]))


if __name__ == "__main__":
    main()
