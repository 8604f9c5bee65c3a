"""Stage promote: a candidate guide against the champion, by the rules in params.yaml.

Moves the alias `champion` of the registered model, or refuses with the reasons and exit code 3.
Every decision is recorded in MLflow, in the experiment `<model>-decisions`. Not part of the DVC
graph: it changes the registry, not files.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from components.cli import main
from components.evaluation import Evaluation
from components.params import Params
from components.paths import REPORT
from components.verdict import Check, checks
from pnp_core.files import read_json

if TYPE_CHECKING:
    from components.tracking import Registry

REFUSED = 3


def run(params: Params, version: str | None = None) -> None:
    """Promote `version`, by default the newest. Exits with code 3 if it is refused.

    Raises ValueError if there is no such version, TrackingError if MLflow can't tell or fails;
    nothing is promoted then.
    """
    from components.tracking import CHAMPION, Decision, Registry

    registry = Registry(params.tracking, params.register_.name)
    candidate = version or registry.newest()
    if candidate is None:
        raise ValueError(nothing_to_promote(registry))
    champion = registry.champion()
    if candidate == champion:
        registry.settle()
        print(f"{registry.name} version {candidate} is the {CHAMPION} already")
        return
    summary = registry.summary(candidate)
    theirs = registry.summary(champion) if champion else None
    found = checks(
        evaluations(registry, candidate, summary),
        evaluations(registry, champion, theirs) if champion and theirs else None,
        params.promote,
        models=list(params.models),
        num_steps=params.evaluate.num_steps,
    )
    reasons = [str(check) for check in found if not check.passed]
    registry.decide(
        Decision(
            verdict="refused" if reasons else "promoted",
            candidate=candidate,
            champion=champion,
            reasons=reasons,
            rules=limits(found),
            values=values(found),
            commit=summary.get("lineage", {}).get("git_commit", "unknown"),
        )
    )
    if reasons:
        print(f"refused: {registry.name} version {candidate}", file=sys.stderr)
        for reason in reasons:
            print(f"  - {reason}", file=sys.stderr)
        sys.exit(REFUSED)
    print(f"{registry.name} version {candidate} is now {CHAMPION}, before: {champion or 'none'}")


def print_log(params: Params) -> None:
    """Print every decision, the oldest first: when, who, what, and why."""
    from components.tracking import Registry

    registry = Registry(params.tracking, params.register_.name)
    for decision in registry.decisions():
        when = decision.when.astimezone().strftime("%Y-%m-%d %H:%M:%S")
        broke_off = "" if decision.is_done else " (broke off: see who is champion)"
        print(
            f"{when}  version {decision.candidate} {decision.verdict}{broke_off}, champion before: "
            f"{decision.champion or 'none'}, by {decision.who}, commit {decision.commit}"
        )
        for reason in decision.reasons:
            print(f"  - {reason}")


def nothing_to_promote(registry: "Registry") -> str:
    """Why there is no version: none was made, or what was made is not there any more."""
    report = REPORT / "summary.json"
    registered = read_json(report).get("registered", {}) if report.exists() else {}
    if registered.get("name") != registry.name:
        return f"{registry.name} has no version yet: run the stage register first"
    return (
        f"{REPORT} says that {registry.name} version {registered.get('version')} was registered, "
        f"but MLflow at {registry.store.name} has no version of it: it is lost there, or was "
        "registered in another store. Name that store as tracking.uri, or register again: "
        "dvc repro --force --single-item register"
    )


def evaluations(
    registry: "Registry", version: str, summary: Mapping[str, Any]
) -> dict[str, Evaluation]:
    """What a version was measured to be, by model.

    Raises ValueError if it was evaluated by another version of the code.
    """
    where = f"summary.json of {registry.name} version {version}"
    return {
        model: Evaluation.from_json(found, where=where)
        for model, found in summary["models"].items()
    }


def limits(found: Sequence[Check]) -> dict[str, float]:
    """The rules about numbers, by their keys in params.yaml and, where that is, the step count."""
    return {name(check): check.limit for check in found if check.limit is not None}


def values(found: Sequence[Check]) -> dict[str, float]:
    """The numbers that the rules were held against, by `<who>.<model>.<rule>`."""
    numbers = {}
    for check in found:
        if check.value is not None:
            numbers[f"candidate.{check.model}.{name(check)}"] = check.value
        if check.champion is not None:
            numbers[f"champion.{check.model}.{name(check)}"] = check.champion
    return numbers


def name(check: Check) -> str:
    """The rule, and at how many steps."""
    return check.rule if check.num_steps is None else f"{check.rule}.{check.num_steps}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m components.promote")
    parser.add_argument("--version", help="of the registered guide; default: the newest")
    parser.add_argument(
        "--log", action="store_true", help="show every decision, and decide nothing"
    )
    arguments = parser.parse_args()
    main(print_log if arguments.log else partial(run, version=arguments.version))
