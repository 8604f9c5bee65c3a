"""One image of a data set, checked and brought to the resolution."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from PIL import Image

# Modes of PIL.
SIXTEEN_BIT = "I;16"
WITHOUT_RANGE = {"I": "integers", "F": "floats"}
# By what PIL calls the packing of a PNG's pixels: those that it spreads over 8 bits, and how far.
SPREAD = {"L;2": 85, "L;4": 17}
SIXTEEN_BIT_RGB = "RGB;16B"
KEY = "transparency"  # PIL's name for what is transparent in an image without an alpha channel


class Record(NamedTuple):
    """One image of a data set, and what is said of it."""

    image: bytes  # an encoded file, as it lies there
    caption: str  # without spaces around it
    split: Any  # what the column `split` says, None without one
    where: str  # file and row, for messages


def check_record(record: Record, resolution: int) -> None:
    """Raise ValueError for an empty caption, and as far as the header tells for a bad image."""
    if not record.caption:
        raise ValueError(f"{record.where}: the caption is empty")
    with _opened(record) as image:
        size, mode = image.size, image.mode
    _check_mode(record, mode)
    _check_size(record, size, resolution)


def fit(record: Record, resolution: int) -> tuple[Any, bool]:
    """The record's image as RGB, `resolution` pixels square; and whether it was so already.

    It is turned as its EXIF orientation says. A larger one is scaled down and cropped at its
    centre, transparency becomes white, also that of a colour which a PNG keys, 16 bits become 8.
    Raises ValueError if it can't be decoded, is smaller, or is of a mode without a known white.
    """
    from PIL import Image, ImageOps

    from pnp_core.orientation import is_upright, upright

    with _opened(record) as opened:
        _bring_key_to_8_bits(opened)
        opened.load()
        as_is = is_upright(opened)
        image: Image.Image = upright(opened)
    _check_mode(record, image.mode)
    _check_size(record, image.size, resolution)
    if image.mode.startswith(SIXTEEN_BIT):
        image = _in_8_bits(image)
    is_plain = image.mode == "RGB" and KEY not in image.info
    if is_plain and image.size == (resolution, resolution):
        return image, as_is
    if not is_plain:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    return ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS), False


def _bring_key_to_8_bits(image: "Image.Image") -> None:
    """Have a PNG key its transparent colour as its pixels will be decoded: PIL does it for most."""
    from PIL.PngImagePlugin import PngImageFile

    if not isinstance(image, PngImageFile) or KEY not in image.info or not image.tile:
        return
    packed, key = image.tile[0].args, image.info[KEY]
    if packed in SPREAD:
        image.info[KEY] = key * SPREAD[packed]
    elif packed == SIXTEEN_BIT_RGB:
        image.info[KEY] = tuple(value // 256 for value in key)


def _in_8_bits(image: "Image.Image") -> "Image.Image":
    """An image of 16 bits, of which PIL would cut off all above 255."""
    import numpy as np
    from PIL import Image

    pixels, key = np.asarray(image), image.info.get(KEY)
    result = Image.fromarray((pixels // 256).astype(np.uint8))
    if key is not None:
        result.putalpha(Image.fromarray(np.where(pixels == key, 0, 255).astype(np.uint8)))
    return result


@contextmanager
def _opened(record: Record) -> "Iterator[Image.Image]":
    """The record's image, not decoded yet. Raises ValueError if that or the block fails."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(record.image)) as opened:
            yield opened
    except Image.DecompressionBombError:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # twice what PIL warns of
        raise ValueError(
            f"{record.where}: an image of more than {most:,} pixels, which are not decoded: make "
            "it smaller"
        ) from None
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{record.where}: not a readable image") from error


def _check_mode(record: Record, mode: str) -> None:
    """Raise ValueError if an image's numbers are of no range that is known."""
    if mode in WITHOUT_RANGE:
        raise ValueError(
            f"{record.where}: an image of 32-bit {WITHOUT_RANGE[mode]} (mode {mode}), of which "
            "nothing says what is white: convert it to 8 bits"
        )


def _check_size(record: Record, size: tuple[int, int], resolution: int) -> None:
    """Raise ValueError if an image of so many pixels is smaller than the resolution."""
    if min(size) < resolution:
        width, height = size
        raise ValueError(
            f"{record.where}: {width}x{height} pixels, fewer than the resolution of {resolution}"
        )


def encode(image: Any) -> bytes:
    """A PIL image as a lossless file."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True, quality=50, method=2)
    return buffer.getvalue()
