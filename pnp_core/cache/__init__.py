"""Everything frozen, computed once: VAE moments, text states and teacher predictions.

A cache is a folder of safetensors shards with an ``index.json`` of their checksums, written last:

- ``text.safetensors``: states ``(P, L, D)``, one row per distinct prompt; row 0 is the null prompt.
  Of an SDXL base also the pooled text, ``(P, E)``, and the ``time_ids``, ``(6,)``.
- ``moments-*.safetensors``: mean and std of each image's latent, scaled as the UNet sees them.
- ``pairs-*.safetensors``: ``z_t``, ``timestep``, ``eps_c`` and ``eps_n`` with the rows of the two
  prompts; at forward-noised states and along CFG trajectories, which guided sampling really visits.

The teacher is the base; beside it, fine-tunes of it may be, its companions. Trajectories are the
teachers' in equal parts, noised data are the base's alone.
"""

from pnp_core.cache.build import CacheBuilder, Example, build_cache
from pnp_core.cache.plan import (
    TEXT,
    CachePlan,
    SampleBytes,
    plan_cache,
    plan_shards,
    sample_bytes,
)
from pnp_core.cache.read import Draws, Latents, Pairs, TeacherCache
from pnp_core.settings import CacheConfig

__all__ = [
    "TEXT",
    "CacheBuilder",
    "CacheConfig",
    "CachePlan",
    "Draws",
    "Example",
    "Latents",
    "Pairs",
    "SampleBytes",
    "TeacherCache",
    "build_cache",
    "plan_cache",
    "plan_shards",
    "sample_bytes",
]
