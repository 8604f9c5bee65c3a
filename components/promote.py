"""Stage promote: a candidate guide against the champion, by the rules in params.yaml.

Moves the alias `champion` of the registered model and keeps in `previous` who had it, or refuses
with the reasons and exit code 3. Whoever decides does so alone. Every decision is recorded in
MLflow, in the experiment `<model>-decisions`. Not part of the DVC graph: it changes the registry,
not files.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.cli import main, utf8
from components.evaluation import Evaluation
from components.params import Params
from components.paths import REPORT
from components.reevaluation import Reevaluated, reevaluate
from components.verdict import Check, checks, clean, not_compared, unusable
from components.verdict_text import as_lines, as_rows, as_table
from pnp_core.files import check_writable, read_json, write_text

if TYPE_CHECKING:
    from components.tracking import Decision, Registry

REFUSED = 3


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to decide.

    Attributes:
        dry_run: say what would be decided; record and change nothing.
        force: promote whatever the rules say.
        reason: why; needed to force, and kept with every decision.
        rollback: make the one champion that was it before.
        reevaluate: judge candidate and champion anew, by the present params.yaml.
        allow_dirty: the candidate may have been made by code that no commit has.
        page: a file for what was decided, in Markdown.

    Raises ValueError for options that contradict one another.
    """

    dry_run: bool = False
    force: bool = False
    reason: str = ""
    rollback: bool = False
    reevaluate: bool = False
    allow_dirty: bool = False
    page: Path | None = None

    def __post_init__(self) -> None:
        if self.force and not self.reason.strip():
            raise ValueError("--force needs --reason: why the rules do not count")
        if self.rollback and (self.force or self.reevaluate):
            raise ValueError("--rollback compares nothing: leave out --force and --reevaluate")


DEFAULT = Options()


def run(params: Params, version: str | None = None, options: Options = DEFAULT) -> None:
    """Promote `version`, by default the newest. Exits with code 3 if it is refused.

    Raises ValueError if there is no such version or no one to go back to, TrackingError if MLflow
    can't tell or fails; nothing is changed then.
    """
    from components.tracking import Registry

    if options.rollback and version:
        raise ValueError("--rollback goes to the previous champion: leave out --version")
    if options.page:  # one that can't be written is told before anything is decided
        options.page.parent.mkdir(parents=True, exist_ok=True)
        if options.page.is_dir():
            raise ValueError(f"--page {options.page}: it is a folder; name a file")
        check_writable(options.page.parent)
    registry = Registry(params.tracking, params.register_.name)
    candidate = None if options.rollback else version or registry.newest()
    if candidate is None and not options.rollback:
        raise ValueError(nothing_to_promote(registry))
    anew: dict[str, Reevaluated] = {}
    if options.reevaluate:  # before anybody has to wait for it
        champion = registry.champion()
        for each in (candidate, champion) if candidate != champion else ():
            if each is not None:
                with registry.folder(each) as bundle:
                    anew[each] = reevaluate(registry.name, each, bundle, params)

    case = Case(params, registry, options, anew)
    if options.dry_run:
        decision = case.decide(candidate)
    else:
        with registry.deciding(wait_s=60 * params.cluster.wait_minutes):
            decision = case.decide(candidate)
            if decision:
                registry.decide(decision, files=[each.file for each in anew.values()])
    if decision is None:
        registry.settle()
        line = f"{registry.name} version {candidate} is the champion already"
        write_page(options, f"# Champion already\n\n{line}.\n")
        print(line)
    else:
        write_page(options, decision.text)
        if case.not_compared:
            print(case.not_compared)
        conclude(registry.name, decision, case.checks if options.dry_run else None)


