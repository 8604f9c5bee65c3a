"""Pictures turned as their EXIF orientation says."""

from PIL import Image
from PIL.ExifTags import Base
from PIL.Image import Transpose

# By the tag's value; 1, and what is none of EXIF's, is upright.
TURNS: dict[object, Transpose] = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


def upright(image: Image.Image) -> Image.Image:
    """A copy of the picture, turned if its EXIF orientation says so."""
    turn = TURNS.get(_orientation(image))
    return image.copy() if turn is None else image.transpose(turn)


def is_upright(image: Image.Image) -> bool:
    """Whether `upright` would change nothing."""
    return _orientation(image) not in TURNS


def _orientation(image: Image.Image) -> object:
    try:
        return image.getexif().get(Base.Orientation)
    except Exception:  # of a damaged block; the picture itself may be fine
        return None
