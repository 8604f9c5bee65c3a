"""The table as a page, benchmarks/results/frontier.md."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.frontier.final import final_models
from benchmarks.frontier.judges import from_json
from benchmarks.frontier.settings import (
    FORMER,
    GUIDES,
    LABELS,
    MOST,
    NUM_LARGE,
    OWN,
    TRAINED_LABELS,
    Setting,
    forwards_of,
    large,
    row_name,
)
from benchmarks.frontier.table import (
    COSTS,
    TRAININGS,
    Cells,
    Found,
    has_large,
    mean,
    over_trained,
    with_interval,
)
from benchmarks.record import Record, as_line
from components.evaluation import Estimate


def as_markdown(results: Mapping[str, Any]) -> str:
    """The results as a page: what they come to, then a table for each model and cost."""
    setting = results["setting"]
    lines = [
        "# The guide at equal cost",
        "",
        f"{setting['num_images']} images a row (PSNR: {setting['num_close']}), {NUM_LARGE} where "
        "a heading says so; each method's "
        f"layout, solver and scale chosen by FID of {setting['num_choosing']} images of other "
        "seeds. "
        f"World's judge: {setting['judge']}; the foreign one: {setting['foreign_judge']}. In "
        "brackets 95 % intervals, by resampling images, which makes an FID's own several times "
        "too wide: rows of one table are resampled alike, and a ratio of two is surer. PSNR is to "
        "CFG of 64 DDIM steps at the row's own scale; ms is processor time of one thread, "
        "denoising alone, beside other jobs: compare rows of one precision. FID is biased "
        "upwards by few images: compare within a table. In tables of rows the last column is the "
        "run that made one, [below](#runs).",
    ]
    lines += beside_free(results)
    lines += beside_one_another(results)
    lines += beside_cfg100(results)
    lines += trained_again(results)
    lines += beside_trained(results)
    runs = runs_of(results.get("records", {}))
    for model in sorted(results["cells"], key=lambda name: (name != "base", name)):
        places = results["cells"][model]
        found = Found(results, [model])
        for place in sorted(places, key=order_of):
            of = {method: runs.get(row_name(model, place, method)) for method in places[place]}
            lines += ["", f"## {model}, {words_of(place)}", "", *rows(places[place], place, of)]
            lines += compared(found, model, place)
            if place == "100":
                lines += of_other_precision(results, model)
    lines += ["", "## Runs", ""]
    lines += [f"{number}. {line}" for line, number in dict.fromkeys(runs.values())]
    return "\n".join(lines) + "\n"


def order_of(place: str) -> tuple[bool, int, bool]:
    """From many forwards to few, large rows after the others; then those at equal steps."""
    return place.startswith("equal"), -int(place.split()[-1]), place != forwards_of(place)


def words_of(place: str) -> str:
    """A place as a heading names it."""
    at = forwards_of(place)
    if at != place:
        return f"{at} forwards, {NUM_LARGE} images"
    return f"{at} forwards" if at.isdigit() else f"{at.split()[1]} steps"


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
    for method in (*GUIDES, *FORMER):
        chosen = " (what is taken, by the images for choosing)" if method == own else ""
        ratio, foreign = (found.ratio(model, place, j, method) for j in ("world", "foreign"))
        lead = found.clip_lead(model, place, method)
        if forwards_of(place).isdigit() and ratio and foreign and lead:
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


def beside_free(results: Mapping[str, Any]) -> list[str]:
    """A table of all models: the guide, as it is taken, beside the best free rival.

    Of large rows where all are there that a line needs.
    """
    found = Found(results, results["cells"])
    models = [name for name in found.models if any(found.ratio(name, at) for at in COSTS)]
    if not models:
        return []
    lines = [
        "",
        "## Beside the best free rival",
        "",
        "What comes out, in one table. FID of the guide, in the way that is taken by the images "
        "for choosing, over that of the rival of least FID among those that train nothing; the "
        "same by the foreign judge, over the rival that is best by it; its CLIP score less that "
        "of the first rival; how many images that is of, and the way (see below).",
        "",
    ]

    def told(some: Sequence[str], at: str) -> str:
        is_large = has_large(found, some, [at])
        place = large(at) if is_large else at
        ratio = mean([found.ratio(name, place) for name in some])
        foreign = mean([found.ratio(name, place, "foreign") for name in some])
        lead = mean([found.clip_lead(name, place) for name in some])
        if not (ratio and foreign and lead):
            return ""
        words = f"{with_interval(ratio, 3)}; {foreign.value:.3f}; {lead.value:+.1f}"
        words += f"; {NUM_LARGE if is_large else results['setting']['num_images']}"
        return words if len(some) > 1 else f"{words}, `{found.own(some[0], place)}`"

    return lines + means(found, models, COSTS, told)


def beside_one_another(results: Mapping[str, Any]) -> list[str]:
    """A table of the ways to take the guide beside CFG and one another, means over all models.

    Without the final ones. A cell is empty until all these models have rows of both.
    """
    found, final = Found(results, results["cells"]), final_models()
    models = [name for name in found.models if name not in final]

    def told(one: str, other: str, at: str) -> str:
        rows = (at, one), (at, other)
        ratio, foreign = (
            mean([found.fid_over(name, *rows, judge) for name in models])
            for judge in ("world", "foreign")
        )
        lead = mean([found.clip_less(name, *rows) for name in models])
        if not (ratio and foreign and lead):
            return ""
        return f"{with_interval(ratio, 3)}; {with_interval(foreign, 3)}; {lead.value:+.2f}"

    pairs = [(way, "cfg") for way in OWN] + [("halved", "guided"), ("mixed", "halved")]
    cells = [(pair, [told(*pair, at) for at in COSTS]) for pair in pairs]
    if not any(any(line) for _, line in cells):
        return []
    lines = [
        "",
        "## Ways to take the guide",
        "",
        f"FID over the other's, mean of {', '.join(models)}; the same by the foreign judge; CLIP "
        "score less the other's. Each at the setting that the images for choosing took. `guided` "
        f"is {LABELS['guided']}, `halved` {LABELS['halved']}, `mixed` that and CFG in some steps.",
        "",
        f"| one | over | {' | '.join(f'{at} forwards' for at in COSTS)} |",
        "|---" * (2 + len(COSTS)) + "|",
    ]
    for (one, other), line in cells:
        lines.append(f"| `{one}` | `{other}` | {' | '.join(line)} |")
    return lines


def beside_cfg100(results: Mapping[str, Any]) -> list[str]:
    """A table of all models: the guide, as it is taken, beside CFG of 100 forwards."""
    found = Found(results, results["cells"])
    costs = ("8", "4", "2")
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
    ]

    def told(some: Sequence[str], at: str) -> str:
        ratio = mean([found.over_cfg100(name, at) for name in some])
        lead = mean([found.clip_over_cfg100(name, at) for name in some])
        return f"{with_interval(ratio, 3)}; {lead.value:+.1f}" if ratio and lead else ""

    return lines + means(found, models, costs, told)


def trained_again(results: Mapping[str, Any]) -> list[str]:
    """A table of the guide's second training beside its first, of models that have rows of both."""
    found = Found(results, results["cells"])
    models = [name for name in found.models if any(found.over_first(name, at) for at in COSTS)]
    if not models:
        return []
    lines = [
        "",
        "## The guide trained a second time",
        "",
        "Today's recipe of zoo/guide with other seeds, the guide alone, each at its best setting: "
        "FID of the second over that of the first; its CLIP score less the first's; FID over the "
        "best free rival's, of the first and the second.",
        "",
    ]

    def told(some: Sequence[str], at: str) -> str:
        ratio = mean([found.over_first(name, at) for name in some])
        lead = mean([found.clip_over_first(name, at) for name in some])
        if not (ratio and lead):
            return ""
        first, second = (
            mean([found.ratio(name, at, method=method) for name in some]) for method in TRAININGS
        )
        beside = f"; {first.value:.3f}, {second.value:.3f}" if first and second else ""
        return f"{with_interval(ratio, 3)}; {lead.value:+.1f}{beside}"

    return lines + means(found, models, COSTS, told)


