"""Reading a complete cache, batch by batch, for training."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from pnp_core.cache.identity import differences
from pnp_core.conditions import AddedConditions, Conditions
from pnp_core.files import read_json
from pnp_core.identity import BaseIdentity
from pnp_core.schedule import NoiseSchedule
from pnp_core.settings import CacheConfig
from pnp_core.shards import (
    SHARDS_SHUFFLED,
    Shard,
    ShardFolder,
    ShardReader,
    ShardSource,
    map_shard,
)


def as_float(x: Tensor, device: torch.device) -> Tensor:
    """Numbers in float32 on a device. From pinned memory the host does not wait for the copy."""
    moved = x.to(device, non_blocking=True)
    return moved.float() if moved.is_floating_point() else moved


class Pairs(NamedTuple):
    """A batch of teacher predictions."""

    z_t: Tensor
    timestep: Tensor
    eps_c: Tensor
    eps_n: Tensor
    text: Tensor
    negative_text: Tensor
    added: AddedConditions | None

    def conditions(self, w_B: Tensor) -> Conditions:
        """Their prompts at these guidance scales."""
        return Conditions(c_BLD=self.text, n_BLD=self.negative_text, w_B=w_B, added=self.added)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Pairs":
        """Each tensor changed."""
        return Pairs(*map_tensors(self, change))


class Latents(NamedTuple):
    """A batch of latents of the data with noise to add."""

    x: Tensor
    noise: Tensor
    text: Tensor
    negative_text: Tensor
    added: AddedConditions | None

    def conditions(self, w_B: Tensor) -> Conditions:
        """Their prompts at these guidance scales."""
        return Conditions(c_BLD=self.text, n_BLD=self.negative_text, w_B=w_B, added=self.added)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Latents":
        """Each tensor changed."""
        return Latents(*map_tensors(self, change))


def map_tensors(batch: Pairs | Latents, change: Callable[[Tensor], Tensor]) -> Iterator[Any]:
    """The fields of a batch, each tensor changed."""
    for value in batch:
        if isinstance(value, AddedConditions):
            yield AddedConditions(*map(change, value))
        else:
            yield None if value is None else change(value)


class Draws(NamedTuple):
    """The random numbers of a global batch of latents, on the CPU.

    Attributes:
        of_latent: standard normal, by which a latent is drawn from its moments.
        noise: standard normal, to add.
        negative: rows of the negative prompts in the text states.
    """

    of_latent: Tensor
    noise: Tensor
    negative: Tensor


class TeacherCache:
    """A complete cache, open for training. Shards are read ahead of use, in the background.

    Text states are memory-mapped; see :func:`pnp_core.shards.map_shard`.

    Args:
        index: what ``index.json`` holds.
        source: where the shards are.
        directory: where a file of text states may lie.
        kept: a folder to put it into where it does not. None: they are held in memory.

    Attributes:
        base_hash: identity of the base whose predictions it holds.
        companions: identities of the further teachers.
        content_hash: identity of the cache.
        num_pairs: teacher predictions.
        num_latents: images.
    """

    def __init__(
        self, index: dict[str, Any], source: ShardSource, directory: Path, kept: Path | None
    ) -> None:
        self.base_hash: str = index["base"]["base_hash"]
        self.companions: list[str] = index["companions"]
        self.prompts: list[str] = index["prompts"]
        self.content_hash = hashlib.sha256(json.dumps(index["files"]).encode()).hexdigest()[:16]
        self.schedule = NoiseSchedule.from_scheduler(DDIMScheduler.from_config(index["scheduler"]))
        self.negative_fraction: float = index["config"]["negative_fraction"]
        text, *shards = (
            Shard(name=name, sha256=checksum, num_rows=index["num_rows"][name])
            for name, checksum in index["files"].items()
        )
        self.text = map_shard(text, source, directory / f"{text.name}.safetensors", kept)
        self.text_N = self.text["states"]
        num_teachers = 1 + len(self.companions)
        # Of each teacher. What is held in memory does not grow with their number.
        self.pair_shards = [
            ShardReader(
                [s for s in shards if index["teachers"].get(s.name) == teacher],
                source,
                num_shuffled=max(1, SHARDS_SHUFFLED // num_teachers),
            )
            for teacher in range(num_teachers)
        ]
        self.moment_shards = ShardReader(
            [s for s in shards if s.name.startswith("moments")], source
        )
        self.starts = torch.tensor([0, *(reader.num_rows for reader in self.pair_shards)]).cumsum(0)
        self.num_pairs = int(self.starts[-1])
        self.num_latents = self.moment_shards.num_rows

    @classmethod
    def open(  # noqa: PLR0913, each, by name, is one way to refuse a cache
        cls,
        directory: Path,
        *,
        base: BaseIdentity | None = None,
        data_hash: str | None = None,
        config: CacheConfig | None = None,
        scheduler: Any = None,
        source: ShardSource | None = None,
        kept: Path | None = None,
    ) -> "TeacherCache":
        """Open the cache whose index lies in ``directory``, if it is the right one.

        Args:
            directory: holds ``index.json``.
            base: refuse a cache of another base.
            data_hash: refuse a cache of other examples.
            config: refuse a cache made with other settings.
            scheduler: refuse a cache made with another noise schedule than this one's.
            source: where the shards are; default: ``directory``.
            kept: a folder for text states that are not in ``directory``. None: they are held in
                memory.

        Raises:
            ValueError: no complete cache there; one made with something else, which is named. A
                damaged shard is named when it is read.
        """
        path = directory / "index.json"
        if not path.exists():
            raise ValueError(f"{directory} holds no complete cache (no index.json): build it.")
        index = read_json(path)
        if "version" not in index:
            raise ValueError(f"{path} was written by an earlier version: run the stage cache.")
        made = NoiseSchedule.from_scheduler(DDIMScheduler.from_config(index["scheduler"]))
        if scheduler is not None and (why := made.differs(NoiseSchedule.from_scheduler(scheduler))):
            raise ValueError(
                f"The cache in {directory} was made with another scheduler than the base's: {why}. "
                "Build the cache again."
            )
        if different := differences(index, base=base, data_hash=data_hash, config=config):
            raise ValueError(
                f"The cache in {directory} was made {', '.join(different)}: build the cache again."
            )
        return cls(index, source or ShardFolder(directory), directory, kept)

    def pair_indices(self, *, batch_size: int, seed: int, step: int, teacher: int = 0) -> Tensor:
        """Which pairs make a teacher's batch number ``step``; they are read in the background."""
        reader = self.pair_shards[teacher]
        return self.starts[teacher] + reader.batch(batch_size=batch_size, seed=seed, step=step)

    def latent_indices(self, *, batch_size: int, seed: int, step: int) -> Tensor:
        """Which latents make step ``step``'s global batch; they are read in the background."""
        return self.moment_shards.batch(batch_size=batch_size, seed=seed, step=step)

    def pairs(self, indices: Tensor, device: torch.device) -> Pairs:
        """The teacher pairs at ``indices``, in float32; the base's come first."""
        return self.stored_pairs(indices).map(lambda x: as_float(x, device))

    def stored_pairs(self, indices: Tensor) -> Pairs:
        """The same in host memory, in half precision as they are stored."""
        rows = self.pair_rows(indices)
        return Pairs(
            z_t=rows["z_t"],
            timestep=rows["timestep"],
            eps_c=rows["eps_c"],
            eps_n=rows["eps_n"],
            text=self.text_N[rows["prompt"]],
            negative_text=self.text_N[rows["negative"]],
            added=added_rows(self.text, rows["prompt"], rows["negative"]),
        )

    def pair_rows(self, indices: Tensor) -> dict[str, Tensor]:
        """The stored tensors of these pairs by name, one row a pair, in the order of ``indices``.

        Args:
            indices: numbers of pairs over all teachers, ``(rows,)``; a teacher's lie together.
        """
        teacher_B = torch.searchsorted(self.starts, indices, right=True) - 1
        result: dict[str, Tensor] = {}
        for teacher in teacher_B.unique().tolist():
            here = teacher_B == teacher
            rows = self.pair_shards[teacher].rows(indices[here] - self.starts[teacher])
            for key, value in rows.items():
                if key not in result:
                    result[key] = torch.empty((len(indices), *value.shape[1:]), dtype=value.dtype)
                result[key][here] = value
        return result

    def name_pair(self, index: int) -> str:
        """Where a pair lies, for messages."""
        teacher = int(torch.searchsorted(self.starts, index, right=True)) - 1
        return self.pair_shards[teacher].name_row(index - int(self.starts[teacher]))

    def name_latent(self, *, batch_size: int, seed: int, step: int, row: int) -> str:
        """Where the latent in a row of a step's global batch lies, for messages."""
        indices = self.latent_indices(batch_size=batch_size, seed=seed, step=step)
        return self.moment_shards.name_row(int(indices[row]))

    def draws(self, indices: Tensor, generator: torch.Generator) -> Draws:
        """The random numbers for the latents at ``indices``."""
        num_rows = len(indices)
        shape = (num_rows, *self.moment_shards.rows(indices[:1])["mean"].shape[1:])
        of_latent, noise = (torch.randn(shape, generator=generator) for _ in range(2))
        others = torch.randint(len(self.prompts), (num_rows,), generator=generator)
        other = torch.rand(num_rows, generator=generator) < self.negative_fraction
        return Draws(of_latent, noise, torch.where(other, others, 0))

    def latents(self, indices: Tensor, draws: Draws, part: slice) -> Latents:
        """Latents drawn from the moments at ``indices[part]``, noise and negatives.

        In host memory; latents and noise in float32, texts in half precision as they are stored.

        Args:
            indices: of a global batch.
            draws: for all of ``indices``, so that a row does not depend on ``part``.
            part: which of them.
        """
        rows = self.moment_shards.rows(indices[part])
        draw, noise, negative = (x[part] for x in draws)
        return Latents(
            x=rows["mean"].float() + rows["std"].float() * draw,
            noise=noise,
            text=self.text_N[rows["prompt"]],
            negative_text=self.text_N[negative],
            added=added_rows(self.text, rows["prompt"], negative),
        )


def added_rows(
    text: Mapping[str, Tensor], prompt_B: Tensor, negative_B: Tensor
) -> AddedConditions | None:
    """An SDXL base's added conditions at these rows of the text shard; None for other bases."""
    if "pooled" not in text:
        return None
    time_ids_B6 = text["time_ids"].expand(len(prompt_B), -1)
    return AddedConditions(text["pooled"][prompt_B], text["pooled"][negative_B], time_ids_B6)
