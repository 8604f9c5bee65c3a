"""The guide: a small external network that replaces classifier-free guidance.

``unet`` says where in a UNet a guide can act; ``kind`` what every kind of guide is; ``tiny`` (made
of ``adapters``) and ``full`` are the kinds there are; ``guide`` makes, saves and opens them.
"""

from pnp_core.guide.guide import FORMAT, FORMATS, Guide
from pnp_core.settings import KINDS, GuideConfig

__all__ = ["FORMAT", "FORMATS", "KINDS", "Guide", "GuideConfig"]
