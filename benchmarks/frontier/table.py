"""What the table says: the numbers that the project answers for."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.frontier.judges import from_json, rounded
from benchmarks.frontier.settings import (
    CONSISTENT,
    FREE,
    LARGE,
    MOST_CONSISTENT,
    NEAR_STRONGEST,
    OWN,
    TRAINED_LABELS,
    contenders,
    forwards_of,
    large,
    layouts,
)
from components.evaluation import Estimate

COSTS = ("16", "8", "4")
NOT_MEASURED = "not measured"
TRAININGS = ("guided", "guided-2")  # of what is shipped, the second to tell how far they scatter
CFG100 = ("100", "cfg")
Row = tuple[str, str]  # place and method, of one model
Cells = Mapping[str, Any]  # by method, of one model at one cost


class Found:
    """The cells of some models, and comparisons of them."""

    def __init__(self, results: Mapping[str, Any], models: Iterable[str]) -> None:
        self.cells: Mapping[str, Any] = results["cells"]
        self.choices: Mapping[str, Any] = results["choices"]
        self.trained: Mapping[str, Any] = results.get("trained", {})
        self.models = [name for name in models if name in self.cells]

    def score(self, model: str, place: str, method: str, name: str, judge: str) -> Estimate | None:
        """A score of a cell; None if there is no such cell yet."""
        cell = self.cells.get(model, {}).get(place, {}).get(method)
        return None if cell is None else from_json(cell["scores"][judge][name])

    def fid_over(self, model: str, one: Row, other: Row, judge: str = "world") -> Estimate | None:
        """The FID of a cell over that of another of the model; None if one is not there yet."""
        own, theirs = (self.score(model, *row, "fid", judge) for row in (one, other))
        return own.with_other(theirs, lambda a, b: a / b) if own and theirs else None

    def clip_less(self, model: str, one: Row, other: Row) -> Estimate | None:
        """The CLIP score of a cell less that of another, in points; None as above."""
        own, theirs = (self.score(model, *row, "clip_score", "world") for row in (one, other))
        return own.with_other(theirs, lambda a, b: a - b) if own and theirs else None

    def rival(self, model: str, place: str, judge: str = "world") -> str | None:
        """The free rival of least FID; None until all that may be it have rows, and the guide."""
        made = self.cells.get(model, {}).get(place, {})
        of_base = self.choices.get("base", {}).get(place, {})
        if place == forwards_of(place):
            wanted = {"cfg", "guided", *contenders(of_base)}
        else:
            wanted = self.strongest(model, forwards_of(place))
            made = {method: made[method] for method in wanted if method in made}
        if not wanted or not wanted <= made.keys():
            return None
        free = [method for method in FREE if method in made]
        return min(free, key=lambda method: made[method]["scores"][judge]["fid"]["value"])

    def strongest(self, model: str, place: str) -> set[str]:
        """The free rivals that may be the best of many images, by the rows of few and both judges.

        Empty until all of them have rows there.
        """
        made = self.cells.get(model, {}).get(place, {})
        free = [method for method in FREE if layouts(method, int(place))]
        if not free or not set(free) <= made.keys():
            return set()
        found = set()
        for judge in ("world", "foreign"):
            fids = {method: made[method]["scores"][judge]["fid"]["value"] for method in free}
            least = min(fids.values())
            found |= {method for method in free if fids[method] <= NEAR_STRONGEST * least}
        return found

    def own(self, model: str, place: str) -> str:
        """The guide alone, halved or with exact steps, by FID of other images than the table's.

        Empty for large rows until all ways have an FID of as many images, of the setting that is
        chosen, and the best of them a row of that setting.
        """
        at = forwards_of(place)
        tried = self.choices.get(model, {}).get(at, {})
        made = self.cells.get(model, {}).get(place, {})
        if place != at:
            best = best_of_large(tried, int(at))
            is_there = best in made and made[best]["setting"] == tried[best]["setting"]
            return best if is_there else ""
        ways = [way for way in OWN if way in made and way in tried]
        of_many = {way: tried[way]["of_many"] for way in ways if "of_many" in tried[way]}
        of_few = {way: min(tried[way]["tried"].values()) for way in ways}
        fids = of_many if len(of_many) == len(ways) else of_few
        return min(ways, key=lambda way: float(fids[way]), default="guided")

    def ratio(
        self, model: str, place: str, judge: str = "world", method: str | None = None
    ) -> Estimate | None:
        """The FID of a method with the guide over that of the judge's best free rival.

        Args:
            model: by name.
            place: number of forwards, of large rows or others.
            judge: "world" or "foreign".
            method: default: :meth:`own`.
        """
        rival, method = self.rival(model, place, judge), method or self.own(model, place)
        return self.fid_over(model, (place, method), (place, rival), judge) if rival else None

    def clip_lead(self, model: str, place: str, method: str | None = None) -> Estimate | None:
        """The CLIP score of a method with the guide less that of the rival of least FID."""
        rival, method = self.rival(model, place), method or self.own(model, place)
        return self.clip_less(model, (place, method), (place, rival)) if rival else None

    def weights(self, model: str, place: str, method: str) -> str | None:
        """Identity of what a cell was made with."""
        found: str | None = self.cells.get(model, {}).get(place, {}).get(method, {}).get("guide")
        return found

    def over_trained(
        self, model: str, place: str, rival: str, judge: str = "world"
    ) -> Estimate | None:
        """The FID of this guide's form over that of a rival; None if not trained alike."""
        alike = set()
        for method in ("ours", rival):
            about = self.trained.get(method, {}).get(self.weights(model, place, method))
            if about is None:
                return None
            alike.add((about["base_hash"], about["settings"]))
        if len(alike) > 1:
            return None
        return self.fid_over(model, (place, "ours"), (place, rival), judge)

    def clip_over_trained(self, model: str, place: str, rival: str) -> Estimate | None:
        """The CLIP score of this guide's form less that of a rival."""
        return self.clip_less(model, (place, "ours"), (place, rival))

    def over_cfg100(self, model: str, place: str) -> Estimate | None:
        """The guide's FID over that of CFG with 50 DDIM steps at its best scale."""
        return self.fid_over(model, (place, self.own(model, place)), CFG100)

    def clip_over_cfg100(self, model: str, place: str) -> Estimate | None:
        """The guide's CLIP score less that CFG's."""
        return self.clip_less(model, (place, self.own(model, place)), CFG100)

    def over_first(self, model: str, place: str) -> Estimate | None:
        """The FID of the guide that was trained a second time over that of the first, alone."""
        first, second = ((place, method) for method in TRAININGS)
        return self.fid_over(model, second, first)

    def clip_over_first(self, model: str, place: str) -> Estimate | None:
        """The CLIP score of that guide less that of the first."""
        first, second = ((place, method) for method in TRAININGS)
        return self.clip_less(model, second, first)

    def clip_gain(self, model: str, place: str) -> Estimate | None:
        """The guide's share of what CFG gains in CLIP score over no guidance, at equal steps."""
        unguided, cfg, guided = (
            self.score(model, place, method, "clip_score", "world")
            for method in ("unguided", "cfg", "guided")
        )
        if not (unguided and cfg and guided):
            return None
        own, whole = (x.with_other(unguided, lambda a, b: a - b) for x in (guided, cfg))
        return own.with_other(whole, lambda a, b: a / b)


