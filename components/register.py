"""Stage register: gather the results of all models, and register the guide with its lineage.

Reads results/evaluate and guides/bundle. Writes results/report: summary.json, table.md and
grid.png; logs them to MLflow and registers guides/bundle there as a new version.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML

from components.cli import main
from components.evaluation import FILE, Evaluation
from components.lineage import lock_hash, run_commit
from components.methods import METHODS
from components.params import Params, companion_paths
from components.paths import BUNDLE, EVALUATED, PREPARED, REPORT
from components.pictures import stacked
from components.publishing import complete
from components.snapshot import check_unchanged
from pnp_core.files import atomic_folder, read_json, sha256_file, write_json

if TYPE_CHECKING:
    from components.tracking import Registry, Run

MAX_DESCRIPTION = 5000  # characters that MLflow's databases have room for
COMMIT = ("git_commit", "lock_hash")  # of a lineage: where the code stood


def run(params: Params) -> None:
    """Write results/report and register the guide, if it is not registered already.

    Raises ValueError if git is missing, TrackingError if MLflow fails; what was there stays, and
    the same command goes on.
    """
    from PIL import Image

    from components.tracking import Registry, Run
    from pnp_core.bundle import GuideBundle
    from pnp_core.models import weights_hash

    evaluations = {name: Evaluation.load(EVALUATED / name) for name in params.models}
    results = {name: as_metrics(evaluation) for name, evaluation in evaluations.items()}
    bundle = GuideBundle.load(BUNDLE)
    lineage = {
        "git_commit": run_commit(),
        "lock_hash": lock_hash(),
        "data_hash": data_hash(),
        "base": params.base,
        "base_hash": weights_hash(params.base),
        "companions": ", ".join(path.stem for path in companion_paths(params)) or "none",
        "num_steps": ", ".join(map(str, bundle.num_steps)),
        "guidance_scale": "{:g} to {:g}".format(*params.distill.guidance_scale),
        "judge": next(iter(results.values()))["judge"],
    }
    summary: dict[str, Any] = {"lineage": lineage, "models": results}
    rows = table_rows(results)
    table = as_markdown(rows)
    registry = Registry(params.tracking, params.register_.name)
    key = version_key(summary)
    # A run that was killed before its report was written has registered already.
    version = registry.find(key)

    with atomic_folder(REPORT) as report:
        grids = [Image.open(EVALUATED / name / "grid.png") for name in params.models]
        stacked(grids).save(report / "grid.png")
        (report / "table.md").write_text(table)
        if version:
            registry.settle()
        else:
            settings = params.model_dump(mode="json", by_alias=True, exclude={"models"})
            with Run(registry.store, params.tracking, "register", params=settings) as tracked:
                log_results(tracked, summary, rows, report)
                with version_files(params, lineage, evaluations, report / "grid.png") as folder:
                    version = upload(registry, tracked, key, folder, summary, table)
        summary["registered"] = {"name": params.register_.name, "version": version}
        write_json(report / "summary.json", summary)
    print(f"\n{table}")
    print(
        f"judge: {lineage['judge']}; FID of few images is biased, KID is not: compare down a column"
    )
    print(f"registered: {params.register_.name} version {version}")
    print(f"grid: {REPORT / 'grid.png'}")


def as_metrics(evaluation: Evaluation) -> dict[str, Any]:
    """What the table, MLflow and `promote` read of an evaluation."""
    steps: dict[str, Any] = {}
    for num_steps in evaluation.num_steps:
        cells = {method: evaluation.cell(method, num_steps) for method in METHODS}
        scores = {
            method: {name: score.value for name, score in cell.scores.items()}
            for method, cell in cells.items()
            if cell
        }
        fid_ratio = evaluation.ratio("fid", num_steps).value
        steps[str(num_steps)] = {**scores, "fid_ratio": fid_ratio}
    return {
        "model": evaluation.model,
        "judge": evaluation.judges[0],
        "num_images": evaluation.num_images,
        "guidance_scale": evaluation.guidance_scale,
        "guidance_fvu": evaluation.guidance_fvu.value,
        "cost": dict(evaluation.cost),
        "steps": steps,
    }


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


def log_results(
    tracked: "Run", summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], report: Path
) -> None:
    """The run's page: numbers, table, images, and the data they are based on."""
    lineage = summary["lineage"]
    tracked.tags(lineage)
    tracked.dataset("prepared", digest=lineage["data_hash"], path=PREPARED)
    tracked.metrics(summary["models"])
    tracked.table("results", rows)
    for name in summary["models"]:
        tracked.image(name, EVALUATED / name / "grid.png")
    for name in ("grid.png", "table.md"):
        tracked.file(report / name)


