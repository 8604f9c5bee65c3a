"""Final models are looked at once, at the end, and the results say when.

A fine-tune is final if it lies in zoo/final. It is sampled by `--final` alone, from a commit, and
before that is done the results say at which commit and when: a look can't be taken back.
"""

from datetime import UTC, datetime
from pathlib import Path

from benchmarks.quality import models_of
from components.lineage import git_commit
from components.params import Model, Params
from pnp_core.files import read_json, write_json

FINAL = Path("zoo/final")


def final_models() -> dict[str, Model]:
    """Those in zoo/final; the pictures of each style lie in zoo/data."""
    return {
        path.name: Model(
            path=path.as_posix(),
            reference=f"zoo/data/{path.name.removesuffix('-lora')}.parquet",
        )
        for path in sorted(FINAL.glob("*"))
        if path.is_dir()
    }


def models_to_run(params: Params, results: Path, *, final: bool) -> dict[str, Model]:
    """The base and the development fine-tunes; in a final run the final ones instead.

    A final run is noted in ``results`` here, before anything is sampled.

    Raises ValueError if a final model is among those of params.yaml, if there is none, or if what
    would be run is not committed.
    """
    final_ones = final_models()
    development = models_of(params)
    looked_at = [
        name
        for name, model in development.items()
        if FINAL.resolve() in Path(model.path).resolve().parents
    ]
    if looked_at:
        raise ValueError(
            f"models.{looked_at[0]}: it is a final model, which only --final may sample; "
            "take it out of params.yaml"
        )
    if not final:
        return development
    if not final_ones:
        raise ValueError(f"there is no final model in {FINAL}")
    commit = git_commit(no_matter=["benchmarks/results"])
    if commit == "none" or commit.endswith("-dirty"):
        raise ValueError(f"a final run is of a commit, and this is {commit}: commit first")
    if not results.exists():
        raise ValueError(f"there is no {results}: the development models come first")
    found = read_json(results)
    used = {"commit": commit, "when": datetime.now(UTC).isoformat(timespec="seconds")}
    found.setdefault("final_runs", []).append(used | {"models": list(final_ones)})
    write_json(results, found)
    return final_ones
