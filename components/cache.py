"""Stage cache: everything frozen, computed once.

Reads data/prepared and the base. Writes data/cache: VAE moments, text states and teacher pairs in
checksummed shards. Shards that are there are not computed again; with `storage`, neither are those
that another machine has put there.
"""

import shutil

from components.cli import main
from components.dataset import read_records
from components.params import Params, teacher_guider
from components.paths import CACHE, PREPARED
from components.progress import Progress
from components.storage import Mirror, read_json


def run(params: Params) -> None:
    """Write data/cache. Raises ValueError if the disk can't hold it."""
    from components.device import load_base
    from pnp_core.cache import CacheBuilder, CacheConfig, Example
    from pnp_core.models import weights_hash

    records = read_records(
        PREPARED / "train.parquet", image_column="image", caption_column="prompt"
    )
    builder = CacheBuilder(
        load_base(params.base),
        [Example(image=record.image, prompt=record.caption) for record in records],
        CacheConfig(**params.cache.model_dump(), guider=teacher_guider(params)),
        CACHE,
        base_hash=weights_hash(params.base),
        data_hash=read_json(PREPARED / "manifest.json")["hash"],
    )
    names = [name for phase in builder.plan.phases for name in phase]
    mirror = Mirror(params.storage, f"cache/{builder.key('')}") if params.storage else None

    CACHE.mkdir(parents=True, exist_ok=True)
    for path in CACHE.iterdir():  # of an earlier, larger cache
        if path.stem not in names:
            path.unlink()
    if mirror and (num_files := mirror.pull(CACHE)):
        print(f"cache: {num_files} files from {params.storage}")
    missing = [name for name in names if not builder.is_built(name)]
    megabytes = builder.plan.num_bytes / 1e6
    print(
        f"cache: {len(names) - len(missing)} of {len(names)} shards there; "
        f"{builder.plan.num_forwards:,} UNet forwards and {megabytes:,.0f} MB in all",
        flush=True,
    )
    free = shutil.disk_usage(CACHE).free
    needed = builder.plan.num_bytes * len(missing) / len(names)
    if free < needed:
        raise ValueError(
            f"cache: {needed / 1e6:,.0f} MB to write, but the disk of {CACHE} has "
            f"{free / 1e6:,.0f} MB left: lower cache.num_forward or cache.num_trajectory"
        )
    progress = Progress("cache", len(names), "shards")
    progress(len(names) - len(missing))
    for number, name in enumerate(missing, start=1):
        builder.build(name)
        if mirror:
            mirror.put(builder.path(name), CACHE)
        progress(len(names) - len(missing) + number)
    builder.finish()
    if mirror:
        mirror.put(CACHE / "index.json", CACHE)


if __name__ == "__main__":
    main(run)
