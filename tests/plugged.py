"""A call of a pipeline, as tests of plugged ones make it."""

from typing import Any

import numpy as np
import torch
from PIL import Image


def generate(pipe: Any, prompt: Any = "a cat", **options: Any) -> np.ndarray:
    defaults = {
        "prompt": prompt,
        "num_inference_steps": 4,
        "guidance_scale": 4.0,
        "output_type": "np",
        "generator": torch.Generator().manual_seed(3),
    }
    return np.asarray(pipe(**{**defaults, **options}).images)


def picture(colour: int = 128) -> Image.Image:
    return Image.new("RGB", (32, 32), (colour, 40, 90))
