"""One contract for everything that denoises: ``(z_BCHW, t_B, c_BLD, w_B, n_BLD) -> eps_BCHW``.

``c`` are the text states of the prompt, ``n`` those of the negative (or null) prompt; ``added`` is
what an SDXL base is told besides, None for other bases.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from pnp_core.guide import Guide
from pnp_core.guiders import Guider
from pnp_core.inject import injecting
from pnp_core.models import AddedConditions
from pnp_core.schedule import NoiseSchedule


class Denoiser(Protocol):
    def __call__(
        self,
        z_BCHW: Tensor,
        t_B: Tensor,
        c_BLD: Tensor,
        w_B: Tensor,
        n_BLD: Tensor,
        added: AddedConditions | None = None,
    ) -> Tensor: ...


class PlainDenoiser:
    """The base as it is, without guidance: one forward, ``w`` and ``n`` unused."""

    def __init__(self, unet: UNet2DConditionModel, schedule: NoiseSchedule) -> None:
        self.unet = unet
        self.schedule = schedule

    def predict(
        self, z_BCHW: Tensor, t_B: Tensor, text_BLD: Tensor, added: Mapping[str, Tensor] | None
    ) -> Tensor:
        """eps under one prompt, with its ``added_cond_kwargs``."""
        prediction = self.unet(z_BCHW, t_B, text_BLD, added_cond_kwargs=added, return_dict=False)[0]
        return self.schedule.to_eps(prediction, z_BCHW, t_B)

    def __call__(
        self,
        z_BCHW: Tensor,
        t_B: Tensor,
        c_BLD: Tensor,
        w_B: Tensor,
        n_BLD: Tensor,
        added: AddedConditions | None = None,
    ) -> Tensor:
        return self.predict(z_BCHW, t_B, c_BLD, None if added is None else added.positive)


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
        self,
        z_BCHW: Tensor,
        t_B: Tensor,
        c_BLD: Tensor,
        n_BLD: Tensor,
        added: AddedConditions | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``eps_c`` and ``eps_n``."""
        texts = torch.cat([c_BLD, n_BLD])
        both = None
        if added is not None:
            both = {
                key: torch.cat([value, added.negative[key]])
                for key, value in added.positive.items()
            }
        eps = self.plain.predict(z_BCHW.repeat(2, 1, 1, 1), t_B.repeat(2), texts, both)
        eps_c, eps_n = eps.chunk(2)
        return eps_c, eps_n

    def __call__(
        self,
        z_BCHW: Tensor,
        t_B: Tensor,
        c_BLD: Tensor,
        w_B: Tensor,
        n_BLD: Tensor,
        added: AddedConditions | None = None,
    ) -> Tensor:
        eps_c, eps_n = self.pair(z_BCHW, t_B, c_BLD, n_BLD, added)
        return self.guider(eps_c, eps_n, t_B, w_B)


class GuidedDenoiser:
    """The student: a frozen UNet with a guide, one forward."""

    def __init__(self, unet: UNet2DConditionModel, guide: Guide, schedule: NoiseSchedule) -> None:
        guide.check_fits(unet)
        self.plain = PlainDenoiser(unet, schedule)
        self.guide = guide

    def __call__(
        self,
        z_BCHW: Tensor,
        t_B: Tensor,
        c_BLD: Tensor,
        w_B: Tensor,
        n_BLD: Tensor,
        added: AddedConditions | None = None,
    ) -> Tensor:
        negative = None if added is None else added.negative
        if n_BLD.stride(0) == 0:  # one negative prompt, expanded
            n_BLD = n_BLD[:1]
        conditioning = self.guide(z_BCHW, t_B, c_BLD, w_B, n_BLD, negative_added=negative)
        text_BLD = self.guide.steer(c_BLD, conditioning)
        with injecting(self.plain.unet, self.guide, conditioning):
            return self.plain(z_BCHW, t_B, text_BLD, w_B, n_BLD, added)
