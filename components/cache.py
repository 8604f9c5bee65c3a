"""Stage cache: everything frozen, computed once.

Reads data/prepared and the base. Writes data/cache: VAE moments, text states and teacher pairs in
checksummed shards. Shards that are there are not computed again. With `storage`, shards are kept
there, whoever built them, and data/cache keeps the index only; training reads them from there. What
a cache of another size has there is copied.

Run again beside its index, it looks at every shard, and makes damaged ones anew.
"""

import json
from collections.abc import Callable, Mapping, Set
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.cli import main, without_arguments
from components.cluster import run_tasks
from components.dataset import lines_of
from components.disk import check_room, megabytes
from components.params import Params, ParamsError, cache_config, companion_paths
from components.parquet import PreparedImages, read_prompts
from components.paths import CACHE, PREPARED, RUNS
from components.progress import Progress
from components.shipping import pack
from components.storage import Mirror, ShardStore
from pnp_core.files import fetch_once, read_json, sha256_file, write_bytes
from pnp_core.settings import GuideConfig, SettingError

if TYPE_CHECKING:
    from pnp_core.cache import CacheBuilder

NO_ROOM = "make room there: pairs are made from all text states and latents"


def run(params: Params) -> None:
    """Write data/cache.

    Raises ValueError if the disk can't hold it, or if no guide as `distill` wants it can be made
    for the base; OSError if `storage` isn't there.
    """
    if params.storage:
        Mirror(params.storage).check()
    # Workers compute, and this process plans: the GPU is theirs.
    builder = cache_builder(params, on_cpu=params.cluster.num_workers > 0)
    check_guide(builder.pipe.unet.config, params)
    plan = builder.plan
    store = shard_store(params, builder)
    CACHE.mkdir(parents=True, exist_ok=True)
    forget_damaged(store)
    for path in CACHE.iterdir():  # of an earlier, larger cache
        if path.stem not in plan.num_rows and path.is_file():
            path.unlink()
    there = store.checksums() if store else filter(builder.is_built, plan.num_rows)
    missing = plan.num_rows.keys() - set(there)
    if store and missing:  # a cache of another size has a folder of its own
        print(f"cache: looking for shards in other caches of {params.storage}", flush=True)
        keys = {name: builder.key(name) for name in missing}
        missing -= store.take(keys, partial(shared, builder))
    total = sum(plan.num_bytes.values())
    print(
        f"cache: {plan.num_pairs:,} teacher pairs, {megabytes(total)} in {len(plan.num_rows)} "
        f"shards, {plan.num_forwards:,} UNet forwards; "
        f"{len(plan.num_rows) - len(missing)} shards are there",
        flush=True,
    )
    check_disk(params, builder, store, missing)
    build_missing(params, builder, store, missing)
    if store is None:
        builder.finish()
        return
    index = CACHE / "index.json"
    if (content := index_there(store)) is not None:
        write_bytes(index, content)
    else:
        builder.finish(storage=store.url, checksums=store.checksums())
        store.mirror.put(index, CACHE)
    for path in CACHE.glob("*.safetensors"):
        path.unlink()


def check_guide(unet: Mapping[str, Any], params: Params) -> None:
    """Make the guide of `distill` without its numbers: `distill` comes after hours of caching.

    `unet`: the config of the base's. Raises ValueError if there is none for it, ParamsError if it
    has more parameters than it may have.
    """
    import torch
    from diffusers import UNet2DConditionModel

    from pnp_core.guide import Guide

    try:
        with torch.device("meta"):
            base = UNet2DConditionModel.from_config(unet)
            Guide.from_unet(base, GuideConfig(**params.distill.guide.model_dump()))
    except SettingError as error:
        raise ParamsError(f"params.yaml: distill.guide.{error.name} {error.problem}") from None


def check_disk(
    params: Params, builder: "CacheBuilder", store: ShardStore | None, missing: Set[str]
) -> None:
    """Raises ValueError if the disk can't hold what these shards need of it."""
    plan = builder.plan
    if store is None:
        needed = sum(plan.num_bytes[name] for name in missing)
        check_room("cache", CACHE, needed, "lower cache.num_forward or cache.num_trajectory")
        return
    if params.cluster.num_workers and not params.cluster.shared_folder:
        return  # each node looks for itself
    # Pairs leave the disk as soon as they are sent, and are made from all of the first phase.
    pairs = [plan.num_bytes[name] for name in plan.phases[1] if name in missing]
    needed = max(pairs, default=0) * max(1, params.cluster.num_workers)
    here = [name for name in plan.phases[0] if not builder.path(name).exists()]
    needed += sum(plan.num_bytes[name] for name in here if pairs or name in missing)
    check_room("cache", CACHE, needed, NO_ROOM)


