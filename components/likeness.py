"""Whether evaluations are such that rules can be held against them, and like against like."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

from components.evaluation import Estimate, Evaluation
from components.methods import METHODS
from components.rules import Promote

# An interval of fewer replicates says nothing of its ends.
LEAST_REPLICATES = 40
NO_INTERVAL = f"has no interval of {LEAST_REPLICATES} replicates that differ"
# What a number can be at all: a step takes some arithmetic, a CLIP score is 100 times a cosine.
POSSIBLE = {
    "guidance_fvu": (0.0, math.inf),
    "flops_ratio": (1e-3, math.inf),
    "fid": (1e-9, math.inf),  # 0 is of the reference images themselves
    "clip_score": (0.0, 100.0),
    "diversity": (0.0, 2.0),
}
# What an evaluation says that it is of, and what that is called in a sentence.
NAMES = {
    "base_hash": "the base",
    "model_hash": "the model's weights",
    "reference_hash": "the reference images",
    "data_hash": "the data",
    "tasks_hash": "prompts and seeds",
    "judges_hash": "the judges",
    "num_images": "the number of images",
    "guidance_scale": "the guidance scale",
    "strength": "the guide's strength",
    "trigger": "the trigger words",
    "clip_skip": "clip_skip",
    "fvu_steps": "the number of steps that guidance_fvu is measured along",
    "timestep_spacing": "the timestep spacing",
    "precision": "the precision",
    "teacher": "the teacher's rule",
    "measured_by": "the version of the measuring code",
}
# What it is of, whatever it says.
SEEN = {
    "judge": "the judge",
    "images": "the number of images",
    "scale": "the guidance scale",
}
PLURAL = ("model_hash", "reference_hash", "tasks_hash", "judges_hash", "trigger")
# All models of a guide's evaluation have the same of these.
OF_ALL_MODELS = (
    *("base_hash", "data_hash", "judges_hash", "timestep_spacing", "precision", "teacher"),
    "measured_by",
)


def missing(evaluation: Evaluation, rules: Promote, num_steps: Sequence[int] = ()) -> list[str]:
    """What an evaluation lacks for the rules to be held against it, in words; empty: nothing.

    Args:
        evaluation: of one model.
        rules: of params.yaml.
        num_steps: at which it must have been evaluated, beside those that the rules name.
    """
    found = []
    if evaluation.num_images < rules.min_images:
        found.append(
            f"{evaluation.num_images} images are too few to decide on, promote.min_images is "
            f"{rules.min_images}"
        )
    if "flops_ratio" not in evaluation.cost:
        found.append("flops_ratio was not measured, and promote has a rule for it")
    if _replicates(evaluation.guidance_fvu) < LEAST_REPLICATES:
        found.append(f"guidance_fvu {NO_INTERVAL}")
    at = {c.num_steps for c in evaluation.cells if c.method == "guided"}
    at |= {*num_steps, *rules.ruled_steps}
    if not at:
        found.append("no image of the guide was judged")
    lacks: dict[str, list[int]] = {}
    for steps in sorted(at, reverse=True):
        for what in _lacking(evaluation, rules, steps):
            lacks.setdefault(what, []).append(steps)
    for what, counts in lacks.items():
        found.append(f"at {' and '.join(map(str, counts))} steps {what}")
    return found


def oddities(evaluation: Evaluation) -> list[str]:
    """What no evaluation is, in words: it was edited, or measured wrongly; empty: nothing."""
    said = evaluation.identity
    found = [f"it does not say {words}" for name, words in NAMES.items() if name not in said]
    estimates = [("guidance_fvu", evaluation.guidance_fvu)]
    estimates += [(f"negative.{name}", share) for name, share in evaluation.negative.items()]
    settings: Counter[tuple[object, ...]] = Counter()
    for cell in evaluation.cells:
        where = f" of {METHODS.get(cell.method, cell.method)} at {cell.num_steps} steps"
        estimates += [(f"{name}{where}", score) for name, score in cell.scores.items()]
        settings[where, cell.solver, cell.guidance_scale, cell.judge] += 1
    numbers = [*evaluation.cost.items(), *((name, each.value) for name, each in estimates)]
    for name, value in dict.fromkeys(numbers):
        low, high = POSSIBLE.get(name.split()[0], (-math.inf, math.inf))
        if value < low or value > high:
            found.append(f"{name} is {value:g}, which it can't be")
    few = {name: n for name, each in estimates if (n := len(each.replicates)) < LEAST_REPLICATES}
    if few:
        name, number = next(iter(few.items()))
        found.append(
            f"{len(few)} of its numbers have fewer than {LEAST_REPLICATES} replicates to tell an "
            f"interval by, such as {name} with {number}: evaluate again"
        )
    twice = dict.fromkeys(where for (where, *_), number in settings.items() if number > 1)
    return found + [f"there are two results{where}" for where in twice]


def differences(mine: Evaluation, theirs: Evaluation) -> list[str]:
    """In what two evaluations of a model differ that must be the same, in words; empty: nothing."""
    own, other = _identity(mine), _identity(theirs)
    found = []
    for name in dict.fromkeys([*other, *own]):
        a, b = own.get(name), other.get(name)
        if a is not None and a == b:
            continue
        a, b = ("none" if value == "" else value for value in (a, b))
        values = "" if name.endswith("_hash") else f": {a}, and {b} for the champion"
        differ = "differ" if name in PLURAL else "differs"
        found.append(f"{(NAMES | SEEN).get(name, name)} {differ}{values}")
    return list(dict.fromkeys(found)) or list(_other_baselines(mine, theirs))


def unlike(evaluations: Mapping[str, Evaluation]) -> list[str]:
    """In what the models of one guide's evaluation differ that must not, in words."""
    found = []
    for first, model in pairwise(evaluations):
        one, other = (evaluations[name].identity for name in (first, model))
        apart = [NAMES[name] for name in OF_ALL_MODELS if one.get(name) != other.get(name)]
        found += [f"{first} and {model} differ in {words}" for words in apart]
    return found


