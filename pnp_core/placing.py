"""Guides on the devices of those who use them.

Pipelines on several devices may share one guide, and run at once: it stays where it is, and those
elsewhere have a copy.
"""

import copy
import threading
from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from pnp_core.guide import Guide

lock = threading.Lock()


class Copy(NamedTuple):
    """A guide on another device, and the weights that it was made from, where they were."""

    original: list[Tensor]
    guide: Guide


copies: "WeakKeyDictionary[Guide, dict[torch.device, Copy]]" = WeakKeyDictionary()


def on_device(guide: Guide, device: torch.device) -> Guide:
    """The guide itself if it is on this device, or a copy, kept until its weights change.

    Their values are compared, once a call: what is written through ``.data``, as averaged weights
    are, leaves no other trace.
    """
    if next(guide.parameters()).device == device:
        return guide
    with lock:
        kept = copies.setdefault(guide, {})
        if device not in kept or not is_copy_of(kept[device].original, guide):
            original = [p.detach().clone() for p in guide.parameters()]
            kept[device] = Copy(original, copy.deepcopy(guide).to(device=device))
        return kept[device].guide


def is_copy_of(weights: Sequence[Tensor], guide: Guide) -> bool:
    """Whether a guide still has these weights."""
    return all(
        old.device == new.device and old.dtype == new.dtype and torch.equal(old, new)
        for old, new in zip(weights, guide.parameters(), strict=True)
    )
