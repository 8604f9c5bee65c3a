"""What params.yaml points at, looked at without loading it, which takes minutes and comes late."""

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from components.evaluation import FILE
from components.paths import BUNDLE, EVALUATED, PREPARED
from pnp_core.files import old_of, read_json
from pnp_core.model_configs import (
    check_base_configs,
    check_prediction,
    image_size,
    num_train_timesteps,
)
from pnp_core.model_files import (
    TOKENIZERS,
    check_model_files,
    check_same_kind,
    check_weight_files,
)

if TYPE_CHECKING:
    from components.params import Params, Prepare

PROCESSORS = ("preprocessor_config.json", "processor_config.json")


def check_model(path: str, base: str, *, teaches: bool = False) -> None:
    """Raise ValueError if a model can't be the base, or no fine-tune of it.

    `teaches`: it is a companion, whose guidance is learnt too.
    """
    check_model_files(path)
    check_same_kind(path, base)
    if not Path(path).exists():
        raise ValueError(
            f"{path} is the name of a model on a hub, and the pipeline works on files that DVC can "
            f"version: download it (hf download {path} --local-dir models/{Path(path).name}) and "
            "name that folder"
        )
    if Path(path) == Path(base):
        check_base_configs(base)
    else:
        check_prediction(path, base, teaches=teaches)


def places_of(model: str, guide: Path, into: Path) -> tuple[Path, Path]:
    """A guide, and where a model's evaluation goes; the pipeline's own as it names them.

    Raises ValueError if a stage before has not run, or what is there would be lost.
    """
    is_own = guide.resolve() == BUNDLE.resolve()
    if not (guide.is_dir() or old_of(guide).is_dir()):
        said = "run the stage halve first" if is_own else "python -m components.fetch brings one"
        raise ValueError(f"--guide {guide}: there is no such folder: {said}")
    if not (PREPARED / "manifest.json").exists():
        raise ValueError(f"there is no {PREPARED / 'manifest.json'}: dvc repro prepare makes it")
    if into.exists() and not into.is_dir():
        raise ValueError(f"--into {into}: it is a file; name a folder")
    if into.resolve() == EVALUATED.resolve():
        if not is_own:
            raise ValueError(f"--guide {guide}: {EVALUATED} is of {BUNDLE}: name another --into")
        return BUNDLE, EVALUATED
    place = into / model
    holds_results = place.is_dir() and ((place / FILE).exists() or not any(place.iterdir()))
    if place.exists() and not holds_results:
        raise ValueError(f"--into {into}: {place} has no {FILE}, and would be replaced")
    return (BUNDLE if is_own else guide), into


def check_dataset(config: "Prepare") -> None:
    """Raise ValueError if a parquet file of the data set lacks a column, or there is no file."""
    from components.parquet import check_columns, parquet_files

    for path in (Path(config.dataset, name) for name in config.files or ("",)):
        for file in [] if (path / "metadata.jsonl").exists() else parquet_files(path):
            check_columns(file, config.image_column, config.caption_column)


def check_num_steps(num_steps: int, base: str) -> None:
    """Raise ValueError if these are more sampling steps than the base has timesteps."""
    most = num_train_timesteps(base)
    if most is not None and num_steps > most:
        raise ValueError(f"{num_steps} steps, but {base} has {most} timesteps: no more than that")


def counts_of_steps(params: "Params") -> dict[str, int]:
    """By the key of params.yaml, the most sampling steps that each asks for."""
    return {
        "cache.trajectory_steps": params.cache.trajectory_steps,
        "halve.start_steps": params.halve.start_steps,
        "evaluate.num_steps": max(params.evaluate.num_steps),
        "evaluate.full.num_steps": max(params.evaluate.full.num_steps),
    }


def check_judge(judge: str) -> None:
    """Raise ValueError if a folder lacks what :class:`components.judging.Judge` opens."""
    folder = Path(judge)
    if not folder.is_dir():
        raise ValueError(f"{judge} is no folder")
    if not (folder / "config.json").exists():
        raise ValueError(
            f"{judge} has no config.json: a judge is a CLIP or another image model of transformers "
            "or timm, as save_pretrained writes it"
        )
    check_weight_files(folder)
    config = read_json(folder / "config.json")
    is_timm = "pretrained_cfg" in config  # which says how images are prepared
    if not is_timm and not any((folder / name).exists() for name in PROCESSORS):
        raise ValueError(f"{judge} has no {PROCESSORS[0]}, by which images are prepared for it")
    is_clip = config.get("model_type") == "clip"
    if is_clip and not any((folder / name).exists() for name in TOKENIZERS):
        raise ValueError(f"{judge} is a CLIP model without a tokenizer, by which it reads prompts")
    for file in folder.glob("inception-*.pt"):
        if not zipfile.is_zipfile(file):  # as TorchScript is
            raise ValueError(f"{file} is damaged or only partly downloaded: get it again")


def check_resolution(resolution: int, base: str) -> None:
    """Raise ValueError if the base's configs say that its images are of another size."""
    size = image_size(base)
    if size not in (None, resolution):
        raise ValueError(
            f"{resolution} pixels, but {base} makes images of {size}, to which all would be "
            f"scaled: set it to {size}"
        )
