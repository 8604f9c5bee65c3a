"""Parquet files of images and captions, read with few of their rows in memory."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

# Of a file, which may hold more than memory does, in one row group.
ROWS_AT_ONCE = 64
BYTES_AT_ONCE = 2**20


def read_prompts(path: Path) -> list[str]:
    """The prompts of prepared images, in the rows' order: the images are not read.

    Raises ValueError, naming the file, for one that can't be read.
    """
    check_columns(path, "prompt")
    return [row["prompt"] or "" for row in rows_of(path, ["prompt"])]


class PreparedImages:
    """The encoded images of a prepared file, each read when it is asked for.

    Who asks in the order of rows reads the file once, and no row group without such a row.

    Raises ValueError, naming the file, for one that can't be read.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        check_columns(path, "image")
        self._path = path
        about = pq.read_metadata(path)
        sizes = [about.row_group(number).num_rows for number in range(about.num_row_groups)]
        self._starts = list(accumulate(sizes, initial=0))  # of row groups, and the end
        self._rows: Iterator[dict[str, Any]] = iter(())
        self._next = self._starts[-1]  # the number of the row that comes next

    def read(self, number: int) -> bytes:
        """The image of a row."""
        group = bisect_right(self._starts, number) - 1
        if number < self._next or self._starts[group] > self._next:
            self._rows, self._next = rows_of(self._path, ["image"], group), self._starts[group]
        others, self._next = number - self._next, self._starts[-1]  # begun anew if this fails
        row = next(islice(self._rows, others, None))
        self._next = number + 1
        return encoded_in(row, "image", f"{self._path}, row {number}")


def parquet_files(path: Path) -> list[Path]:
    """A file itself, or those of a folder; ValueError if that has none."""
    if not path.is_dir():
        return [path]
    files = sorted(path.glob("*.parquet"))
    if not files:
        raise ValueError(f"{path} has neither parquet files nor a metadata.jsonl")
    return files


def check_columns(path: Path, *needed: str) -> list[str]:
    """The columns of a parquet file. Raises ValueError if it is none, or lacks a needed one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        found: list[str] = pq.read_schema(path).names
    except pa.ArrowInvalid:
        raise ValueError(f"{path} is not a parquet file, or only part of one") from None
    except OSError as error:
        raise _unreadable(path, error) from None
    for name in needed:
        if name not in found:
            raise ValueError(f"{path} has no column {name!r}, it has {', '.join(found)}")
    return found


def rows_of(path: Path, names: Sequence[str], group: int = 0) -> Iterator[dict[str, Any]]:
    """These columns of a parquet file's rows, from a row group on, with few of them in memory.

    Raises ValueError, naming the file, for one that is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # By default all images of a row group are read before its first row is there.
        with pq.ParquetFile(path, buffer_size=BYTES_AT_ONCE, pre_buffer=False) as file:
            groups = list(range(group, file.num_row_groups))
            for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=groups, columns=list(names)):
                yield from batch.to_pylist()
    except MemoryError:  # an ArrowException too
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> Exception:
    """What to raise in place of an error of pyarrow's, which names no file."""
    if isinstance(error, FileNotFoundError | PermissionError):  # these do
        return error
    why = " ".join(str(error).split()).rstrip(".")
    return ValueError(f"{path} is damaged, or can't be read ({why}): get it again")


def encoded_in(row: dict[str, Any], image_column: str, where: str) -> bytes:
    """The image file in a row. Raises ValueError, saying where, if there is none."""
    image = row[image_column]
    data = image.get("bytes") if isinstance(image, dict) else None
    if not isinstance(data, bytes):
        raise ValueError(
            f"{where}: column {image_column!r} holds no encoded image ({{bytes, path}}, as "
            "Hugging Face datasets write them)"
        )
    return data
