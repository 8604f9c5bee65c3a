"""From kept images to the numbers of an evaluation, each with its interval."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from components.evaluation import Cell, Estimate
from components.images import KeptImages, Recipe, Setting, Task, batches
from components.judging import Judge
from components.scores import (
    RealImages,
    diversity,
    estimate,
    mean_of,
    resamples,
    share_of,
)
from pnp_core.metrics import psnr

# Decoded at a time: 64 images of 512 pixels, whose differences in float64 take 0.4 GB.
PIXELS_AT_A_TIME = 64 * 512**2


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """The images of a model that are measured.

    Attributes:
        kept: where they are.
        recipes: of each setting.
        tasks: one image of each setting.
    """

    kept: KeptImages
    recipes: Mapping[Setting, Recipe]
    tasks: Sequence[Task]

    @property
    def counts(self) -> np.ndarray:
        """Which tasks' images each replicate has, (R, N)."""
        return resamples(len(self.tasks))

    def num_at_a_time(self, setting: Setting) -> int:
        """How many images of a setting are decoded together, by their size."""
        first = self.kept.read(self.recipes[setting], self.tasks[:1])
        return num_at_a_time(*first.shape[1:3])


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What judges see in the images of a setting: by judge, one row or number an image."""

    features: list[np.ndarray]
    clip_scores: list[np.ndarray | None]
    psnr: np.ndarray | None  # to CFG's


def num_at_a_time(height: int, width: int) -> int:
    """How many images of this size are decoded together."""
    return max(1, PIXELS_AT_A_TIME // (height * width))


def measure_cells(
    sampled: Sampled,
    judges: Sequence[tuple[Judge, RealImages]],
    forwards_per_step: Mapping[str, float],
    tell: Callable[[str], None],
) -> tuple[Cell, ...]:
    """All settings by all judges.

    Args:
        sampled: the images.
        judges: with the real images that each compares with.
        forwards_per_step: of a method, in plain forwards.
        tell: hears of each setting that is done.
    """
    counts_RN, cells = sampled.counts, []
    for setting in sampled.recipes:
        seen = look(sampled, setting, [judge for judge, _ in judges])
        for number, (judge, real) in enumerate(judges):
            features, clip_scores = seen.features[number], seen.clip_scores[number]
            statistics = {
                "fid": real.fid(features),
                "kid": real.kid(features),
                "diversity": diversity(features),
            }
            if clip_scores is not None:
                statistics["clip_score"] = mean_of(clip_scores)
            if seen.psnr is not None:
                statistics["cfg_psnr"] = mean_of(seen.psnr)
            where = f"of {setting.method} at {setting.num_steps} steps by {judge.name}"
            cells.append(
                Cell(
                    **setting._asdict(),
                    forwards=setting.num_steps * forwards_per_step[setting.method],
                    judge=judge.name,
                    scores={
                        name: estimate(statistic, counts_RN, f"{name} {where}")
                        for name, statistic in statistics.items()
                    },
                )
            )
        tell(f"{setting.method}, {setting.num_steps} steps")
    return tuple(cells)


def look(sampled: Sampled, setting: Setting, judges: Sequence[Judge]) -> Seen:
    """Show a setting's images to the judges, a batch at a time."""
    kept, recipe = sampled.kept, sampled.recipes[setting]
    cfg = sampled.recipes.get(setting._replace(method="cfg")) if setting.method != "cfg" else None
    features: list[list[np.ndarray]] = [[] for _ in judges]
    clip_scores: list[list[np.ndarray]] = [[] for _ in judges]
    agreements = []
    for batch in batches(sampled.tasks, sampled.num_at_a_time(setting)):
        images, prompts = kept.read(recipe, batch), [task.prompt for task in batch]
        for number, judge in enumerate(judges):
            seen, agreement = judge.look(images, prompts)
            features[number].append(seen)
            if agreement is not None:
                clip_scores[number].append(agreement)
        if cfg is not None:
            agreements.append(psnr(images, kept.read(cfg, batch)))
    return Seen(
        features=[np.concatenate(parts) for parts in features],
        clip_scores=[np.concatenate(parts) if parts else None for parts in clip_scores],
        psnr=np.concatenate(agreements) if agreements else None,
    )


