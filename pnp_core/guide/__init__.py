"""The guide: a small external network that replaces classifier-free guidance.

``unet`` says where in a UNet a guide can act; ``kind`` what every kind of guide is; ``tiny`` (made
of ``adapters``) and ``full`` are the kinds there are; ``guide`` makes, saves and opens them;
``saved`` tells whether what is on disk is one.
"""

from pnp_core.guide.guide import Guide
from pnp_core.guide.saved import FORMAT, FORMATS
from pnp_core.settings import KINDS, GuideConfig

__all__ = ["FORMAT", "FORMATS", "KINDS", "Guide", "GuideConfig"]
