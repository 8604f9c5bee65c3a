"""Sinusoidal embeddings, by which a guide reads a timestep and a guidance scale.

E half of an embedding.
"""

import math

import torch
from torch import Tensor

EMBEDDING_DIM = 64  # sinusoidal embedding of t and of w
W_SCALE = 30  # w from 1 to 30 covers about the range of phases that t from 0 to 1000 does


def frequencies(device: torch.device) -> Tensor:
    """Of the sinusoidal embedding of a timestep (Vaswani et al. 2017), as diffusers has them."""
    half = EMBEDDING_DIM // 2
    steps = torch.arange(half, dtype=torch.float32, device=device)
    return torch.exp(-math.log(10_000) * steps / (half - 1))


def sinusoidal(value: Tensor, frequencies_E: Tensor) -> Tensor:
    """Sinusoidal embeddings, ``(..., EMBEDDING_DIM)``, float32."""
    phase = value.float()[..., None] * frequencies_E
    return torch.cat([phase.sin(), phase.cos()], dim=-1)
