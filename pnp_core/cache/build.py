"""Building a cache: VAE moments, text states and teacher predictions, shard by shard."""

import dataclasses
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from pnp_core.cache.identity import VERSION, CacheIdentity, of_content
from pnp_core.cache.plan import FORWARD, TEXT, plan_cache
from pnp_core.cache.read import added_rows
from pnp_core.conditions import Conditions
from pnp_core.cores import num_cores, on_cores
from pnp_core.denoiser import CFGDenoiser
from pnp_core.files import sha256_file, write_tensors, write_text
from pnp_core.guiders import Guider
from pnp_core.identity import BaseIdentity
from pnp_core.models import encode_prompts, time_ids_of
from pnp_core.orientation import upright
from pnp_core.precision import mixed_precision
from pnp_core.schedule import NoiseSchedule
from pnp_core.seeds import step_generator
from pnp_core.settings import CacheConfig
from pnp_core.shards import shuffled

IMAGES_AT_ONCE = 16  # through the VAE, whose activations are 64 times the size of latents
ROWS_CHECKED = 1024  # at once: a check takes several times the memory of what it looks at


@dataclass(frozen=True, kw_only=True)
class Example:
    """One training image and its prompt."""

    image: bytes | Callable[[], bytes]  # an encoded image file, or what reads it
    prompt: str