def has(evaluation: Evaluation, score: str, num_steps: int) -> bool:
    """Whether a score was measured, with an interval of as many replicates, by every method."""
    found = _by_methods(evaluation, score, num_steps)
    is_paired = len({len(each.replicates) for each in found}) == 1
    return (
        len(found) == len(METHODS)
        and is_paired
        and min(map(_replicates, found)) >= LEAST_REPLICATES
    )


def _lacking(evaluation: Evaluation, rules: Promote, num_steps: int) -> Iterator[str]:
    """What is missing at a number of steps."""
    if num_steps not in evaluation.num_steps:
        yield f"it was not evaluated by all of {', '.join(METHODS.values())}"
        return
    for score in rules.at(num_steps):
        if not has(evaluation, score, num_steps):
            is_there = len(_by_methods(evaluation, score, num_steps)) == len(METHODS)
            what = NO_INTERVAL if is_there else "was not measured"
            yield f"{score} {what}, and promote has a rule for it"


def _by_methods(evaluation: Evaluation, score: str, num_steps: int) -> list[Estimate]:
    """A score by each of the methods that have it."""
    cells = [evaluation.cell(method, num_steps) for method in METHODS]
    return [cell.scores[score] for cell in cells if cell and score in cell.scores]


def _other_baselines(mine: Evaluation, theirs: Evaluation) -> Iterator[str]:
    """Where CFG or no guidance came out otherwise than beside the champion, beyond its noise.

    They are the same images by the same judge, so that rounding alone tells them apart.
    """
    for num_steps in mine.num_steps:
        for method in ("unguided", "cfg"):
            own, other = (each.cell(method, num_steps) for each in (mine, theirs))
            if own is None or other is None:
                continue
            for score in sorted(own.scores.keys() & other.scores.keys()):
                value, known = own.scores[score].value, other.scores[score]
                low, high = known.interval
                if value < low or value > high:
                    yield (
                        f"{score} of {METHODS[method]} at {num_steps} steps is {value:.3g}, and "
                        f"{known.value:.3g} for the champion, of what should be the same images"
                    )


def _identity(evaluation: Evaluation) -> dict[str, str | int | float]:
    """What it says that it is of, and what it is of: neither may differ."""
    return {
        **evaluation.identity,
        "judge": ", ".join(evaluation.judges[:1]),
        "images": evaluation.num_images,
        "scale": evaluation.guidance_scale,
    }


def _replicates(estimate: Estimate) -> int:
    """How many replicates an interval is of; those that say the same are one."""
    return len(set(estimate.replicates))
