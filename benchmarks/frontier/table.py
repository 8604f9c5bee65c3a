"""What the table says: the numbers that the project answers for, and the page."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.frontier.final import final_models
from benchmarks.frontier.judges import from_json, rounded
from benchmarks.frontier.settings import (
    CONSISTENT,
    FREE,
    GUIDES,
    LABELS,
    LARGE,
    MOST,
    MOST_CONSISTENT,
    TRAINED_LABELS,
    Setting,
    contenders,
    row_name,
)
from benchmarks.record import Record, as_line
from components.evaluation import Estimate

COSTS = ("16", "8", "4")
NOT_MEASURED = "not measured"
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

    def rival(self, model: str, place: str, judge: str = "world") -> str | None:
        """The free rival of least FID; None until all that may be it have rows, and the guide."""
        made = self.cells.get(model, {}).get(place, {})
        wanted = {"cfg", "guided", *contenders(self.choices.get("base", {}).get(place, {}))}
        if not wanted <= made.keys():
            return None
        free = [method for method in FREE if method in made]
        return min(free, key=lambda method: made[method]["scores"][judge]["fid"]["value"])

    def own(self, model: str, place: str) -> str:
        """The guide alone or with exact steps, by FID of the images that settings are chosen by."""
        tried = self.choices.get(model, {}).get(place, {})
        made = self.cells.get(model, {}).get(place, {})
        ways = [way for way in GUIDES if GUIDES[way] == "guided" and way in made and way in tried]
        return min(ways, key=lambda way: min(tried[way]["tried"].values()), default="guided")

    def ratio(
        self, model: str, place: str, judge: str = "world", method: str | None = None
    ) -> Estimate | None:
        """The FID of a method with the guide over that of the judge's best free rival.

        Args:
            model: by name.
            place: number of forwards.
            judge: "world" or "foreign".
            method: default: :meth:`own`.
        """
        rival, method = self.rival(model, place, judge), method or self.own(model, place)
        if rival is None:
            return None
        own, theirs = (self.score(model, place, m, "fid", judge) for m in (method, rival))
        return own.with_other(theirs, lambda a, b: a / b) if own and theirs else None

    def clip_lead(self, model: str, place: str, method: str | None = None) -> Estimate | None:
        """The CLIP score of a method with the guide less that of the rival of least FID."""
        rival, method = self.rival(model, place), method or self.own(model, place)
        if rival is None:
            return None
        own, theirs = (self.score(model, place, m, "clip_score", "world") for m in (method, rival))
        return own.with_other(theirs, lambda a, b: a - b) if own and theirs else None

    def over_trained(
        self, model: str, place: str, rival: str, judge: str = "world"
    ) -> Estimate | None:
        """The FID of this guide's form over that of a rival; None if not trained alike, or since.

        Rows are of the weights that they were made with.
        """
        cells, alike = self.cells.get(model, {}).get(place, {}), set()
        for method in ("ours", rival):
            about = self.trained.get(method)
            if about is None or cells.get(method, {}).get("guide", "") != about["digest"]:
                return None
            alike.add((about["base_hash"], about["settings"]))
        if len(alike) > 1:
            return None
        own, theirs = (self.score(model, place, m, "fid", judge) for m in ("ours", rival))
        return own.with_other(theirs, lambda a, b: a / b) if own and theirs else None

    def clip_over_trained(self, model: str, place: str, rival: str) -> float:
        """The CLIP score of this guide's form less that of a rival, in points."""
        own, theirs = (self.score(model, place, m, "clip_score", "world") for m in ("ours", rival))
        return own.value - theirs.value if own and theirs else math.nan

    def over_cfg100(self, model: str, place: str) -> Estimate | None:
        """The guide's FID over that of CFG with 50 DDIM steps at its best scale."""
        own = self.score(model, place, self.own(model, place), "fid", "world")
        theirs = self.score(model, "100", "cfg", "fid", "world")
        return own.with_other(theirs, lambda a, b: a / b) if own and theirs else None

    def clip_over_cfg100(self, model: str, place: str) -> float:
        """The guide's CLIP score less that CFG's, in points."""
        own = self.score(model, place, self.own(model, place), "clip_score", "world")
        theirs = self.score(model, "100", "cfg", "clip_score", "world")
        return own.value - theirs.value if own and theirs else math.nan

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


