"""This project's guide, as one of the methods that are compared."""

from diffusers import UNet2DConditionModel

from benchmarks.peers.peer import Peer
from pnp_core.denoiser import Denoiser, GuidedDenoiser
from pnp_core.guide import Guide
from pnp_core.schedule import NoiseSchedule


class Ours(Peer):
    """A guide: a fresh one, or one that is given."""

    def __init__(self, unet: UNet2DConditionModel, guide: Guide | None = None) -> None:
        super().__init__(unet)
        self.guide = guide or Guide.from_unet(unet)

    def denoiser(self, unet: UNet2DConditionModel, schedule: NoiseSchedule) -> Denoiser:
        """The guide at work in `unet`, which stays frozen."""
        return GuidedDenoiser(unet, self.guide, schedule)