class CacheBuilder:
    """Builds a cache shard by shard; a shard that is there already is not built again.

    Args:
        base: identity of the base, see :func:`pnp_core.identity.base_identity`.
        data_hash: identity of the examples and of further prompts.
        companions: further teachers by identity: UNets of fine-tunes of the base.
        further_prompts: that no example has; if there are any, half of the trajectories follow
            them.

    Attributes:
        tell: hears how many pairs have been computed, while a shard is built.

    Raises:
        ValueError: no examples; companions, but no trajectories for them.
    """

    def __init__(  # noqa: PLR0913, all that a cache's identity is made of
        self,
        pipe: DiffusionPipeline,
        examples: Sequence[Example],
        config: CacheConfig,
        directory: Path,
        *,
        base: BaseIdentity,
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
        self.tell: Callable[[int], None] = lambda _: None
        self.pipe = pipe
        self.examples = examples
        self.config = config
        self.directory = directory
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
            companions=tuple(self.companions),
        )
        self.teachers = [pipe.unet, *self.companions.values()]
        self.image_size = pipe.unet.config.sample_size * pipe.vae_scale_factor
        self.identity = CacheIdentity(
            base=base,
            data_hash=data_hash,
            companions=tuple(self.companions),
            prompts=tuple(self.prompts),
            size=self.image_size,
            dtypes=tuple(str(x.dtype) for x in (pipe.unet, pipe.text_encoder, pipe.vae)),
            config=config,
        )
        for unet in self.teachers:
            unet.requires_grad_(False).eval()
        pipe.vae.requires_grad_(False).eval()

    def key(self, name: str) -> str:
        """What a shard's content depends on."""
        rows, teacher = self.plan.num_rows.get(name, 0), self.plan.teachers.get(name, 0)
        return self.identity.key(name, num_rows=rows, teacher=teacher)

    def path(self, name: str) -> Path:
        """Where the shard ``name`` lies, or will."""
        return self.directory / f"{name}.safetensors"

    def is_built(self, name: str) -> bool:
        """Whether the shard lies there, whole, and was made with what this builder has."""
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
                states_NLD, pooled_NP = encode_prompts(self.pipe, self.prompts, dtype=torch.half)
                tensors = {"states": states_NLD}
                if pooled_NP is not None:
                    tensors |= {"pooled": pooled_NP, "time_ids": time_ids_of(self.pipe)}
            elif kind == "moments":
                tensors = self.build_moments(int(number))
            else:
                tensors = self.build_pairs(name)
        for key, tensor in tensors.items():
            if tensor.is_floating_point():
                tensors[key] = tensor.half()
                if not all(part.isfinite().all() for part in tensors[key].split(ROWS_CHECKED)):
                    raise ValueError(
                        f"Shard {name}: {key} has values that half precision can't hold."
                    )
        write_tensors(self.path(name), tensors, {"key": self.key(name)})

    def build_moments(self, number: int) -> dict[str, Tensor]:
        """Mean and std of the scaled latents of one shard's images, and their prompts' rows."""
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
        """RGB in [-1, 1] at the base's resolution, upright, cropped at the centre if not square."""
        size = self.image_size
        encoded = example.image() if callable(example.image) else example.image
        image = upright(Image.open(io.BytesIO(encoded))).convert("RGB")
        if image.size != (size, size):
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side))
            image = image.resize((size, size), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1

    @cached_property
    def text(self) -> dict[str, Tensor]:
        """The shard of text states, which must be built: the other shards are made from it."""
        return load_file(self.path(TEXT))

    @cached_property
    def moments(self) -> list[dict[str, Tensor]]:
        """The shards of moments, which must be built; memory-mapped: only rows used are read."""
        return [load_file(self.path(name)) for name in self.plan.phases[0] if name != TEXT]

    def moment_rows(self, key: str, image_B: Tensor) -> Tensor:
        """Rows of these examples in the shards of moments, of what is called ``key`` there."""
        of_first = self.moments[0][key]
        rows = torch.empty((len(image_B), *of_first.shape[1:]), dtype=of_first.dtype)
        shard_B = image_B // self.config.shard_size
        for number in shard_B.unique().tolist():
            here = shard_B == number
            local = image_B[here] - number * self.config.shard_size
            rows[here] = self.moments[number][key][local]
        return rows

    def build_pairs(self, name: str) -> dict[str, Tensor]:
        """One shard of teacher pairs: at noised data, or along trajectories, by its name.

        Its random numbers are its own and drawn at once: they depend neither on other shards nor
        on how many samples are computed at once.
        """
        generator = step_generator(self.config.seed, name)
        rows = self.plan.num_rows[name]
        if name.startswith(FORWARD):
            start = int(name.rpartition("-")[2]) * self.config.shard_size
            return self.forward_pairs(start, rows, generator)
        unet = self.teachers[self.plan.teachers[name]]
        return self.trajectory_pairs(unet, rows // self.config.trajectory_steps, generator)

    def negatives(self, count: int, generator: torch.Generator) -> Tensor:
        """Rows of negative prompts, ``(count,)``: 0, or with ``negative_fraction`` any prompt's."""
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
    ) -> dict[str, Tensor]:
        """Pairs as they are kept, with the teacher's predictions, fp32 on the CPU.

        So many are computed at once as ``batch_size`` says.

        Args:
            unet: the base's, or a companion's.
            z_t: noised latents, ``(B, C, H, W)``, rounded as they are kept.
            t_B: timesteps.
            prompt_B: rows of the prompts in the text states.
            negative_B: rows of the negative prompts there.
        """
        inputs = (x.split(self.config.batch_size) for x in (z_t, t_B, prompt_B, negative_B))
        return joined([self.predict_at_once(unet, *batch) for batch in zip(*inputs, strict=True)])

    def predict_at_once(
        self,
        unet: UNet2DConditionModel,
        z_t: Tensor,
        t_B: Tensor,
        prompt_B: Tensor,
        negative_B: Tensor,
    ) -> dict[str, Tensor]:
        """The same of samples that are computed together."""
        teacher = CFGDenoiser(unet, self.schedule)
        z, c, n = (
            x.to(unet.device, unet.dtype)
            for x in (z_t.float(), self.text["states"][prompt_B], self.text["states"][negative_B])
        )
        added = added_rows(self.text, prompt_B, negative_B)
        if added is not None:
            added = added.to(unet.device, unet.dtype)
        conditions = Conditions.at_scale(1.0, c_BLD=c, n_BLD=n, added=added)
        t = t_B.to(unet.device)
        both = on_cores(
            lambda rows: teacher.pair(z[rows], t[rows], conditions.part(rows)),
            slice(0, len(z)),
            num_cores(len(z), unet.device),
        )
        eps_c, eps_n = (torch.cat(each) for each in zip(*both, strict=True))
        self.tell(len(z_t))
        return {
            "z_t": z_t,
            "timestep": t_B,
            "eps_c": eps_c.float().cpu(),
            "eps_n": eps_n.float().cpu(),
            "prompt": prompt_B,
            "negative": negative_B,
        }

    def forward_pairs(
        self, start: int, count: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Teacher predictions at noised data."""
        positions = torch.arange(start, start + count)
        image_B = shuffled(positions, (len(self.examples),), num_shuffled=1, seed=self.config.seed)
        mean, std = (self.moment_rows(key, image_B).float() for key in ("mean", "std"))
        x = mean + std * torch.randn(mean.shape, generator=generator)
        t_B = torch.randint(self.schedule.num_train_timesteps, (count,), generator=generator)
        # The teacher must see exactly the z_t that is stored, hence the rounding to half first.
        z_t = self.schedule.add_noise(x, torch.randn(x.shape, generator=generator), t_B).half()
        prompt_B = self.moment_rows("prompt", image_B)
        negative_B = self.negatives(count, generator)
        return self.predict(self.pipe.unet, z_t, t_B, prompt_B, negative_B)

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
        prompt_B = self.moment_rows("prompt", image_B)
        negative_B = self.negatives(count, generator)
        if self.num_further:
            first = len(self.prompts) - self.num_further
            further_B = torch.randint(first, len(self.prompts), (count,), generator=generator)
            coin_B = torch.rand(count, generator=generator) < 0.5
            prompt_B = torch.where(coin_B, further_B, prompt_B)
        z_t = torch.randn((count, *self.moments[0]["mean"].shape[1:]), generator=generator)
        interval = num_timesteps / max(1, config.trajectory_steps - 1)
        grid = [torch.full((count,), num_timesteps - 1)]
        for k in range(config.trajectory_steps - 1):
            grid.append((num_timesteps - 1 - interval * (k + jitter_B)).long().clamp(min=0))
        grid.append(torch.full((count,), -1))
        steps: list[dict[str, Tensor]] = []
        for t_B, s_B in pairwise(grid):
            z_t = z_t.half()
            pairs = self.predict(unet, z_t, t_B, prompt_B, negative_B)
            steps.append(pairs)
            eps = self.guider(pairs["eps_c"], pairs["eps_n"], t_B, w_B)
            z_t = self.schedule.ddim_step(z_t.float(), eps, t_B, s_B)
        return joined(steps)

    def finish(
        self, *, storage: str | None = None, checksums: Mapping[str, str] | None = None
    ) -> None:
        """Write the index; the cache is complete.

        Args:
            storage: where the shards are kept, if not beside the index.
            checksums: SHA-256 of those that are kept there.

        Raises:
            ValueError: shards are missing; named.
        """
        if checksums is None:
            built = filter(self.is_built, self.plan.num_rows)
            checksums = {name: sha256_file(self.path(name)) for name in built}
        if missing := [name for name in self.plan.num_rows if name not in checksums]:
            raise ValueError(
                f"The cache in {storage or self.directory} lacks {', '.join(missing)}."
            )
        files = {name: checksums[name] for name in self.plan.num_rows}
        index = {
            "version": VERSION,
            "config": of_content(self.config),
            "base": dataclasses.asdict(self.identity.base),
            "data_hash": self.identity.data_hash,
            "companions": list(self.companions),
            "teachers": self.plan.teachers,
            "scheduler": {k: v for k, v in self.pipe.scheduler.config.items() if k[0] != "_"},
            "prompts": self.prompts,
            "files": files,
            "num_rows": self.plan.num_rows,
            "storage": storage,
        }
        write_text(self.directory / "index.json", json.dumps(index, indent=1))


def joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows of several parts, in the types that they have."""
    with torch.autocast("cpu", enabled=False):
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def build_cache(
    builder: CacheBuilder, progress: Callable[[int, int], None] = lambda *_: None
) -> None:
    """Build every shard in this process. ``progress(done, total)`` counts shards."""
    for done, name in enumerate(builder.plan.num_rows):
        builder.build(name)
        progress(done + 1, len(builder.plan.num_rows))
    builder.finish()
