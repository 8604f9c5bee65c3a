"""The log of what was decided about a registered model.

A decision is a run of its own in the experiment `<model>-decisions`: nothing overwrites another.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlflow.entities import ViewType

from components.places import Tracking
from components.tracking.runs import Run
from components.tracking.store import Store

PROMOTED, REFUSED, FORCED, ROLLED_BACK = "promoted", "refused", "forced", "rolled back"
NOBODY, UNKNOWN = "none", "unknown"  # how a log says that there was no champion, and what it lost
PAGE = 1000  # decisions read in a call
MAX_TAG = 5000  # characters that MLflow's databases have room for


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What was decided about a candidate, and on what.

    Attributes:
        verdict: `promoted`, `refused`, `forced` (promoted although refused), or `rolled back`.
        candidate: the version that was judged, or gone back to.
        champion: the version that it was compared with; None if there was none.
        why: what whoever decided gave as the reason.
        reasons: the rules that did not hold.
        rules: the limits that held.
        values: the numbers that they were held against, by `candidate.…` and `champion.…`.
        table: every rule with its numbers: rows of columns.
        text: all of it in Markdown, which the record's page shows.
        commit: of the code that made the candidate.
        who: `user@host:folder`; known once it is recorded.
        when: known once it is recorded.
        is_done: False if whoever decided was stopped before the alias was seen to have moved.
    """

    verdict: str
    candidate: str
    champion: str | None
    why: str = ""
    reasons: Sequence[str] = ()
    rules: Mapping[str, float] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)
    table: Sequence[Mapping[str, Any]] = ()
    text: str = ""
    commit: str = UNKNOWN
    who: str = ""
    when: datetime = datetime.min.replace(tzinfo=UTC)
    is_done: bool = True

    @property
    def title(self) -> str:
        """In a line, of which version, and who was champion before."""
        before = self.champion or NOBODY
        return f"version {self.candidate} {self.verdict}, champion before: {before}"


@contextmanager
def record(
    store: Store, tracking: Tracking, model: str, decision: Decision, files: Sequence[Path]
) -> Iterator[None]:
    """Append the decision to the log; it is done when the block has ended without an error."""
    tags = {
        "verdict": decision.verdict,
        "model": model,
        "candidate": decision.candidate,
        "champion": decision.champion or NOBODY,
        "commit": decision.commit,
        "why": decision.why,
        "mlflow.note.content": decision.text or decision.title,
    }
    tags |= {f"reason.{i:04}": why for i, why in enumerate(decision.reasons, 1)}
    with Run(
        store,
        tracking,
        "promote",
        name=decision.title,
        params={f"rule.{name}": value for name, value in decision.rules.items()},
        experiment=f"{model}-decisions",
        tags={name: value[:MAX_TAG] for name, value in tags.items() if value},
    ) as run:
        run.metrics(decision.values)
        if decision.table:
            run.table("rules", decision.table)
        for path in files:
            run.file(path)
        yield


def recorded(store: Store, model: str) -> list[Decision]:
    """All decisions about the model, the oldest first."""
    with store.asking("read the decisions"):
        experiment = store.client.get_experiment_by_name(f"{model}-decisions")
        if experiment is None:
            return []
        runs, token = [], None
        while True:
            page = store.client.search_runs(
                [experiment.experiment_id],
                run_view_type=ViewType.ALL,
                max_results=PAGE,
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )
            runs += page
            if not (token := page.token):
                break
    return [_decision(run) for run in runs if "verdict" in run.data.tags]


def _decision(run: Any) -> Decision:
    tags, params, metrics = run.data.tags, run.data.params, run.data.metrics
    return Decision(
        verdict=tags["verdict"],
        # tags can be edited by hand, and one that is gone hides no other decision
        candidate=tags.get("candidate", UNKNOWN),
        champion=None if (before := tags.get("champion", UNKNOWN)) == NOBODY else before,
        why=tags.get("why", ""),
        reasons=[tags[name] for name in sorted(tags) if name.startswith("reason.")],
        rules={name.removeprefix("rule."): float(value) for name, value in params.items()},
        values=dict(metrics),
        text=tags.get("mlflow.note.content", ""),
        commit=tags.get("commit", UNKNOWN),
        who=tags.get("pnp.place", ""),
        when=datetime.fromtimestamp(run.info.start_time / 1000, UTC),
        is_done=run.info.status == "FINISHED",
    )
