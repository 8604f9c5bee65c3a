"""Captioned images as people have them: parquet files and image folders."""

import io
import json
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from components.params import Model, Params
from components.paths import PREPARED
from pnp_core.files import read_json

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

Refuse = Callable[[ValueError], None]

# Of a parquet file, which may hold more than memory does, in one row group.
ROWS_AT_ONCE = 64
BYTES_AT_ONCE = 2**20
# Modes of PIL.
SIXTEEN_BIT = "I;16"
WITHOUT_RANGE = {"I": "integers", "F": "floats"}


class Record(NamedTuple):
    """One image of a data set, and what is said of it."""

    image: bytes  # an encoded file, as it lies there
    caption: str  # without spaces around it
    split: Any  # what the column `split` says, None without one
    where: str  # file and row, for messages


def read_records(path: Path, *, image_column: str, caption_column: str) -> list[Record]:
    """The images at `path`, and their captions.

    `path` is one of
    - a parquet file with the images as `{bytes, path}`, as Hugging Face datasets write them;
    - a folder of such files;
    - a folder with images and a metadata.jsonl, one object a line with `file_name` and the caption.

    Raises ValueError, naming the file, for one that can't be read.
    """
    return list(each_record(path, image_column=image_column, caption_column=caption_column))


def count_records(path: Path, *, image_column: str, caption_column: str) -> int:
    """How many images are at `path`, which are not read.

    Raises ValueError, naming the file, for one that can't be read or lacks a column, and for a
    folder of neither kind.
    """
    if (path / "metadata.jsonl").exists():
        return sum(1 for line in lines_of(path / "metadata.jsonl") if line.strip())

    import pyarrow.parquet as pq

    files = _parquet_files(path)
    for file in files:
        _columns(file, image_column, caption_column)
    return sum(pq.read_metadata(file).num_rows for file in files)


def _raised(error: ValueError) -> None:
    raise error


def each_record(
    path: Path, refuse: Refuse = _raised, /, *, image_column: str, caption_column: str
) -> Iterator[Record]:
    """The same one after another, for more images than there is memory for.

    `refuse` hears of a row without an image or a caption, or with one that is no text; if it
    returns, the next one is read.
    """
    if (path / "metadata.jsonl").exists():
        yield from _read_folder(path, caption_column, refuse)
        return
    for file in _parquet_files(path):
        yield from _read_parquet(file, image_column, caption_column, refuse)


def lines_of(path: Path) -> list[str]:
    """The lines of a text file, with or without a byte order mark.

    A line ends where an editor ends it: what str.splitlines takes for an end besides may stand in a
    caption, as U+2028 does. Raises ValueError, naming the file, if it is no text in UTF-8.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a text file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from None
    return text.removesuffix("\n").split("\n") if text else []


def read_prompts(path: Path) -> list[str]:
    """The prompts of prepared images, in the rows' order: the images are not read.

    Raises ValueError, naming the file, for one that can't be read.
    """
    _columns(path, "prompt")
    return [row["prompt"] or "" for row in _rows(path, ["prompt"])]


class PreparedImages:
    """The encoded images of a prepared file, each read when it is asked for.

    Who asks in the order of rows reads the file once, and no row group without such a row.

    Raises ValueError, naming the file, for one that can't be read.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        _columns(path, "image")
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
            self._rows, self._next = _rows(self._path, ["image"], group), self._starts[group]
        others, self._next = number - self._next, self._starts[-1]  # begun anew if this fails
        row = next(islice(self._rows, others, None))
        self._next = number + 1
        return _encoded(row, "image", f"{self._path}, row {number}")


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
    centre, transparency becomes white, 16 bits become 8. Raises ValueError if it can't be decoded,
    is smaller, or is of a mode without a known white.
    """
    import numpy as np
    from PIL import Image, ImageOps

    from pnp_core.orientation import is_upright, upright

    with _opened(record) as opened:
        opened.load()
        as_is = is_upright(opened)
        image: Image.Image = upright(opened)
    _check_mode(record, image.mode)
    _check_size(record, image.size, resolution)
    if image.mode.startswith(SIXTEEN_BIT):  # PIL would cut off all above 255
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    if image.mode == "RGB" and image.size == (resolution, resolution):
        return image, as_is
    if image.mode != "RGB":
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    return ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS), False


@contextmanager
def _opened(record: Record) -> "Iterator[Image.Image]":
    """The record's image, not decoded yet. Raises ValueError if that or the block fails."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(record.image)) as opened:
            yield opened
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
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


def reference_images(reference: str, params: Params) -> "np.ndarray":
    """Every image that `reference` holds, in the resolution of the prepared ones: uint8."""
    import numpy as np

    return np.concatenate(list(reference_batches(reference, params, ROWS_AT_ONCE)))


def reference_batches(reference: str, params: Params, size: int) -> "Iterator[np.ndarray]":
    """The same, `size` at a time: (N, height, width, 3). No more than these are in memory.

    Raises ValueError for an image that can't be read, and if there are fewer than two.
    """
    records = each_record(Path(reference), **columns_of(reference, params))
    resolution = read_json(PREPARED / "manifest.json")["resolution"]
    num_images = 0
    while part := list(islice(records, size)):
        num_images += len(part)
        yield _pixels(part, resolution)
    if num_images < 2:
        raise ValueError(f"models: the reference {reference} has {num_images} images: too few")


def columns_of(reference: str, params: Params) -> dict[str, str]:
    """Where a reference's images and captions are: as prepared ones have them, or the data set."""
    if Path(reference) == PREPARED:
        return {"image_column": "image", "caption_column": "prompt"}
    config = params.prepare
    return {"image_column": config.image_column, "caption_column": config.caption_column}


