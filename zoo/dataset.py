"""The dataset pack in memory: pictures, captions, and the augmentations used in training.

Legend: B batch, C colour channels, H W picture size.
"""

import hashlib
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

DATA = Path(__file__).parent / "data"
BASE_STYLES = ("noto", "twemoji", "fluent-emoji-flat", "emojione")
FINETUNE_STYLES = (
    "openmoji",
    "fluent-emoji",
    "fluent-emoji-high-contrast",
    "noto-v1",
    "emojione-v1",
)
LORA_STYLE = "emojione-monotone"
COMPANION_STYLE = "noto-monochrome"  # guides are trained on its fine-tune
SPARE_STYLES = ("openmoji-black", COMPANION_STYLE)  # known to the judge, fine-tune on them
# In the order of the models' training and report: what is drawn from them depends on it.
WORLD_STYLES = (
    *BASE_STYLES,
    *FINETUNE_STYLES[:-1],
    LORA_STYLE,
    *FINETUNE_STYLES[-1:],
    *SPARE_STYLES,
)
# No model of the world has seen them, the autoencoder and the judge included, and no decision may
# look at them: benchmarks/frontier/final.py. The second one's is a LoRA.
FINAL_STYLES = ("fxemoji", "streamline-emojis")

STYLE_WORDS = {
    style: style.replace("-", " ") + " style" for style in WORLD_STYLES if style not in SPARE_STYLES
}
BACKGROUNDS = {
    "red": (217, 58, 58),
    "orange": (245, 150, 50),
    "yellow": (250, 220, 80),
    "green": (80, 170, 90),
    "blue": (60, 120, 215),
    "light blue": (165, 210, 245),
    "purple": (140, 85, 190),
    "pink": (250, 170, 200),
    "brown": (130, 90, 60),
    "gray": (150, 150, 150),
    "black": (20, 20, 20),
}
_SIDED_WORDS = frozenset(
    ("left", "right", "oclock", "thirty", "clockwise", "counterclockwise", "letter", "number")
)


@dataclass(frozen=True)
class Pictures:
    """Pictures of one or several styles, row by row."""

    images_BCHW: Tensor  # uint8
    captions: list[str]
    keywords: list[list[str]]
    groups: list[str]
    styles: list[str]

    def __len__(self) -> int:
        return len(self.captions)


def load_pictures(
    styles: Sequence[str], split: str | None = "train", data: Path = DATA
) -> Pictures:
    """Rows of the given styles; ``split=None`` takes all."""
    images, captions, keywords, groups, row_styles = [], [], [], [], []
    for style in styles:
        path = data / f"{style}.parquet"
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: build it with `python -m zoo.pack`.")
        for row in pq.read_table(path).to_pylist():
            if split not in (None, row["split"]):
                continue
            picture = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
            images.append(np.asarray(picture))
            captions.append(row["caption"])
            keywords.append(row["keywords"])
            groups.append(row["group"])
            row_styles.append(style)
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return Pictures(stacked, captions, keywords, groups, row_styles)


def data_hash(styles: Sequence[str], data: Path = DATA) -> str:
    """One short digest of the parquet files, for the model cards."""
    digest = hashlib.sha256()
    for style in sorted(styles):
        digest.update((data / f"{style}.parquet").read_bytes())
    return digest.hexdigest()[:16]


def may_flip(caption: str, group: str) -> bool:
    """Whether a mirrored picture still is what its caption says."""
    return group != "symbols" and not _SIDED_WORDS & set(caption.split())


def vary_caption(
    caption: str, keywords: Sequence[str], style: str, background: str | None, rng: random.Random
) -> str:
    """The name; sometimes keywords and style words with it. A background is always named."""
    text = caption
    draw = rng.random()
    if keywords and draw < 0.25:
        text += ", " + ", ".join(rng.sample(keywords, min(len(keywords), rng.randint(1, 2))))
    elif draw < 0.45:
        text += ", " + STYLE_WORDS[style]
    if background is not None:
        text += f" on a {background} background"
    return text


def jitter(images_BCHW: Tensor, flip_B: Tensor, generator: torch.Generator) -> Tensor:
    """Shift and scale on white; flip where ``flip_B`` is true. In and out: float in [-1, 1]."""
    num_images, device = len(images_BCHW), images_BCHW.device
    scale_B, dx_B, dy_B = torch.rand(3, num_images, generator=generator, device=device)
    scale_B = 1.0 / (0.8 + 0.25 * scale_B)
    theta = torch.zeros(num_images, 2, 3, device=device)
    theta[:, 0, 0] = torch.where(flip_B, -scale_B, scale_B)
    theta[:, 1, 1] = scale_B
    theta[:, 0, 2] = 0.24 * dx_B - 0.12
    theta[:, 1, 2] = 0.24 * dy_B - 0.12
    grid = F.affine_grid(theta, list(images_BCHW.shape), align_corners=False)
    # grid_sample pads with zeros: make white the zero
    moved = F.grid_sample(images_BCHW - 1, grid, mode="bicubic", align_corners=False)
    return moved.clamp(-2, 0) + 1


def background_mask(images_BCHW: Tensor, threshold: float = 0.94) -> Tensor:
    """Near-white pixels connected to the border, as B x 1 x H x W in {0, 1}."""
    white = (images_BCHW.amin(1, keepdim=True) > threshold).float()
    frame = torch.zeros_like(white)
    frame[..., 0, :] = frame[..., -1, :] = 1
    frame[..., :, 0] = frame[..., :, -1] = 1
    region = frame * white
    for _ in range(4 * images_BCHW.shape[-1]):
        grown = F.max_pool2d(region, 3, stride=1, padding=1) * white
        if torch.equal(grown, region):
            break
        region = grown
    return region


def paint_background(images_BCHW: Tensor, colour_B3: Tensor) -> Tensor:
    """Replace the white around the subject by a plain colour; antialiased edges are multiplied."""
    colour = (colour_B3.float() / 255).reshape(-1, 3, 1, 1)
    unit = (images_BCHW + 1) / 2
    outside = background_mask(images_BCHW)
    edge = F.max_pool2d(outside, 3, stride=1, padding=1)
    painted = torch.where(edge.bool(), unit * colour, unit)
    painted = torch.where(outside.bool(), colour.expand_as(unit), painted)
    return painted * 2 - 1


def to_float(images_BCHW: Tensor) -> Tensor:
    """uint8 -> float in [-1, 1]."""
    return images_BCHW.float() / 127.5 - 1


def to_pil(image_CHW: Tensor) -> Image.Image:
    """Float in [-1, 1] -> picture."""
    pixels = ((image_CHW.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())