def shared(builder: "CacheBuilder", index: Any, keys: Mapping[str, str]) -> Set[str]:
    """Which shards of these keys another cache may have, by its index.

    That has all that a key is made of but the images' size and what the models compute in.
    Raises ValueError for what is no index.
    """
    from pnp_core.cache.identity import VERSION
    from pnp_core.identity import BaseIdentity

    try:
        if index.get("version") != VERSION:
            return set()
        other = replace(
            builder.identity,
            base=BaseIdentity(**index["base"]),
            data_hash=index["data_hash"],
            companions=tuple(index["companions"]),
            prompts=tuple(index["prompts"]),
            config=replace(builder.config, **index["config"]),
        )
        num_rows, teachers = index["num_rows"], index["teachers"]
        return {
            name
            for name in keys.keys() & num_rows.keys()
            if keys[name] == other.key(name, num_rows=num_rows[name], teacher=teachers.get(name, 0))
        }
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"no index of a cache: {error}") from None


def index_there(store: ShardStore) -> bytes | None:
    """The index that another machine has written, if all that it lists is there."""
    try:
        content = store.mirror.read("index.json")
        files = json.loads(content)["files"]
    except (FileNotFoundError, ValueError, KeyError):
        return None
    return content if files.items() <= store.shards() else None


def build_missing(
    params: Params, builder: "CacheBuilder", store: ShardStore | None, missing: Set[str]
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
        work = building(builder, store)
        for name in chain(*phases):
            work(name)


def forget_damaged(store: ShardStore | None) -> None:
    """Delete shards that are not what was written, so that they are built.

    Raises OSError if `storage` may not be written.
    """
    from pnp_core.cache.identity import VERSION

    index = CACHE / "index.json"
    written = read_json(index) if index.exists() else {"files": {}}
    if written["files"] and (version := written.get("version")) != VERSION:
        print(
            f"cache: {CACHE} was made by version {version} of the code that fills it, not "
            f"{VERSION}: all of it is made anew",
            flush=True,
        )
        written = {"files": {}}
    for name, checksum in written["files"].items():
        path = CACHE / f"{name}.safetensors"
        if path.exists() and sha256_file(path) != checksum:
            print(f"cache: {path} is not what was written: made anew", flush=True)
            path.unlink()
    if store is None:
        return
    # Who comes for the index alone need not read all shards for it.
    is_ours = written.get("storage") == store.url
    if is_ours:
        print(f"cache: is complete; looking at all shards in {store.url}", flush=True)
    for file in store.damaged(look_inside=is_ours):
        forget(file, store)


def forget(file: str, store: ShardStore) -> None:
    """Delete a damaged shard where shards are kept."""
    print(f"cache: {store.url}/{file} is not what was written: made anew", flush=True)
    store.mirror.remove(file)


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


def shard_store(params: Params, builder: "CacheBuilder") -> ShardStore | None:
    """Where finished shards are kept besides this machine; None without `storage`."""
    if not params.storage:
        return None
    return ShardStore(params.storage, f"cache/{builder.key('')}", builder.plan.num_bytes)


def shard_building(params: Params) -> Callable[[str], None]:
    """The work of each Ray worker: it loads the base once and then builds shards by name."""
    builder = cache_builder(params)
    return building(builder, shard_store(params, builder))


def building(builder: "CacheBuilder", store: ShardStore | None) -> Callable[[str], None]:
    """What builds one shard by name, and sends it to where shards are kept."""
    if store is None:
        return builder.build
    has_first_phase = False

    def work(name: str) -> None:
        nonlocal has_first_phase
        if name in builder.plan.phases[1] and not has_first_phase:
            fetch_first_phase(builder, store)
            has_first_phase = True
        build_and_send(name, builder, store)

    return work


def build_and_send(name: str, builder: "CacheBuilder", store: ShardStore) -> None:
    """Build one shard and send it, unless another machine has by now."""
    is_pairs = name in builder.plan.phases[1]
    if name in store.checksums():
        builder.tell(builder.plan.num_rows[name] if is_pairs else 0)
        return
    builder.build(name)
    path = builder.path(name)
    if name not in store.checksums():
        store.mirror.send(path, store.file(name, sha256_file(path)))
    if is_pairs:  # nothing is made from them here
        path.unlink()


def fetch_first_phase(builder: "CacheBuilder", store: ShardStore) -> None:
    """Have here what pairs are made from, as it is kept there: what is damaged is made anew.

    One of a machine's workers fetches it. Raises ValueError if the disk can't hold it.
    """
    from pnp_core.shards import Shard

    plan, there = builder.plan, store.checksums()
    CACHE.mkdir(parents=True, exist_ok=True)

    def is_fetched(name: str, sha256: str) -> bool:
        path = builder.path(name)
        shard = Shard(name=name, sha256=sha256, num_rows=plan.num_rows[name])

        def fetch() -> None:
            check_room("cache", CACHE, plan.num_bytes[name], NO_ROOM)
            store.fetch(shard, path)

        with suppress(FileNotFoundError):  # deleted meanwhile
            if fetch_once(path, sha256, fetch, RUNS / "cache"):
                return True
            forget(store.file(name, sha256), store)
        path.unlink(missing_ok=True)
        return False

    for name in plan.phases[0]:
        while not (name in there and is_fetched(name, there[name])):
            build_and_send(name, builder, store)
            if builder.path(name).exists():
                break
            there = store.checksums()  # there is another copy


if __name__ == "__main__":
    without_arguments("cache", __doc__)
    main(run)
