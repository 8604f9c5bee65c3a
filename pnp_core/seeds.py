"""Random numbers that are a function of (seed, step), whoever draws them and however often."""

import hashlib

import torch


def step_generator(seed: int, step: int | str) -> torch.Generator:
    """The random numbers of one step, or of what has this name."""
    digest = hashlib.sha256(f"{seed}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
