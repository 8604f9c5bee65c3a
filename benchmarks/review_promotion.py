"""Promotions that must not be, rightful ones, and two at once, on a real MLflow server."""

import contextlib
import io
import logging
import multiprocessing
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from components import promote
from components.evaluation import Cell, Estimate, Evaluation
from components.params import Params, Register, load_params
from components.places import Tracking
from components.rules import Promote, ScoreRule
from components.tracking import Registry
from tests.evaluations import estimate, evaluation
from tests.stores import Server, proxy, register, results

NUM_RACES = 20
EXPERIMENT = "review"
MLFLOWS_LINKS = ("🏃", "🧪")  # what it prints of each run
PARAMS = Path(__file__).parent.parent / "params.yaml"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A promotion, and what is around it.

    Attributes:
        candidate: what it was measured to be.
        champion: what the champion was; empty: there is none.
        commit: of the candidate.
        answer: the HTTP status in place of the registry's word on aliases; 0: its word.
        rules: changes those of params.yaml.
        spoils: what happens to the registry before the candidate is judged.
        options: of the promotion.
    """

    candidate: Mapping[str, Any]
    champion: Mapping[str, Any] = field(default_factory=lambda: results(evaluation()))
    commit: str = "c0ffee"
    answer: int = 0
    rules: Callable[[Promote], Promote] | None = None
    spoils: Callable[[Registry], None] | None = None
    options: promote.Options = promote.Options()


def better(**other: Any) -> Evaluation:
    """An evaluation that would pass everything, if it were like the champion's."""
    return evaluation(**{"fid": 0.9, "clip_gain": 1.0, "guidance_fvu": 0.3, **other})


def without(given: Evaluation, method: str, num_steps: int) -> Evaluation:
    """An evaluation that was not finished."""
    kept = [c for c in given.cells if (c.method, c.num_steps) != (method, num_steps)]
    return replace(given, cells=tuple(kept))


def old_format() -> dict[str, Any]:
    """What a version of an earlier state of the code keeps."""
    return {"base": {"guidance_fvu": 0.1, "cost": {}, "steps": {}}}


def lose_files(registry: Registry) -> None:
    """Take the champion's files away from the server."""
    champion = registry.champion()
    assert champion
    with registry.store.asking("say where the champion's files are"):
        uri = registry.store.client.get_model_version_download_uri(registry.name, champion)
    found = re.search(r"m-[0-9a-f]{32}", uri)
    assert found
    for folder in Path("artifacts").rglob(found[0]):
        shutil.rmtree(folder)


def changed(given: Evaluation, method: str, change: Callable[[Estimate], Estimate]) -> Evaluation:
    """An evaluation in which a method's FID is another."""

    def of(cell: Cell) -> Cell:
        new = {"fid": change(cell.scores["fid"])} if cell.method == method else {}
        return replace(cell, scores={**cell.scores, **new})

    return replace(given, cells=tuple(map(of, given.cells)))


def scaled(found: Estimate, by: float) -> Estimate:
    """A multiple of it, with its resamples."""
    return found.with_other(found, lambda a, _: by * a)


def with_another_judge(given: Evaluation) -> Evaluation:
    """An evaluation in which a second judge sees the same images otherwise."""
    others = [replace(cell, judge="second", scores={}) for cell in given.cells]
    return replace(given, cells=(*given.cells, *others))


def null_for_a_number() -> dict[str, Any]:
    """What was edited by hand, and badly."""
    found = results(better())
    found["base"]["guidance_fvu"]["value"] = None
    return found


