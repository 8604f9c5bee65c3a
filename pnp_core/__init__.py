"""Plug-and-play guides for diffusion models (after Hsiao et al., CVPR 2024).

torch and diffusers are imported with the first of these names that is used: what is said about a
mistake in the settings need not wait for them.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pnp_core.bundle import GuideBundle, load_guide
    from pnp_core.guide import Guide
    from pnp_core.models import load_pipeline, load_unet
    from pnp_core.plug import plug, unplug
    from pnp_core.settings import GuideConfig

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

MODULES = {
    "Guide": "guide",
    "GuideBundle": "bundle",
    "GuideConfig": "settings",
    "load_guide": "bundle",
    "load_pipeline": "models",
    "load_unet": "models",
    "plug": "plug",
    "unplug": "plug",
}


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{MODULES[name]}"), name)


class _Package(ModuleType):
    """Importing the module ``pnp_core.plug`` must not hide the function of that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
