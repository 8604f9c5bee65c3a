"""Reading shards ahead: every row once, in the right place, and never much in memory."""

import hashlib
import queue
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import psutil
import pytest
import torch
from safetensors.torch import load_file, save

from pnp_core.shards import Ahead, Shard, ShardFolder, ShardReader, epoch_order, map_shard
from pnp_core.train import parts_of

ROWS = (3, 4, 2, 5, 4)
Numbers = TypeVar("Numbers")


@pytest.fixture
def files() -> dict[str, bytes]:
    """Shards whose rows count through."""
    starts = torch.tensor([0, *ROWS]).cumsum(0).tolist()
    return {
        f"pairs-{n}.safetensors": save({"row": torch.arange(starts[n], starts[n + 1])})
        for n in range(len(ROWS))
    }


class Source:
    """Shards that ``read(file name)`` gives; counts what is written to files."""

    remedy = "run what makes it"

    def __init__(self, read: Callable[[str], bytes]) -> None:
        self.read_file = read
        self.fetched: list[str] = []

    def place(self, shard: Shard) -> str:
        return f"s3://bucket/{shard.name}.safetensors"

    def read(self, shard: Shard) -> bytes:
        return self.read_file(f"{shard.name}.safetensors")

    def fetch(self, shard: Shard, path: Path) -> None:
        self.fetched.append(shard.name)
        path.write_bytes(self.read(shard))


def reader(
    files: dict[str, bytes],
    fetch: Callable[[str], bytes] | None = None,
    num_shuffled: int = 2,
) -> ShardReader:
    shards = [
        Shard(name=Path(name).stem, sha256=hashlib.sha256(content).hexdigest(), num_rows=rows)
        for (name, content), rows in zip(files.items(), ROWS, strict=True)
    ]
    return ShardReader(shards, Source(fetch or files.__getitem__), num_shuffled=num_shuffled)


@pytest.mark.parametrize("num_shuffled", [1, 2, 5])
def test_every_row_comes_once_an_epoch_and_in_another_order_the_next(
    files: dict[str, bytes], num_shuffled: int
) -> None:
    one = reader(files, num_shuffled=num_shuffled)
    batches = [one.batch(batch_size=4, seed=0, step=step) for step in range(9)]
    seen = torch.cat([one.rows(batch)["row"] for batch in batches]).tolist()
    assert torch.cat(batches).tolist() == seen  # row i of the files says i
    assert sorted(seen[:18]) == sorted(seen[18:]) == list(range(18))
    assert seen[:18] != seen[18:]


def test_rows_are_shuffled_among_the_shards_of_a_group_only() -> None:
    order, groups = epoch_order(ROWS, num_shuffled=2, seed=0, epoch=0)
    assert sorted(n for group in groups for n in group) == [0, 1, 2, 3, 4]
    starts = torch.tensor([0, *ROWS]).cumsum(0)
    for group in groups:
        size = sum(ROWS[n] for n in group)
        expected = [i for n in group for i in range(starts[n], starts[n + 1])]
        assert sorted(order[:size].tolist()) == sorted(expected)
        order = order[size:]


def test_no_more_than_two_groups_are_held_and_the_next_is_read_before_it_is_asked_for(
    files: dict[str, bytes],
) -> None:
    fetched: list[str] = []
    arrived = threading.Semaphore(0)

    def fetch(name: str) -> bytes:
        fetched.append(name)
        arrived.release()
        return files[name]

    one = reader(files, fetch, num_shuffled=1)
    one.batch(batch_size=1, seed=0, step=0)
    for _ in range(2):  # the first group and the next, though no row was asked for
        assert arrived.acquire(timeout=10)
    for step in range(40):
        one.rows(one.batch(batch_size=1, seed=0, step=step))
        assert len(one.reading) <= 2
    assert 10 <= len(fetched) <= 13  # each shard about once an epoch


def test_an_altered_shard_is_named_when_it_is_read(files: dict[str, bytes]) -> None:
    one = reader(files)
    files["pairs-3.safetensors"] = files["pairs-3.safetensors"][:-1]
    with pytest.raises(ValueError, match=r"shard pairs-3 is not what was written \(the checksum"):
        one.rows(torch.arange(18))


def test_a_row_is_named_by_its_shard(files: dict[str, bytes]) -> None:
    assert reader(files).name_row(3 + 4 + 2 + 1) == "row 1 of shard pairs-3"


def test_what_is_read_ahead_is_what_would_be_read_whatever_is_asked_for() -> None:
    asked: list[tuple[int, int, int]] = []

    def read(step: int, part: slice) -> torch.Tensor:
        asked.append((step, part.start, part.stop))
        return torch.arange(part.start, part.stop) + 100 * step

    parts = parts_of(slice(4, 12), 3)
    ahead = Ahead(read)
    jumps = [(step, part) for step in (0, 1, 7, 2, 2) for part in parts]
    jumps += [(3, parts[2]), (3, slice(0, 16)), (0, parts[1])]
    for step, part in jumps:
        expected = torch.arange(part.start, part.stop) + 100 * step
        assert torch.equal(ahead(step, part), expected)
    first = [(step, part.start, part.stop) for step in (0, 1) for part in parts]
    assert sorted(asked[:6]) == first  # each once


