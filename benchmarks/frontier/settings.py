"""What is sampled: methods, their settings, and what they cost.

A method's cost is its FLOPs over those of a plain forward of the same UNet. At N forwards stands
what costs at most ``MOST * N`` of that, whatever it is spent on.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pnp_core.exact import spread
from pnp_core.sample import SOLVERS

FORWARDS = (64, 32, 16, 8, 4, 2)
MOST = 1.04
NUM_LARGE = 2304  # images of a large row, whose FID is biased by their number a quarter as much
SCALES = (1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)  # the guide serves up to 8
LABELS = {
    "unguided": "no guidance",
    "cfg": "CFG",
    "first": "CFG in the first steps only",
    "interval": "CFG in an interval (Kynkäänniemi et al. 2024)",
    "reuse": "guidance of an earlier step reused (FasterCache's CFG-Cache)",
    "linear": "LinearAG (Castillo et al. 2023)",
    "guided": "this guide",
    "guided-2": "this guide, trained a second time",
    "halved": "this guide, halved, under another solver than DDIM",
    "mixed": "this guide, halved, under another solver than DDIM, and CFG in some steps",
}
FORMER_LABELS = {
    "exact": "this guide, and CFG in some steps, which correct the others",
}
LABELS |= FORMER_LABELS
TRAINED_LABELS = {
    "ours": "this guide's form, trained as those below",
    "meng": "the whole UNet (Meng et al. 2023)",
    "agd": "AGD (Jensen & Sadat 2025)",
    "dice": "DICE (Zhou et al. 2026)",
    "paper-full": "the paper's full guide (Hsiao et al. 2024)",
    "paper-tiny": "the paper's tiny guide",
    "lora-1": "low-rank guidance, 1 %",
    "lora-8": "low-rank guidance, 8 %",
    "lcm-1": "LCM-LoRA, 1 % (Luo et al. 2023)",
    "lcm-8": "LCM-LoRA, 8 %",
}
LABELS |= TRAINED_LABELS
LARGE = ("meng", "paper-full")
"""With far more than 8 % of the parameters: shown, but the guide does not answer for them."""
CONSISTENT = ("lcm-1", "lcm-8")
"""Not told the scale, not halved, and sampled by diffusers' `LCMScheduler`, in few steps."""
LCM = "lcm"
MOST_CONSISTENT = 8
FREE = ("cfg", "first", "interval", "reuse", "linear")
GUIDES = {"guided": "guided", "guided-2": "guided-2", "halved": "guided", "mixed": "guided"}
"""Methods with a guide, and whose guide they have."""
HALVED = ("halved", "mixed")
"""Have the halved guide under other solvers than DDIM; the others have it under DDIM alone."""
# An FID of few images within this of the best may be the best of many: such layouts of a method,
# and such free rivals of the base, are followed first. By their number alone 192 images have an FID
# near 11, so this is about 3 % of what many would show.
NEAR_BEST = 1.015
OWN = tuple(method for method, guide in GUIDES.items() if guide == "guided")
"""What the guide is taken in: alone, halved under another solver, or so with exact steps."""
FORMER = tuple(FORMER_LABELS)
"""Ways to take the guide that are not in the package any more, of which the final models have rows.

The keys are never of them.
"""
AFTER_FINAL = ("mixed",)
"""Came after the final models had been looked at, and is not tried on them."""
NEAR_STRONGEST = 1.05
"""A free rival within this of the least FID of 576 images, by either judge, has a large row."""


def large(place: str | int) -> str:
    """The place of large rows at a number of forwards."""
    return f"large {place}"


def forwards_of(place: str) -> str:
    """The number of forwards at a place, of large rows or others; other places as they are."""
    return place.removeprefix(large(""))


