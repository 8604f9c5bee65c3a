"""Stage register: gather the results of all models, and register the guide with its lineage.

Reads results/evaluate, results/sampled and guides/bundle. Writes results/report: index.html, the
page to decide by; table.md, grid.png, summary.json; and pictures.parquet, which the next guide's
page shows beside its own. Logs them to MLflow and registers guides/bundle as a new version. What
was written stays where MLflow can't be reached, and the same command then uploads it.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components import champion, headlines
from components.champion import Champion
from components.cli import main, without_arguments
from components.environment import FLOW_RUN_URL
from components.evaluation import FILE, Evaluation
from components.images import Gallery, guide_identity
from components.lineage import lock_hash, locked_stages, run_commit
from components.params import Params, companion_paths
from components.paths import BUNDLE, EVALUATED, PREPARED, REPORT
from components.publishing import complete
from components.report import content, gallery, page
from components.report.gallery import GuidedPictures, PictureSet
from components.snapshot import check_unchanged
from components.verdict import Check, checks, clean, not_compared
from pnp_core.files import atomic_folder, read_json, sha256_file, write_json

if TYPE_CHECKING:
    from PIL import Image

    from components.tracking import Pipeline, Registry, Run
    from pnp_core.bundle import GuideBundle

COMMIT = ("git_commit", "lock_hash")  # of a lineage: where the code stood
PAGE = "index.html"
IN_MLFLOW, IN_PREFECT = "The run in MLflow", "The flow run in Prefect"  # links of the page
# The settings that a run is told apart by, beside what was sampled; all are in its params.yaml.
TOLD_APART = (
    *("base", "teacher.guider", "cache.num_trajectory", "distill.guide.kind"),
    *("distill.guide.max_parameters_ratio", "distill.num_images", "distill.learning_rate"),
    *("halve.start_steps", "halve.end_steps", "halve.num_images", "halve.guidance_gain"),
    *("evaluate.review", "evaluate.guidance_scale"),
)


@dataclass(frozen=True, kw_only=True)
class Results:
    """What there is to say of a guide.

    Attributes:
        evaluations: by model.
        lineage: what it was made of.
        champion: who it is compared with.
        checks: the rules of params.yaml.
        pictures: those that the page shows.
        kept: all guided ones.
        report: what the page says.
    """

    evaluations: Mapping[str, Evaluation]
    lineage: Mapping[str, str]
    champion: Champion
    checks: Sequence[Check]
    pictures: Sequence[PictureSet]
    kept: GuidedPictures
    report: content.Report

    @property
    def summary(self) -> dict[str, Any]:
        """What a version keeps, and `promote` reads."""
        return {"lineage": dict(self.lineage), "models": as_written(self.evaluations)}

    @property
    def page(self) -> str:
        """Of the run in MLflow, where that is a server; else empty."""
        return self.report.links.get(IN_MLFLOW, "")

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The table."""
        return headlines.table_rows(self.evaluations, self.checks)


def run(params: Params) -> None:
    """Write results/report and register the guide, if it is not registered already.

    Raises ValueError if git is missing or results are of another guide, TrackingError if MLflow
    fails; the report is written then, and the same command registers it.
    """
    from components.tracking import Registry, TrackingError, finish_pipeline
    from pnp_core.bundle import GuideBundle

    evaluations = {name: Evaluation.load(EVALUATED / name) for name in params.models}
    bundle = GuideBundle.load(BUNDLE)
    check_guide(bundle, evaluations)
    lineage = lineage_of(params, evaluations, bundle)
    key = version_key({"lineage": lineage, "models": as_written(evaluations)})
    try:
        registry = Registry(params.tracking, params.register_.name)
        # A run that was killed before its report was written has registered already.
        version = registry.find(key)
        compared = champion.ask(registry, version, evaluations)
    except TrackingError as error:
        write(gather(params, evaluations, lineage, champion.unknown(error)))
        raise TrackingError(f"{error}. The report is in {REPORT / PAGE}, not registered") from None
    results = gather(params, evaluations, lineage, compared)
    if version:
        finish_pipeline()
        write(registered(registry, results, version))
        registry.settle()
        registry.finish_run(version, REPORT / PAGE, "report")
    else:
        write(results)
        version = upload(params, registry, key, results)
    print(f"\n{(REPORT / 'table.md').read_text(encoding='utf-8')}")
    print(f"judge: {lineage['judge']}; FID of few images is biased, KID is not")
    print(f"registered: {params.register_.name} version {version}")
    print(f"report: {REPORT / PAGE}")


def check_guide(bundle: "GuideBundle", models: Iterable[str]) -> None:
    """Raise ValueError if the results of a model are of another guide than the bundle's."""
    for model in models:
        for num_steps, identity in Gallery.open(model).guides.items():
            if identity != guide_identity(bundle.for_steps(num_steps)):
                raise ValueError(
                    f"{EVALUATED / model} is of another guide for {num_steps} steps than the one "
                    f"in {BUNDLE}: dvc repro evaluates again what that needs, and registers"
                )


