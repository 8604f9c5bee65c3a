"""Room on a disk, looked for before it is needed."""

import io
import shutil
from pathlib import Path

from components.fitting import encode
from components.parquet import PreparedImages, read_prompts

IMAGES_WEIGHED = 32


def check_room(stage: str, folder: Path, needed: int, remedy: str) -> None:
    """Raises ValueError if the disk of `folder`, which is there, can't hold so many bytes more."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{stage}: {megabytes(needed)} to write, but the disk of {folder} has "
            f"{megabytes(free)} left: {remedy}"
        )


def megabytes(num_bytes: int) -> str:
    """A size for people, in millions of bytes."""
    return f"{num_bytes / 1e6:,.0f} MB"


def mean_bytes(path: Path) -> float:
    """What an image of a prepared file takes without loss: the mean of `IMAGES_WEIGHED`, at most.

    Raises ValueError, naming the file, for one that can't be read.
    """
    from PIL import Image

    images, count = PreparedImages(path), len(read_prompts(path))
    numbers = range(0, count, -(-count // IMAGES_WEIGHED))
    opened = (Image.open(io.BytesIO(images.read(number))) for number in numbers)
    return sum(len(encode(image.convert("RGB"))) for image in opened) / len(numbers)