@contextmanager
def version_files(
    params: Params,
    lineage: Mapping[str, str],
    evaluations: Mapping[str, Evaluation],
    picture: Path,
) -> Iterator[Path]:
    """A folder with all that a version carries; it is gone when the block ends."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "guide"
        shutil.copytree(BUNDLE, folder)
        models = {name: read_json(EVALUATED / name / FILE) for name in evaluations}
        write_json(folder / "summary.json", {"lineage": lineage, "models": models})
        complete(folder, params, lineage, evaluations, picture)
        yield folder


def upload(  # noqa: PLR0913, a version's parts
    registry: "Registry",
    tracked: "Run",
    key: str,
    folder: Path,
    summary: Mapping[str, Any],
    table: str,
) -> str:
    """Register the files in the folder; returns the version."""
    check_unchanged()  # before anybody can see a version
    is_short = len(table) <= MAX_DESCRIPTION
    return registry.register(
        tracked,
        folder,
        key=key,
        metrics=summary["models"],
        tags=summary["lineage"],
        description=table if is_short else "See table.md among the run's artifacts.",
    )


def table_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each model and step count: quality without guidance, with CFG, with the guide."""
    rows = []
    for name, metrics in results.items():
        for num_steps, scores in sorted(metrics["steps"].items(), key=lambda item: -int(item[0])):
            row: dict[str, Any] = {"model": name, "steps": int(num_steps)}
            row |= {f"FID {method}": scores[method]["fid"] for method in METHODS}
            row |= {f"KID {method}": scores[method]["kid"] for method in METHODS}
            row |= {f"CLIP {method}": scores[method]["clip_score"] for method in METHODS}
            row["PSNR to CFG, dB"] = scores["guided"]["cfg_psnr"]
            row["guidance_fvu"] = metrics["guidance_fvu"]
            row["time / CFG"] = metrics["cost"]["time_ratio"]
            row["with decoding"] = metrics["cost"]["image_time_ratio"]
            row["FLOPs / CFG"] = metrics["cost"]["flops_ratio"]
            row["images"] = metrics["num_images"]
            rows.append(row)
    return rows


def as_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table that also reads well as plain text: the three methods share a cell's column."""
    triples = ["FID", "KID", "CLIP"]
    rest = ["PSNR to CFG, dB", "guidance_fvu", "FLOPs / CFG", "time / CFG", "with decoding"]
    columns = ["model", "steps", *triples, *rest]
    lines = [columns]
    for row in rows:
        cells = []
        for column in columns:
            if column in triples:
                values = [row[f"{column} {method}"] for method in METHODS]
                cells.append(" / ".join(f"{value:.3g}" for value in values))
            else:
                value = row[column]
                cells.append(f"{value:.3g}" if isinstance(value, float) else str(value))
        lines.append(cells)
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    text = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([text[0], rule, *text[1:]]) + "\n\nTriples: unguided / CFG / guided.\n"


def data_hash() -> str:
    """DVC's hash of data/prepared; outside DVC the manifest's own."""
    lock = Path("dvc.lock")
    stages = YAML(typ="safe", pure=True).load(lock)["stages"] if lock.exists() else {}
    for out in stages.get("prepare", {}).get("outs", []):
        if out["path"] == PREPARED.as_posix():
            return str(out["md5"])
    return str(read_json(PREPARED / "manifest.json")["hash"])


if __name__ == "__main__":
    main(run)
