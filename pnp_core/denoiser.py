"""One contract for everything that denoises: ``(z_BCHW, t_B, c_BLD, w_B, n_BLD) -> eps_BCHW``.

``c`` are the text states of the prompt, ``n`` those of the negative (or null) prompt.
"""

from typing import Protocol

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from pnp_core.guide import Guide
from pnp_core.guiders import Guider
from pnp_core.inject import injecting
from pnp_core.schedule import NoiseSchedule


class Denoiser(Protocol):
    def __call__(
        self, z_BCHW: Tensor, t_B: Tensor, c_BLD: Tensor, w_B: Tensor, n_BLD: Tensor
    ) -> Tensor: ...


class PlainDenoiser:
    """The base as it is, without guidance: one forward, ``w`` and ``n`` unused."""

    def __init__(self, unet: UNet2DConditionModel, schedule: NoiseSchedule) -> None:
        self.unet = unet
        self.schedule = schedule

    def __call__(
        self, z_BCHW: Tensor, t_B: Tensor, c_BLD: Tensor, w_B: Tensor, n_BLD: Tensor
    ) -> Tensor:
        prediction = self.unet(z_BCHW, t_B, c_BLD, return_dict=False)[0]
        return self.schedule.to_eps(prediction, z_BCHW, t_B)


class CFGDenoiser:
    """The teacher: classifier-free guidance, two forwards in one doubled batch.

    Args:
        guider: combines the two predictions; plain CFG by default.
    """

    def __init__(
        self, unet: UNet2DConditionModel, schedule: NoiseSchedule, guider: Guider | None = None
    ) -> None:
        self.plain = PlainDenoiser(unet, schedule)
        self.guider = guider or Guider()

    def pair(
        self, z_BCHW: Tensor, t_B: Tensor, c_BLD: Tensor, n_BLD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``eps_c`` and ``eps_n``."""
        texts = torch.cat([c_BLD, n_BLD])
        eps = self.plain(z_BCHW.repeat(2, 1, 1, 1), t_B.repeat(2), texts, t_B, texts)
        eps_c, eps_n = eps.chunk(2)
        return eps_c, eps_n

    def __call__(
        self, z_BCHW: Tensor, t_B: Tensor, c_BLD: Tensor, w_B: Tensor, n_BLD: Tensor
    ) -> Tensor:
        eps_c, eps_n = self.pair(z_BCHW, t_B, c_BLD, n_BLD)
        return self.guider(eps_c, eps_n, t_B, w_B)


class GuidedDenoiser:
    """The student: a frozen UNet with a guide in its decoder, one forward."""

    def __init__(self, unet: UNet2DConditionModel, guide: Guide, schedule: NoiseSchedule) -> None:
        guide.check_fits(unet)
        self.plain = PlainDenoiser(unet, schedule)
        self.guide = guide

    def __call__(
        self, z_BCHW: Tensor, t_B: Tensor, c_BLD: Tensor, w_B: Tensor, n_BLD: Tensor
    ) -> Tensor:
        conditioning = self.guide(z_BCHW, t_B, c_BLD, w_B, n_BLD)
        with injecting(self.plain.unet, self.guide, conditioning):
            return self.plain(z_BCHW, t_B, c_BLD, w_B, n_BLD)
