"""Zhou et al., *DICE: Distilling Classifier-Free Guidance into Text Embeddings*, AAAI 2026.

A small network sharpens the text states before the frozen network sees them. The paper's is for
one ``w``; this one is told ``w``, so that it can be compared over a range.
"""

from dataclasses import replace

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from benchmarks.peers.peer import Peer
from pnp_core.conditions import Conditions
from pnp_core.denoiser import Denoiser, PlainDenoiser
from pnp_core.guide.kind import EMBEDDING_DIM, W_SCALE, frequencies, sinusoidal
from pnp_core.schedule import NoiseSchedule


class TextSharpener(Peer):
    """``c + f(c, n, w)``, token by token; ``n`` are the null prompt's states."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__(unet)
        width = unet.config.cross_attention_dim
        # The paper's has about 2 M parameters at D = 768; so has this with a hidden width of 4/3 D.
        hidden = 4 * width // 3
        out = nn.Linear(hidden, width)
        nn.init.zeros_(out.weight)
        nn.init.zeros_(out.bias)
        self.layers = nn.Sequential(nn.Linear(2 * width + EMBEDDING_DIM, hidden), nn.SiLU(), out)

    def forward(self, c_BLD: Tensor, n_BLD: Tensor, w_B: Tensor) -> Tensor:
        """The sharpened text states."""
        w_BE = sinusoidal(W_SCALE * w_B, frequencies(w_B.device))
        w_BLE = w_BE[:, None].expand(-1, c_BLD.shape[1], -1)
        result: Tensor = c_BLD + self.layers(torch.cat([c_BLD, n_BLD, w_BLE], dim=-1))
        return result

    def denoiser(self, unet: UNet2DConditionModel, schedule: NoiseSchedule) -> Denoiser:
        """`unet`, frozen, under text that the peer has sharpened."""
        return SharpenedDenoiser(self, unet, schedule)


class SharpenedDenoiser:
    """One forward of a frozen UNet with sharpened text."""

    def __init__(
        self, peer: TextSharpener, unet: UNet2DConditionModel, schedule: NoiseSchedule
    ) -> None:
        self.peer = peer
        self.plain = PlainDenoiser(unet, schedule)

    def __call__(self, z_BCHW: Tensor, t_B: Tensor, conditions: Conditions) -> Tensor:
        """Predicted eps, `(B, C, H, W)`, in one forward under the sharpened text."""
        c_BLD = conditions.c_BLD
        sharp_BLD = self.peer(c_BLD.float(), conditions.each_negative.float(), conditions.w_B)
        return self.plain(z_BCHW, t_B, replace(conditions, c_BLD=sharp_BLD.to(c_BLD.dtype)))
