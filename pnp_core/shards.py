"""Shards of a cache, read into memory ahead of training, from wherever they lie."""

import hashlib
import shutil
import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch
from safetensors.torch import load, load_file
from torch import Tensor

from pnp_core.files import atomic_file, fetch_once, sha256_file
from pnp_core.seeds import step_generator

Batch = TypeVar("Batch")

# Rows are shuffled among so many shards; twice as many are held in memory. A cache of no more
# shards than this is shuffled as a whole.
SHARDS_SHUFFLED = 16
READING_THREADS = 2


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of a cache.

    Attributes:
        sha256: of the file's content.
        num_rows: samples in it.
    """

    name: str
    sha256: str
    num_rows: int


class ShardSource(Protocol):
    """Where a cache's shards lie."""

    @property
    def remedy(self) -> str:
        """What makes a shard anew, for messages."""

    def place(self, shard: Shard) -> str:
        """Path or URL of its file, for messages."""

    def read(self, shard: Shard) -> bytes:
        """What its file holds; FileNotFoundError if there is none."""

    def fetch(self, shard: Shard, path: Path) -> None:
        """The same, to a file, piece by piece."""


@dataclass(frozen=True)
class ShardFolder:
    """A local folder with a cache's shards; a :class:`ShardSource`."""

    directory: Path
    remedy: str = "delete what there is of it, and build the cache again"

    def place(self, shard: Shard) -> str:
        """Path of its file."""
        return str(self.directory / f"{shard.name}.safetensors")

    def read(self, shard: Shard) -> bytes:
        """What its file holds."""
        return Path(self.place(shard)).read_bytes()

    def fetch(self, shard: Shard, path: Path) -> None:
        """Copy its file."""
        with atomic_file(path) as new:
            shutil.copyfile(self.place(shard), new)


def read_shard(shard: Shard, source: ShardSource) -> dict[str, Tensor]:
    """The tensors of one shard.

    Raises:
        ValueError: it is not there, or not what was written; named.
    """
    try:
        content = source.read(shard)
    except FileNotFoundError as error:
        raise lacking(shard, source, error) from None
    if hashlib.sha256(content).hexdigest() != shard.sha256:
        raise not_as_written(shard, source)
    return load(content)


def lacking(shard: Shard, source: ShardSource, error: FileNotFoundError) -> ValueError:
    """The error that says that a shard has expired or was deleted."""
    return ValueError(f"The cache lacks {shard.name} ({error}): {source.remedy}.")


def not_as_written(shard: Shard, source: ShardSource) -> ValueError:
    """The error that says that a shard is damaged."""
    return ValueError(
        f"The cache's shard {shard.name} is not what was written (the checksum of "
        f"{source.place(shard)} differs): {source.remedy}."
    )


def map_shard(
    shard: Shard, source: ShardSource, path: Path, kept: Path | None
) -> dict[str, Tensor]:
    """The tensors of one shard, memory-mapped: what is read of them is read from the disk then.

    All processes of a machine share the pages that the system keeps of it.

    Args:
        shard: which one.
        source: where it is if not at ``path``.
        path: where it may lie.
        kept: a folder for a file of it where it does not, in which it is the only one. None: it is
            held in memory instead.

    Raises:
        ValueError: as :func:`read_shard`.
    """
    if path.exists():
        if sha256_file(path) != shard.sha256:
            raise not_as_written(shard, source)
        return load_file(path)
    if kept is None:
        return read_shard(shard, source)
    path = kept / f"{shard.sha256}.safetensors"

    def fetch() -> None:
        for other in kept.glob("*.safetensors"):
            if other != path:
                other.unlink()
        source.fetch(shard, path)

    try:
        is_whole = fetch_once(path, shard.sha256, fetch, kept / "lock")
    except FileNotFoundError as error:
        raise lacking(shard, source, error) from None
    if not is_whole:
        raise not_as_written(shard, source)
    return load_file(path)


@lru_cache(maxsize=4)
def epoch_order(
    num_rows: tuple[int, ...], *, num_shuffled: int, seed: int, epoch: int
) -> tuple[Tensor, tuple[tuple[int, ...], ...]]:
    """The rows of all shards, once each, in an order of this epoch's own.

    Shards come in random order, ``num_shuffled`` at a time; rows are shuffled among those.

    Returns:
        Row numbers of the shards' concatenation, ``(sum(num_rows),)``; the shards of each group.
    """
    generator = step_generator(seed + 1, epoch)
    if len(num_rows) <= num_shuffled:
        everything = tuple(range(len(num_rows)))
        return torch.randperm(sum(num_rows), generator=generator), (everything,)
    order = torch.randperm(len(num_rows), generator=generator)
    starts = torch.tensor([0, *num_rows]).cumsum(0).tolist()
    parts, groups = [], []
    for group in order.split(num_shuffled):
        shards = tuple(group.tolist())
        rows = torch.cat([torch.arange(starts[n], starts[n + 1]) for n in shards])
        parts.append(rows[torch.randperm(len(rows), generator=generator)])
        groups.append(shards)
    return torch.cat(parts), tuple(groups)