WORSE = results(evaluation(guidance_fvu=0.8, fid=1.2, clip_gain=0.6))
BAD: dict[str, Case] = {
    "judged at 16 steps alone": Case(candidate=results(better(num_steps=(16,)))),
    "another judge": Case(candidate=results(better(judge="another", judges_hash="other"))),
    "12 images": Case(candidate=results(replace(better(), num_images=12))),
    "12 images, no champion": Case(
        candidate=results(replace(better(), num_images=12)), champion={}
    ),
    "another guidance scale": Case(candidate=results(better(guidance_scale=1.2))),
    "another base": Case(candidate=results(better(base_hash="other"))),
    "other data": Case(candidate=results(better(data_hash="other"))),
    "other prompts and seeds": Case(candidate=results(better(tasks_hash="other"))),
    "a CLIP score of 3": Case(candidate=results(better(clip_gain=-37 / 8)), champion={}),
    "a CLIP score of 3 beside a champion": Case(candidate=results(better(clip_gain=-37 / 8))),
    "worse in every number": Case(candidate=WORSE),
    "not a number": Case(candidate=results(better(guidance_fvu=float("nan")))),
    "not on all of the champion's models": Case(
        candidate=results(better()), champion=results(evaluation(), evaluation("tuned"))
    ),
    "CFG was not sampled at 8 steps": Case(candidate=results(without(better(), "cfg", 8))),
    "results of an earlier code": Case(candidate=old_format()),
    "results of another model": Case(candidate={"base": results(better(model="tuned"))["tuned"]}),
    "made by code in no commit": Case(candidate=results(better()), commit="c0ffee-dirty"),
    "a rule for what was not measured": Case(
        candidate=results(better()),
        rules=lambda rules: rules.model_copy(
            update={"scores": {"aesthetics": ScoreRule(min_gain=0.5, ratio=None, max_loss=None)}}
        ),
    ),
    "the registry answers 503": Case(candidate=WORSE, answer=503),
    "the registry answers 403": Case(candidate=WORSE, answer=403),
    "the registry answers 404 with a page": Case(candidate=WORSE, answer=404),
    "the champion's files are lost": Case(candidate=results(better()), spoils=lose_files),
    "a dry run": Case(candidate=results(better()), options=promote.Options(dry_run=True)),
    "no guidance came out ten times worse than for the champion": Case(
        candidate=results(changed(better(fid=1.4), "unguided", lambda fid: scaled(fid, 10)))
    ),
    "intervals of two resamples": Case(
        candidate=results(
            changed(better(), "guided", lambda fid: replace(fid, replicates=fid.replicates[:2]))
        )
    ),
    "resamples that all say the same": Case(
        candidate=results(
            changed(better(), "guided", lambda fid: replace(fid, replicates=(fid.value,) * 50))
        ),
        champion={},
    ),
    "a step without any arithmetic": Case(candidate=results(better(flops_ratio=0.0))),
    "less than nothing unexplained": Case(candidate=results(better(guidance_fvu=-0.5))),
    "two results of each setting": Case(
        candidate=results(replace(better(), cells=better(fid=0.5).cells + better(fid=1.9).cells))
    ),
    "neither says what it is of": Case(
        candidate=results(replace(better(), identity={})),
        champion=results(replace(evaluation(), identity={})),
    ),
    "one model by another judge, no champion": Case(
        candidate=results(better(), better(model="tuned", judges_hash="other")), champion={}
    ),
    "null for a number": Case(candidate=null_for_a_number()),
    "made by what is no commit": Case(candidate=results(better()), commit="HEAD"),
}


def changed_at_8(given: Evaluation, other: Evaluation) -> Evaluation:
    """An evaluation with another's results at 8 steps."""
    mine = [cell for cell in given.cells if cell.num_steps == 16]
    theirs = [cell for cell in other.cells if cell.num_steps == 8]
    return replace(given, cells=(*mine, *theirs))


def no_gain(**other: Any) -> Evaluation:
    """One of a model on which CFG gains nothing in FID."""
    found = evaluation(**other)
    (cfg, *_) = (c.scores["fid"] for c in found.cells if c.method == "cfg")
    return changed(found, "unguided", lambda _: cfg)


RIGHTFUL: dict[str, Case] = {
    "better in every number": Case(candidate=results(better())),
    "the first of all": Case(candidate=results(evaluation()), champion={}),
    "as good as the champion": Case(candidate=results(evaluation(time_ratio=0.6))),
    "a loss inside the noise": Case(
        candidate=results(
            changed(evaluation(), "guided", lambda _: estimate(5.3, spread=0.1, seed=77))
        ),
    ),
    "a loss that is allowed": Case(candidate=results(evaluation(clip_gain=0.87, fid=1.03))),
    "slower and better": Case(candidate=results(better(time_ratio=1.4))),
    "on more models than the champion": Case(candidate=results(better(), better(model="tuned"))),
    "at more numbers of steps than the champion": Case(
        candidate=results(better(num_steps=(16, 8, 4)))
    ),
    "one judge more for both, who decides nothing": Case(
        candidate=results(with_another_judge(better())),
        champion=results(with_another_judge(evaluation())),
    ),
    "where CFG gains nothing, as good as CFG": Case(
        candidate=results(no_gain(fid=0.98)), champion=results(no_gain())
    ),
    "bad at 8 steps, at which no score decides": Case(
        candidate=results(changed_at_8(better(), evaluation(fid=3.0))),
        rules=lambda rules: rules.model_copy(update={"at_steps": {8: None}}),
    ),
    "in no commit, which is allowed": Case(
        candidate=results(better()),
        commit="c0ffee-dirty",
        options=promote.Options(allow_dirty=True),
    ),
    "rounding made CFG another one": Case(
        candidate=results(changed(better(), "cfg", lambda fid: scaled(fid, 1.001)))
    ),
    "worse, with a reason": Case(
        candidate=WORSE, options=promote.Options(force=True, reason="it is faster")
    ),
}


def bad_promotions(scratch: Path) -> tuple[dict[str, float], dict[str, str]]:
    """Try each of them; a promotion that was made has passed."""
    passed, said = tried(scratch, BAD)
    return {"bad_promotions_tried": len(BAD), "bad_promotions_passed": len(passed)}, said


