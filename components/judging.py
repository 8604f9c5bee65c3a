"""What judges images: networks from a folder, whose features FID, KID and diversity compare.

A CLIP model gives the CLIP score besides. A score depends on the network behind it, so
`Judge.name` stands beside every number.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import AutoImageProcessor, AutoModel, CLIPModel, CLIPProcessor

from pnp_core.model_files import PICKLES

INCEPTION = "inception-2015-12-05.pt"  # the network behind published FIDs, as clean-fid uses it
ON_DISK = {"local_files_only": True}
# In fp32 whatever the file has: fp16 takes a CPU four times as long.
OPENED: dict[str, Any] = {
    **ON_DISK,
    "use_safetensors": True,
    "dtype": torch.float32,
    "output_loading_info": True,
}


class Judge:
    """A network in a folder of safetensors, with its image processor.

    - a CLIP model: its image features, and the CLIP score; with Inception's weights beside it,
      Inception's features;
    - any other image model that `transformers.AutoModel` opens, timm's among them where timm is
      installed: the pooled features, or the mean of the last ones where the files have no weights
      for pooling, as those of a classifier.

    Raises ValueError if the folder holds nothing of the kind or only some of its weights, or the
    features are no vectors.

    Attributes:
        folder: where it is.
        name: what stands beside its numbers.
        reads_text: whether it has a CLIP score.
    """

    def __init__(self, folder: str, device: torch.device, *, batch_size: int = 256) -> None:
        self.folder = folder
        self._device, self._batch_size = device, batch_size
        self._clip, self._model, self._inception = None, None, None
        where = Path(folder).as_posix()
        try:
            if is_clip(folder):
                self._clip, about = CLIPModel.from_pretrained(folder, **OPENED)
                self._clip = self._clip.to(device).eval()
                self._processor = CLIPProcessor.from_pretrained(folder, **ON_DISK)
            else:
                self._model, about = AutoModel.from_pretrained(folder, **OPENED)
                self._model = self._model.to(device).eval()
                self._processor = AutoImageProcessor.from_pretrained(folder, **ON_DISK)
        except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"evaluate.judges: {folder} {objection(folder, error)}") from None
        self._pools = not check_complete(folder, about["missing_keys"])
        if Path(folder, INCEPTION).exists():
            from cleanfid.inception_torchscript import InceptionV3W
            from cleanfid.resize import build_resizer

            self._inception = InceptionV3W(folder, download=False).to(device)
            self._resize = build_resizer("clean")
        self.reads_text = self._clip is not None
        num_features = self._try(folder)
        kind = type(self._model).__name__ if self._model is not None else "CLIP"
        self.name = f"{where} ({kind}, {num_features} features)"
        if self._inception:
            self.name = f"{where} (Inception V3{'; CLIP score by CLIP' * self.reads_text})"

    @property
    def device(self) -> str:
        """The kind that it computes on, such as `cpu`."""
        return self._device.type

    def to(self, device: torch.device) -> None:
        """Compute there from now on."""
        self._device = device
        for network in (self._clip, self._model, self._inception):
            if network is not None:
                network.to(device)

    def features(self, images: np.ndarray) -> np.ndarray:
        """What FID and KID compare: uint8 images (N, height, width, 3) to features (N, D)."""
        return self._in_batches(self._see if self._inception else self._embed, images)

    def look(
        self, images: np.ndarray, prompts: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """`features`, and `clip_scores` if it reads text, with one look at each image."""
        embedded = self._in_batches(self._embed, images) if self.reads_text else None
        features = self.features(images) if self._inception or embedded is None else embedded
        return features, None if embedded is None else self._agreement(embedded, prompts)

    def clip_scores(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """100 cos(image, prompt) of each, not below 0 (Hessel et al. 2021 without their 2.5)."""
        return self._agreement(self._in_batches(self._embed, images), prompts)

    def _agreement(self, features: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """The CLIP score of embedded images."""
        assert self._clip
        distinct = sorted(set(prompts))
        tokens = self._processor.tokenizer(
            distinct, padding=True, truncation=True, return_tensors="pt"
        ).to(self._device)
        with torch.inference_mode():
            pooled = self._clip.text_model(**tokens).pooler_output
            text = self._clip.text_projection(pooled).float().cpu().numpy()
        rows = text[[distinct.index(prompt) for prompt in prompts]]
        norms = np.linalg.norm(features, axis=1) * np.linalg.norm(rows, axis=1)
        cosines = (features * rows).sum(axis=1) / norms
        scores: np.ndarray = np.maximum(100 * cosines, 0)
        return scores

    def _try(self, folder: str) -> int:
        """How many features it gives. Raises ValueError unless they are finite vectors."""
        images = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8)
        try:
            found = self.features(images)
        except (TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise ValueError(f"evaluate.judges: {folder} gives no features: {error}") from None
        if found.ndim != 2 or len(found) != 2 or not np.isfinite(found).all():
            raise ValueError(
                f"evaluate.judges: the features of {folder} do not fit: two images gave "
                f"{found.shape} numbers, {np.isfinite(found).mean():.0%} of them finite, where a "
                "judge gives one vector an image"
            )
        return found.shape[1]

    @torch.inference_mode()
    def _in_batches(
        self, function: Callable[[np.ndarray], torch.Tensor], images: np.ndarray
    ) -> np.ndarray:
        starts = range(0, len(images), self._batch_size)
        found = [function(images[start : start + self._batch_size]) for start in starts]
        return torch.cat(found).float().cpu().numpy()

    def _embed(self, images: np.ndarray) -> torch.Tensor:
        """CLIP's projected image features, not normalised; another model's pooled ones."""
        processor = self._processor if self._clip is None else self._processor.image_processor
        pixels = processor(list(images), return_tensors="pt").pixel_values.to(self._device)
        if self._clip is not None:
            pooled = self._clip.vision_model(pixels).pooler_output
            features: torch.Tensor = self._clip.visual_projection(pooled)
            return features
        return pooled_features(self._model, pixels, pools=self._pools)

    def _see(self, images: np.ndarray) -> torch.Tensor:
        """Inception's features, after clean-fid's resizing."""
        resized = np.stack([self._resize(image) for image in images]).transpose(0, 3, 1, 2)
        assert self._inception
        features: torch.Tensor = self._inception(torch.from_numpy(resized).to(self._device))
        return features


def check_complete(folder: str, lacking: Iterable[str]) -> bool:
    """Whether the weights that pool are lacking in a judge's files.

    They would be random, others each time. Raises ValueError if others are lacking.
    """
    lacking = sorted(lacking)
    if needed := [name for name in lacking if "pooler" not in name.split(".")]:
        raise ValueError(
            f"evaluate.judges: {folder} lacks {len(needed)} weights of the model that its "
            f"config.json tells of, such as {needed[0]}: get it again"
        )
    return bool(lacking)


def pooled_features(model: Any, pixels: torch.Tensor, *, pools: bool = True) -> torch.Tensor:
    """One vector an image, (N, D), of an image model of transformers.

    What the model pools itself, if it `pools`, else the mean over its tokens or pixels.
    """
    if hasattr(model, "get_image_features"):  # also reads text
        found = model.get_image_features(pixel_values=pixels)
    else:
        found = model(pixel_values=pixels)
    if isinstance(found, torch.Tensor):
        return found
    pooled = getattr(found, "pooler_output", None)
    if pools and pooled is not None:
        return pooled.flatten(1) if pooled.ndim == 4 else pooled
    last: torch.Tensor = found.last_hidden_state
    return last.mean(dim=1) if last.ndim == 3 else last.mean(dim=(2, 3))


def objection(folder: str, error: Exception) -> str:
    """Why a folder that can't be opened is no judge, and what to do where that is known."""
    files = [file for file in Path(folder).glob("*") if file.name != INCEPTION]
    pickled = sorted(file.name for file in files if file.suffix in PICKLES)
    if pickled and not any(file.suffix == ".safetensors" for file in files):
        return (
            f"has pickled weights ({pickled[0]}), and nothing is unpickled here: open the model "
            "where you trust it, and write it with save_pretrained, as safetensors"
        )
    return f"is not a CLIP or another image model with its processor, in safetensors: {error}"


def is_clip(folder: str) -> bool:
    """Whether a folder's config.json says that a CLIP model is in it."""
    config = Path(folder, "config.json")
    return (
        config.exists()
        and json.loads(config.read_text(encoding="utf-8")).get("model_type") == "clip"
    )