class Case:
    """What is decided on."""

    def __init__(
        self,
        params: Params,
        registry: "Registry",
        options: Options,
        anew: Mapping[str, Reevaluated],
    ) -> None:
        self._params, self._registry, self._options, self._anew = params, registry, options, anew
        self.checks: list[Check] = []
        self.not_compared = ""

    def decide(self, candidate: str | None) -> "Decision | None":
        """What becomes of the candidate; without one, of the previous champion.

        None if the candidate is champion. Raises ValueError if there is nobody to go back to.
        """
        from components import tracking

        champion = self._registry.champion()
        if candidate is None:
            return self._roll_back(champion)
        if candidate == champion:
            return None
        commit, self.checks = "unknown", self._gone(candidate) if champion is None else []
        try:
            summary = self._registry.summary(candidate)
        except tracking.UnjudgedError as error:
            self.checks.append(unusable(f"version {candidate}", str(error)))
        else:
            commit = str(summary["lineage"].get("git_commit", "unknown"))
            self.checks.append(clean(commit, allow_dirty=self._options.allow_dirty))
            self.checks += self._judge(candidate, summary, champion)
        reasons = [str(check) for check in self.checks if not check.passed]
        is_forced = bool(reasons) and self._options.force
        refused_or_not = tracking.REFUSED if reasons else tracking.PROMOTED
        decision = tracking.Decision(
            verdict=tracking.FORCED if is_forced else refused_or_not,
            candidate=candidate,
            champion=champion,
            why=self._options.reason,
            reasons=reasons,
            rules=limits(self.checks),
            values=values(self.checks),
            table=as_rows(self.checks),
            commit=commit,
        )
        text = as_page(self._registry.name, decision, self.checks, self.not_compared)
        return replace(decision, text=text)

    def _roll_back(self, champion: str | None) -> "Decision":
        from components.tracking import PREVIOUS, ROLLED_BACK, Decision

        previous = self._registry.previous()
        if previous is None or previous == champion:
            raise ValueError(
                f"{self._registry.name} has no previous champion to go back to: the alias "
                f"{PREVIOUS!r} {'is not set' if previous is None else 'names the champion'}. "
                "See --log for who was champion; --version N --force --reason TEXT promotes any"
            )
        self._registry.check_files(previous)
        decision = Decision(
            verdict=ROLLED_BACK, candidate=previous, champion=champion, why=self._options.reason
        )
        return replace(decision, text=as_page(self._registry.name, decision, []))

    def _gone(self, candidate: str) -> list[Check]:
        """Where the registry has no champion and the log knows of another: who to compare with?"""
        from components import tracking

        made = (tracking.PROMOTED, tracking.FORCED, tracking.ROLLED_BACK)
        moves = [d for d in self._registry.decisions() if d.is_done and d.verdict in made]
        if not moves or moves[-1].candidate == candidate:
            return []
        why = (
            "by the log it is champion, and the registry has none: it was deleted, or its alias "
            "was. --rollback goes to the champion before it; --force --reason TEXT compares with "
            "nobody"
        )
        return [unusable(f"champion {moves[-1].candidate}", why)]

    def _judge(
        self, candidate: str, summary: Mapping[str, Any], champion: str | None
    ) -> list[Check]:
        """The rules. What can't be compared with passes none; what can't be read is an error."""
        from components.tracking import LostError

        judged = self._anew.keys()
        if self._options.reevaluate and not {candidate, champion or candidate} <= judged:
            raise ValueError(
                f"the champion is {champion or 'none'} now, and was another when they were judged "
                "anew: run the same command again; what was sampled is kept"
            )
        try:
            mine = self._evaluations(candidate, summary)
        except ValueError as error:
            return [unusable(f"version {candidate}", str(error))]
        found, theirs = [], None
        if champion is not None:
            try:
                # One that was made elsewhere has none, and needs none when it is judged anew.
                kept = {} if champion in self._anew else self._registry.summary(champion)
                theirs = self._evaluations(champion, kept)
            except LostError as error:
                if not self._options.force:
                    raise
                found.append(unusable(f"champion {champion}", str(error)))
            except ValueError as error:
                found.append(unusable(f"champion {champion}", str(error)))
        expected = self._params.evaluate.extent.num_steps
        models = list(self._params.models)
        rules = self._params.promote
        self.not_compared = not_compared(mine, theirs, rules)
        return found + checks(mine, theirs, rules, models=models, num_steps=expected)

    def _evaluations(self, version: str, summary: Mapping[str, Any]) -> Mapping[str, Evaluation]:
        """What a version was measured to be, by model. Raises ValueError if it does not say."""
        if version in self._anew:
            return self._anew[version].evaluations
        where = f"summary.json of {self._registry.name} version {version}"
        return {
            model: Evaluation.from_json(found, where=f"{model} in {where}")
            for model, found in summary["models"].items()
        }


def conclude(name: str, decision: "Decision", dry: Sequence[Check] | None) -> None:
    """Say what was decided, of a dry run with every rule. Exits with code 3 for a refusal."""
    from components import tracking

    for line in as_lines(dry or []):
        print(line)
    if dry is not None:
        print("dry run, nothing is changed:")
    if decision.verdict == tracking.REFUSED:
        print(f"refused: {name} version {decision.candidate}", file=sys.stderr)
        for reason in decision.reasons:
            print(f"  - {reason}", file=sys.stderr)
        sys.exit(REFUSED)
    print(
        f"{name} version {decision.candidate} {'would be' if dry is not None else 'is now'} "
        f"champion ({decision.verdict}), before: {decision.champion or 'none'}"
    )