def lineage_of(
    params: Params, evaluations: Mapping[str, Evaluation], bundle: "GuideBundle"
) -> dict[str, str]:
    """What the guide in guides/bundle was made of. Raises ValueError if git is missing."""
    from pnp_core.model_files import weights_hash

    return {
        "git_commit": run_commit(),
        "lock_hash": lock_hash(),
        "data_hash": data_hash(),
        "base": params.base,
        "base_hash": weights_hash(params.base),
        "companions": ", ".join(path.stem for path in companion_paths(params)) or "none",
        "num_steps": ", ".join(map(str, bundle.num_steps)),
        "guidance_scale": "{:g} to {:g}".format(*params.distill.guidance_scale),
        "judge": next(iter(evaluations.values())).judges[0],
    }


def gather(
    params: Params,
    evaluations: Mapping[str, Evaluation],
    lineage: Mapping[str, str],
    compared: Champion,
) -> Results:
    """All that the page shows: rules, pictures, where it comes from."""
    found = [
        clean(lineage["git_commit"], allow_dirty=False),
        *checks(
            evaluations,
            compared.evaluations,
            params.promote,
            models=list(params.models),
            num_steps=params.evaluate.extent.num_steps,
        ),
    ]
    beside = not_compared(evaluations, compared.evaluations, params.promote)
    pictures, kept = gallery.gather(evaluations, champion=compared.pictures)
    now = datetime.now().astimezone()
    report = content.Report(
        name=params.register_.name,
        version=None,
        made=f"{now.day} {now:%B %Y, %H:%M %Z}",
        evaluations=evaluations,
        checks=found,
        champion=f"{compared.said} {beside}".strip(),
        no_champion_pictures=compared.no_pictures,
        lineage=lineage,
        links={IN_PREFECT: url} if (url := os.environ.get(FLOW_RUN_URL)) else {},
    )
    return Results(
        evaluations=evaluations,
        lineage=lineage,
        champion=compared,
        checks=found,
        pictures=pictures,
        kept=kept,
        report=report,
    )


def registered(registry: "Registry", results: Results, version: str) -> Results:
    """The same, of a guide that has a version and a run."""
    report = results.report
    address = registry.address(version)
    links = {**report.links, IN_MLFLOW: address} if address else report.links
    return replace(results, report=replace(report, version=version, links=links))


def write(results: Results) -> None:
    """Write results/report, whole."""
    from components.pictures import stacked

    summary, report = results.summary, results.report
    if report.version:
        summary["registered"] = {"name": report.name, "version": report.version}
        summary["registered"] |= {"page": results.page} if results.page else {}
    with atomic_folder(REPORT) as folder:
        stacked([grid_of(name) for name in results.evaluations]).save(folder / "grid.png")
        table = headlines.as_markdown(results.rows)
        (folder / "table.md").write_text(table, encoding="utf-8")
        results.kept.save(folder / gallery.FILE)
        page.write(folder / PAGE, report, results.pictures)
        write_json(folder / "summary.json", summary)


def grid_of(model: str) -> "Image.Image":
    """The picture that an evaluation drew. Raises ValueError, naming it, if it is not whole."""
    from PIL import Image

    path = EVALUATED / model / "grid.png"
    try:
        with Image.open(path) as opened:
            opened.load()
            return opened.copy()
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"{path} is not there or not whole ({error}): dvc repro makes it again, or python -m "
            f"components.evaluate --model {model}"
        ) from None


def as_written(evaluations: Mapping[str, Evaluation]) -> dict[str, Any]:
    """The evaluations as their files have them."""
    return {name: read_json(EVALUATED / name / FILE) for name in evaluations}


def version_key(summary: Mapping[str, Any]) -> str:
    """What makes a version: the guide's files, its results and what it was made of.

    The same at another commit is no other guide.
    """
    made_of = {k: v for k, v in summary["lineage"].items() if k not in COMMIT}
    files = {
        p.relative_to(BUNDLE).as_posix(): sha256_file(p) for p in BUNDLE.rglob("*") if p.is_file()
    }
    identity = {"files": files, "models": summary["models"], "lineage": made_of}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def told_apart(params: Params) -> dict[str, Any]:
    """The settings that runs are told apart by; of images and steps those that were sampled."""
    from components.tracking import flat

    settings = flat(params.model_dump(mode="json", by_alias=True))
    extent = params.evaluate.extent
    return {name: settings[name] for name in TOLD_APART if name in settings} | {
        "evaluate.num_images": extent.num_images,
        "evaluate.num_steps": ", ".join(map(str, extent.num_steps)),
        "models": ", ".join(params.models),
    }