def mean(found: Sequence[Estimate | None]) -> Estimate | None:
    """The mean of estimates, replicate by replicate; None if there is none or one is missing."""
    estimates = [one for one in found if one]
    if not found or len(estimates) < len(found):
        return None
    return Estimate(
        value=float(np.mean([one.value for one in estimates])),
        replicates=tuple(np.mean([one.replicates for one in estimates], axis=0).tolist()),
    )


def worst(found: Sequence[Estimate | None], *, least: bool = False) -> Estimate | None:
    """The one of greatest value, or least; None if there is none or one is missing."""
    estimates = [one for one in found if one]
    if not found or len(estimates) < len(found):
        return None
    return (min if least else max)(estimates, key=lambda one: one.value)


def best_of_large(tried: Mapping[str, Any], num_forwards: int) -> str:
    """The way to take the guide that has the least FID of as many images as a large row.

    Empty until all ways that there are at this cost have one in ``tried``, its choices.
    """
    ways = [way for way in OWN if layouts(way, num_forwards)]
    if not all("of_large" in tried.get(way, {}) for way in ways):
        return ""
    return min(ways, key=lambda way: float(tried[way]["of_large"]))


def has_large(found: Found, models: Sequence[str], costs: Sequence[str]) -> bool:
    """Whether all large rows are there that compare the guide of these models at these costs."""
    return all(found.ratio(name, large(at)) is not None for name in models for at in costs)


def estimates_of(
    results: Mapping[str, Any], base: Sequence[str], tuned: Sequence[str]
) -> dict[str, Estimate | None]:
    """The keys of `--json` over these models; None where cells are not made yet.

    Of large rows where all are there that a key needs.
    """
    models = [*base, *tuned]
    found = Found(results, models)
    keys: dict[str, Estimate | None] = {}
    for at in COSTS:
        place = large(at) if has_large(found, base, [at]) else at
        if base:
            keys[f"fid_{at}_base"] = found.ratio("base", place)
            keys[f"clip_{at}_base"] = found.clip_lead("base", place)
        place = large(at) if has_large(found, tuned, [at]) else at
        keys[f"fid_{at}_mean"] = mean([found.ratio(name, place) for name in tuned])
        foreign = [found.ratio(name, place, "foreign") for name in tuned]
        keys[f"foreign_fid_{at}_mean"] = mean(foreign)
    places = [large(at) if has_large(found, models, COSTS) else at for at in COSTS]
    keys["fid_worst"] = worst([found.ratio(name, at) for name in models for at in places])
    for at in ("8", "4", "2"):
        over = [found.over_cfg100(name, at) for name in models]
        keys[f"fid_{at}_over_cfg100"] = worst(over)
    gains = [found.clip_gain(name, f"equal {n}") for name in models for n in (16, 8)]
    keys["clip_gain_worst"] = worst(gains, least=True)
    return keys


