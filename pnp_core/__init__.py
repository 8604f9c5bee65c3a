"""Plug-and-play guides for diffusion models (after Hsiao et al., CVPR 2024)."""

from pnp_core.bundle import GuideBundle, load_guide
from pnp_core.guide import Guide, GuideConfig
from pnp_core.models import load_pipeline, load_unet
from pnp_core.plug import plug, unplug

__all__ = [
    "Guide",
    "GuideBundle",
    "GuideConfig",
    "load_guide",
    "load_pipeline",
    "load_unet",
    "plug",
    "unplug",
]
