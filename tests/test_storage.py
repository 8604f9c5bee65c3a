"""Storage does what it is told: nothing is made unasked, mistakes are told at once."""

import errno
import hashlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import s3fs
import torch

from components import cache, cli, distill, prepare
from components.environment import quiet
from components.errors import MayPassError
from components.params import Params, load_params
from components.storage import Mirror, ShardStore
from pnp_core.files import read_json, write_json
from pnp_core.shards import Shard
from tests import toy
from tests.cases import few_of

pytest_plugins = ["tests.toy"]
quiet()


def params_with(**values: Any) -> Params:
    toy.write_params(Path(), toy.toy_params() | values)
    return load_params(Path("params.yaml"))


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that storage would have waited."""
    waited: list[float] = []
    monkeypatch.setattr("components.storage.time.sleep", waited.append)
    return waited


def buckets() -> list[str]:
    return list(s3fs.S3FileSystem().ls("", refresh=True))


def test_a_misspelt_bucket_is_told_before_the_base_loads_and_is_not_made(
    world: Path, s3: str, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    monkeypatch.setattr(cache, "cache_builder", None)  # would load the base
    with pytest.raises(OSError, match="there is no bucket buckt: correct `storage` in params.yaml"):
        cache.run(params_with(storage="s3://buckt/prefix"))
    with pytest.raises(OSError, match="there is no bucket buckt"):
        Mirror("s3://buckt/prefix").put(Path("params.yaml"), Path())
    with pytest.raises(OSError, match="there is no bucket buckt"):
        Mirror("s3://buckt/prefix").names()
    with pytest.raises(OSError, match="there is no bucket buckt") as caught:
        Mirror("s3://buckt/prefix").read("a")
    assert not isinstance(caught.value, FileNotFoundError), "which says that the file is gone"
    assert buckets() == ["bucket"] and not waits


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    """The disk may not be mounted."""
    (tmp_path / "a").touch()
    mirror = Mirror(str(tmp_path / "disk"), "cache/x")
    for refused in (mirror.check, lambda: mirror.put(tmp_path / "a", tmp_path)):
        with pytest.raises(OSError, match=f"there is no folder {tmp_path}/disk"):
            refused()
    assert not (tmp_path / "disk").exists()
    (tmp_path / "disk").mkdir()
    mirror.check()
    mirror.put(tmp_path / "a", tmp_path)
    assert mirror.names() == {"a"}


def test_a_file_in_a_shared_folder_is_there_whole_or_not_at_all(
    tmp_path: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "a").write_text("new")
    mirror = Mirror(str(tmp_path / "disk"))
    (tmp_path / "disk/a").write_text("old")

    def half(source: Path, target: Path) -> None:
        target.write_text("n")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("components.storage.shutil.copyfile", half)
    with pytest.raises(OSError, match="No space left"):
        mirror.put(tmp_path / "a", tmp_path)
    assert not waits, "waiting makes no room"
    assert mirror.read("a") == b"old" and mirror.names() == {"a"}
    monkeypatch.undo()
    mirror.put(tmp_path / "a", tmp_path)
    assert mirror.read("a") == b"new" and mirror.names() == {"a"}


def without(*names: str) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: [patch.delenv(f"AWS_{name}") for name in names] and None


@pytest.mark.parametrize(
    ("storage", "break_it", "message"),
    [
        ("s3://bucket", without("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"), "locate credentials"),
        ("s3://bucket", without("SECRET_ACCESS_KEY"), "missing: AWS_SECRET_ACCESS_KEY"),
        ("s3://No Bucket!", without(), "Invalid bucket name"),
        ("s3://bucket", lambda p: p.setenv("AWS_PROFILE", "nobody"), "profile .nobody."),
        ("s3://bucket", lambda p: p.setenv("AWS_ENDPOINT_URL", "nowhere"), "Invalid endpoint"),
        ("s4://bucket", without(), "storage: s4://bucket: Protocol not known"),
        ("gs://bucket", without(), "storage: gs://bucket: .*gcsfs"),
    ],
)
def test_what_waiting_cannot_mend_is_not_waited_for(  # noqa: PLR0913, cases and fixtures
    s3: str,
    storage: str,
    break_it: Callable[[pytest.MonkeyPatch], None],
    message: str,
    waits: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    break_it(monkeypatch)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises((OSError, ValueError), match=message):
        Mirror(storage).check()
    assert not waits


class Answers(Exception):
    """An error of S3's client, with what the server answered."""

    def __init__(self, code: str) -> None:
        super().__init__(f"An error occurred ({code})")
        self.response = {"Error": {"Code": code}}