def over_trained(
    results: Mapping[str, Any], models: Sequence[str]
) -> dict[str, dict[str, Estimate | None]]:
    """By rival and cost: this guide's form over it, the mean over models; None: not made yet.

    Of one training each: one that is half replaced by a later one has no mean.
    """
    found = Found(results, models)
    complete = len(found.models) == len(models)

    def over(rival: str, at: str) -> Estimate | None:
        weights = {
            tuple(found.weights(name, at, method) for method in (rival, "ours")) for name in models
        }
        if not complete or len(weights) > 1:
            return None
        return mean([found.over_trained(name, at, rival) for name in models])

    return {
        rival: {
            at: over(rival, at)
            for at in COSTS
            if rival not in CONSISTENT or int(at) <= MOST_CONSISTENT
        }
        for rival in TRAINED_LABELS
        if rival != "ours"
    }


def behind(results: Mapping[str, Any], tuned: Sequence[str]) -> list[str]:
    """Where this guide is not known to be ahead of a rival with few parameters that trains."""
    places: list[str] = []
    for rival, by_cost in over_trained(results, tuned).items():
        for at, ratio in by_cost.items():
            if rival not in LARGE and (ratio is None or ratio.interval[1] >= 1):
                found = with_interval(ratio, 3) if ratio else NOT_MEASURED
                places.append(f"{rival} at {at}: {found}")
    return places


def trainings(results: Mapping[str, Any], tuned: Sequence[str]) -> dict[str, list[float]] | None:
    """FID over the best free rival's of the first and the second training, the guide alone.

    On the base and as a mean over the fine-tunes, by key, as far as both are there; None: nowhere.
    """
    found = Found(results, ["base", *tuned])
    pairs = {}
    for at in COSTS:
        for key, models in ((f"fid_{at}_base", ["base"]), (f"fid_{at}_mean", tuned)):
            both = [mean([found.ratio(name, at, method=m) for name in models]) for m in TRAININGS]
            if all(both):
                pairs[key] = [rounded(one.value) for one in both if one]
    return pairs or None


def intervals_of(estimates: Mapping[str, Estimate | None]) -> dict[str, list[float]]:
    """The 95 % intervals of those that are known."""
    return {key: [rounded(end) for end in one.interval] for key, one in estimates.items() if one}


def summary(
    results: Mapping[str, Any], tuned: Sequence[str], final: Sequence[str]
) -> dict[str, Any]:
    """What `--json` prints.

    Args:
        results: of the run.
        tuned: the development fine-tunes.
        final: the final ones.
    """
    found = estimates_of(results, ["base"], tuned)
    numbers: dict[str, Any] = {
        key: None if one is None else rounded(one.value) for key, one in found.items()
    }
    fvu = {
        name: one["guided"]["value"]
        for name, one in results.get("fvu", {}).items()
        if "guided" in one
    }
    numbers["fvu_base"] = fvu.get("base")
    complete = tuned and all(name in fvu for name in tuned)
    numbers["fvu_finetune_worst"] = max(fvu[name] for name in tuned) if complete else None
    numbers["trainings"] = trainings(results, tuned)
    numbers["behind_trained_rivals"] = places = behind(results, tuned)
    unknown = ["behind_trained_rivals"] if any(NOT_MEASURED in place for place in places) else []
    unknown += ["trainings"] if 0 < len(numbers["trainings"] or ()) < 2 * len(COSTS) else []
    intervals: dict[str, Any] = intervals_of(found)
    if any(name in results["cells"] for name in final):
        ended = estimates_of(results, [], final)
        numbers["final"] = {key: one and rounded(one.value) for key, one in ended.items()}
        intervals["final"] = intervals_of(ended)
        unknown += ["final"] if None in ended.values() else []
    else:
        numbers["final"] = None
    rows = Found(results, ["base", *tuned])
    return {
        **numbers,
        "of_large_rows": {
            "base": [int(at) for at in COSTS if has_large(rows, ["base"], [at])],
            "fine-tunes": [int(at) for at in COSTS if tuned and has_large(rows, tuned, [at])],
            "fid_worst": has_large(rows, ["base", *tuned], COSTS),
        },
        "intervals": intervals,
        "missing": [*unknown, *(key for key, value in numbers.items() if value is None)],
        "models": sorted(results["cells"]),
    }


def with_interval(found: Estimate, digits: int) -> str:
    """A value with its interval in brackets."""
    low, high = found.interval
    return f"{found.value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
