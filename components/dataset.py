"""Captioned images as people have them: parquet files and image folders."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.fitting import Record, fit
from components.params import Model, Params
from components.parquet import ROWS_AT_ONCE, check_columns, encoded_in, parquet_files, rows_of
from components.paths import PREPARED
from pnp_core.files import read_json

if TYPE_CHECKING:
    import numpy as np

Refuse = Callable[[ValueError], None]


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

    files = parquet_files(path)
    for file in files:
        check_columns(file, image_column, caption_column)
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
    for file in parquet_files(path):
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


def _caption(value: Any, where: str) -> str:
    """A caption without spaces around it. Raises ValueError, saying where, if it is no text."""
    if not isinstance(value, str | None):
        raise ValueError(f"{where}: the caption is no text: {value!r} ({type(value).__name__})")
    caption = (value or "").strip()
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        half = ascii(caption[error.start])
        raise ValueError(
            f"{where}: the caption has {half}, which is half of a character: write the whole one, "
            "or leave it out"
        ) from None
    return caption


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
    there = check_columns(path, image_column, caption_column)
    names = [image_column, caption_column, *(["split"] if "split" in there else [])]
    for number, row in enumerate(rows_of(path, names)):
        where = f"{path}, row {number}"
        try:
            data = encoded_in(row, image_column, where)
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
        entry = json.loads(line)
    except json.JSONDecodeError:
        raise ValueError(f"{where}: not JSON") from None
    except RecursionError:
        raise ValueError(f"{where}: JSON that is nested too deep") from None
    except ValueError:
        raise ValueError(f"{where}: JSON with a number of too many digits") from None
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: no object with file_name and {caption_column}")
    if "file_name" not in entry:
        raise ValueError(f"{where}: no 'file_name'")
    name = entry["file_name"]
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{where}: file_name is {ascii(name)}: write the name of an image there")
    if not (path / name).is_file():
        raise ValueError(f"{where}: there is no file {path / name}")
    if caption_column not in entry:
        raise ValueError(f"{where}: no {caption_column!r}")
    entry[caption_column] = _caption(entry[caption_column], where)
    return entry