def row_name(model: str, place: str, method: str) -> str:
    """By which a row's records go."""
    return f"{model}, {place}, {LABELS[method]}"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How an image is made.

    Attributes:
        method: a key of `LABELS`.
        solver: one of `pnp_core.sample.SOLVERS`, or LCM.
        num_steps: of the solver.
        scale: guidance scale as diffusers counts it.
        full: the steps at which both predictions are made, from 0.
    """

    method: str
    solver: str
    num_steps: int
    scale: float
    full: tuple[int, ...] = ()

    @property
    def forwards(self) -> int:
        """Forwards of the UNet an image; what a guide adds to its forward is not in it."""
        return self.num_steps + len(self.full)

    @property
    def layout(self) -> str:
        """All but the scale, in words."""
        words = f"{self.solver}, {self.num_steps} steps"
        if self.full and len(self.full) < self.num_steps:
            words += f", both predictions at {' '.join(map(str, self.full))}"
        return words

    def at(self, scale: float) -> "Setting":
        """The same at another scale."""
        return replace(self, scale=scale)

    @property
    def text(self) -> str:
        """All of it in one line of words, which `parse` reads."""
        full = ",".join(map(str, self.full))
        return f"{self.method} {self.solver} {self.num_steps} {self.scale:g} {full}".strip()

    @classmethod
    def parse(cls, text: str) -> "Setting":
        """From `text`."""
        method, solver, num_steps, scale, *full = text.split()
        return cls(
            method=method,
            solver=solver,
            num_steps=int(num_steps),
            scale=float(scale),
            full=tuple(int(step) for step in full[0].split(",")) if full else (),
        )


def first_steps(num_full: int, num_steps: int) -> tuple[int, ...]:
    """Guidance while noise is strongest."""
    del num_steps
    return tuple(range(num_full))


def interval(num_full: int, num_steps: int) -> tuple[int, ...]:
    """Guidance in the middle: not in the first sixth, where noise is strongest."""
    start = max(1, round(num_steps / 6))
    return tuple(range(start, start + num_full))


def alternate(num_full: int, num_steps: int) -> tuple[int, ...]:
    """Every other step from the first on, or more where they are not enough; none in the end."""
    return tuple(round(k * min(2, num_steps / num_full)) for k in range(num_full))


PLACES: dict[str, Callable[[int, int], tuple[int, ...]]] = {
    "first": first_steps,
    "interval": interval,
    "reuse": spread,
    "linear": alternate,
    "mixed": spread,
}


def layouts(
    method: str,
    num_forwards: int,
    solvers: Iterable[str] = tuple(SOLVERS),
    most_steps: int | None = None,
) -> list[Setting]:
    """The settings to try at a cost, all at one scale: the solvers, and where CFG's forwards go.

    What saves some of CFG's second forwards spends a quarter or three eighths of all forwards on
    them. Empty where there are too few forwards for that.

    Args:
        method: a key of `LABELS`.
        num_forwards: an image.
        solvers: to try.
        most_steps: of a trained rival at this cost; default: as many as forwards.
    """
    if method in TRAINED_LABELS:
        most = num_forwards if most_steps is None else most_steps
        return trained_layouts(method, most, solvers)
    start = 4.0 if method in GUIDES else 3.0
    places: list[tuple[int, tuple[int, ...]]] = []
    if method in HALVED:
        solvers = [solver for solver in solvers if solver != "ddim"]
    if method in GUIDES and method not in PLACES:
        places.append((num_forwards, ()))
    elif method == "cfg":
        half = num_forwards // 2
        places.append((half, tuple(range(half))))
    else:
        for num_full in sorted({num_forwards // 4, 3 * num_forwards // 8} - {0}):
            num_steps = num_forwards - num_full
            places.append((num_steps, PLACES[method](num_full, num_steps)))
    return [
        Setting(method=method, solver=solver, num_steps=num_steps, scale=start, full=full)
        for num_steps, full in places
        for solver in solvers
    ]


def trained_layouts(method: str, num_steps: int, solvers: Iterable[str]) -> list[Setting]:
    """Of a trained rival that can take so many steps; under DDIM also as many as it is halved to.

    Halved to a power of two, it may do better there than in the steps that are left.
    """
    allowed = num_steps > 0
    if method in CONSISTENT:
        solvers, allowed = (LCM,), 0 < num_steps <= MOST_CONSISTENT
    found = [(solver, num_steps) for solver in solvers if allowed]
    halved = 2 ** (num_steps.bit_length() - 1) if num_steps else 0
    if ("ddim", num_steps) in found and halved < num_steps:
        found.append(("ddim", halved))
    return [
        Setting(method=method, solver=solver, num_steps=steps, scale=4.0) for solver, steps in found
    ]


def contenders(of_base: Mapping[str, Any]) -> list[str]:
    """The free rivals that may be the best at a cost, by what was tried on the base.

    Args:
        of_base: `choices` of the results, of the base at this cost.
    """
    free = {name: min(of_base[name]["tried"].values()) for name in FREE if name in of_base}
    return [name for name, found in free.items() if found <= NEAR_BEST * min(free.values())]


def climb(
    start: float, cost: Callable[[float], float], scales: tuple[float, ...] = SCALES
) -> float:
    """The scale of least cost, by steps to the better neighbour: `cost` has one valley in them."""
    known = {index: cost(scales[index]) for index in [scales.index(start)]}
    at = scales.index(start)
    while True:
        near = [index for index in (at - 1, at + 1) if 0 <= index < len(scales)]
        for index in near:
            if index not in known:
                known[index] = cost(scales[index])
        best = min([at, *near], key=lambda index: known[index])
        if best == at:
            return scales[at]
        at = best
