"""What params.yaml points at, looked at without loading it, which takes minutes and comes late."""

import zipfile
from pathlib import Path

from pnp_core.files import read_json
from pnp_core.model_files import TOKENIZERS, check_weight_files, image_size

PROCESSORS = ("preprocessor_config.json", "processor_config.json")


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
