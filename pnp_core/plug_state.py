"""What a pipeline has been plugged with."""

import logging
import weakref
from dataclasses import dataclass, field
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from pnp_core.bundle import GuideBundle

STATE = "_pnp_plug"  # attribute of a plugged pipeline
logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Plug:
    """What a pipeline has been plugged with."""

    bundle: GuideBundle
    strength: float
    exact_steps: int
    stock_class: type[DiffusionPipeline]
    unet: "weakref.ref[nn.Module] | None" = None  # the one that was checked
    warned: set[str] = field(default_factory=set)
    num_calls: int = 0  # under way, in all threads
    num_forwards: int = 0  # begun, in all threads

    def __getstate__(self) -> dict[str, Any]:
        """Of a copied or pickled pipeline, with a guide of its own; its UNet has to be checked."""
        return {**vars(self), "unet": None, "warned": set(), "num_calls": 0}

    def warn_once(self, message: str) -> None:
        """Log a warning, the first time; those of shallow copies are this one's."""
        if message not in self.warned:
            self.warned.add(message)
            logger.warning(message)


def state_of_plug(pipe: Any) -> Plug | None:
    """What a pipeline has been plugged with; None: it has not."""
    state: Plug | None = getattr(pipe, "__dict__", {}).get(STATE)
    return state