@pytest.mark.parametrize(
    ("code", "is_mistake"),
    [("SlowDown", False), ("InternalError", False), ("ExpiredToken", True), ("NoSuchBucket", True)],
)
def test_the_servers_word_decides_whether_to_try_again(
    s3: str, code: str, is_mistake: bool, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str) -> bytes:
        if code == "NoSuchBucket":
            raise FileNotFoundError from Answers(code)
        raise OSError(5, "Input/output error") from Answers(code)

    mirror = Mirror(s3)
    monkeypatch.setattr(mirror._files, "cat_file", refuse)
    with pytest.raises(OSError, match="storage: "):
        mirror.read("a")
    assert bool(waits) != is_mistake


@pytest.mark.parametrize(("error", "told"), [(OSError, MayPassError), (FileNotFoundError,) * 2])
def test_a_file_that_can_not_be_fetched_is_told_as_one_that_can_not_be_read(
    tmp_path: Path, error: type[OSError], told: type[OSError], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a flow tries again where storage was away, and what is gone can be made anew."""

    def fail(*_: str) -> None:
        raise error("Input/output error")

    mirror = Mirror(str(tmp_path))
    for way in ("cat_file", "get_file"):
        monkeypatch.setattr(mirror._files, way, fail)
    for ask in (lambda: mirror.read("a"), lambda: mirror.fetch("a", tmp_path / "here")):
        with pytest.raises(OSError, match="storage: could not read|there is no") as caught:
            ask()
        assert type(caught.value) is told
    assert not (tmp_path / "here").exists()


def test_a_file_that_another_machine_replaces_at_s3_after_a_look_is_read_as_it_is_now(
    s3: str, tmp_path: Path, waits: list[float]
) -> None:
    mirror, path = Mirror(s3), tmp_path / "a"
    path.write_bytes(b"damaged")
    mirror.send(path, "a")
    assert mirror.sizes() == {"a": 7}
    s3fs.S3FileSystem(skip_instance_cache=True).pipe_file(f"{s3}/a", b"whole")
    assert mirror.checksum("a") == hashlib.sha256(b"whole").hexdigest()
    assert waits == [1]


@pytest.fixture
def keys_for_a_prefix(s3: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Keys that may list, read and write below bucket/prefix, and nothing else.

    To them S3 says "403" of a file that is not there: whether it is would be a listing's to tell.
    """
    asks = s3fs.S3FileSystem._call_s3

    async def ask(files: Any, method: str, *given: Any, **named: Any) -> Any:
        deleted = [one["Key"] for one in named.get("Delete", {}).get("Objects", [])]
        keys = deleted or [named.get("Prefix", named.get("Key", ""))]
        if all(key.startswith("prefix/") for key in keys):
            try:
                return await asks(files, method, *given, **named)
            except FileNotFoundError:
                if method.startswith("list_"):
                    raise
        raise PermissionError("Forbidden")

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", ask)
    return s3


def test_keys_for_a_prefix_are_enough(
    keys_for_a_prefix: str, tmp_path: Path, waits: list[float]
) -> None:
    (tmp_path / "a").write_text("a")
    Mirror(keys_for_a_prefix).check()
    mirror = Mirror(keys_for_a_prefix, "cache/x")
    assert mirror.names() == set() and mirror.num_bytes() == 0
    mirror.put(tmp_path / "a", tmp_path)
    Mirror(keys_for_a_prefix).check()
    assert mirror.names() == {"a"} and mirror.read("a") == b"a"
    mirror.forget()
    assert mirror.names() == set() and not waits


@pytest.mark.parametrize("storage", ["s3://bucket", "s3://bucket/other"])
def test_keys_for_another_prefix_are_refused(keys_for_a_prefix: str, storage: str) -> None:
    for ask in (Mirror(storage).check, Mirror(storage).names):
        with pytest.raises(PermissionError, match="storage: may not .* allowed to"):
            ask()


def test_an_expired_shard_is_made_anew_by_the_command_that_the_message_names(
    world: Path, s3: str, capsys: pytest.CaptureFixture[str]
) -> None:
    params = params_with(storage=s3)
    prepare.run(params)
    cache.run(params)
    index = Path("data/cache/index.json").read_bytes()
    shard = at_storage("pairs-forward-00001").removeprefix("s3://")
    content = s3fs.S3FileSystem().cat_file(shard)
    s3fs.S3FileSystem().rm_file(shard)
    with pytest.raises(
        ValueError, match="lacks pairs-forward-00001.*`python -m components.cache` makes"
    ):
        distill.run(params)
    cli.main(cache.run)
    s3fs.S3FileSystem.clear_instance_cache()
    assert s3fs.S3FileSystem().cat_file(shard) == content
    assert Path("data/cache/index.json").read_bytes() == index, "so DVC sees no change"
    distill.run(params)


def at_storage(name: str) -> str:
    """URL of a shard, by the index that is here."""
    index = read_json(Path("data/cache/index.json"))
    return f"{index['storage']}/{name}.{index['files'][name]}.safetensors"


DAMAGES: Mapping[str, Callable[[bytes], bytes]] = {
    "altered": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "truncated": lambda content: content[: len(content) // 2],
}


@pytest.mark.parametrize(
    ("name", "damage"),
    few_of([("text", "truncated"), ("pairs-forward-00001", "altered")], ("text", "truncated")),
)
def test_a_damaged_shard_at_storage_is_made_anew_by_the_command_that_the_message_names(
    world: Path, s3: str, name: str, damage: str
) -> None:
    params = params_with(storage=s3)
    prepare.run(params)
    cache.run(params)
    index = Path("data/cache/index.json").read_bytes()
    shard, files = at_storage(name), s3fs.S3FileSystem()
    content = files.cat_file(shard)
    files.pipe_file(shard, DAMAGES[damage](content))
    named = f"{name} is not what was written .*{shard} differs.*`python -m components.cache` makes"
    with pytest.raises(ValueError, match=named):
        distill.run(params)
    cli.main(cache.run)
    s3fs.S3FileSystem.clear_instance_cache()
    assert s3fs.S3FileSystem().cat_file(shard) == content
    assert Path("data/cache/index.json").read_bytes() == index
    distill.run(params)


@pytest.mark.parametrize(
    ("name", "damage"),
    few_of(
        [("pairs-forward-00001", "truncated"), ("text", "altered"), ("moments-00001", "truncated")],
        ("text", "altered"),
    ),
)
def test_shards_of_a_killed_run_that_are_damaged_at_storage_are_not_taken(
    world: Path, storage: Path, name: str, damage: str
) -> None:
    params = params_with(storage=str(storage))
    prepare.run(params)
    cache.run(params)
    index = Path("data/cache/index.json").read_bytes()
    shards = {path: path.read_bytes() for path in storage.rglob("*.safetensors")}
    shard = Path(at_storage(name))
    shard.write_bytes(DAMAGES[damage](shards[shard]))
    Path(at_storage("pairs-base-00000")).unlink()  # it was killed before this one
    (shard.parent / "index.json").unlink()
    shutil.rmtree("data/cache")
    cache.run(params)
    assert {path: path.read_bytes() for path in storage.rglob("*.safetensors")} == shards
    assert Path("data/cache/index.json").read_bytes() == index


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    """A folder for `storage`, empty."""
    folder = tmp_path / "storage"
    folder.mkdir()
    return folder


def test_two_machines_that_build_a_cache_at_once_share_it(
    world: Path, storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one, whose GPU rounds in another way, comes in while each shard is built."""
    from pnp_core.cache import CacheBuilder

    params = params_with(storage=str(storage))
    prepare.run(params)
    other = shutil.copytree(world, tmp_path / "other", symlinks=True)
    predict, built = CacheBuilder.predict, []

    def rounded(self: CacheBuilder, *args: Any) -> dict[str, torch.Tensor]:
        pairs = predict(self, *args)
        return {**pairs, "eps_c": pairs["eps_c"] + 1e-2}

    def build(self: CacheBuilder, name: str) -> None:
        at_work(self, name)
        built.append(name)
        if name == "pairs-forward-00001":  # by now the other one does all the rest, this shard too
            with monkeypatch.context() as there:
                there.setattr(CacheBuilder, "predict", rounded)
                there.setattr(CacheBuilder, "build", lambda b, n: (at_work(b, n), built.append(n)))
                there.chdir(other)
                cache.run(params)

    at_work = CacheBuilder.build
    monkeypatch.setattr(CacheBuilder, "build", build)
    cache.run(params)
    names = read_json(Path("data/cache/index.json"))["files"]
    assert sorted(built) == sorted([*names, "pairs-forward-00001"]), "and no other twice"
    assert len(list(storage.rglob("*.safetensors"))) == len(names)
    indices = {(folder / "data/cache/index.json").read_bytes() for folder in (world, other)}
    assert len(indices) == 1
    for folder in (world, other):
        monkeypatch.chdir(folder)
        distill.run(params)


def test_nodes_with_folders_of_their_own_build_the_cache_that_one_machine_does(
    world: Path, storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of them, by turns, without Ray."""
    params = params_with()
    prepare.run(params)
    nodes = [shutil.copytree(world, tmp_path / name, symlinks=True) for name in ("one", "two")]
    cache.run(params)
    alone = read_json(Path("data/cache/index.json"))
    shutil.rmtree("data/cache")

    def by_turns(make: Any, params: Params, phases: Any, done: Any, **_: Any) -> None:
        work = []
        for node in nodes:
            monkeypatch.chdir(node)
            work.append(make(params))
        for number, name in enumerate(name for phase in phases for name in phase):
            monkeypatch.chdir(nodes[number % 2])
            work[number % 2](name)
            done(name)
        monkeypatch.chdir(world)

    monkeypatch.setattr(cache, "run_tasks", by_turns)
    monkeypatch.setattr(cache, "pack", lambda *_, **__: None)
    cluster = toy.toy_params()["cluster"] | {"num_workers": 2, "shared_folder": False}
    cache.run(params_with(storage=str(storage), cluster=cluster))
    together = read_json(Path("data/cache/index.json"))
    assert together["files"] == alone["files"]
    first_phase = {"text.safetensors", "moments-00000.safetensors", "moments-00001.safetensors"}
    for node in nodes:  # pairs were sent, and do not stay
        assert {path.name for path in (node / "data/cache").iterdir()} == first_phase


def test_of_a_shard_that_two_machines_sent_at_once_neither_spoils_the_others(
    storage: Path, tmp_path: Path
) -> None:
    store = ShardStore(str(storage))
    contents = (b"one", b"other")
    checksums = [hashlib.sha256(content).hexdigest() for content in contents]
    for content, sha256 in zip(contents, checksums, strict=True):
        (tmp_path / "shard").write_bytes(content)
        store.mirror.send(tmp_path / "shard", store.file("text", sha256))
    for content, sha256 in zip(contents, checksums, strict=True):
        assert store.read(Shard(name="text", sha256=sha256, num_rows=1)) == content
    assert store.checksums() == {"text": min(checksums)}
    assert store.damaged(look_inside=True) == []


def of_size(num_forward: int, storage: str | None) -> Params:
    """Of a cache with so many pairs at noised images."""
    section = toy.toy_params()["cache"] | {"num_forward": num_forward}
    return params_with(storage=storage, cache=section)


@pytest.mark.services
def test_a_cache_that_grows_at_storage_computes_only_what_the_smaller_one_has_not(
    world: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pnp_core.cache import CacheBuilder

    def files() -> dict[str, str]:
        found: dict[str, str] = read_json(Path("data/cache/index.json"))["files"]
        return found

    prepare.run(of_size(24, s3))  # shards of 16: the second is not full
    cache.run(of_size(24, s3))
    damaged = at_storage("pairs-base-00000").removeprefix("s3://")
    content = s3fs.S3FileSystem().cat_file(damaged)
    s3fs.S3FileSystem().pipe_file(damaged, DAMAGES["altered"](content))
    shutil.rmtree("data/cache")  # another machine
    built: list[str] = []
    build = CacheBuilder.build
    monkeypatch.setattr(
        CacheBuilder, "build", lambda self, name: (built.append(name), build(self, name))
    )
    cache.run(of_size(48, s3))
    here = sorted(built)
    assert here == ["pairs-base-00000", *(f"pairs-forward-0000{n}" for n in (1, 2))]
    at_storage_now = files()
    shutil.rmtree("data/cache")
    cache.run(of_size(48, None))
    assert at_storage_now == files(), "what one machine makes at once"


def test_of_a_cache_of_another_base_only_shards_that_both_may_have_are_looked_at(
    world: Path, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its index; one without an index is looked into."""
    from pnp_core.cache import CacheBuilder

    prepare.run(of_size(32, str(storage)))
    cache.run(of_size(32, str(storage)))
    index = read_json(Path("data/cache/index.json"))
    other = shutil.copytree(index["storage"], storage / "cache/0")
    tuned = index["base"] | {"base_hash": "another", "unet": "another"}
    write_json(other / "index.json", index | {"base": tuned})
    (Path(index["storage"]) / "index.json").unlink()
    shutil.rmtree("data/cache")  # another machine
    looked_at: list[str] = []
    built: list[str] = []
    begin, build = Mirror.begin, CacheBuilder.build
    monkeypatch.setattr(
        Mirror,
        "begin",
        lambda self, name, size: (looked_at.append(name), begin(self, name, size))[1],
    )
    monkeypatch.setattr(
        CacheBuilder, "build", lambda self, name: (built.append(name), build(self, name))
    )
    cache.run(of_size(48, str(storage)))
    assert built == ["pairs-forward-00002"]
    of_other = {Path(path).name.partition(".")[0] for path in looked_at if path.startswith("0/")}
    assert of_other == {"text", "moments-00000", "moments-00001"}


def test_a_shard_that_goes_while_a_cache_at_a_folder_grows_is_computed(
    world: Path, storage: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine deletes the smaller cache's when it has been found whole."""

    prepare.run(of_size(32, str(storage)))
    cache.run(of_size(32, str(storage)))
    gone, checksum = Path(at_storage("pairs-forward-00001")), Mirror.checksum
    shutil.rmtree("data/cache")  # another machine

    def last_checksum(self: Mirror, name: str) -> str:
        found = checksum(self, name)
        if name.endswith(gone.name):
            gone.unlink()
        return found

    monkeypatch.setattr(Mirror, "checksum", last_checksum)
    cache.run(of_size(48, str(storage)))
    made = Path(at_storage("pairs-forward-00001"))
    assert not gone.exists() and not waits
    assert made.name == gone.name and made.parent != gone.parent, "the same, computed anew"
    assert hashlib.sha256(made.read_bytes()).hexdigest() in made.name


@pytest.mark.parametrize(("name", "way"), [("text", "fetch"), ("pairs-base-00000", "checksum")])
def test_a_shard_that_goes_as_it_is_read_from_a_folder_is_computed(
    world: Path, storage: Path, name: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = params_with(storage=str(storage))
    prepare.run(params)
    cache.run(params)
    index = Path("data/cache/index.json").read_bytes()
    gone, read = Path(at_storage(name)), getattr(Mirror, way)
    content = gone.read_bytes()
    if way == "fetch":  # on another machine, to make this one
        Path(at_storage("pairs-forward-00001")).unlink()
        shutil.rmtree("data/cache")

    def lose_and_read(self: Mirror, file: str, *arguments: Any) -> Any:
        if file == gone.name:
            gone.unlink(missing_ok=True)
        return read(self, file, *arguments)

    monkeypatch.setattr(Mirror, way, lose_and_read)
    cache.run(params)
    assert gone.read_bytes() == content and Path("data/cache/index.json").read_bytes() == index


@pytest.mark.parametrize("first", few_of(["0", "f"], "0"))
def test_a_second_copy_of_a_shard_leaves_an_index_that_is_there_as_it_is(
    world: Path, storage: Path, first: str
) -> None:
    params = params_with(storage=str(storage))
    prepare.run(params)
    cache.run(params)
    index = Path("data/cache/index.json").read_bytes()
    shard = Path(at_storage("pairs-forward-00001"))
    shutil.copy(shard, shard.with_name(f"pairs-forward-00001.{first * 64}.safetensors"))
    shutil.rmtree("data/cache")  # another machine
    cache.run(params)
    assert Path("data/cache/index.json").read_bytes() == index


@pytest.mark.parametrize("is_there", [False, True])
def test_where_one_copy_of_a_shard_is_gone_or_damaged_another_is_fetched(
    world: Path, storage: Path, monkeypatch: pytest.MonkeyPatch, *, is_there: bool
) -> None:
    params = params_with(storage=str(storage))
    prepare.run(params)
    cache.run(params)
    own = Path(at_storage("text"))
    header = int.from_bytes(own.read_bytes()[:8], "little")
    longer = (header + 8).to_bytes(8, "little") + own.read_bytes()[8 : 8 + header] + b" " * 8
    content = longer + own.read_bytes()[8 + header :]  # another file of the same tensors
    other = own.with_name(f"text.{hashlib.sha256(content).hexdigest()}.safetensors")
    other.write_bytes(content)
    first, second = sorted((own, other))  # all take the first
    Path(at_storage("pairs-forward-00001")).unlink()
    shutil.rmtree("data/cache")  # another machine
    fetch = Mirror.fetch

    def lose_and_fetch(self: Mirror, file: str, path: Path) -> None:
        if file == first.name:
            whole = first.read_bytes()
            first.unlink()
            if is_there:
                first.write_bytes(DAMAGES["altered"](whole))
        fetch(self, file, path)

    monkeypatch.setattr(Mirror, "fetch", lose_and_fetch)
    cache.run(params)
    assert not first.exists() and Path(at_storage("text")) == second


def test_a_cache_at_storage_is_never_downloaded_to_tell_its_checksums_nor_held_in_memory(
    world: Path, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = params_with(storage=str(storage))
    prepare.run(params)
    brought: list[str] = []

    def noting(way: str) -> Callable[..., Any]:
        original = getattr(Mirror, way)

        def note(self: Mirror, name: str, *args: Any) -> Any:
            if name != "index.json":
                brought.append(f"{way} {name.partition('.')[0]}")
            return original(self, name, *args)

        return note

    for way in ("read", "fetch", "checksum"):
        monkeypatch.setattr(Mirror, way, noting(way))
    cache.run(params)
    assert brought == []
    Path(at_storage("pairs-forward-00001")).unlink()
    shutil.rmtree("data/cache")  # another machine
    cache.run(params)
    assert brought == ["fetch text", "fetch moments-00000", "fetch moments-00001"]


def test_with_storage_the_disk_needs_room_for_what_pairs_are_made_from_and_for_one_shard_of_them(
    world: Path, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = toy.toy_params()["cache"] | {"num_forward": 160}
    params = params_with(storage=str(storage), cache=section)
    prepare.run(params)
    plan = cache.cache_builder(params).plan
    needed = (
        sum(plan.num_bytes[name] for name in plan.phases[0]) + plan.num_bytes["pairs-forward-00000"]
    )
    free, send = needed - 1, Mirror.send

    def send_and_look(self: Mirror, path: Path, name: str) -> None:
        assert len(list(Path("data/cache").glob("pairs-*"))) <= 1
        send(self, path, name)

    monkeypatch.setattr(Mirror, "send", send_and_look)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": free}))
    with pytest.raises(ValueError, match="make room there: pairs are made from all"):
        cache.run(params)
    free = needed
    assert needed < sum(plan.num_bytes.values()) / 2
    cache.run(params)
    assert len(list(storage.rglob("pairs-*.safetensors"))) == len(plan.phases[1])


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_named_and_made_anew(
    world: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    params = params_with()
    prepare.run(params)
    cache.run(params)
    shard = Path("data/cache/pairs-forward-00001.safetensors")
    content = shard.read_bytes()
    index = Path("data/cache/index.json").read_bytes()
    shard.write_bytes(DAMAGES[damage](content))
    capsys.readouterr()
    cache.run(params)
    assert f"{shard} is not what was written: made anew" in capsys.readouterr().out
    assert shard.read_bytes() == content
    assert Path("data/cache/index.json").read_bytes() == index


def test_a_file_that_is_not_there_is_told_apart_from_storage_that_is_not(s3: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"there is no {s3}/b.json"):
        Mirror(s3).read("b.json")
    assert Mirror(s3).names() == set()