def check_reference(reference: str, params: Params) -> None:
    """Raise ValueError if there are no two images in a reference, as far as no image is read."""
    columns = columns_of(reference, params)
    for _ in _entries(Path(reference), columns["caption_column"], _raised):
        pass
    num_images = count_records(Path(reference), **columns)
    if num_images < 2:
        raise ValueError(f"{reference} has {num_images} images: too few")


def own_prompts(model: Model) -> tuple[str, ...]:
    """A model's own prompts; none if it has those of the data.

    Raises ValueError for a list or a file without any, and for a file that is not in the model's
    folder, where DVC sees it change.
    """
    if model.prompts is None:
        return ()
    where, found = "the list", model.prompts
    if isinstance(found, str):
        file = Path(model.path, found)
        within = Path(os.path.abspath(file)).is_relative_to(os.path.abspath(model.path))
        if not (within and Path(model.path).is_dir() and file.is_file()):
            raise ValueError(f"there is no file {file} in the model's folder: put it there")
        where, found = str(file), tuple(lines_of(file))
    prompts = tuple(line.strip() for line in found if line.strip())
    if not prompts:
        raise ValueError(f"there is no prompt in {where}")
    return prompts


def _parquet_files(path: Path) -> list[Path]:
    """A file itself, or those of a folder; ValueError if that has none."""
    if not path.is_dir():
        return [path]
    files = sorted(path.glob("*.parquet"))
    if not files:
        raise ValueError(f"{path} has neither parquet files nor a metadata.jsonl")
    return files


def _columns(path: Path, *needed: str) -> list[str]:
    """The columns of a parquet file. Raises ValueError if it is none, or lacks a needed one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        found: list[str] = pq.read_schema(path).names
    except pa.ArrowInvalid:
        raise ValueError(f"{path} is not a parquet file, or only part of one") from None
    for name in needed:
        if name not in found:
            raise ValueError(f"{path} has no column {name!r}, it has {', '.join(found)}")
    return found


def _rows(path: Path, names: Sequence[str], group: int = 0) -> Iterator[dict[str, Any]]:
    """These columns of a parquet file's rows, from a row group on, with few of them in memory."""
    import pyarrow.parquet as pq

    # By default all images of a row group are read before its first row is there.
    with pq.ParquetFile(path, buffer_size=BYTES_AT_ONCE, pre_buffer=False) as file:
        groups = list(range(group, file.num_row_groups))
        for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=groups, columns=list(names)):
            yield from batch.to_pylist()


def _encoded(row: dict[str, Any], image_column: str, where: str) -> bytes:
    """The image file in a row. Raises ValueError, saying where, if there is none."""
    image = row[image_column]
    data = image.get("bytes") if isinstance(image, dict) else None
    if not isinstance(data, bytes):
        raise ValueError(
            f"{where}: column {image_column!r} holds no encoded image ({{bytes, path}}, as "
            "Hugging Face datasets write them)"
        )
    return data


def _caption(value: Any, where: str) -> str:
    """A caption without spaces around it. Raises ValueError, saying where, if it is no text."""
    if not isinstance(value, str | None):
        raise ValueError(f"{where}: the caption is no text: {value!r} ({type(value).__name__})")
    return (value or "").strip()


def _pixels(records: Sequence[Record], resolution: int) -> "np.ndarray":
    """The images of records, fitted: uint8, (N, resolution, resolution, 3)."""
    import numpy as np

    images = np.empty((len(records), resolution, resolution, 3), dtype=np.uint8)
    for number, record in enumerate(records):
        images[number] = fit(record, resolution)[0]
    return images


def _read_parquet(
    path: Path, image_column: str, caption_column: str, refuse: Refuse
) -> Iterator[Record]:
    there = _columns(path, image_column, caption_column)
    names = [image_column, caption_column, *(["split"] if "split" in there else [])]
    for number, row in enumerate(_rows(path, names)):
        where = f"{path}, row {number}"
        try:
            data = _encoded(row, image_column, where)
            caption = _caption(row[caption_column], where)
        except ValueError as error:
            refuse(error)
            continue
        yield Record(data, caption, row.get("split"), where)


def _read_folder(path: Path, caption_column: str, refuse: Refuse) -> Iterator[Record]:
    for entry, where in _entries(path, caption_column, refuse):
        image = (path / entry["file_name"]).read_bytes()
        yield Record(image, entry[caption_column], entry.get("split"), where)


def _entries(
    path: Path, caption_column: str, refuse: Refuse
) -> Iterator[tuple[dict[str, Any], str]]:
    """The lines of a folder's metadata.jsonl, and where they are; none if it has no such file."""
    metadata = path / "metadata.jsonl"
    lines = lines_of(metadata) if metadata.exists() else []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{metadata}, line {number}"
            try:
                entry = _entry(path, line, where, caption_column)
            except ValueError as error:
                refuse(error)
                continue
            yield entry, where


def _entry(path: Path, line: str, where: str, caption_column: str) -> dict[str, Any]:
    """What a line of metadata.jsonl says. Raises ValueError if it lacks something."""
    try:
        entry: dict[str, Any] = json.loads(line)
        image = path / entry["file_name"]
        if not image.is_file():
            raise ValueError(f"{where}: there is no {image}")
        if caption_column not in entry:
            raise KeyError(caption_column)
        entry[caption_column] = _caption(entry[caption_column], where)
    except json.JSONDecodeError:
        raise ValueError(f"{where}: not JSON") from None
    except KeyError as error:
        raise ValueError(f"{where}: no {error}") from None
    except TypeError:
        raise ValueError(f"{where}: no object with file_name and {caption_column}") from None
    return entry
