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

import dataclasses
import hashlib
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from pnp_core.conditions import AddedConditions, Conditions
from pnp_core.denoiser import CFGDenoiser
from pnp_core.files import sha256_file, write_tensors, write_text
from pnp_core.guiders import Guider, GuiderConfig
from pnp_core.models import (
    encode_prompts,
    is_xl,
    time_ids_of,
)
from pnp_core.precision import mixed_precision
from pnp_core.schedule import NoiseSchedule
from pnp_core.shards import (
    SHARDS_SHUFFLED,
    Fetch,
    Shard,
    ShardReader,
    fetch_from,
    read_shard,
    shuffled,
)
from pnp_core.train import config_hash, step_generator

TEXT = "text"
IMAGES_AT_ONCE = 16  # through the VAE, whose activations are 64 times the size of latents


@dataclass(frozen=True, kw_only=True)
class Example:
    """One training image and its prompt."""

    image: bytes  # an encoded image file
    prompt: str


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """What to compute.

    Attributes:
        num_forward: teacher pairs at forward-noised states.
        num_trajectory: teacher pairs along CFG trajectories, of all teachers together: half of them
            the base's, as half of the training steps are.
        trajectory_steps: DDIM steps of a trajectory, and so its states.
        guidance_scale: range of the trajectories' ``w``, drawn uniformly.
        guider: the teacher's rule, which the trajectories follow.
        negative_fraction: share of pairs whose negative is another sample's prompt, not null.
        batch_size: of the UNet's forwards, before CFG doubles it.
        shard_size: most rows in a shard.
        precision: ``bf16`` (where the hardware has it) or ``fp32``.

    Raises:
        ValueError: a value out of range, named.
    """

    num_forward: int
    num_trajectory: int
    trajectory_steps: int = 20
    guidance_scale: tuple[float, float] = (1.0, 8.0)
    guider: GuiderConfig = field(default_factory=GuiderConfig)
    negative_fraction: float = 0.1
    batch_size: int = 64
    shard_size: int = 2048
    precision: str = "bf16"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_forward < 0 or self.num_trajectory < 0:
            raise ValueError("num_forward and num_trajectory must not be negative.")
        if self.num_forward + self.num_trajectory == 0:
            raise ValueError("num_forward and num_trajectory are both 0: nothing to cache.")
        for name in ("trajectory_steps", "batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if not 0 <= self.negative_fraction <= 1:
            raise ValueError(
                f"negative_fraction is {self.negative_fraction}; it must lie in [0, 1]."
            )

    @property
    def trajectories_per_shard(self) -> int:
        return max(1, self.shard_size // self.trajectory_steps)


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


class Pairs(NamedTuple):
    """A batch of teacher predictions on a device."""

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


class Latents(NamedTuple):
    """A batch of latents of the data with noise to add, on a device."""

    x: Tensor
    noise: Tensor
    text: Tensor
    negative_text: Tensor
    added: AddedConditions | None

    def conditions(self, w_B: Tensor) -> Conditions:
        """Their prompts at these guidance scales."""
        return Conditions(c_BLD=self.text, n_BLD=self.negative_text, w_B=w_B, added=self.added)


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


class CacheBuilder:
    """Builds a cache shard by shard; a shard that is there already is not built again.

    Args:
        base_hash: identity of the base, see :func:`pnp_core.models.weights_hash`.
        data_hash: identity of the examples and of further prompts.
        companions: further teachers by identity: UNets of fine-tunes of the base.
        further_prompts: that no example has; if there are any, half of the trajectories follow
            them.

    Raises:
        ValueError: no examples; companions, but no trajectories for them.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        examples: Sequence[Example],
        config: CacheConfig,
        directory: Path,
        *,
        base_hash: str,
        data_hash: str,
        companions: Mapping[str, UNet2DConditionModel] | None = None,
        further_prompts: Sequence[str] = (),
    ) -> None:
        if not examples:
            raise ValueError("There are no examples to cache: the data set is empty.")
        if companions and not config.num_trajectory:
            raise ValueError(
                "There are companions, which teach along trajectories, but num_trajectory is 0."
            )
        self.pipe = pipe
        self.examples = examples
        self.config = config
        self.directory = directory
        self.base_hash = base_hash
        self.data_hash = data_hash
        self.companions = dict(companions or {})
        captions = sorted({e.prompt for e in examples} - {""})
        self.prompts = ["", *captions, *further_prompts]
        self.num_further = len(further_prompts)
        self.prompt_row = {prompt: row for row, prompt in enumerate(self.prompts)}
        self.schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
        self.guider = Guider(config.guider, self.schedule.num_train_timesteps)
        self.plan = plan_cache(
            pipe,
            num_images=len(examples),
            num_prompts=len(self.prompts) - 1,
            config=config,
            num_companions=len(self.companions),
        )
        self.teachers = [pipe.unet, *self.companions.values()]
        for unet in self.teachers:
            unet.requires_grad_(False).eval()
        pipe.vae.requires_grad_(False).eval()

    def key(self, name: str) -> str:
        """What a shard's content depends on."""
        return config_hash(self.config, self.base_hash, self.data_hash, *self.companions, name)

    def path(self, name: str) -> Path:
        return self.directory / f"{name}.safetensors"

    def is_built(self, name: str) -> bool:
        try:
            with safe_open(self.path(name), "pt") as shard:
                return bool((shard.metadata() or {}).get("key") == self.key(name))
        except (FileNotFoundError, SafetensorError):
            return False

    def build(self, name: str) -> None:
        """Compute one shard and write it."""
        if self.is_built(name):
            return
        kind, _, number = name.partition("-")
        with (
            torch.inference_mode(),
            mixed_precision(self.pipe.unet.device.type, self.config.precision),
        ):
            if kind == TEXT:
                states_NLD, pooled_NP = encode_prompts(self.pipe, self.prompts)
                tensors = {"states": states_NLD}
                if pooled_NP is not None:
                    tensors |= {"pooled": pooled_NP, "time_ids": time_ids_of(self.pipe)}
            elif kind == "moments":
                tensors = self.build_moments(int(number))
            else:
                tensors = self.build_pairs(int(number))
        for key, tensor in tensors.items():
            if tensor.is_floating_point():
                tensors[key] = tensor.half()
                if not tensors[key].isfinite().all():
                    raise ValueError(
                        f"Shard {name}: {key} has values that half precision can't hold."
                    )
        write_tensors(self.path(name), tensors, {"key": self.key(name)})

    def build_moments(self, number: int) -> dict[str, Tensor]:
        size = self.config.shard_size
        examples = self.examples[number * size : (number + 1) * size]
        vae = self.pipe.vae
        means, stds = [], []
        for start in range(0, len(examples), IMAGES_AT_ONCE):
            batch = examples[start : start + IMAGES_AT_ONCE]
            x = torch.stack([self.to_tensor(example) for example in batch])
            posterior = vae.encode(x.to(vae.device, vae.dtype)).latent_dist
            means.append(posterior.mean.float().cpu() * vae.config.scaling_factor)
            stds.append(posterior.std.float().cpu() * vae.config.scaling_factor)
        rows = torch.tensor([self.prompt_row[e.prompt] for e in examples])
        return {"mean": torch.cat(means), "std": torch.cat(stds), "prompt": rows}

    def to_tensor(self, example: Example) -> Tensor:
        """RGB in [-1, 1] at the base's resolution, cropped at the centre where it is not square."""
        size = self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor
        image = Image.open(io.BytesIO(example.image)).convert("RGB")
        if image.size != (size, size):
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side))
            image = image.resize((size, size), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1

    @cached_property
    def text(self) -> dict[str, Tensor]:
        return load_file(self.path(TEXT))

    @cached_property
    def moments(self) -> dict[str, Tensor]:
        shards = [load_file(self.path(name)) for name in self.plan.phases[0] if name != TEXT]
        # Autocast on a CPU can't concatenate half precision.
        with torch.autocast("cpu", enabled=False):
            return {key: torch.cat([shard[key] for shard in shards]) for key in shards[0]}

    def build_pairs(self, number: int) -> dict[str, Tensor]:
        config = self.config
        name = self.plan.phases[1][number]
        generator = step_generator(config.seed, number)
        if number < math.ceil(config.num_forward / config.shard_size):
            done = number * config.shard_size
            rows = min(config.shard_size, config.num_forward - done)
            batches = [
                self.forward_pairs(done + start, min(config.batch_size, rows - start), generator)
                for start in range(0, rows, config.batch_size)
            ]
        else:
            unet = self.teachers[self.plan.teachers[name]]
            count = self.plan.num_rows[name] // config.trajectory_steps
            batches = [
                self.trajectory_pairs(unet, min(config.batch_size, count - start), generator)
                for start in range(0, count, config.batch_size)
            ]
        with torch.autocast("cpu", enabled=False):
            return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}

    def negatives(self, count: int, generator: torch.Generator) -> Tensor:
        others = torch.randint(len(self.prompts), (count,), generator=generator)
        other = torch.rand(count, generator=generator) < self.config.negative_fraction
        return torch.where(other, others, 0)

    def predict(
        self,
        unet: UNet2DConditionModel,
        z_t: Tensor,
        t_B: Tensor,
        prompt_B: Tensor,
        negative_B: Tensor,
    ) -> tuple[Tensor, Tensor]:
        teacher = CFGDenoiser(unet, self.schedule)
        z_t, c, n = (
            x.to(unet.device, unet.dtype)
            for x in (z_t, self.text["states"][prompt_B], self.text["states"][negative_B])
        )
        added = added_rows(self.text, prompt_B, negative_B, unet.device, unet.dtype)
        conditions = Conditions.at_scale(1.0, c_BLD=c, n_BLD=n, added=added)
        eps_c, eps_n = teacher.pair(z_t, t_B.to(unet.device), conditions)
        return eps_c.float().cpu(), eps_n.float().cpu()

    def forward_pairs(
        self, start: int, count: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Teacher predictions at noised data."""
        positions = torch.arange(start, start + count)
        image_B = shuffled(positions, (len(self.examples),), num_shuffled=1, seed=self.config.seed)
        mean, std = self.moments["mean"][image_B].float(), self.moments["std"][image_B].float()
        x = mean + std * torch.randn(mean.shape, generator=generator)
        t_B = torch.randint(self.schedule.num_train_timesteps, (count,), generator=generator)
        # The teacher must see exactly the z_t that is stored, hence the rounding to half first.
        z_t = self.schedule.add_noise(x, torch.randn(x.shape, generator=generator), t_B).half()
        prompt_B = self.moments["prompt"][image_B]
        negative_B = self.negatives(count, generator)
        eps_c, eps_n = self.predict(self.pipe.unet, z_t.float(), t_B, prompt_B, negative_B)
        return {
            "z_t": z_t,
            "timestep": t_B,
            "eps_c": eps_c,
            "eps_n": eps_n,
            "prompt": prompt_B,
            "negative": negative_B,
        }

    def trajectory_pairs(
        self, unet: UNet2DConditionModel, count: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Teacher predictions along CFG sampling.

        A trajectory starts at pure noise and has a further state in each of equal intervals of
        timesteps, anywhere in it: samplers of every step count find their timesteps among them.
        """
        config, num_timesteps = self.config, self.schedule.num_train_timesteps
        jitter_B = torch.rand(count, generator=generator)
        low, high = config.guidance_scale
        w_B = low + (high - low) * torch.rand(count, generator=generator)
        image_B = torch.randint(len(self.examples), (count,), generator=generator)
        prompt_B, negative_B = self.moments["prompt"][image_B], self.negatives(count, generator)
        if self.num_further:
            first = len(self.prompts) - self.num_further
            further_B = torch.randint(first, len(self.prompts), (count,), generator=generator)
            coin_B = torch.rand(count, generator=generator) < 0.5
            prompt_B = torch.where(coin_B, further_B, prompt_B)
        z_t = torch.randn((count, *self.moments["mean"].shape[1:]), generator=generator)
        interval = num_timesteps / max(1, config.trajectory_steps - 1)
        grid = [torch.full((count,), num_timesteps - 1)]
        for k in range(config.trajectory_steps - 1):
            grid.append((num_timesteps - 1 - interval * (k + jitter_B)).long().clamp(min=0))
        grid.append(torch.full((count,), -1))
        steps: list[dict[str, Tensor]] = []
        for t_B, s_B in pairwise(grid):
            z_t = z_t.half()
            eps_c, eps_n = self.predict(unet, z_t.float(), t_B, prompt_B, negative_B)
            steps.append(
                {
                    "z_t": z_t,
                    "timestep": t_B,
                    "eps_c": eps_c,
                    "eps_n": eps_n,
                    "prompt": prompt_B,
                    "negative": negative_B,
                }
            )
            eps = self.guider(eps_c, eps_n, t_B, w_B)
            z_t = self.schedule.ddim_step(z_t.float(), eps, t_B, s_B)
        with torch.autocast("cpu", enabled=False):
            return {key: torch.cat([step[key] for step in steps]) for key in steps[0]}

    def finish(self, *, storage: str | None = None, fetch: Fetch | None = None) -> None:
        """Write the index; the cache is complete.

        Args:
            storage: where the shards are kept, if not beside the index.
            fetch: reads those that are not here from there.

        Raises:
            ValueError: shards are missing; named.
        """
        files, missing = {}, []
        for name in self.plan.num_rows:
            if self.is_built(name):
                files[name] = sha256_file(self.path(name))
            elif fetch is not None:
                files[name] = hashlib.sha256(fetch(self.path(name).name)).hexdigest()
            else:
                missing.append(name)
        if missing:
            raise ValueError(f"The cache in {self.directory} lacks {', '.join(missing)}.")
        index = {
            "config": dataclasses.asdict(self.config),
            "base_hash": self.base_hash,
            "data_hash": self.data_hash,
            "companions": list(self.companions),
            "teachers": self.plan.teachers,
            "scheduler": {k: v for k, v in self.pipe.scheduler.config.items() if k[0] != "_"},
            "prompts": self.prompts,
            "files": files,
            "num_rows": self.plan.num_rows,
            "storage": storage,
        }
        write_text(self.directory / "index.json", json.dumps(index, indent=1))


def build_cache(
    builder: CacheBuilder, progress: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Build every shard in this process. ``progress(done, total)`` counts shards."""
    for done, name in enumerate(builder.plan.num_rows):
        builder.build(name)
        progress(done + 1, len(builder.plan.num_rows))
    builder.finish()


class TeacherCache:
    """A complete cache, open for training. Shards are read ahead of use, in the background.

    Args:
        index: what ``index.json`` holds.
        fetch: reads a file of the cache.

    Attributes:
        base_hash: identity of the base whose predictions it holds.
        companions: identities of the further teachers.
        content_hash: identity of the cache.
        num_pairs: teacher predictions.
        num_latents: images.
    """

    def __init__(self, index: dict[str, Any], fetch: Fetch) -> None:
        self.base_hash: str = index["base_hash"]
        self.companions: list[str] = index["companions"]
        self.prompts: list[str] = index["prompts"]
        self.content_hash = hashlib.sha256(json.dumps(index["files"]).encode()).hexdigest()[:16]
        self.schedule = NoiseSchedule.from_scheduler(DDIMScheduler.from_config(index["scheduler"]))
        self.negative_fraction: float = index["config"]["negative_fraction"]
        text, *shards = (
            Shard(name=name, sha256=checksum, num_rows=index["num_rows"][name])
            for name, checksum in index["files"].items()
        )
        self.text = read_shard(text, fetch)
        self.text_N = self.text["states"]
        num_teachers = 1 + len(self.companions)
        # Of each teacher. What is held in memory does not grow with their number.
        self.pair_shards = [
            ShardReader(
                [s for s in shards if index["teachers"].get(s.name) == teacher],
                fetch,
                num_shuffled=max(1, SHARDS_SHUFFLED // num_teachers),
            )
            for teacher in range(num_teachers)
        ]
        self.moment_shards = ShardReader([s for s in shards if s.name.startswith("moments")], fetch)
        self.starts = torch.tensor([0, *(reader.num_rows for reader in self.pair_shards)]).cumsum(0)
        self.num_pairs = int(self.starts[-1])
        self.num_latents = self.moment_shards.num_rows

    @classmethod
    def open(
        cls,
        directory: Path,
        *,
        base_hash: str | None = None,
        data_hash: str | None = None,
        scheduler: Any = None,
        fetch: Fetch | None = None,
    ) -> "TeacherCache":
        """Open the cache whose index lies in ``directory``, if it is the right one.

        Args:
            base_hash: refuse a cache of another base.
            data_hash: refuse a cache of other examples.
            scheduler: refuse a cache made with another noise schedule than this one's.
            fetch: where the shards are; default: ``directory``.

        Raises:
            ValueError: no complete cache there; one made with something else, which is named. A
                damaged shard is named when it is read.
        """
        path = directory / "index.json"
        if not path.exists():
            raise ValueError(f"{directory} holds no complete cache (no index.json): build it.")
        index = json.loads(path.read_text())
        if "teachers" not in index:
            raise ValueError(f"{path} was written by an earlier version: run the stage cache.")
        made = NoiseSchedule.from_scheduler(DDIMScheduler.from_config(index["scheduler"]))
        if scheduler is not None and (why := made.differs(NoiseSchedule.from_scheduler(scheduler))):
            raise ValueError(
                f"The cache in {directory} was made with another scheduler than the base's: {why}. "
                "Build the cache again."
            )
        for what, there, given in (
            ("base", index["base_hash"], base_hash),
            ("data", index["data_hash"], data_hash),
        ):
            if given is not None and given != there:
                raise ValueError(
                    f"The cache in {directory} was made with {what} {there[:12]}, but the {what} "
                    f"given is {given[:12]}: build the cache again."
                )
        return cls(index, fetch or fetch_from(directory))

    def pair_indices(self, *, batch_size: int, seed: int, step: int, teacher: int = 0) -> Tensor:
        """Which pairs make a teacher's batch number ``step``; they are read in the background."""
        reader = self.pair_shards[teacher]
        return self.starts[teacher] + reader.batch(batch_size=batch_size, seed=seed, step=step)

    def latent_indices(self, *, batch_size: int, seed: int, step: int) -> Tensor:
        """Which latents make step ``step``'s global batch; they are read in the background."""
        return self.moment_shards.batch(batch_size=batch_size, seed=seed, step=step)

    def pairs(self, indices: Tensor, device: torch.device) -> Pairs:
        """The teacher pairs at ``indices``, in float32; the base's come first."""
        rows = self.pair_rows(indices)
        return Pairs(
            z_t=rows["z_t"].float().to(device),
            timestep=rows["timestep"].to(device),
            eps_c=rows["eps_c"].float().to(device),
            eps_n=rows["eps_n"].float().to(device),
            text=self.text_N[rows["prompt"]].float().to(device),
            negative_text=self.text_N[rows["negative"]].float().to(device),
            added=added_rows(self.text, rows["prompt"], rows["negative"], device),
        )

    def pair_rows(self, indices: Tensor) -> dict[str, Tensor]:
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

    def latents(
        self, indices: Tensor, generator: torch.Generator, part: slice, device: torch.device
    ) -> Latents:
        """Latents drawn from the moments at ``indices[part]``, noise and negatives, in float32.

        Random numbers are drawn for all of ``indices``, so that a row does not depend on ``part``.
        """
        rows = self.moment_shards.rows(indices[part])
        shape = (len(indices), *rows["mean"].shape[1:])
        draw, noise = (torch.randn(shape, generator=generator)[part] for _ in range(2))
        others = torch.randint(len(self.prompts), (len(indices),), generator=generator)
        other = torch.rand(len(indices), generator=generator) < self.negative_fraction
        negative = torch.where(other, others, 0)[part]
        return Latents(
            x=(rows["mean"].float() + rows["std"].float() * draw).to(device),
            noise=noise.to(device),
            text=self.text_N[rows["prompt"]].float().to(device),
            negative_text=self.text_N[negative].float().to(device),
            added=added_rows(self.text, rows["prompt"], negative, device),
        )


def added_rows(
    text: Mapping[str, Tensor],
    prompt_B: Tensor,
    negative_B: Tensor,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> AddedConditions | None:
    """An SDXL base's added conditions at these rows of the text shard; None for other bases."""
    if "pooled" not in text:
        return None
    time_ids_B6 = text["time_ids"].expand(len(prompt_B), -1)
    added = AddedConditions(text["pooled"][prompt_B], text["pooled"][negative_B], time_ids_B6)
    return added.to(device, dtype)
