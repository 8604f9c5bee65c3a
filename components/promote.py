"""Stage promote: a candidate guide against the champion, by the rules in params.yaml.

Moves the alias `champion` of the registered model, or refuses with the reasons and exit code 3.
Not part of the DVC graph: it changes the registry, not files.
"""

import argparse
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

from components.cli import main
from components.params import Params, Promote
from pnp_core.files import read_json

REFUSED = 3


def run(params: Params, version: str | None = None) -> None:
    """Promote `version`, by default the newest. Exits with code 3 if it is refused.

    Raises ValueError if there is no such version.
    """
    from components.tracking import CHAMPION, Registry

    registry = Registry(params.tracking, params.register_.name)
    candidate = version or registry.newest()
    if candidate is None:
        raise ValueError(f"{registry.name} has no version yet: run the stage register first")
    champion = registry.champion()
    if candidate == champion:
        print(f"{registry.name} version {candidate} is the {CHAMPION} already")
        return
    reasons = objections(
        read_json(registry.folder(candidate) / "summary.json")["models"],
        read_json(registry.folder(champion) / "summary.json")["models"] if champion else {},
        params.promote,
    )
    if reasons:
        registry.note(candidate, "promotion", "refused: " + "; ".join(reasons))
        print(f"refused: {registry.name} version {candidate}", file=sys.stderr)
        for reason in reasons:
            print(f"  - {reason}", file=sys.stderr)
        sys.exit(REFUSED)
    registry.crown(candidate)
    registry.note(candidate, "promotion", f"promoted over {champion or 'nothing'}")
    print(f"{registry.name} version {candidate} is now {CHAMPION}, before: {champion or 'none'}")


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
    arguments = parser.parse_args()
    main(partial(run, version=arguments.version))
