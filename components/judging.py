"""What judges images: features for FID and KID by clean-fid, and the CLIP score.

A score depends on the network behind it, so `Judge.name` stands beside every number.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPModel, CLIPProcessor

INCEPTION = "inception-2015-12-05.pt"  # the network behind published FIDs, as clean-fid uses it


class Judge:
    """A CLIP model, from a folder of safetensors; with an Inception beside it if that lies there.

    Raises ValueError if the folder holds no usable CLIP model.
    """

    def __init__(self, folder: str, device: torch.device, *, batch_size: int = 256) -> None:
        from cleanfid.inception_torchscript import InceptionV3W
        from cleanfid.resize import build_resizer

        try:
            self._clip = CLIPModel.from_pretrained(folder, use_safetensors=True).to(device).eval()
            self._processor = CLIPProcessor.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"evaluate.judge: {folder} is not a CLIP model with its processor: {error}"
            ) from None
        self.name = f"{Path(folder).as_posix()} (CLIP, {self._clip.config.projection_dim} features)"
        self._inception = None
        if Path(folder, INCEPTION).exists():
            self._inception = InceptionV3W(folder, download=False).to(device)
            self._resize = build_resizer("clean")
            self.name = f"{Path(folder).as_posix()} (Inception V3; CLIP score by CLIP)"
        self._device, self._batch_size = device, batch_size

    def features(self, images: np.ndarray) -> np.ndarray:
        """What FID and KID compare: uint8 images (N, height, width, 3) to features (N, D)."""
        return self._in_batches(self._see if self._inception else self._embed, images)

    def clip_score(self, images: np.ndarray, prompts: Sequence[str]) -> float:
        """Mean of 100 cos(image, prompt), not below 0 (Hessel et al. 2021 without their 2.5)."""
        distinct = sorted(set(prompts))
        tokens = self._processor.tokenizer(
            distinct, padding=True, truncation=True, return_tensors="pt"
        ).to(self._device)
        with torch.inference_mode():
            pooled = self._clip.text_model(**tokens).pooler_output
            text = self._clip.text_projection(pooled).float().cpu().numpy()
        rows = text[[distinct.index(prompt) for prompt in prompts]]
        features = self._in_batches(self._embed, images)
        norms = np.linalg.norm(features, axis=1) * np.linalg.norm(rows, axis=1)
        cosines = (features * rows).sum(axis=1) / norms
        return float(np.maximum(100 * cosines, 0).mean())

    @torch.inference_mode()
    def _in_batches(
        self, function: Callable[[np.ndarray], torch.Tensor], images: np.ndarray
    ) -> np.ndarray:
        starts = range(0, len(images), self._batch_size)
        found = [function(images[start : start + self._batch_size]) for start in starts]
        return torch.cat(found).float().cpu().numpy()

    def _embed(self, images: np.ndarray) -> torch.Tensor:
        """CLIP's projected image features, not normalised."""
        pixels = self._processor.image_processor(list(images), return_tensors="pt").pixel_values
        pooled = self._clip.vision_model(pixels.to(self._device)).pooler_output
        features: torch.Tensor = self._clip.visual_projection(pooled)
        return features

    def _see(self, images: np.ndarray) -> torch.Tensor:
        """Inception's features, after clean-fid's resizing."""
        resized = np.stack([self._resize(image) for image in images]).transpose(0, 3, 1, 2)
        assert self._inception
        features: torch.Tensor = self._inception(torch.from_numpy(resized).to(self._device))
        return features


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