def means(
    found: Found,
    models: Sequence[str],
    costs: Sequence[str],
    told: Callable[[Sequence[str], str], str],
) -> list[str]:
    """A table with a line for each model, and for means where all of their models have one.

    Args:
        found: the cells.
        models: that have a line.
        costs: the columns.
        told: what a line says of some models at a cost.
    """
    final = final_models()
    tuned = [name for name in found.models if name not in (*final, "base")]
    groups = [(name, [name]) for name in models]
    groups += [
        (words, some)
        for words, some in (
            ("mean of the development fine-tunes", tuned),
            ("mean of the final models", [name for name in found.models if name in final]),
        )
        if some and set(some) <= set(models)
    ]
    lines = [f"| model | {' | '.join(f'{at} forwards' for at in costs)} |"]
    lines.append("|---" * (1 + len(costs)) + "|")
    for words, some in groups:
        lines.append(f"| {words} | {' | '.join(told(some, at) for at in costs)} |")
    return lines


def beside_trained(results: Mapping[str, Any]) -> list[str]:
    """A table of means over the fine-tunes, as far as they have rows of trained rivals."""
    about = {
        method: next(iter(trainings.values()))  # alike in what is told here
        for method, trainings in results.get("trained", {}).items()
    }
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
        "none); the guide of the other tables has seen more." + of_other_trainings(found, tuned),
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


def of_other_trainings(found: Found, tuned: Sequence[str]) -> str:
    """Which columns of that table are not of the same weights as the last; empty if all are."""
    weights = {at: {found.weights(name, at, "ours") for name in tuned} - {None} for at in COSTS}
    made = [at for at in COSTS if weights[at]]
    others = [at for at in made if weights[at] != weights[made[-1]]]
    if not others:
        return ""
    return (
        f" Weights are not kept: what stands at {' and '.join(others)} forwards is of another "
        f"training, on a cache made anew by the same settings, than what stands at {made[-1]}."
    )


def beside_one(
    found: Found, tuned: Sequence[str], place: str, rival: str, ratio: Estimate | None
) -> str:
    """A cell of that table; empty where it is not made yet."""
    if ratio is None:
        return ""
    foreign = mean([found.over_trained(name, place, rival, "foreign") for name in tuned])
    lead = mean([found.clip_over_trained(name, place, rival) for name in tuned])
    words = [with_interval(ratio, 3), f"{foreign.value:.3f}" if foreign else ""]
    words.append(f"{lead.value:+.1f}" if lead else "")
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
        at = forwards_of(place)
        allowed = int(at) if at.isdigit() else setting.forwards
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
