"""What a cache holds and what building it costs, known before anything is computed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from diffusers import DiffusionPipeline

from pnp_core.models import is_xl
from pnp_core.settings import CacheConfig, CacheSettings

TEXT = "text"  # the name of the shard of text states
FORWARD = "pairs-forward"  # how names of shards of pairs at noised data begin


@dataclass(frozen=True, kw_only=True)
class SampleBytes:
    """What a cache's rows take on disk."""

    pair: int  # z_t, eps_c, eps_n in half precision; timestep and two prompt numbers
    image: int  # mean and std of its latent, and a prompt number
    prompt: int  # text states


def sample_bytes(
    *, latent: tuple[int, int, int], text: tuple[int, int], pooled: int = 0
) -> SampleBytes:
    """Bytes of a row, for latents ``(C, H, W)``, text states ``(L, D)`` and SDXL's pooled text."""
    latent_bytes = 2 * math.prod(latent)
    return SampleBytes(
        pair=3 * latent_bytes + 3 * 8,
        image=2 * latent_bytes + 8,
        prompt=2 * (math.prod(text) + pooled),
    )


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """What building a cache will cost.

    Attributes:
        phases: names of shards; those of one phase are independent and need the phase before.
        num_rows: of each shard.
        num_bytes: of each shard, without its header of a few hundred bytes.
        teachers: of each shard of pairs: 0 is the base, 1 its first companion.
        num_pairs: teacher pairs in all.
        num_forwards: UNet forwards of one sample.
    """

    phases: tuple[tuple[str, ...], ...]
    num_rows: dict[str, int]
    num_bytes: dict[str, int]
    teachers: dict[str, int]
    num_pairs: int
    num_forwards: int


def plan_cache(
    pipe: DiffusionPipeline,
    *,
    num_images: int,
    num_prompts: int,
    config: CacheConfig,
    companions: Sequence[str] = (),
) -> CachePlan:
    """Shards, bytes and forwards, known before anything is computed.

    ``companions`` are the identities of the further teachers, in order.
    """
    size = pipe.unet.config.sample_size
    row = sample_bytes(
        latent=(pipe.unet.config.in_channels, size, size),
        text=(pipe.tokenizer.model_max_length, pipe.unet.config.cross_attention_dim),
        pooled=pipe.text_encoder_2.config.projection_dim if is_xl(pipe) else 0,
    )
    return plan_shards(
        row,
        num_images=num_images,
        num_prompts=num_prompts,
        config=config,
        companions=companions,
    )


def plan_shards(
    row: SampleBytes,
    *,
    num_images: int,
    num_prompts: int,
    config: CacheSettings,
    companions: Sequence[str] = (),
) -> CachePlan:
    """The same of a base that is not at hand, from what its rows take."""
    num_steps = config.trajectory_steps
    num_trajectories = config.num_trajectory / num_steps
    shares = [1.0]
    if companions:
        shares = [1 / 2] + [1 / 2 / len(companions)] * len(companions)
    pairs = numbered(FORWARD, split(config.num_forward, config.shard_size))
    teachers = dict.fromkeys(pairs, 0)
    for teacher, (named, share) in enumerate(zip(("base", *companions), shares, strict=True)):
        parts = split(math.ceil(share * num_trajectories), config.trajectories_per_shard)
        of_teacher = numbered(trajectories_of(named), [n * num_steps for n in parts])
        pairs |= of_teacher
        teachers |= dict.fromkeys(of_teacher, teacher)
    moments = numbered("moments", split(num_images, config.shard_size))
    phases = ({TEXT: num_prompts + 1, **moments}, pairs)
    num_rows = phases[0] | phases[1]
    bytes_of = {TEXT: row.prompt, "moments": row.image, "pairs": row.pair}
    return CachePlan(
        phases=tuple(tuple(phase) for phase in phases),
        num_rows=num_rows,
        num_bytes={name: n * bytes_of[name.partition("-")[0]] for name, n in num_rows.items()},
        teachers=teachers,
        num_pairs=sum(pairs.values()),
        num_forwards=2 * sum(pairs.values()),
    )


def trajectories_of(teacher: str) -> str:
    """How names of shards of pairs along a teacher's trajectories begin.

    Args:
        teacher: ``base``, or a companion's identity. By its place among them, a further companion
            would give shards that are there another name.
    """
    return f"pairs-{teacher[:16]}"


def numbered(begin: str, num_rows: Sequence[int]) -> dict[str, int]:
    """Rows of shards by names that are numbered."""
    return {f"{begin}-{number:05d}": rows for number, rows in enumerate(num_rows)}


def split(total: int, size: int) -> list[int]:
    """``total`` in parts of ``size``, the last one smaller."""
    return [min(size, total - start) for start in range(0, total, size)]
