"""What is measured, and how large: true bases of random weights, or toys on a CPU."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from benchmarks.cost import TINY_SHARE, unet_config
from benchmarks.plan import NAMES, PRESETS
from components.params import Params, load_params
from pnp_core.files import read_json
from pnp_core.model_files import LAYOUTS


@dataclass(frozen=True, kw_only=True)
class Base:
    """One base.

    Attributes:
        unet_config: its architecture.
        make_pipe: all of it, random, on a device.
        params: settings of its preset.
        share: the most parameters of a tiny guide, over the UNet's.
        num_pairs: of the cache that is built; in four shards.
        batch_size: of training: a GPU's share of the preset's, as far as the time allows.
    """

    unet_config: Mapping[str, Any]
    make_pipe: Callable[[str], DiffusionPipeline]
    params: Params
    share: float
    num_pairs: int
    batch_size: int


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A machine and what is measured on it.

    Attributes:
        device: where.
        backend: of ``torch.compile``.
        repeats: of each time; the median counts.
        seconds: that a training's speed is taken over, at most.
        bases: by name.
    """

    device: str
    backend: str
    repeats: int
    seconds: float
    bases: Mapping[str, Base]


def true_scale() -> Scale:
    """SD1.5 and SDXL on this process's GPU."""
    sizes = {"sd15": (256, 64), "sdxl": (64, 16)}
    bases = {}
    for name in NAMES:
        num_pairs, batch_size = sizes[name]
        bases[name] = Base(
            unet_config=unet_config(name),
            make_pipe=partial(random_pipe, name),
            params=load_params(PRESETS / f"{name}.yaml"),
            share=TINY_SHARE[name],
            num_pairs=num_pairs,
            batch_size=batch_size,
        )
    return Scale(device="cuda", backend="inductor", repeats=15, seconds=12, bases=bases)


def toy_scale() -> Scale:
    """The tests' toy bases on the CPU, to see that all of it runs."""
    bases = {}
    for name in NAMES:
        params = load_params(PRESETS / f"{name}.yaml")
        guide = params.distill.guide.model_copy(update={"max_parameters_ratio": 0.2})
        bases[name] = Base(
            unet_config=dict(toy_pipe(name, "cpu").unet.config),
            make_pipe=partial(toy_pipe, name),
            params=params.model_copy(
                update={
                    "cache": params.cache.model_copy(update={"batch_size": 4}),
                    "distill": params.distill.model_copy(
                        update={"guide": guide, "micro_batch_size": 2}
                    ),
                }
            ),
            share=0.2,
            num_pairs=32,
            batch_size=4,
        )
    return Scale(device="cpu", backend="eager", repeats=1, seconds=0.1, bases=bases)


def toy_pipe(name: str, device: str) -> DiffusionPipeline:
    """A toy base of the family."""
    from tests import toy

    with tempfile.TemporaryDirectory() as folder:
        pipe = toy.make_pipeline(Path(folder, "tokenizer"))
        return (toy.make_xl_pipeline(pipe) if name == "sdxl" else pipe).to(device)


def random_pipe(name: str, device: str) -> DiffusionPipeline:
    """A base of true size with random weights, in fp32."""
    folder = LAYOUTS / name
    index = read_json(folder / "model_index.json")
    options: dict[str, Any] = {"add_watermarker": False}
    if "text_encoder_2" not in index:
        options = dict.fromkeys(("safety_checker", "feature_extractor"))
        options["requires_safety_checker"] = False
    tokenizer = CLIPTokenizer.from_pretrained(LAYOUTS / "tokenizer")
    encoders = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    parts: dict[str, Any] = {}
    with torch.device(device):
        parts["unet"] = UNet2DConditionModel.from_config(unet_config(name))
        parts["vae"] = AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae"))
        for part, cls in encoders.items():
            if part in index:
                parts[part] = cls(CLIPTextConfig.from_pretrained(folder / part))
                parts[part.replace("text_encoder", "tokenizer")] = tokenizer
    parts["scheduler"] = DDIMScheduler.from_config(DDIMScheduler.load_config(folder / "scheduler"))
    return getattr(diffusers, index["_class_name"])(**parts, **options)
