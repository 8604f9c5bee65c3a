"""What judges images: features for FID and KID by clean-fid, and the CLIP score.

A score depends on the network behind it, so `Judge.name` stands beside every number.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPModel, CLIPProcessor


class Judge:
    """A CLIP model, from a folder of safetensors.

    Raises ValueError if the folder holds no usable CLIP model.
    """

    def __init__(self, folder: str, device: torch.device, *, batch_size: int = 256) -> None:
        try:
            self._model = CLIPModel.from_pretrained(folder, use_safetensors=True).to(device).eval()
            self._processor = CLIPProcessor.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"evaluate.judge: {folder} is not a CLIP model with its processor: {error}"
            ) from None
        self.name = (
            f"{Path(folder).as_posix()} (CLIP, {self._model.config.projection_dim} features)"
        )
        self._device, self._batch_size = device, batch_size

    @torch.inference_mode()
    def features(self, images: np.ndarray) -> np.ndarray:
        """uint8 images (N, height, width, 3) to projected image features (N, D), not normalised."""
        found = []
        for start in range(0, len(images), self._batch_size):
            batch = list(images[start : start + self._batch_size])
            pixels = self._processor.image_processor(batch, return_tensors="pt").pixel_values
            pooled = self._model.vision_model(pixels.to(self._device)).pooler_output
            found.append(self._model.visual_projection(pooled).float().cpu().numpy())
        return np.concatenate(found)

    @torch.inference_mode()
    def clip_score(self, features: np.ndarray, prompts: Sequence[str]) -> float:
        """Mean of 100 cos(image, prompt), not below 0 (Hessel et al. 2021 without their 2.5)."""
        distinct = sorted(set(prompts))
        tokens = self._processor.tokenizer(
            distinct, padding=True, truncation=True, return_tensors="pt"
        ).to(self._device)
        pooled = self._model.text_model(**tokens).pooler_output
        text = self._model.text_projection(pooled).float().cpu().numpy()
        rows = text[[distinct.index(prompt) for prompt in prompts]]
        norms = np.linalg.norm(features, axis=1) * np.linalg.norm(rows, axis=1)
        cosines = (features * rows).sum(axis=1) / norms
        return float(np.maximum(100 * cosines, 0).mean())


def fid(features: np.ndarray, references: np.ndarray) -> float:
    """Fréchet distance of two sets of features, by clean-fid.

    With fewer images than dimensions, where the matrix square root loses its footing, the same
    number comes from the singular values of X Y^T.
    """
    from cleanfid.fid import fid_from_feats

    if min(len(features), len(references)) > features.shape[1]:
        return float(fid_from_feats(features, references))
    x, y = features.astype(np.float64), references.astype(np.float64)
    means = x.mean(axis=0) - y.mean(axis=0)
    x = (x - x.mean(axis=0)) / np.sqrt(len(x) - 1)
    y = (y - y.mean(axis=0)) / np.sqrt(len(y) - 1)
    overlap = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return float(means @ means + (x**2).sum() + (y**2).sum() - 2 * overlap)


def kid(features: np.ndarray, references: np.ndarray) -> float:
    """Kernel distance by clean-fid; unlike FID's, its expectation doesn't depend on the count."""
    from cleanfid.fid import kernel_distance

    np.random.seed(0)  # clean-fid draws its subsets from numpy's global generator
    return float(kernel_distance(features, references))
