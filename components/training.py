"""What distill and halve share: workers, progress lines, loss curves in MLflow."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.cluster import run_training
from components.following import Report
from components.params import Params, Train, cache_config
from components.paths import CACHE, DISTILLED, PREPARED, RUNS
from components.progress import Progress
from components.shipping import pack
from components.storage import ShardStore
from pnp_core.files import old_of, read_json
from pnp_core.settings import UNSEEN, TrainConfig

if TYPE_CHECKING:
    from pnp_core.cache import TeacherCache


MATCHING_TAKES = 3  # times as long for an image as halving


def train_stage(  # noqa: PLR0913, a stage, then by name what it counts and makes
    stage: str,
    work: Callable[[Params, Report], None],
    params: Params,
    *,
    num_images: int,
    num_matched: int = 0,
    makes: Path,
) -> None:
    """Run `work` on the cluster, with progress lines and an MLflow run that a restart resumes.

    Args:
        stage: its name, and that of its section and its folder of checkpoints.
        work: what each worker does.
        params: all of them.
        num_images: that it will report, over all rounds.
        num_matched: how many of them come last, in matching.
        makes: the folder that the first worker writes.

    Raises ValueError if a stage before it has not run.
    """
    if not (CACHE / "index.json").exists():
        raise ValueError(f"there is no teacher cache in {CACHE}: run the stage cache first")
    if makes != DISTILLED and not (DISTILLED.is_dir() or old_of(DISTILLED).is_dir()):
        raise ValueError(f"there is no guide in {DISTILLED}: run the stage distill first")
    from components.tracking import TrainingRun, current_pipeline
    from pnp_core.train import RECIPE

    section = getattr(params, stage)
    settings = {"base": params.base, stage: section.model_dump(mode="json", exclude=UNSEEN)}
    identity = (
        f"{stage}\n{RECIPE}\n{settings}\n{(CACHE / 'index.json').read_text(encoding='utf-8')}"
    )
    progress = Progress(stage, num_images, "images")
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    whole = current_pipeline(params)
    needs = [Path(params.base), Path(params.companions), CACHE / "index.json"]
    needs += [PREPARED / "manifest.json", *([DISTILLED] if makes != DISTILLED else [])]
    shipment = pack(params, needs, stage=stage, kept=RUNS / stage, made=makes)
    with TrainingRun(params.tracking, stage, key=key, params=settings, pipeline=whole) as run:

        def report(done: int, metrics: Mapping[str, float]) -> None:
            rounds = f"{metrics['num_steps']:.0f} steps, " if "num_steps" in metrics else ""
            rounds += "matching, " if "matched" in metrics else ""
            share = share_of_work(done, num_images, num_matched)
            progress(done, f"{rounds}loss {metrics['loss']:.4f}", share=share)
            run.curve(*curves(stage, done, metrics, section.num_images))

        run_training(work, params, report, name=stage, shipment=shipment)


def share_of_work(done: int, num_images: int, num_matched: int) -> float:
    """How much of a training's work is done with so many images."""
    halved = num_images - num_matched
    of_matching = max(0, done - halved)
    return (done + (MATCHING_TAKES - 1) * of_matching) / (halved + MATCHING_TAKES * num_matched)


def curves(
    stage: str, done: int, metrics: Mapping[str, float], num_images: int
) -> tuple[int, dict[str, float]]:
    """A point of each curve: `distill/loss`, or `halve/steps-16/loss` counted within its round.

    Args:
        stage: its name.
        done: images seen, over all rounds.
        metrics: what training reports; `num_steps` says which round, `matched` how many images of
            the matching after it.
        num_images: of a round.
    """
    values = dict(metrics)
    if "num_steps" not in values:
        return done, {f"{stage}/{name}": value for name, value in values.items()}
    num_steps = int(values.pop("num_steps"))
    if "matched" in values:
        within = int(values.pop("matched"))
        return within, {f"{stage}/matched-{num_steps}/{name}": x for name, x in values.items()}
    within = (done - 1) % num_images + 1
    return within, {f"{stage}/steps-{num_steps}/{name}": value for name, value in values.items()}


def train_config(section: Train) -> TrainConfig:
    """The training part of a section, in the library's terms."""
    return TrainConfig(**{name: getattr(section, name) for name in Train.model_fields})


def check_precision(stage: str, config: TrainConfig) -> None:
    """Say so, once, where bf16 is asked for and no worker's hardware has it.

    Raises ValueError where some of the workers have it: each would compute in its own precision.
    """
    if config.precision != "bf16":
        return
    from components.device import device
    from pnp_core.precision import has_bf16
    from pnp_core.train import of_all_workers, rank_and_world

    has = of_all_workers(int(has_bf16(device().type)), device())
    lacking = [str(rank) for rank, having in enumerate(has) if not having]
    if 0 < len(lacking) < len(has):
        raise ValueError(
            f"{stage}.precision: bf16, which the hardware of {len(lacking)} of {len(has)} workers "
            f"does not compute in (by rank: {', '.join(lacking)}): set {stage}.precision: fp32, or "
            "train on machines that are alike"
        )
    if lacking and rank_and_world()[0] == 0:
        print(
            f"{stage}: precision bf16 is asked for, which this hardware has not: all is in fp32",
            flush=True,
        )


def open_cache(params: Params, scheduler: Any) -> "TeacherCache":
    """The teacher cache, read from where its index says that it lies.

    Raises ValueError if it was made with another base, `scheduler`, data or other settings than
    there are now.
    (Training needs no data; where data/prepared is not at hand, that is not compared.)
    """
    from pnp_core.cache import TeacherCache
    from pnp_core.identity import base_identity
    from pnp_core.shards import ShardFolder

    index, manifest = CACHE / "index.json", PREPARED / "manifest.json"
    storage = read_json(index).get("storage") if index.exists() else None
    return TeacherCache.open(
        CACHE,
        base=base_identity(params.base),
        config=cache_config(params),
        data_hash=read_json(manifest)["hash"] if manifest.exists() else None,
        scheduler=scheduler,
        source=ShardStore(storage) if storage else ShardFolder(CACHE, ShardStore.remedy),
        kept=RUNS / "texts" if storage else None,
    )


def checkpoint_folder(stage: str) -> Path:
    """Where a run of `stage` in progress keeps its state."""
    folder = RUNS / stage
    folder.mkdir(parents=True, exist_ok=True)
    return folder
