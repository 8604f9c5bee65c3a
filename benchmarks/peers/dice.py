"""Zhou et al., *DICE: Distilling Classifier-Free Guidance into Text Embeddings*, AAAI 2026.

A small network sharpens the text states before the frozen network sees them. The paper's is for
one ``w``; this one is told ``w``, so that it can be compared over a range.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from benchmarks.peers.peer import Peer
from pnp_core.conditions import Conditions
from pnp_core.denoiser import Denoiser, PlainDenoiser
from pnp_core.distill import Drawn
from pnp_core.guide.embeddings import EMBEDDING_DIM, W_SCALE, frequencies, sinusoidal
from pnp_core.schedule import NoiseSchedule

NUM_HEADS = 8


class TextSharpener(Peer):
    """``c + f(c, n, w)``: the prompt's states attend to the null prompt's; the first is kept."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__(unet)
        width = unet.config.cross_attention_dim
        # 512 at the official code's D of 768.
        inner = max(1, round(2 * width / 3 / NUM_HEADS)) * NUM_HEADS
        self.enter = nn.Linear(width, inner)
        self.scale = nn.Linear(EMBEDDING_DIM, inner, bias=False)
        self.query, self.key, self.value = (nn.Linear(inner, inner, bias=False) for _ in range(3))
        self.out = nn.Linear(inner, inner)
        self.leave = nn.Linear(inner, width)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, c_BLD: Tensor, n_BLD: Tensor, w_B: Tensor) -> Tensor:
        """The sharpened text states."""
        w_B1I = self.scale(sinusoidal(W_SCALE * w_B, frequencies(w_B.device)))[:, None]
        own, null = (F.relu(self.enter(states) + w_B1I) for states in (c_BLD, n_BLD))
        query, key, value = (
            layer(states).unflatten(-1, (NUM_HEADS, -1)).transpose(1, 2)
            for layer, states in ((self.query, own), (self.key, null), (self.value, null))
        )
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        change = self.leave(F.relu(self.out(attended)))
        return torch.cat([c_BLD[:, :1], (c_BLD + change)[:, 1:]], dim=1)

    def denoiser(self, unet: UNet2DConditionModel, schedule: NoiseSchedule) -> Denoiser:
        """`unet`, frozen, under text that the peer has sharpened."""
        return SharpenedDenoiser(self, unet, schedule)

    def losses(self, student: Denoiser, drawn: Drawn, schedule: NoiseSchedule) -> Tensor:  # noqa: ARG002, the interface's
        """The absolute error of eps, one a sample."""
        pairs = drawn.pairs
        eps = student(pairs.z_t, pairs.timestep, pairs.conditions(drawn.w_B))
        return (eps.float() - drawn.eps_w.float()).abs().mean(dim=(1, 2, 3))


class SharpenedDenoiser:
    """One forward of a frozen UNet with sharpened text."""

    def __init__(
        self, peer: TextSharpener, unet: UNet2DConditionModel, schedule: NoiseSchedule
    ) -> None:
        self.peer = peer
        self.plain = PlainDenoiser(unet, schedule)
        self.last: tuple[Conditions, Tensor] | None = None  # and their sharpened text

    def __call__(self, z_BCHW: Tensor, t_B: Tensor, conditions: Conditions) -> Tensor:
        """Predicted eps, `(B, C, H, W)`, in one forward under the sharpened text."""
        if self.last is not None and self.last[0] is conditions and not torch.is_grad_enabled():
            sharp_BLD = self.last[1]
        else:
            c_BLD = conditions.c_BLD
            sharp_BLD = self.peer(c_BLD.float(), conditions.each_negative.float(), conditions.w_B)
            sharp_BLD = sharp_BLD.to(c_BLD.dtype)
            self.last = None if torch.is_grad_enabled() else (conditions, sharp_BLD)
        return self.plain(z_BCHW, t_B, replace(conditions, c_BLD=sharp_BLD))