def as_page(name: str, decision: "Decision", found: Sequence[Check], not_compared: str = "") -> str:
    """What was decided, in Markdown."""
    number = len(decision.reasons)
    rules = f"{number} of {len(found)} rules do not hold" if number else "every rule holds"
    before = f"version {decision.champion}" if decision.champion else "none"
    said = {
        "promoted": f"It becomes champion: {rules}. Champion before: {before}.",
        "forced": f"It becomes champion although {rules}. Champion before: {before}.",
        "refused": f"It does not become champion: {rules}. The champion stays: {before}.",
        "rolled back": f"It is champion again. The one before, {before}, is now `previous`.",
    }[decision.verdict]
    said = f"{said} {not_compared}".strip()
    parts = [f"# {name} version {decision.candidate}: {decision.verdict}", said]
    if decision.why:
        parts.append(f"Reason given: {decision.why}")
    if found:
        parts += [as_table(found), f"Made by commit `{decision.commit}`."]
    return "\n\n".join(parts) + "\n"


def write_page(options: Options, text: str) -> None:
    """Write the page that the options ask for."""
    if options.page:
        write_text(options.page, text)


def print_log(params: Params) -> None:
    """Print every decision, the oldest first: when, who, what, and why."""
    from components.tracking import Registry

    registry = Registry(params.tracking, params.register_.name)
    decisions = registry.decisions()
    if not decisions:
        print(f"no decision yet about {registry.name} in MLflow at {registry.store.name}")
    for decision in decisions:
        when = decision.when.astimezone().strftime("%Y-%m-%d %H:%M:%S")
        broke_off = "" if decision.is_done else " (broke off: see who is champion)"
        commit = "" if decision.commit == "unknown" else f", commit {decision.commit}"
        print(
            f"{when}  version {decision.candidate} {decision.verdict}{broke_off}, champion before: "
            f"{decision.champion or 'none'}, by {decision.who}{commit}"
        )
        if decision.why:
            print(f"  reason given: {decision.why}")
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


def limits(found: Sequence[Check]) -> dict[str, float]:
    """The rules about numbers, by their keys in params.yaml and, where that is, the step count."""
    return {_key(check): check.limit for check in found if check.limit is not None}


def values(found: Sequence[Check]) -> dict[str, float]:
    """The numbers that the rules were held against, by `<who>.<model>.<rule>`."""
    numbers = {}
    for check in found:
        if check.value is not None:
            numbers[f"candidate.{check.model}.{_key(check)}"] = check.value
        if check.champion is not None:
            numbers[f"champion.{check.model}.{_key(check)}"] = check.champion
    return numbers


def _key(check: Check) -> str:
    return check.rule if check.num_steps is None else f"{check.rule}.{check.num_steps}"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of a decision, for this command line and the flow's."""
    parser.add_argument(
        "--version", type=version, help="of the registered guide; default: the newest"
    )
    flag = partial(parser.add_argument, action="store_true")
    flag("--dry-run", help="say what would be decided, and change nothing")
    flag("--reevaluate", help="judge candidate and champion anew, by the present params.yaml")
    flag("--allow-dirty", help="also what was made by code that is in no commit")
    flag("--force", help="promote whatever the rules say; needs --reason")
    flag("--rollback", help="make the one champion that was it before")
    said = "why; kept with the decision"
    parser.add_argument("--reason", type=utf8, default="", metavar="TEXT", help=said)


def version(text: str) -> int:
    """A number that a registry can be asked for."""
    number = int(text)
    if not 1 <= number < 2**63:
        raise argparse.ArgumentTypeError(f"no version has the number {text}")
    return number


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m components.promote", description="Make a registered guide the champion."
    )
    add_options(parser)
    parser.add_argument("--page", type=Path, help="write what was decided there, in Markdown")
    parser.add_argument(
        "--log", action="store_true", help="show every decision, and decide nothing"
    )
    return parser.parse_args()


def from_command_line(params: Params, arguments: argparse.Namespace) -> None:
    """Do what the command line asks for. Raises as `run` and `Options` do."""
    given = vars(arguments)
    if given.pop("log"):
        print_log(params)
        return
    version = given.pop("version")
    run(params, None if version is None else str(version), Options(**given))


if __name__ == "__main__":
    main(partial(from_command_line, arguments=parsed()), reads_inputs=False)
