"""Stage cache: everything frozen, computed once.

Reads data/prepared and the base. Writes data/cache: VAE moments, text states and teacher pairs in
checksummed shards. Shards that are there are not computed again. With `storage`, shards are kept
there, whoever built them, and data/cache keeps the index only; training reads them from there.
"""

from collections.abc import Callable, Iterable, Set
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from components.cli import main
from components.cluster import run_tasks
from components.dataset import PreparedImages, lines_of, read_prompts
from components.disk import check_room, megabytes
from components.params import Params, cache_config, companion_paths
from components.paths import CACHE, PREPARED
from components.progress import Progress
from components.shipping import pack
from components.storage import Mirror
from pnp_core.files import read_json, write_bytes

if TYPE_CHECKING:
    from pnp_core.cache import CacheBuilder


def run(params: Params) -> None:
    """Write data/cache.

    Raises ValueError if the disk can't hold it, OSError if `storage` isn't there.
    """
    if params.storage:
        Mirror(params.storage).check()
    # Workers compute, and this process plans: the GPU is theirs.
    builder = cache_builder(params, on_cpu=params.cluster.num_workers > 0)
    plan = builder.plan
    mirror = cache_mirror(params, builder)
    CACHE.mkdir(parents=True, exist_ok=True)
    forget_damaged()
    for path in CACHE.iterdir():  # of an earlier, larger cache
        if path.stem not in plan.num_rows and path.is_file():
            path.unlink()
    elsewhere = mirror.names() if mirror else set()
    built = {name for name in plan.num_rows if builder.is_built(name)}
    there = {name for name in plan.num_rows if builder.path(name).name in elsewhere}
    missing = plan.num_rows.keys() - (there if mirror else built)
    total = sum(plan.num_bytes.values())
    print(
        f"cache: {plan.num_pairs:,} teacher pairs, {megabytes(total)} in {len(plan.num_rows)} "
        f"shards, {plan.num_forwards:,} UNet forwards; "
        f"{len(plan.num_rows) - len(missing)} shards are there",
        flush=True,
    )
    needed = sum(plan.num_bytes[name] for name in missing - built)
    check_room("cache", CACHE, needed, "lower cache.num_forward or cache.num_trajectory")
    if mirror and missing:
        fetch_missing([n for n in plan.phases[0] if n in there], builder, mirror)  # for pairs
    build_missing(params, builder, mirror, missing)
    index = CACHE / "index.json"
    if mirror and not missing and index.name in elsewhere:
        write_bytes(index, mirror.read(index.name))
    else:
        builder.finish(
            storage=mirror.url if mirror else None, fetch=mirror.read if mirror else None
        )
    if mirror:
        mirror.put(index, CACHE)
        for path in CACHE.glob("*.safetensors"):
            path.unlink()


def build_missing(
    params: Params, builder: "CacheBuilder", mirror: Mirror | None, missing: Set[str]
) -> None:
    """Make these shards, here or on Ray workers."""
    plan = builder.plan
    # Pairs take nearly all of the time.
    progress = Progress("cache", plan.num_pairs, "pairs")
    done = sum(plan.num_rows[name] for name in plan.phases[1] if name not in missing)
    progress(done)

    def count(num_pairs: int) -> None:
        nonlocal done
        done += num_pairs
        progress(done)

    def count_shard(name: str) -> None:
        if name in plan.phases[1]:
            count(plan.num_rows[name])

    phases = [[name for name in phase if name in missing] for phase in plan.phases]
    if params.cluster.num_workers:
        shipment = pack(
            params, [PREPARED, Path(params.base), Path(params.companions)], stage="cache"
        )
        run_tasks(shard_building, params, phases, count_shard, name="cache", shipment=shipment)
    else:
        builder.tell = count
        for name in chain(*phases):
            build(name, builder, mirror)


def forget_damaged() -> None:
    """Delete shards that are not what the index of an earlier run says, so that they are built."""
    from pnp_core.files import sha256_file

    index = CACHE / "index.json"
    recorded = read_json(index)["files"] if index.exists() else {}
    for name, checksum in recorded.items():
        path = CACHE / f"{name}.safetensors"
        if path.exists() and sha256_file(path) != checksum:
            print(f"cache: {path} is not what was written: made anew", flush=True)
            path.unlink()


def cache_builder(params: Params, *, on_cpu: bool = False) -> "CacheBuilder":
    """The builder of the whole cache: the base, its companions and the prepared examples.

    `on_cpu`: it holds the models there, also where there is a GPU.
    Images are read as they are encoded: there may be more than a worker's memory has room for.
    Raises ValueError for prepared data that can't be read, and for images of another size than the
    base makes.
    """
    import torch

    from components.device import load_base, load_companions
    from pnp_core.cache import CacheBuilder, Example
    from pnp_core.identity import base_identity

    path = PREPARED / "train.parquet"
    images = PreparedImages(path)
    pipe = load_base(params.base, torch.device("cpu") if on_cpu else None)
    manifest = read_json(PREPARED / "manifest.json")
    builder = CacheBuilder(
        pipe,
        [
            Example(image=partial(images.read, number), prompt=prompt)
            for number, prompt in enumerate(read_prompts(path))
        ],
        cache_config(params),
        CACHE,
        base=base_identity(params.base),
        data_hash=manifest["hash"],
        companions=load_companions(companion_paths(params), pipe),
        further_prompts=lines_of(PREPARED / "prompts.txt"),
    )
    if builder.image_size != manifest["resolution"]:  # configs on disk need not say it
        raise ValueError(
            f"prepare.resolution: {manifest['resolution']} pixels, but {params.base} makes images "
            f"of {builder.image_size}, to which all would be scaled: set it to {builder.image_size}"
        )
    return builder


def cache_mirror(params: Params, builder: "CacheBuilder") -> Mirror | None:
    """Where finished shards are kept besides this machine; None without `storage`."""
    return Mirror(params.storage, f"cache/{builder.key('')}") if params.storage else None


def build(name: str, builder: "CacheBuilder", mirror: Mirror | None) -> None:
    """Build one shard, and send it to where shards are kept."""
    builder.build(name)
    if mirror:
        mirror.put(builder.path(name), CACHE)


def shard_building(params: Params) -> Callable[[str], None]:
    """The work of each Ray worker: it loads the base once and then builds shards by name."""
    builder = cache_builder(params)
    mirror = cache_mirror(params, builder)

    def work(name: str) -> None:
        if mirror and name not in builder.plan.phases[0]:  # it is built from these
            fetch_missing(builder.plan.phases[0], builder, mirror)
        build(name, builder, mirror)

    return work


def fetch_missing(names: Iterable[str], builder: "CacheBuilder", mirror: Mirror) -> None:
    """Have these shards here, which are where shards are kept."""
    for name in names:
        if not builder.is_built(name):
            write_bytes(builder.path(name), mirror.read(builder.path(name).name))


if __name__ == "__main__":
    main(run)
