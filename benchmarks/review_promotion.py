"""Promotions that must not be, and two at once, on a real MLflow server."""

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
from components.evaluation import Evaluation
from components.params import Params, Register, Tracking, load_params
from components.rules import Promote, ScoreRule
from components.tracking import Registry
from tests.evaluations import evaluation
from tests.stores import Server, proxy, register, results

NUM_RACES = 20
EXPERIMENT = "review"
MLFLOWS_LINKS = ("🏃", "🧪")  # what it prints of each run
PARAMS = Path(__file__).parent.parent / "params.yaml"


@dataclass(frozen=True, kw_only=True)
class Bad:
    """A promotion that must not be.

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


WORSE = results(evaluation(guidance_fvu=0.8, fid=1.2, clip_gain=0.6))
BAD: dict[str, Bad] = {
    "judged at 16 steps alone": Bad(candidate=results(better(num_steps=(16,)))),
    "another judge": Bad(candidate=results(better(judge="another", judges_hash="other"))),
    "12 images": Bad(candidate=results(replace(better(), num_images=12))),
    "12 images, no champion": Bad(candidate=results(replace(better(), num_images=12)), champion={}),
    "another guidance scale": Bad(candidate=results(better(guidance_scale=1.2))),
    "another base": Bad(candidate=results(better(base_hash="other"))),
    "other data": Bad(candidate=results(better(data_hash="other"))),
    "other prompts and seeds": Bad(candidate=results(better(tasks_hash="other"))),
    "a CLIP score of 3": Bad(candidate=results(better(clip_gain=-37 / 8)), champion={}),
    "a CLIP score of 3 beside a champion": Bad(candidate=results(better(clip_gain=-37 / 8))),
    "worse in every number": Bad(candidate=WORSE),
    "not a number": Bad(candidate=results(better(guidance_fvu=float("nan")))),
    "not on all of the champion's models": Bad(
        candidate=results(better()), champion=results(evaluation(), evaluation("tuned"))
    ),
    "CFG was not sampled at 8 steps": Bad(candidate=results(without(better(), "cfg", 8))),
    "results of an earlier code": Bad(candidate=old_format()),
    "results of another model": Bad(candidate={"base": results(better(model="tuned"))["tuned"]}),
    "made by code in no commit": Bad(candidate=results(better()), commit="c0ffee-dirty"),
    "a rule for what was not measured": Bad(
        candidate=results(better()),
        rules=lambda rules: rules.model_copy(
            update={"scores": {"aesthetics": ScoreRule(min_gain=0.5, ratio=None, max_loss=None)}}
        ),
    ),
    "the registry answers 503": Bad(candidate=WORSE, answer=503),
    "the registry answers 403": Bad(candidate=WORSE, answer=403),
    "the registry answers 404 with a page": Bad(candidate=WORSE, answer=404),
    "the champion's files are lost": Bad(candidate=results(better()), spoils=lose_files),
    "a dry run": Bad(candidate=results(better()), options=promote.Options(dry_run=True)),
}


def bad_promotions(scratch: Path) -> tuple[dict[str, float], dict[str, str]]:
    """Try each of them; a promotion that was made has passed."""
    said, num_passed = {}, 0
    with mlflow_server(scratch) as server:
        for number, (name, bad) in enumerate(BAD.items()):
            passed, said[name] = attempt(server, f"guide-{number}", bad)
            num_passed += passed
    return {"bad_promotions_tried": len(BAD), "bad_promotions_passed": num_passed}, said


def attempt(server: Server, name: str, bad: Bad) -> tuple[bool, str]:
    """Whether the candidate became champion, and what was said."""
    own = Tracking(uri=server.uri, experiment=EXPERIMENT)
    registry = Registry(own, name)
    before = None
    if bad.champion:
        before = register(tracking=own, name=name, models=bad.champion)
        with registry.store.asking("crown the champion"):
            registry.store.client.set_registered_model_alias(name, "champion", before)
    candidate = register(tracking=own, name=name, models=bad.candidate, commit=bad.commit)
    if bad.spoils:
        bad.spoils(registry)
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    try:
        with proxy(server.uri) as (uri, answers):
            if bad.answer:
                answers["registered-models/alias"] = bad.answer
            asked = params(Tracking(uri=uri, experiment=EXPERIMENT), name)
            if bad.rules:
                asked = asked.model_copy(update={"promote": bad.rules(asked.promote)})
            _, said = decide(asked, candidate, bad.options)
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
