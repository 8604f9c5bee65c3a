"""Where this process computes, and the base model there."""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def device() -> torch.device:
    """This process's GPU if it has one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_base(path: str) -> "DiffusionPipeline":
    """The base at `path`, frozen, on this process's device."""
    from pnp_core.models import load_pipeline

    return frozen(load_pipeline(path, device=device()))


def frozen(pipe: "DiffusionPipeline") -> "DiffusionPipeline":
    """The pipeline with its UNet and VAE frozen, and as fast here as they can be."""
    from diffusers.models.attention_processor import AttnProcessor

    for part in (pipe.unet, pipe.vae):
        part.requires_grad_(False).eval().to(memory_format=torch.channels_last)
    if device().type == "cpu":
        # The fused kernel's backward pass takes a third of a training step on a CPU.
        pipe.unet.set_attn_processor(AttnProcessor())
    return pipe
