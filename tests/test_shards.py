"""Reading shards ahead: every row once, in the right place, and never much in memory."""

import hashlib
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from pnp_core.shards import Shard, ShardReader, epoch_order

ROWS = (3, 4, 2, 5, 4)


@pytest.fixture
def files() -> dict[str, bytes]:
    """Shards whose rows count through."""
    starts = torch.tensor([0, *ROWS]).cumsum(0).tolist()
    return {
        f"pairs-{n}.safetensors": save({"row": torch.arange(starts[n], starts[n + 1])})
        for n in range(len(ROWS))
    }


def reader(files: dict[str, bytes], fetch: object = None, num_shuffled: int = 2) -> ShardReader:
    shards = [
        Shard(name=Path(name).stem, sha256=hashlib.sha256(content).hexdigest(), num_rows=rows)
        for (name, content), rows in zip(files.items(), ROWS, strict=True)
    ]
    return ShardReader(shards, fetch or files.__getitem__, num_shuffled=num_shuffled)


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
    with pytest.raises(ValueError, match=r"shard pairs-3 is not what was written \(\d+ bytes"):
        one.rows(torch.arange(18))


def test_a_row_is_named_by_its_shard(files: dict[str, bytes]) -> None:
    assert reader(files).name_row(3 + 4 + 2 + 1) == "row 1 of shard pairs-3"
