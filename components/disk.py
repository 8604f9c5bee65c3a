"""Room on a disk, looked for before it is needed."""

import shutil
from pathlib import Path


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