def upload(params: Params, registry: "Registry", key: str, results: Results) -> str:
    """Log the run and register the bundle as a new version, which it returns."""
    from components.tracking import Run, current_pipeline, finish_pipeline

    check_unchanged()  # what is uploaded stays
    whole = current_pipeline(params)
    with Run(
        registry.store,
        params.tracking,
        "register",
        params=told_apart(params),
        pipeline=replace(whole, is_itself=True),
    ) as tracked:
        log_models(params, registry, whole, results)
        log_results(tracked, results)
        version = register_version(params, registry, tracked, key, results)
        finish_pipeline()  # at once: the next guide must not be written to this one's run
        write(registered(registry, results, version))
        tracked.file(REPORT / PAGE, "report")  # it says its version now
        tracked.rename(registry.run_name(version))
    return version


def log_models(params: Params, registry: "Registry", whole: "Pipeline", results: Results) -> None:
    """A run for each model, with its curves over steps and timesteps, and its pictures."""
    from components.tracking import Run

    for name, evaluation in results.evaluations.items():
        part = replace(whole, part=name)
        with Run(
            registry.store, params.tracking, "evaluate", params={}, name=name, pipeline=part
        ) as tracked:
            for num_steps, scores in headlines.by_steps(evaluation).items():
                tracked.metrics(scores, step=num_steps)
            for timestep, share in evaluation.fvu_by_timestep.items():
                tracked.metrics({"fvu_by_timestep": {"unexplained": share}}, step=int(timestep))
            shares = {of: estimate.value for of, estimate in evaluation.negative.items()}
            tracked.metrics({"cost": evaluation.cost, "negative_prompt": shares})
            tracked.tags({"timed_on": evaluation.timed_on or "not told"})
            tracked.file(EVALUATED / name / "evaluation.json")
            tracked.file(EVALUATED / name / "grid.png")


def log_results(tracked: "Run", results: Results) -> None:
    """The run's page: data, table, pictures, report."""
    tracked.tags(results.lineage)
    tracked.tags({"timed_on": timed_on(results.evaluations)})
    commit = results.lineage["git_commit"].removesuffix("-dirty")
    if commit != "none":  # outside git
        tracked.tags({"mlflow.source.git.commit": commit})
    data = results.lineage["data_hash"]
    tracked.dataset("prepared", digest=data, path=PREPARED)
    tracked.table("results", results.rows)
    tracked.table("checks", [asdict(check) for check in results.checks])
    for model in results.evaluations:  # where MLflow's slider stands at first
        tracked.image(model, EVALUATED / model / "grid.png", step=0)
    with tempfile.TemporaryDirectory() as temporary:
        for one in results.pictures:
            sheet = Path(temporary) / "sheet.png"
            gallery.sheet(one).save(sheet)
            tracked.image(one.model, sheet, step=one.num_steps)
    for path in (Path("params.yaml"), REPORT / "grid.png", REPORT / "table.md"):
        tracked.file(path)
    for name in (PAGE, gallery.FILE):
        tracked.file(REPORT / name, "report")


def timed_on(evaluations: Mapping[str, Evaluation]) -> str:
    """The machines that times were taken on, in words."""
    machines = dict.fromkeys(one.timed_on or "not told" for one in evaluations.values())
    return "; ".join(machines)


def register_version(
    params: Params, registry: "Registry", tracked: "Run", key: str, results: Results
) -> str:
    """Register the bundle, with the summary that `promote` compares; returns the version."""
    from components.tracking import TRAINING

    said = content.headlines(results.evaluations)
    where = [f"{each.text} {each.label}, {each.where}" for each in said]
    run = f"#/experiments/{tracked.experiment}/runs/{tracked.id}"
    address = f"{run}/artifacts/report/{PAGE}?{TRAINING}"
    where.append(f"[The report, with all numbers and pictures]({address})")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "guide"
        shutil.copytree(BUNDLE, folder)
        write_json(folder / "summary.json", results.summary)
        complete(
            folder,
            params,
            lineage=results.lineage,
            evaluations=results.evaluations,
            checks=results.checks,
            champion=results.report.champion,
            picture=REPORT / "grid.png",
        )
        check_unchanged()  # before anybody can see a version
        return registry.register(
            tracked,
            folder,
            key=key,
            # A quick and a full review's are of the same steps.
            metrics=headlines.numbers(
                results.evaluations, results.checks, params.evaluate.num_steps
            ),
            tags=results.lineage,
            description=headlines.description(
                results.checks, compared=results.report.champion, where=where
            ),
        )


def data_hash() -> str:
    """DVC's hash of data/prepared; outside DVC the manifest's own."""
    lock = Path("dvc.lock")
    stages = locked_stages(lock.read_text(encoding="utf-8")) if lock.exists() else {}
    for out in stages.get("prepare", {}).get("outs", []):
        if out["path"] == PREPARED.as_posix():
            return str(out["md5"])
    return str(read_json(PREPARED / "manifest.json")["hash"])


if __name__ == "__main__":
    without_arguments("register", __doc__)
    main(run)
