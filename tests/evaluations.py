"""Evaluations whose numbers are made up, for the tests of what reads them."""

import numpy as np

from components.evaluation import Cell, Estimate, Evaluation

NUM_REPLICATES = 50
IDENTITY: dict[str, str | int | float] = {
    "base_hash": "base",
    "model_hash": "model",
    "reference_hash": "reference",
    "data_hash": "data",
    "tasks_hash": "tasks",
    "judges_hash": "judges",
    "num_images": 192,
    "guidance_scale": 3.0,
    "strength": 1.0,
    "trigger": "",
    "clip_skip": 0,
    "fvu_steps": 16,
    "timestep_spacing": "trailing",
    "precision": "fp32",
    "teacher": "ClassifierFreeGuidance {}",
    "measured_by": 1,
}


def estimate(value: float, *, spread: float = 0.01, seed: int = 0) -> Estimate:
    """Replicates around the value, with this standard deviation relative to it."""
    noise = np.random.default_rng(seed).standard_normal(NUM_REPLICATES)
    return Estimate(value=value, replicates=tuple(float(value * (1 + spread * x)) for x in noise))


def evaluation(  # noqa: PLR0913, what tests vary, by name
    model: str = "base",
    *,
    num_steps: tuple[int, ...] = (16, 8),
    judge: str = "judge",
    fid: float = 1.0,
    clip_gain: float = 0.9,
    guidance_fvu: float = 0.5,
    flops_ratio: float = 0.52,
    time_ratio: float = 0.54,
    spread: float = 0.01,
    **identity: str | float,
) -> Evaluation:
    """One in which the guide's FID is `fid` times CFG's, and its CLIP gain this share of CFG's."""

    def cell(  # noqa: PLR0913
        method: str, steps: int, solver: str, fids: float, clip: float, seed: int
    ) -> Cell:
        scores = {
            "fid": estimate(fids, spread=spread, seed=seed),
            "kid": estimate(fids / 100, spread=spread, seed=seed),
            "clip_score": estimate(clip, spread=spread / 10, seed=seed),
            "diversity": estimate(0.3, spread=spread, seed=seed),
        }
        if method != "cfg":
            scores["cfg_psnr"] = estimate(20.0, spread=spread, seed=seed)
        forwards = steps * {"unguided": 1.0, "cfg": 2.0, "guided": 2 * flops_ratio}[method]
        return Cell(
            method=method,
            num_steps=steps,
            forwards=forwards,
            solver=solver,
            guidance_scale=3.0,
            judge=judge,
            scores=scores,
        )

    cells = []
    for number, steps in enumerate(num_steps):
        cells += [
            cell("unguided", steps, "ddim", 10.0, 40.0, 3 * number),
            cell("cfg", steps, "ddim", 5.0, 48.0, 3 * number + 1),
            cell("guided", steps, "ddim", 5.0 * fid, 40.0 + 8.0 * clip_gain, 3 * number + 2),
            cell("cfg", steps // 2, "dpmsolver++", 5.2, 47.5, 3 * number + 1),
        ]
    return Evaluation(
        model=model,
        identity={**IDENTITY, **identity},
        num_images=192,
        guidance_scale=3.0,
        cells=tuple(cells),
        guidance_fvu=estimate(guidance_fvu, spread=spread, seed=99),
        fvu_by_timestep={"999": 0.9, "500": guidance_fvu, "62": 0.3},
        cost={
            "flops_ratio": flops_ratio,
            "time_ratio": time_ratio,
            "image_time_ratio": (time_ratio + 1) / 2,
            "guided_ms_per_image": 54.0,
            "cfg_ms_per_image": 100.0,
            "decoding_ms_per_image": 5.0,
        },
        negative={"picture": estimate(0.8, seed=98), "avoided": estimate(0.7, seed=97)},
    )
