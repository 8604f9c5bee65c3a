"""Stage promote: a candidate guide against the champion, by the rules in params.yaml.

Moves the alias `champion` of the registered model, or refuses with the reasons and exit code 3.
Every decision is recorded in MLflow, in the experiment `<model>-decisions`. Not part of the DVC
graph: it changes the registry, not files.
"""

import argparse
import sys
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from components.cli import main
from components.params import Params, Promote
from components.paths import REPORT
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
    theirs = registry.summary(champion)["models"] if champion else {}
    try:
        reasons = objections(summary["models"], theirs, params.promote)
        values = compared("candidate", summary["models"]) | compared("champion", theirs)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"the results of {registry.name} version {candidate} or {champion} have no {error}: "
            "evaluate and register again with this code"
        ) from None
    registry.decide(
        Decision(
            verdict="refused" if reasons else "promoted",
            candidate=candidate,
            champion=champion,
            reasons=reasons,
            rules=params.promote.model_dump(),
            values=values,
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


def compared(who: str, models: Mapping[str, Any]) -> dict[str, float]:
    """The numbers that the rules are about, by `<who>.<model>.<what>`."""
    values = {}
    for name, metrics in models.items():
        values[f"{who}.{name}.guidance_fvu"] = metrics["guidance_fvu"]
        values[f"{who}.{name}.time_ratio"] = metrics["cost"]["time_ratio"]
        for num_steps, scores in metrics["steps"].items():
            values[f"{who}.{name}.fid_ratio.{num_steps}"] = scores["fid_ratio"]
    return values


def objections(
    candidate: Mapping[str, Any], champion: Mapping[str, Any], rules: Promote
) -> list[str]:
    """Why the candidate must not become champion; empty if it may.

    Both are the results by model name. A model or step count that the champion was not evaluated
    on is held to the absolute rules only.
    """
    reasons = [f"{name}: not evaluated" for name in champion if name not in candidate]
    for name, metrics in candidate.items():
        limits = {
            "guidance_fvu": (metrics["guidance_fvu"], rules.max_guidance_fvu),
            "time ratio": (metrics["cost"]["time_ratio"], rules.max_time_ratio),
        }
        for num_steps, scores in metrics["steps"].items():
            limits[f"FID ratio at {num_steps} steps"] = scores["fid_ratio"], rules.max_fid_ratio
        for what, (value, limit) in limits.items():
            if not value <= limit:
                reasons.append(f"{name}: {what} is {value:.3f}, the rule allows {limit:g}")
        if name not in champion:
            continue
        before = champion[name]
        pairs = {"guidance_fvu": (metrics["guidance_fvu"], before["guidance_fvu"])}
        for num_steps in metrics["steps"].keys() & before["steps"].keys():
            pairs[f"FID ratio at {num_steps} steps"] = (
                metrics["steps"][num_steps]["fid_ratio"],
                before["steps"][num_steps]["fid_ratio"],
            )
        for what, (value, old) in sorted(pairs.items()):
            if not value <= old * (1 + rules.max_worse_than_champion):
                reasons.append(
                    f"{name}: {what} is {value:.3f}, the champion's is {old:.3f}, and the rule "
                    f"allows {rules.max_worse_than_champion:.0%} worse"
                )
    return reasons


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m components.promote")
    parser.add_argument("--version", help="of the registered guide; default: the newest")
    parser.add_argument(
        "--log", action="store_true", help="show every decision, and decide nothing"
    )
    arguments = parser.parse_args()
    main(print_log if arguments.log else partial(run, version=arguments.version))
