"""What is known of an evaluated model: written by `evaluate`, read by the gate and the report.

results/evaluate/<model>/evaluation.json holds all of it. The few numbers that DVC shows lie beside
it in metrics.json.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import TypeAdapter, ValidationError

from pnp_core.files import read_json, write_json

FORMAT = 2
FILE = "evaluation.json"
COVERAGE = 0.95
LOWER_IS_BETTER = ("fid", "kid")  # of the scores


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number, and replicates that spread around it as it would over new images.

    Replicate i of every estimate of an evaluation, and of any evaluation of the same tasks, is of
    the same part of the (prompt, seed) pairs: what is computed of two estimates is paired.
    """

    value: float
    replicates: tuple[float, ...] = ()

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval; NaN where it has none.

        The percentiles of the replicates, moved so that their mean is the value: that of a ratio
        need not be.
        """
        if not self.replicates:
            return math.nan, math.nan
        found = np.asarray(self.replicates)
        tail = 50 * (1 - COVERAGE)
        low, high = np.percentile(found, [tail, 100 - tail]) - found.mean() + self.value
        return float(low), float(high)

    def with_other(self, other: "Estimate", function: Callable[[Any, Any], Any]) -> "Estimate":
        """`function` of the values, and of the replicates pair by pair."""
        pairs = zip(self.replicates, other.replicates, strict=True)
        return Estimate(
            value=float(function(self.value, other.value)),
            replicates=tuple(float(function(a, b)) for a, b in pairs),
        )


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The scores of the images of one method at one setting, by one judge.

    Attributes:
        method: a key of `METHODS`.
        num_steps: of the sampler.
        forwards: what an image costs, in plain forwards of the UNet, by FLOPs.
        solver: `ddim` or `dpmsolver++`.
        guidance_scale: diffusers'.
        judge: its name.
        scores: by name: fid, kid, clip_score, diversity, cfg_psnr (to CFG at the same setting).
    """

    method: str
    num_steps: int
    forwards: float
    solver: str
    guidance_scale: float
    judge: str
    scores: Mapping[str, Estimate]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All cells of one model, and what is not a matter of images.

    Attributes:
        model: its name in params.yaml.
        identity: what two evaluations must have in common to be compared, by name: hashes of the
            base, the model, the reference, the data, the tasks (prompts and seeds) and the judges,
            the number of images, the guidance scale, the guide's strength, spacing, precision, the
            teacher's rule and the version of the measuring code.
        num_images: of each cell.
        guidance_scale: of the cells that are compared at every number of steps.
        cells: of every method, setting and judge; the first judge is the one that the gate asks.
        guidance_fvu: the share of guidance that the guide leaves unexplained.
        fvu_by_timestep: the same at each timestep.
        fvu_intervals: its 95 % interval there.
        fvu_prompts: how many prompts it is of, `heldout` and `trained`; empty where that was not
            written yet.
        cost: flops_ratio, time_ratio, image_time_ratio, times in ms and memory in MB, by name. With
            `_batch_1`: of a single image, else of an image in a batch of `batch_size`.
        machine: what times were taken on: `device`, by name, and the version of `torch`; empty
            where that was not written yet.
        negative: what a negative prompt does, by name: the share of CFG's effect.
    """

    model: str
    identity: Mapping[str, str | int | float]
    num_images: int
    guidance_scale: float
    cells: tuple[Cell, ...]
    guidance_fvu: Estimate
    fvu_by_timestep: Mapping[str, float] = field(default_factory=dict)
    fvu_intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    fvu_prompts: Mapping[str, int] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)
    machine: Mapping[str, str] = field(default_factory=dict)
    negative: Mapping[str, Estimate] = field(default_factory=dict)

    @property
    def judges(self) -> tuple[str, ...]:
        """In the order of params.yaml."""
        return tuple(dict.fromkeys(cell.judge for cell in self.cells))

    @property
    def timed_on(self) -> str:
        """The machine that times were taken on, in words; empty: not known."""
        if not self.machine:
            return ""
        return f"{self.machine.get('device')}, torch {self.machine.get('torch')}"

    @property
    def fvu_along(self) -> str:
        """Whose prompts `guidance_fvu` is of, in words."""
        heldout, trained = (self.fvu_prompts.get(kind, 0) for kind in ("heldout", "trained"))
        if trained:
            return f"prompts that the guide was trained on: {trained} of {heldout + trained}"
        return f"held-out prompts: {heldout}" if heldout else "prompts not told"

    @property
    def num_steps(self) -> tuple[int, ...]:
        """The step counts at which guided, CFG and unguided stand side by side, most first."""
        steps = {method: self._steps(method) for method in ("unguided", "cfg", "guided")}
        return tuple(sorted(set.intersection(*steps.values()), reverse=True))

    def cell(
        self,
        method: str,
        num_steps: int,
        *,
        solver: str = "ddim",
        guidance_scale: float | None = None,
        judge: str | None = None,
    ) -> Cell | None:
        """The one of these settings, by default the evaluation's scale and its first judge."""
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        wanted = (method, num_steps, solver, scale, judge or self.judges[0])
        for cell in self.cells:
            is_it = (cell.method, cell.num_steps, cell.solver, cell.guidance_scale, cell.judge)
            if is_it == wanted:
                return cell
        return None

    def ratio(self, score: str, num_steps: int, *, judge: str | None = None) -> Estimate:
        """A score of the guide's over CFG's at the same number of steps.

        Raises ValueError if CFG's is 0, or it was not measured.
        """
        cfg = self._score("cfg", score, num_steps, judge)
        if 0 in (cfg.value, *cfg.replicates):
            raise ValueError(
                f"{self.model}: {score} of CFG at {num_steps} steps is 0, and nothing is a ratio "
                f"to that: evaluate {self.model} again"
            )
        return self._score("guided", score, num_steps, judge).with_other(cfg, lambda a, b: a / b)

    def gain(self, score: str, num_steps: int, *, judge: str | None = None) -> Estimate | None:
        """The share of what CFG gains in a score over no guidance that the guide gains.

        None where CFG's own gain is inside its interval, is a loss, or may be none: the share says
        nothing then.
        """
        unguided = self._score("unguided", score, num_steps, judge)
        whole = self._score("cfg", score, num_steps, judge).with_other(unguided, lambda a, b: a - b)
        low, high = whole.interval
        is_sure = high < 0 if score in LOWER_IS_BETTER else low > 0
        if not is_sure or 0 in (whole.value, *whole.replicates):
            return None
        part = self._score("guided", score, num_steps, judge).with_other(
            unguided, lambda a, b: a - b
        )
        return part.with_other(whole, lambda a, b: a / b)

    def save(self, folder: Path) -> None:
        """Write evaluation.json into `folder`."""
        write_json(folder / FILE, {"format": FORMAT, **asdict(self)})

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read `folder`/evaluation.json. Raises ValueError if it is not there or not that."""
        path = folder / FILE
        try:
            values = read_json(path)
        except FileNotFoundError:
            raise ValueError(f"there is no {path}: evaluate {folder.name} first") from None
        except ValueError as error:
            raise ValueError(f"{path} can't be read ({error}): evaluate again") from None
        return cls.from_json(values, where=str(path))

    @classmethod
    def from_json(cls, values: Mapping[str, Any], *, where: str) -> Self:
        """From what `save` wrote. Raises ValueError, which names `where`, for anything else."""
        if not isinstance(values, Mapping):
            raise ValueError(f"{where} is not what `evaluate` wrote: evaluate again")
        if values.get("format") != FORMAT:
            raise ValueError(
                f"{where} was written by another version of this code (format "
                f"{values.get('format', 1)}, this code's is {FORMAT}): evaluate again"
            )
        try:
            found: Self = _as_written().validate_python(values)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            raise ValueError(
                f"{where} is not what `evaluate` wrote ({name}: {first['msg']}): evaluate again"
            ) from None
        if wrong := found._never_written():
            raise ValueError(f"{where} is not what `evaluate` wrote ({wrong}): evaluate again")
        return found

    def _never_written(self) -> str:
        """What the types of an evaluation allow and `evaluate` does not write; empty: nothing."""
        if not self.cells:
            return "cells: there is none"
        for name in ("fvu_by_timestep", "fvu_intervals"):
            for timestep in getattr(self, name):
                if not timestep.isdecimal():
                    return f"{name}: {timestep!r} is no timestep"
        scores = [score for cell in self.cells for score in cell.scores.values()]
        counts = sorted({len(score.replicates) for score in scores})
        if len(counts) > 1:
            return f"cells: scores have from {counts[0]} to {counts[-1]} replicates"
        return ""

    def _score(self, method: str, score: str, num_steps: int, judge: str | None) -> Estimate:
        cell = self.cell(method, num_steps, judge=judge)
        if cell is None or score not in cell.scores:
            raise ValueError(f"{self.model}: no {score} of {method} at {num_steps} steps")
        return cell.scores[score]

    def _steps(self, method: str) -> set[int]:
        scale = self.guidance_scale
        return {
            cell.num_steps
            for cell in self.cells
            if (cell.method, cell.solver, cell.guidance_scale) == (method, "ddim", scale)
        }


@cache
def _as_written() -> TypeAdapter[Any]:
    """What reads an evaluation from JSON's values, and refuses what has not its form."""
    return TypeAdapter(Evaluation)
