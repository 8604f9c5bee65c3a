"""Captioned images as people have them: parquet files and image folders."""

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from components.params import Model, Params
from components.paths import PREPARED
from pnp_core.files import read_json

if TYPE_CHECKING:
    import numpy as np


class Record(NamedTuple):
    """One image of a data set, and what is said of it."""

    image: bytes  # an encoded file, as it lies there
    caption: str
    split: str | None
    where: str  # file and row, for messages


def read_records(path: Path, *, image_column: str, caption_column: str) -> list[Record]:
    """The images at `path`, and their captions.

    `path` is one of
    - a parquet file with the images as `{bytes, path}`, as Hugging Face datasets write them;
    - a folder of such files;
    - a folder with images and a metadata.jsonl, one object a line with `file_name` and the caption.

    Raises ValueError, naming the file, for one that can't be read.
    """
    if not path.is_dir():
        return _read_parquet(path, image_column, caption_column)
    if (path / "metadata.jsonl").exists():
        return _read_folder(path, caption_column)
    files = sorted(path.glob("*.parquet"))
    if not files:
        raise ValueError(f"{path} has neither parquet files nor a metadata.jsonl")
    return [
        record for file in files for record in _read_parquet(file, image_column, caption_column)
    ]


def fit(record: Record, resolution: int) -> tuple[Any, bool]:
    """The record's image as RGB, `resolution` pixels square; and whether it was so already.

    A larger one is scaled down and cropped at its centre, transparency becomes white. Raises
    ValueError if it can't be decoded or is smaller.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(record.image)) as opened:
            opened.load()
            image: Image.Image = opened.copy()
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{record.where}: not a readable image") from error
    if min(image.size) < resolution:
        raise ValueError(
            f"{record.where}: {image.width}x{image.height} pixels, fewer than the resolution of "
            f"{resolution}"
        )
    if image.mode == "RGB" and image.size == (resolution, resolution):
        return image, True
    if image.mode != "RGB":
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    return ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS), False


def encode(image: Any) -> bytes:
    """A PIL image as a lossless file."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True, quality=50, method=2)
    return buffer.getvalue()


def reference_images(reference: str, params: Params) -> "np.ndarray":
    """Every image that `reference` holds, in the resolution of the prepared ones: uint8."""
    import numpy as np

    if Path(reference) == PREPARED:
        columns = {"image_column": "image", "caption_column": "prompt"}
    else:
        columns = {
            "image_column": params.prepare.image_column,
            "caption_column": params.prepare.caption_column,
        }
    records = read_records(Path(reference), **columns)
    if len(records) < 2:
        raise ValueError(f"models: the reference {reference} has {len(records)} images: too few")
    resolution = read_json(PREPARED / "manifest.json")["resolution"]
    return np.stack([np.asarray(fit(record, resolution)[0]) for record in records])


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
        if not (Path(model.path).is_dir() and file.is_file()):
            raise ValueError(f"there is no file {file}: put it into the model's folder")
        where, found = str(file), tuple(file.read_text(encoding="utf-8").splitlines())
    prompts = tuple(line.strip() for line in found if line.strip())
    if not prompts:
        raise ValueError(f"there is no prompt in {where}")
    return prompts


def _read_parquet(path: Path, image_column: str, caption_column: str) -> list[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        columns = pq.read_schema(path).names
    except pa.ArrowInvalid:
        raise ValueError(f"{path} is not a parquet file, or only part of one") from None
    for name in (image_column, caption_column):
        if name not in columns:
            raise ValueError(f"{path} has no column {name!r}, it has {', '.join(columns)}")
    has_split = "split" in columns
    table = pq.read_table(
        path, columns=[image_column, caption_column, *(["split"] if has_split else [])]
    )
    records = []
    for number, row in enumerate(table.to_pylist()):
        where = f"{path}, row {number}"
        image = row[image_column]
        data = image.get("bytes") if isinstance(image, dict) else None
        if not isinstance(data, bytes):
            raise ValueError(
                f"{where}: column {image_column!r} holds no encoded image ({{bytes, path}}, as "
                "Hugging Face datasets write them)"
            )
        records.append(Record(data, row[caption_column] or "", row.get("split"), where))
    return records


def _read_folder(path: Path, caption_column: str) -> list[Record]:
    metadata = path / "metadata.jsonl"
    records = []
    for number, line in enumerate(metadata.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{metadata}, line {number}"
        try:
            entry = json.loads(line)
            image = (path / entry["file_name"]).read_bytes()
            records.append(Record(image, entry[caption_column], entry.get("split"), where))
        except json.JSONDecodeError:
            raise ValueError(f"{where}: not JSON") from None
        except KeyError as error:
            raise ValueError(f"{where}: no {error}") from None
        except FileNotFoundError:
            raise ValueError(f"{where}: there is no {path / entry['file_name']}") from None
    return records
