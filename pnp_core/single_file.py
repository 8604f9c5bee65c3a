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
from transformers import CLIPTokenizer

from pnp_core.files import in_short, read_json
from pnp_core.model_files import LAYOUTS, config_folder


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
            f"The weights in {path} don't fit the configs in {folder}: {problem_of(error)}"
        ) from None


def problem_of(error: Exception) -> str:
    """What is wrong with a single file; of missing weights diffusers says what it could not do."""
    lacks = "meta tensor" in str(error)
    return "some are missing; get it again" if lacks else f"{in_short(error)}."
