"""Stage prepare: captioned images, checked, of one size, split into train and held out.

Reads what `prepare.dataset` names. Writes data/prepared: train.parquet and heldout.parquet
(columns `image` and `prompt`), prompts.txt (those that have no image, for trajectories) and
manifest.json (counts, and a hash of the content).
"""

import hashlib
from collections.abc import Set
from pathlib import Path

from components.cli import main
from components.dataset import encode, fit, read_records
from components.params import Params
from components.paths import PREPARED
from components.progress import Progress
from pnp_core.files import atomic_folder, write_json


def run(params: Params) -> None:
    """Write data/prepared. Raises ValueError that names the file and row of a bad image."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    config = params.prepare
    dataset = Path(config.dataset)
    records = [
        record
        for path in [dataset / name for name in config.files] or [dataset]
        for record in read_records(
            path, image_column=config.image_column, caption_column=config.caption_column
        )
    ]
    progress = Progress("prepare", len(records), "images")
    digest = hashlib.sha256()
    splits: dict[str, list[tuple[bytes, str]]] = {"train": [], "heldout": []}
    for number, record in enumerate(records):
        if not record.caption.strip():
            raise ValueError(f"prepare.dataset: {record.where}: the caption is empty")
        try:
            image, as_is = fit(record, config.resolution)
        except ValueError as error:
            raise ValueError(f"prepare.dataset: {error}") from None
        data = record.image if as_is else encode(image)
        if record.split is None:
            split = "heldout" if falls_out(record.caption, config.heldout_fraction) else "train"
        else:
            split = "train" if record.split == "train" else "heldout"
        splits[split].append((data, record.caption))
        digest.update(hashlib.sha256(data).digest() + f"{split}\0{record.caption}\0".encode())
        progress(number + 1)
    for name, rows in splits.items():
        if not rows:
            raise ValueError(
                f"prepare.dataset: {dataset} has no {name} images, and {len(records)} in all"
            )
    further = further_prompts(
        Path(config.prompts), known={prompt for rows in splits.values() for _, prompt in rows}
    )
    digest.update("\0".join(further).encode())
    with atomic_folder(PREPARED) as folder:
        for name, rows in splits.items():
            images = [{"bytes": data, "path": None} for data, _ in rows]
            table = pa.table({"image": images, "prompt": [prompt for _, prompt in rows]})
            pq.write_table(table, folder / f"{name}.parquet")
        text = "".join(f"{prompt}\n" for prompt in further)
        (folder / "prompts.txt").write_text(text, encoding="utf-8")
        manifest = {
            "hash": digest.hexdigest(),
            "resolution": config.resolution,
            "num_images": {name: len(rows) for name, rows in splits.items()},
            "num_prompts": {
                **{name: len({p for _, p in rows}) for name, rows in splits.items()},
                "further": len(further),
            },
        }
        write_json(folder / "manifest.json", manifest)
    counts = ", ".join(f"{len(rows)} {name}" for name, rows in splits.items())
    print(f"prepare: images of {config.resolution} px: {counts}")


def further_prompts(path: Path, *, known: Set[str]) -> list[str]:
    """The lines of a text file, each once, without empty ones and those of images, held out or not.

    Raises ValueError if it is no text in UTF-8.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"prepare.prompts: {path} is no text in UTF-8: {error}") from None
    prompts = dict.fromkeys(line.strip() for line in lines)
    return [prompt for prompt in prompts if prompt and prompt not in known]


def falls_out(prompt: str, fraction: float) -> bool:
    """Whether a prompt is held out: the same answer in every file and on every machine."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4]) < fraction * 2**32


if __name__ == "__main__":
    main(run)
