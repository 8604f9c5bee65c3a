"""Stage prepare: captioned images, checked, of one size, split into train and held out.

Reads what `prepare.dataset` names. Writes data/prepared: train.parquet and heldout.parquet
(columns `image` and `prompt`), prompts.txt (those that have no image, for trajectories) and
manifest.json (counts, and a hash of the content).
"""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from components.cli import main, without_arguments
from components.dataset import count_records, each_record, lines_of
from components.fitting import Record, check_record, encode, fit
from components.params import Params, Prepare
from components.paths import PREPARED
from components.progress import Progress
from pnp_core.files import atomic_folder, write_json

ROWS_IN_A_GROUP = 64  # of a parquet file; the unit that is read at a time
NUM_TOLD = 10  # of bad images
# What a column `split` may say, beside `train`.
HELDOUT = ("heldout", "validation", "val", "valid", "dev", "eval", "test")


def run(params: Params) -> None:
    """Write data/prepared. Raises ValueError that names the files and rows of bad images."""
    config = params.prepare
    paths = [Path(config.dataset, name) for name in config.files] or [Path(config.dataset)]
    columns = {"image_column": config.image_column, "caption_column": config.caption_column}
    further = further_prompts(Path(config.prompts))
    num_records = sum(count_records(path, **columns) for path in paths)
    captions = check_records(paths, columns, config, num_records)
    known = captions["train"] | captions["heldout"]
    further = [prompt for prompt in further if prompt not in known]
    progress = Progress("prepare", num_records, "images")
    digest = hashlib.sha256()
    with atomic_folder(PREPARED) as folder, ExitStack() as stack:
        splits = {
            name: stack.enter_context(Split(folder / f"{name}.parquet"))
            for name in ("train", "heldout")
        }
        refused = Refusals()
        records = (record for path in paths for record in each_record(path, **columns))
        for number, record in enumerate(records, start=1):
            try:
                if refused.number:  # nothing will be kept: are there others?
                    fit(record, config.resolution)
                else:
                    data, name = prepared(record, config.resolution), split_of(record, config)
                    splits[name].add(data, record.caption)
                    line = f"{name}\0{record.caption}\0"
                    digest.update(hashlib.sha256(data).digest() + line.encode())
            except ValueError as error:
                refused(error)
                if refused.number == 1:
                    print(f"prepare: {error}; looking for others", flush=True)
                if refused.number == NUM_TOLD:
                    refused.check(f"the first {number}")
            progress(number)
        refused.check(num_records)
        digest.update("\0".join(further).encode())
        text = "".join(f"{prompt}\n" for prompt in further)
        (folder / "prompts.txt").write_text(text, encoding="utf-8")
        manifest = {
            "hash": digest.hexdigest(),
            "resolution": config.resolution,
            "num_images": {name: split.num_images for name, split in splits.items()},
            "num_prompts": {
                **{name: len(of_split) for name, of_split in captions.items()},
                "further": len(further),
            },
        }
        write_json(folder / "manifest.json", manifest)
    counts = ", ".join(f"{split.num_images} {name}" for name, split in splits.items())
    print(f"prepare: images of {config.resolution} px: {counts}")
    if in_both := captions["train"] & captions["heldout"]:
        print(f"prepare: {len(in_both)} captions are in both parts, and count as trained")


class Refusals:
    """Images that can't be used: the first are kept to be told, and all are counted."""

    def __init__(self) -> None:
        self.number = 0
        self._told: list[str] = []

    def __call__(self, error: ValueError) -> None:
        """One more, and why."""
        self.number += 1
        if len(self._told) < NUM_TOLD:
            self._told.append(str(error))

    def check(self, num_seen: int | str) -> None:
        """Raise ValueError that names the first and counts all, of so many; if there are any."""
        if self.number == 1:
            raise ValueError(f"prepare.dataset: {self._told[0]}")
        if self.number:
            more = self.number - len(self._told)
            raise ValueError(
                f"prepare.dataset: {self.number} of {num_seen} images can't be used: "
                f"{'; '.join(self._told)}{f'; and {more} more' if more else ''}"
            )


