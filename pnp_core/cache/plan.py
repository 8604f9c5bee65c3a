"""What a cache holds and what building it costs, known before anything is computed."""

import math
from dataclasses import dataclass

from diffusers import DiffusionPipeline

from pnp_core.models import is_xl
from pnp_core.settings import CacheConfig, CacheSettings

TEXT = "text"  # the name of the shard of text states


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
    num_companions: int = 0,
) -> CachePlan:
    """Shards, bytes and forwards, known before anything is computed."""
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
        num_companions=num_companions,
    )


def plan_shards(
    row: SampleBytes,
    *,
    num_images: int,
    num_prompts: int,
    config: CacheSettings,
    num_companions: int = 0,
) -> CachePlan:
    """The same of a base that is not at hand, from what its rows take."""
    num_steps = config.trajectory_steps
    num_trajectories = config.num_trajectory / num_steps
    shares = [1.0]
    if num_companions:
        shares = [1 / 2] + [1 / 2 / num_companions] * num_companions
    moments = split(num_images, config.shard_size)
    pairs = split(config.num_forward, config.shard_size)
    teachers = [0] * len(pairs)
    for teacher, share in enumerate(shares):
        parts = split(math.ceil(share * num_trajectories), config.trajectories_per_shard)
        pairs += [n * num_steps for n in parts]
        teachers += [teacher] * len(parts)
    phases = (
        {TEXT: num_prompts + 1, **{f"moments-{i:05d}": n for i, n in enumerate(moments)}},
        {f"pairs-{i:05d}": n for i, n in enumerate(pairs)},
    )
    num_rows = phases[0] | phases[1]
    bytes_of = {TEXT: row.prompt, "moments": row.image, "pairs": row.pair}
    return CachePlan(
        phases=tuple(tuple(phase) for phase in phases),
        num_rows=num_rows,
        num_bytes={name: n * bytes_of[name.partition("-")[0]] for name, n in num_rows.items()},
        teachers=dict(zip(phases[1], teachers, strict=True)),
        num_pairs=sum(pairs),
        num_forwards=2 * sum(pairs),
    )


def split(total: int, size: int) -> list[int]:
    """``total`` in parts of ``size``, the last one smaller."""
    return [min(size, total - start) for start in range(0, total, size)]