def test_the_next_batch_is_read_before_it_is_asked_for_and_no_further_one() -> None:
    seen: queue.Queue[int] = queue.Queue()
    ahead = Ahead(lambda step, part: seen.put(step))
    ahead(0, slice(0, 4))
    assert [seen.get(timeout=10) for _ in range(2)] == [0, 1]
    with pytest.raises(queue.Empty):
        seen.get(timeout=0.2)


def test_an_error_of_reading_ahead_is_told_when_its_batch_is_asked_for() -> None:
    def read(step: int, part: slice) -> int:
        if step == 1:
            raise ValueError("pairs-00001 is not what was written")
        return step

    ahead = Ahead(read)
    assert ahead(0, slice(0, 4)) == 0
    with pytest.raises(ValueError, match="pairs-00001"):
        ahead(1, slice(0, 4))
    assert ahead(2, slice(0, 4)) == 2


def text_shard(folder: Path) -> tuple[Shard, bytes]:
    """A file of 64 MB, in the folder."""
    content = save({"states": torch.zeros(1 << 25, dtype=torch.float16)})
    (folder / "text.safetensors").write_bytes(content)
    return Shard(name="text", sha256=hashlib.sha256(content).hexdigest(), num_rows=1), content


def memory_bytes() -> int:
    """What this process holds of its own and of files that it has mapped."""
    return psutil.Process().memory_info().rss


def in_a_fresh_process(measure: Callable[[Path], Numbers], folder: Path) -> Numbers:
    """What is measured where nobody else takes memory or gives it back."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, folder).result(timeout=120)


def memory_of_mapping(folder: Path) -> tuple[int, int, int]:
    """Bytes of a shard; what mapping it and reading two values takes; what a copy takes."""
    shard, content = text_shard(folder)
    size = len(content)
    del content
    before = memory_bytes()
    tensors = map_shard(shard, ShardFolder(folder), folder / "text.safetensors", None)
    tensors["states"][torch.tensor([5, 1 << 24])].float()
    mapped = memory_bytes() - before
    held = load_file(folder / "text.safetensors")["states"].clone()
    copied = memory_bytes() - before
    assert torch.equal(held, tensors["states"])
    return size, mapped, copied


def test_a_mapped_shard_takes_the_memory_of_what_is_read_of_it(tmp_path: Path) -> None:
    size, mapped, copied = in_a_fresh_process(memory_of_mapping, tmp_path)
    assert mapped < size / 4
    assert copied > 0.9 * size, "what a whole copy takes is noticed"


def test_a_shard_that_lies_elsewhere_is_fetched_once_and_takes_its_predecessors_place(
    tmp_path: Path,
) -> None:
    shard, content = text_shard(tmp_path)
    kept = tmp_path / "texts"
    kept.mkdir()
    (kept / "earlier.safetensors").write_bytes(b"")
    source = Source(lambda name: content)
    for _ in range(2):
        tensors = map_shard(shard, source, tmp_path / "not there", kept)
        assert len(tensors["states"]) == 1 << 25
    assert source.fetched == ["text"]
    (path,) = kept.glob("*.safetensors")
    path.write_bytes(content[:-1] + b"x")  # damaged on this disk
    assert len(map_shard(shard, source, tmp_path / "not there", kept)["states"]) == 1 << 25
    assert source.fetched == ["text"] * 2
    assert [path.name for path in kept.glob("*.safetensors")] == [f"{shard.sha256}.safetensors"]


@pytest.mark.parametrize("where", ["here", "kept"])
def test_an_altered_shard_is_not_mapped(tmp_path: Path, where: str) -> None:
    shard, content = text_shard(tmp_path)
    altered = content[:-1] + b"x"
    (tmp_path / "text.safetensors").write_bytes(altered)
    path = tmp_path / ("text.safetensors" if where == "here" else "not there")
    named = (
        r"shard text is not what was written \(.* of s3://bucket/text.safetensors differs\): run"
    )
    with pytest.raises(ValueError, match=named):
        map_shard(shard, Source(lambda name: altered), path, tmp_path / "kept")


def memory_of_fetching(folder: Path) -> tuple[int, int]:
    """Bytes of a shard; the most that is held while it is brought and afterwards."""
    shard, content = text_shard(folder)
    size = len(content)
    del content
    before, most = memory_bytes(), 0

    class Slow(ShardFolder):
        def read(self, shard: Shard) -> bytes:
            nonlocal most
            content = super().read(shard)
            most = memory_bytes()
            return content

    map_shard(shard, Slow(folder), folder / "not there", folder / "kept")
    return size, max(most, memory_bytes()) - before


def test_a_shard_that_lies_elsewhere_is_brought_without_being_held_in_memory(
    tmp_path: Path,
) -> None:
    size, most = in_a_fresh_process(memory_of_fetching, tmp_path)
    assert most < size / 4