def rightful_promotions(scratch: Path) -> tuple[dict[str, float], dict[str, str]]:
    """Try each of them; one that was not made was refused."""
    passed, said = tried(scratch, RIGHTFUL)
    refused = len(RIGHTFUL) - len(passed)
    keys: dict[str, float] = {
        "rightful_promotions_tried": len(RIGHTFUL),
        "rightful_promotions_refused": refused,
    }
    return keys, said


def tried(scratch: Path, cases: Mapping[str, Case]) -> tuple[list[str], dict[str, str]]:
    """Those of which the candidate became champion, and what was said of each."""
    passed, said = [], {}
    with mlflow_server(scratch) as server:
        for number, (name, case) in enumerate(cases.items()):
            has_passed, said[name] = attempt(server, f"guide-{number}", case)
            passed += [name] * has_passed
    return passed, said


def attempt(server: Server, name: str, case: Case) -> tuple[bool, str]:
    """Whether the candidate became champion, and what was said."""
    own = Tracking(uri=server.uri, experiment=EXPERIMENT)
    registry = Registry(own, name)
    before = None
    if case.champion:
        before = register(tracking=own, name=name, models=case.champion)
        with registry.store.asking("crown the champion"):
            registry.store.client.set_registered_model_alias(name, "champion", before)
    candidate = register(tracking=own, name=name, models=case.candidate, commit=case.commit)
    if case.spoils:
        case.spoils(registry)
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    try:
        with proxy(server.uri) as (uri, answers):
            if case.answer:
                answers["registered-models/alias"] = case.answer
            asked = params(Tracking(uri=uri, experiment=EXPERIMENT), name)
            if case.rules:
                asked = asked.model_copy(update={"promote": case.rules(asked.promote)})
            _, said = decide(asked, candidate, case.options)
    finally:
        del os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"]
    now = Registry(own, name).champion()
    return now != before, re.sub(r":\d{4,5}\b", "", said.replace(str(Path.cwd()), "."))


def races(scratch: Path) -> tuple[dict[str, float], list[str]]:
    """Two at once, of which the later must know of the earlier, again and again."""
    outcomes = []
    with mlflow_server(scratch) as server:
        own = Tracking(uri=server.uri, experiment=EXPERIMENT)
        for number in range(NUM_RACES):
            name = f"race-{number}"
            for fvu in (0.5, 0.4, 0.3):
                register(fvu, tracking=own, name=name)
            decide(params(own, name), "1")
            outcomes.append(race(params(own, name), Registry(own, name)))
    return {"promotion_races_survived": sum(map(one_after_the_other, outcomes))}, outcomes


def race(asked: Params, registry: Registry) -> str:
    """Promote versions 2 and 3, of which 3 is better, at the same time; what is recorded."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    both = [
        context.Process(target=decide_together, args=(asked, version, barrier))
        for version in ("2", "3")
    ]
    for process in both:
        process.start()
    for process in both:
        process.join()
    log = [f"{d.candidate} {d.verdict} over {d.champion}" for d in registry.decisions()[1:]]
    return ", ".join([*log, f"champion {registry.champion()}"])


def one_after_the_other(outcome: str) -> bool:
    """Whether a race came out as if one had waited for the other."""
    return outcome in (
        "2 promoted over 1, 3 promoted over 2, champion 3",
        "3 promoted over 1, 2 refused over 3, champion 3",
    )


def decide_together(asked: Params, version: str, barrier: Any) -> None:
    """Decide as soon as the other is there, too."""
    barrier.wait()
    code, _ = decide(asked, version)
    raise SystemExit(code)


def decide(
    asked: Params, version: str, options: promote.Options = promote.DEFAULT
) -> tuple[int, str]:
    """Promote as the command line does: the exit code, and the last line that was said."""
    out = io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            promote.run(asked, version, options)
        except SystemExit as left:
            code = int(left.code or 0)
        except (ValueError, OSError) as error:
            code = 1
            print(error)
    lines = [line for line in out.getvalue().splitlines() if not line.startswith(MLFLOWS_LINKS)]
    return code, " ".join(" ".join(lines).split())


def params(tracking: Tracking, name: str) -> Params:
    """The repository's own parameters, for another registered model and for made-up models."""
    own = load_params(PARAMS)
    update = {"tracking": tracking, "register_": Register(name=name), "models": {}}
    evaluate = own.evaluate.model_copy(update={"num_steps": (), "review": "quick"})
    return own.model_copy(update={**update, "evaluate": evaluate})


@contextmanager
def mlflow_server(folder: Path) -> Iterator[Server]:
    """A server in the folder, which is the working directory meanwhile."""
    before = Path.cwd()
    os.chdir(folder)
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    server = Server(folder)
    try:
        server.start()
        with contextlib.redirect_stdout(io.StringIO()):  # MLflow's links to each run
            yield server
    finally:
        server.kill()
        os.chdir(before)