def shuffled(
    positions: Tensor, num_rows: tuple[int, ...], *, num_shuffled: int, seed: int
) -> Tensor:
    """Row numbers at ``positions`` of an endless sequence of epochs, see :func:`epoch_order`."""
    total = sum(num_rows)
    result = torch.empty_like(positions)
    for epoch in (positions // total).unique().tolist():
        order, _ = epoch_order(num_rows, num_shuffled=num_shuffled, seed=seed, epoch=epoch)
        here = positions // total == epoch
        result[here] = order[positions[here] % total]
    return result


class ShardReader:
    """Rows of many shards; what :meth:`batch` will ask for next is read in the background.

    Each shard's checksum is verified whenever it is read.

    Attributes:
        num_rows: of all shards together.
    """

    def __init__(
        self, shards: Sequence[Shard], source: ShardSource, *, num_shuffled: int = SHARDS_SHUFFLED
    ) -> None:
        self.shards = list(shards)
        self.source = source
        self.num_shuffled = num_shuffled
        self.num_rows_each = tuple(shard.num_rows for shard in self.shards)
        self.num_rows = sum(self.num_rows_each)
        self.starts = torch.tensor([0, *self.num_rows_each]).cumsum(0)
        self.reading: dict[int, Future[dict[str, Tensor]]] = {}
        self.lock = threading.Lock()  # batches are read ahead in a thread of their own
        self.pool = ThreadPoolExecutor(READING_THREADS, thread_name_prefix="shards")

    def batch(self, *, batch_size: int, seed: int, step: int) -> Tensor:
        """Row numbers of step ``step``'s global batch, ``(batch_size,)``: every row once an epoch.

        The shards of its group and of the next are read ahead, and all others forgotten.
        """
        start = step * batch_size
        with self.lock:
            self._read_ahead(seed, *divmod(start, self.num_rows))
        return shuffled(
            torch.arange(start, start + batch_size),
            self.num_rows_each,
            num_shuffled=self.num_shuffled,
            seed=seed,
        )

    def rows(self, indices: Tensor) -> dict[str, Tensor]:
        """Rows ``indices`` of the shards' concatenation, waiting for shards not yet read."""
        shard_B = self._shard_of(indices)
        result: dict[str, Tensor] = {}
        for number in shard_B.unique().tolist():
            here = shard_B == number
            local = indices[here] - self.starts[number]
            for key, value in self._shard(number).items():
                if key not in result:
                    result[key] = torch.empty((len(indices), *value.shape[1:]), dtype=value.dtype)
                result[key][here] = value[local]
        return result

    def name_row(self, index: int) -> str:
        """Where a row lies, for messages."""
        number = int(self._shard_of(torch.tensor([index])))
        return f"row {index - int(self.starts[number])} of shard {self.shards[number].name}"

    def _shard_of(self, indices: Tensor) -> Tensor:
        return torch.searchsorted(self.starts, indices, right=True) - 1

    def _read_ahead(self, seed: int, epoch: int, position: int) -> None:
        """Want the group of shards at ``position`` of an epoch and the one after it."""
        options = {"num_shuffled": self.num_shuffled, "seed": seed}
        _, groups = epoch_order(self.num_rows_each, epoch=epoch, **options)
        ends = list(accumulate(sum(self.num_rows_each[n] for n in group) for group in groups))
        now = bisect_right(ends, position)
        if now + 1 < len(groups):
            following = groups[now + 1]
        else:
            following = epoch_order(self.num_rows_each, epoch=epoch + 1, **options)[1][0]
        wanted = dict.fromkeys([*groups[now], *following])
        for gone in self.reading.keys() - wanted.keys():
            self.reading.pop(gone).cancel()
        for number in wanted:
            self._start(number)

    def _start(self, number: int) -> Future[dict[str, Tensor]]:
        if number not in self.reading:
            self.reading[number] = self.pool.submit(read_shard, self.shards[number], self.source)
        return self.reading[number]

    def _shard(self, number: int) -> dict[str, Tensor]:
        with self.lock:
            reading = self._start(number)
        return reading.result()


def pinning(device: torch.device) -> Callable[[Tensor], Tensor]:
    """What brings a tensor into memory that a GPU copies from by itself; nothing for a CPU."""
    return Tensor.pin_memory if device.type == "cuda" else lambda x: x


class Ahead(Generic[Batch]):
    """Reads the next step's batch while this one's is used.

    Parts of a batch may be asked for in any order, and from several threads.

    Args:
        read: ``read(step, part)``: these rows of a step's batch, in host memory. Always called in
            the same thread, one call at a time.
    """

    def __init__(self, read: Callable[[int, slice], Batch]) -> None:
        self.read = read
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self.reading: dict[tuple[int, int], tuple[int, Future[Batch]]] = {}  # by part: of a step

    def __call__(self, step: int, part: slice) -> Batch:
        """What ``read`` gives, or raises."""
        key = part.start, part.stop
        step_read, reading = self.reading.pop(key, (None, None))
        if reading is None or step_read != step:
            if reading is not None:
                reading.cancel()
            reading = self.pool.submit(self.read, step, part)
        batch = reading.result()
        self.reading[key] = step + 1, self.pool.submit(self.read, step + 1, part)
        return batch
