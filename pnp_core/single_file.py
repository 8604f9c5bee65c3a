"""Single ``.safetensors`` files in the original Stable Diffusion key layout.

Such a file holds weights only. What they belong to is told by configs: those of Stable Diffusion
1.5, 2.1 and XL are in ``layouts/``; those of any other model, and its tokenizer, belong in a folder
beside the file with the file's name (``model/`` beside ``model.safetensors``), which comes first.
Nothing is asked of a hub.
"""

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import SingleFileComponentError
from safetensors import safe_open
from transformers import CLIPTokenizer

from pnp_core.files import read_json
from pnp_core.model_files import PARTS

LAYOUTS = Path(__file__).parent / "layouts"
LAYOUT_OF_TEXT_WIDTH = {768: "sd15", 1024: "sd21", 2048: "sdxl"}
CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
TEXT_TO_KEY = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"


def configs_of(path: str | Path) -> Path | None:
    """The folder of configs of a model on disk; None of a hub id."""
    path = Path(path)
    if path.is_file():
        return config_folder(path)
    return path if (path / "model_index.json").exists() else None


def config_folder(path: Path, like: Path | None = None) -> Path:
    """The folder of configs that a single file's pipeline is made by.

    Args:
        path: of the file.
        like: configs of the base that the file is a fine-tune of: its own, where it has none.

    Raises:
        ValueError: the file is no whole checkpoint, or of a kind whose configs aren't known.
    """
    with safe_open(path, "pt") as file:
        keys = list(file.keys())
        if CONV_IN not in keys or TEXT_TO_KEY not in keys:
            raise ValueError(
                f"{path} is not a checkpoint in the original Stable Diffusion layout: it has no "
                f"{CONV_IN if CONV_IN not in keys else TEXT_TO_KEY}."
            )
        channels, in_channels = file.get_slice(CONV_IN).get_shape()[:2]
        text_width = file.get_slice(TEXT_TO_KEY).get_shape()[1]
    for part, prefixes in PARTS.items():
        if not any(key.startswith(prefixes) for key in keys):
            raise ValueError(
                f"{path} has no {part}: it can be a fine-tune of a base, but not a base."
            )
    beside = path.with_suffix("")
    if (beside / "model_index.json").exists():
        return beside
    if like is not None:
        return like
    layout = LAYOUT_OF_TEXT_WIDTH.get(text_width)
    if layout is None or (channels, in_channels) != (320, 4):
        raise ValueError(
            f"The UNet in {path} ({in_channels} input channels, {channels} wide, text width "
            f"{text_width}) is not that of Stable Diffusion 1.5, 2.1 or XL. Put the configs and "
            f"the tokenizer of its diffusers folder into {beside}, beginning with model_index.json."
        )
    return LAYOUTS / layout


def load_single_file(
    path: Path, *, dtype: torch.dtype, like: Path | None = None
) -> DiffusionPipeline:
    """The whole pipeline from a single file, by configs as :func:`config_folder` finds them.

    Raises:
        ValueError: see :func:`config_folder`; or weights and configs don't fit.
    """
    folder = config_folder(path, like)
    index = read_json(folder / "model_index.json")
    options: dict[str, Any] = {"torch_dtype": dtype}
    if "safety_checker" in index:
        options["safety_checker"] = None
    if folder.parent == LAYOUTS:
        # One vocabulary serves all; OpenCLIP's text encoders were trained with another padding.
        tokenizer, padded_with_0 = (
            CLIPTokenizer.from_pretrained(LAYOUTS / "tokenizer", pad_token=pad_token)
            for pad_token in ("<|endoftext|>", "!")
        )
        options["tokenizer"] = padded_with_0 if folder.name == "sd21" else tokenizer
        if "tokenizer_2" in index:
            options["tokenizer_2"] = padded_with_0
    pipeline_class = getattr(diffusers, index["_class_name"])
    try:
        return pipeline_class.from_single_file(
            str(path), config=str(folder), local_files_only=True, **options
        )
    except (KeyError, RuntimeError, SingleFileComponentError, ValueError) as error:
        raise ValueError(
            f"The weights in {path} don't fit the configs in {folder}: {error}"
        ) from None
