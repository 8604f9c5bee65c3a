"""Guides on the devices of those who use them.

Pipelines on several devices may share one guide, and run at once: it stays where it is, and those
elsewhere have a copy.
"""

import copy
import threading
from typing import Any
from weakref import WeakKeyDictionary

import torch

from pnp_core.guide import Guide

lock = threading.Lock()
copies: "WeakKeyDictionary[Guide, dict[torch.device, tuple[Any, Guide]]]" = WeakKeyDictionary()


def on_device(guide: Guide, device: torch.device) -> Guide:
    """The guide itself if it is on this device, or a copy, kept until its weights change."""
    if next(guide.parameters()).device == device:
        return guide
    weights = [
        (p.data_ptr(), p.dtype, 0 if p.is_inference() else p._version) for p in guide.parameters()
    ]
    with lock:
        kept = copies.setdefault(guide, {})
        if device not in kept or kept[device][0] != weights:
            kept[device] = weights, copy.deepcopy(guide).to(device=device)
        return kept[device][1]