def estimates_of(
    results: Mapping[str, Any], base: Sequence[str], tuned: Sequence[str]
) -> dict[str, Estimate | None]:
    """The keys of `--json` over these models; None where cells are not made yet."""
    models = [*base, *tuned]
    found = Found(results, models)
    keys: dict[str, Estimate | None] = {}
    for at in COSTS:
        if base:
            keys[f"fid_{at}_base"] = found.ratio("base", at)
            keys[f"clip_{at}_base"] = found.clip_lead("base", at)
        keys[f"fid_{at}_mean"] = mean([found.ratio(name, at) for name in tuned])
        keys[f"foreign_fid_{at}_mean"] = mean([found.ratio(name, at, "foreign") for name in tuned])
    keys["fid_worst"] = worst([found.ratio(name, at) for name in models for at in COSTS])
    for at in ("8", "4", "2"):
        over = [found.over_cfg100(name, at) for name in models]
        keys[f"fid_{at}_over_cfg100"] = worst(over)
    gains = [found.clip_gain(name, f"equal {n}") for name in models for n in (16, 8)]
    keys["clip_gain_worst"] = worst(gains, least=True)
    return keys


def over_trained(
    results: Mapping[str, Any], models: Sequence[str]
) -> dict[str, dict[str, Estimate | None]]:
    """By rival and cost: this guide's form over it, the mean over models; None: not made yet."""
    found = Found(results, models)
    complete = len(found.models) == len(models)
    return {
        rival: {
            at: mean([found.over_trained(name, at, rival) for name in models if complete])
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
    numbers["behind_trained_rivals"] = places = behind(results, tuned)
    unknown = ["behind_trained_rivals"] if any(NOT_MEASURED in place for place in places) else []
    intervals: dict[str, Any] = intervals_of(found)
    if any(name in results["cells"] for name in final):
        ended = estimates_of(results, [], final)
        numbers["final"] = {key: one and rounded(one.value) for key, one in ended.items()}
        intervals["final"] = intervals_of(ended)
        unknown += ["final"] if None in ended.values() else []
    else:
        numbers["final"] = None
    return {
        **numbers,
        "intervals": intervals,
        "missing": [*unknown, *(key for key, value in numbers.items() if value is None)],
        "models": sorted(results["cells"]),
    }


def as_markdown(results: Mapping[str, Any]) -> str:
    """The results as a page: a table for each model and cost."""
    setting = results["setting"]
    lines = [
        "# The guide at equal cost",
        "",
        f"{setting['num_images']} images a row (PSNR: {setting['num_close']}); each method's "
        f"layout, solver and scale chosen by FID of {setting['num_choosing']} images of other "
        "seeds. "
        f"World's judge: {setting['judge']}; the foreign one: {setting['foreign_judge']}. In "
        "brackets 95 % intervals, by resampling images, which makes an FID's own several times "
        "too wide: rows of one table are resampled alike, and a ratio of two is surer. PSNR is to "
        "CFG of 64 DDIM steps at the row's own scale; ms is processor time of one thread, "
        "denoising alone, beside other jobs: compare rows of one precision. FID is biased "
        "upwards by few images: compare within a table. The last column is the run that made "
        "a row, [below](#runs).",
    ]
    runs = runs_of(results.get("records", {}))
    for model in sorted(results["cells"], key=lambda name: (name != "base", name)):
        places = results["cells"][model]
        found = Found(results, [model])
        for place in sorted(places, key=lambda p: (p.startswith("equal"), -int(p.split()[-1]))):
            words = f"{place} forwards" if place.isdigit() else f"{place.split()[1]} steps"
            of = {method: runs.get(row_name(model, place, method)) for method in places[place]}
            lines += ["", f"## {model}, {words}", "", *rows(places[place], place, of)]
            lines += compared(found, model, place)
            if place == "100":
                lines += of_other_precision(results, model)
    lines += beside_cfg100(results)
    lines += beside_trained(results)
    lines += ["", "## Runs", ""]
    lines += [f"{number}. {line}" for line, number in dict.fromkeys(runs.values())]
    return "\n".join(lines) + "\n"


class Run(NamedTuple):
    """That made rows: its record, and its number on the page."""

    line: str
    number: int


def runs_of(records: Mapping[str, Sequence[Record]]) -> dict[str, Run]:
    """The last run that made what goes by each name."""
    lines = {name: as_line(made_by[-1]) for name, made_by in records.items()}
    numbers = {line: number for number, line in enumerate(dict.fromkeys(lines.values()), 1)}
    return {name: Run(line, numbers[line]) for name, line in lines.items()}


def compared(found: Found, model: str, place: str) -> list[str]:
    """A sentence for each method with a guide: beside the best free rival at this cost."""
    lines = []
    own = found.own(model, place)
    for method in GUIDES:
        chosen = " (what is taken, by the images for choosing)" if method == own else ""
        ratio, foreign = (found.ratio(model, place, j, method) for j in ("world", "foreign"))
        lead = found.clip_lead(model, place, method)
        if place.isdigit() and ratio and foreign and lead:
            lines += [
                "",
                f"For {LABELS[method]}{chosen}: FID over the best free rival's "
                f"{with_interval(ratio, 3)}, by the foreign judge {with_interval(foreign, 3)}, "
                f"CLIP score less that rival's {with_interval(lead, 2)}.",
            ]
    return lines


def of_other_precision(results: Mapping[str, Any], model: str) -> list[str]:
    """A sentence if the guide's rows, which are held against CFG of 100 forwards, are not of its.

    Rows are kept, whatever precision they were made in.
    """
    records: Mapping[str, Sequence[Record]] = results.get("records", {})

    def precision(place: str, method: str) -> str | None:
        made_by = records.get(row_name(model, place, method))
        return made_by[-1]["precision"].split(" ")[0] if made_by else None

    own, apart = precision("100", "cfg"), []
    for place in (*COSTS, "2"):
        made_in = {one for method in GUIDES if (one := precision(place, method))}
        if others := sorted(made_in - {own}):
            apart.append(f"{place} forwards in {' and '.join(others)}")
    if own is None or not apart:
        return []
    said = f"This row is in {own}, the guide's of {', of '.join(apart)}"
    return ["", f"{said}: what compares the two compares precisions besides."]


def beside_cfg100(results: Mapping[str, Any]) -> list[str]:
    """A table of all models: the guide, as it is taken, beside CFG of 100 forwards."""
    found = Found(results, results["cells"])
    costs, final = ("8", "4", "2"), final_models()
    models = [name for name in found.models if all(found.over_cfg100(name, at) for at in costs)]
    if not models:
        return []
    lines = [
        "",
        "## Beside CFG of 100 forwards",
        "",
        "FID of the guide, in the way that is taken by the images for choosing, over that of 50 "
        "DDIM steps of CFG at their best scale, and its CLIP score less that CFG's.",
        "",
        f"| model | {' | '.join(f'{at} forwards' for at in costs)} |",
        "|---" * (1 + len(costs)) + "|",
    ]

    def line(name: str, ratios: Sequence[Estimate | None], leads: Sequence[float]) -> str:
        pairs = zip(ratios, leads, strict=True)
        words = [f"{with_interval(ratio, 3)}; {lead:+.1f}" for ratio, lead in pairs if ratio]
        return f"| {name} | {' | '.join(words)} |"

    leads = {name: [found.clip_over_cfg100(name, at) for at in costs] for name in models}
    for name in models:
        lines.append(line(name, [found.over_cfg100(name, at) for at in costs], leads[name]))
    for words, some in (
        ("mean of the development fine-tunes", [n for n in models if n not in (*final, "base")]),
        ("mean of the final models", [n for n in models if n in final]),
    ):
        if some:
            ratios = [mean([found.over_cfg100(name, at) for name in some]) for at in costs]
            lines.append(line(words, ratios, np.mean([leads[n] for n in some], axis=0).tolist()))
    return lines


def beside_trained(results: Mapping[str, Any]) -> list[str]:
    """A table of means over the fine-tunes, as far as they have rows of trained rivals."""
    about = results.get("trained", {})
    models = [
        name
        for name, places in results["cells"].items()
        if any("ours" in places.get(at, {}) for at in COSTS)
    ]
    if "ours" not in about or not models:
        return []
    own, found = about["ours"], Found(results, models)
    tuned = [name for name in models if name != "base"] or models
    lines = [
        "",
        "## Beside rivals that train",
        "",
        f"FID of this guide's form over theirs, mean of {', '.join(tuned)}: below 1 it is ahead; "
        "the same by the foreign judge, and its CLIP score less theirs; at last the FID on the "
        f"base. All have seen {own['num_images']:,} samples of the same pairs at their best "
        f"learning rate, and {own['num_images_in_a_round']:,} in each round of halving (LCM-LoRA: "
        "none); the guide of the tables above has seen more.",
        "",
        f"| rival | parameters, of the UNet's | {' | '.join(f'{at} forwards' for at in COSTS)} |",
        "|---" * (2 + len(COSTS)) + "|",
    ]
    for rival, by_cost in over_trained(results, tuned).items():
        if rival in about and any(by_cost.values()):
            cells = [beside_one(found, tuned, at, rival, by_cost.get(at)) for at in COSTS]
            share = f"{100 * about[rival]['params_ratio']:.1f} %"
            lines.append(f"| {TRAINED_LABELS[rival]} | {share} | {' | '.join(cells)} |")
    return lines


def beside_one(
    found: Found, tuned: Sequence[str], place: str, rival: str, ratio: Estimate | None
) -> str:
    """A cell of that table; empty where it is not made yet."""
    if ratio is None:
        return ""
    foreign = mean([found.over_trained(name, place, rival, "foreign") for name in tuned])
    lead = np.mean([found.clip_over_trained(name, place, rival) for name in tuned])
    words = [with_interval(ratio, 3), f"{foreign.value:.3f}" if foreign else "", f"{lead:+.1f}"]
    if base := found.over_trained("base", place, rival):
        words.append(f"base {base.value:.3f}")
    return "; ".join(words)


def rows(cells: Cells, place: str, runs: Mapping[str, Run | None]) -> list[str]:
    """The table of one model at one cost; ``runs`` by method."""
    head = ["method", "setting", "w", "forwards", "FID", "KID x1000", "CLIP score", "diversity"]
    head += ["foreign FID", "PSNR", "ms", "run"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for method in (name for name in LABELS if name in cells):
        cell = cells[method]
        setting, world = Setting.parse(cell["setting"]), cell["scores"]["world"]
        allowed = int(place) if place.isdigit() else setting.forwards
        dear = " (too dear)" if cell["forwards"] > MOST * allowed else ""
        close = cell.get("cfg64_psnr")
        words = [
            LABELS[method],
            setting.layout,
            f"{setting.scale:g}",
            f"{cell['forwards']:.2f}{dear}",
            with_interval(from_json(world["fid"]), 2),
            f"{1000 * world['kid']['value']:.2f}",
            f"{world['clip_score']['value']:.2f}",
            f"{world['diversity']['value']:.3f}",
            with_interval(from_json(cell["scores"]["foreign"]["fid"]), 1),
            f"{close['value']:.1f} dB" if close else "",
            f"{cell['cpu_ms']:.0f}",
            str(run.number) if (run := runs[method]) else "",
        ]
        lines.append(f"| {' | '.join(words)} |")
    return lines


def with_interval(found: Estimate, digits: int) -> str:
    """A value with its interval in brackets."""
    low, high = found.interval
    return f"{found.value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