def measure_negatives(
    sampled: Sampled,
    setting: Setting,
    with_negatives: Sequence[Task],
    negatives: Sequence[str],
    judge: Judge,
) -> dict[str, Estimate]:
    """What negative prompts do under the guide, as a share of what they do under CFG.

    `picture`: the guide's change of the picture projected onto CFG's, over CFG's: the sum of
    ``<d_guided, d_cfg>`` over that of ``<d_cfg, d_cfg>``. 1 is CFG's change, 0 none of it.
    `avoided`: how far the CLIP score for the negative prompt falls, guided over CFG; left out where
    the judge reads no text, and where CFG's own fall is inside its interval. Neither, where CFG's
    pictures stay as they were.

    Args:
        sampled: the images without these negative prompts, among them those of the same tasks.
        setting: of CFG, whose guided twin is the other.
        with_negatives: the first tasks with negative prompts.
        negatives: what each of them avoids.
        judge: whose CLIP score is taken.
    """
    if not with_negatives:
        return {}
    parts, wholes = [], []
    falls: dict[str, list[np.ndarray]] = {"cfg": [], "guided": []}
    size = sampled.num_at_a_time(setting)
    for start in range(0, len(with_negatives), size):
        part = slice(start, start + size)
        changes = {}
        for method, found in falls.items():
            recipe = sampled.recipes[setting._replace(method=method)]
            without = sampled.kept.read(recipe, sampled.tasks[: len(with_negatives)][part])
            avoiding = sampled.kept.read(recipe, with_negatives[part])
            change = avoiding.astype(np.float64) - without
            changes[method] = change.reshape(len(change), -1)
            if judge.reads_text:
                before, after = (judge.clip_scores(x, negatives[part]) for x in (without, avoiding))
                found.append(before - after)
        parts.append((changes["guided"] * changes["cfg"]).sum(axis=1))
        wholes.append((changes["cfg"] ** 2).sum(axis=1))
    if np.concatenate(wholes).sum() == 0:
        return {}
    counts_RN = sampled.counts[:, : len(with_negatives)]
    picture = share_of(np.concatenate(parts), np.concatenate(wholes))
    shares = {"picture": estimate(picture, counts_RN, "the change that negative prompts make")}
    if judge.reads_text:
        ours, theirs = (np.concatenate(falls[method]) for method in ("guided", "cfg"))
        if estimate(mean_of(theirs), counts_RN).interval[0] > 0:
            shares["avoided"] = estimate(share_of(ours, theirs), counts_RN)
    return shares


def unexplained(
    terms: Mapping[str, Any], tasks: Sequence[Task], of: Sequence[Task], counts_RN: np.ndarray
) -> tuple[Estimate, dict[str, Estimate]]:
    """`guidance_fvu`, and the same by timestep.

    Args:
        terms: of `Sampler.fvu_terms`.
        tasks: all tasks, which the counts are of.
        of: those that the terms are of, in order; further ones were not measured.
        counts_RN: which tasks each replicate has.
    """
    parts_NT, wholes_NT = np.array(terms["unexplained"]), np.array(terms["total"])
    rows = [tasks.index(task) for task in of[: len(parts_NT)]]
    counts = counts_RN[:, rows]
    share = share_of(parts_NT.sum(axis=1), wholes_NT.sum(axis=1))
    by_timestep = {
        str(t): estimate(share_of(parts_NT[:, i], wholes_NT[:, i]), counts, "guidance_fvu")
        for i, t in enumerate(terms["timesteps"])
    }
    return estimate(share, counts, "guidance_fvu"), by_timestep