def check_records(
    paths: Sequence[Path], columns: Mapping[str, str], config: Prepare, num_records: int
) -> dict[str, set[str]]:
    """Look at every caption and at every image's header: minutes, where decoding takes hours.

    The captions of each part. Raises ValueError that names the first images that are bad, and says
    how many there are; or if nothing is held out, or all.
    """
    captions: dict[str, set[str]] = {"train": set(), "heldout": set()}
    refused = Refusals()
    progress = Progress("prepare", num_records, "images looked at")
    records = (record for path in paths for record in each_record(path, refused, **columns))
    num_seen = 0
    for num_seen, record in enumerate(records, start=1):
        try:
            check_record(record, config.resolution)
            captions[split_of(record, config)].add(record.caption)
        except ValueError as error:
            refused(error)
        progress(num_seen)
    if num_seen < num_records:  # the rest are refused rows: the line ends all the same
        progress(num_records)
    refused.check(num_records)
    for name, of_split in captions.items():
        if not of_split:
            raise ValueError(
                f"prepare.dataset: {config.dataset} has no {name} images, and {num_records} in all"
            )
    if captions["heldout"] <= captions["train"]:
        raise ValueError(
            f"prepare.dataset: every held-out caption of {config.dataset} is also one of train, so "
            "no prompt is held out: change the column `split`, or leave it out"
        )
    return captions


def prepared(record: Record, resolution: int) -> bytes:
    """An image as an encoded file of the resolution. Raises ValueError if it can't be decoded."""
    image, as_is = fit(record, resolution)
    return record.image if as_is else encode(image)


def split_of(record: Record, config: Prepare) -> str:
    """Which part of the data an image belongs to. Raises ValueError if its split says neither."""
    if record.split is None:
        is_heldout = falls_out(record.caption, config.heldout_fraction)
    elif record.split == "train" or record.split in HELDOUT:
        is_heldout = record.split != "train"
    else:
        raise ValueError(
            f"{record.where}: its split is {record.split!r}, which is neither train nor "
            f"{', '.join(HELDOUT[:-1])} or {HELDOUT[-1]}"
        )
    return "heldout" if is_heldout else "train"


class Split:
    """One file of prepared images, written by row groups: all may be more than memory holds."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        image = pa.struct({"bytes": pa.binary(), "path": pa.null()})
        self._schema = pa.schema({"image": image, "prompt": pa.string()})
        self._writer = pq.ParquetWriter(path, self._schema)
        self._rows: list[dict[str, Any]] = []
        self.num_images = 0

    def add(self, image: bytes, prompt: str) -> None:
        """An encoded image, as the last row."""
        self._rows.append({"image": {"bytes": image, "path": None}, "prompt": prompt})
        self.num_images += 1
        if len(self._rows) == ROWS_IN_A_GROUP:
            self._write()

    def _write(self) -> None:
        import pyarrow as pa

        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
            self._rows = []

    def __enter__(self) -> "Split":
        return self

    def __exit__(self, failed: type[BaseException] | None, *about: object) -> None:
        if failed is None:
            self._write()
        self._writer.close()


def further_prompts(path: Path) -> list[str]:
    """The lines of a text file, each once, without empty ones.

    Raises ValueError if it is no text in UTF-8.
    """
    try:
        prompts = dict.fromkeys(line.strip() for line in lines_of(path))
    except ValueError as error:
        raise ValueError(f"prepare.prompts: {error}") from None
    return [prompt for prompt in prompts if prompt]


def falls_out(prompt: str, fraction: float) -> bool:
    """Whether a prompt is held out: the same answer in every file and on every machine."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4]) < fraction * 2**32


if __name__ == "__main__":
    without_arguments("prepare", __doc__)
    main(run)
