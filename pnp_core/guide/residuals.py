"""Residuals on the text states and at the decoder's entrances, as tiny guides up to format 3 add.

Later ones have none: a second direction in each layer does as much for less time.

Shape legend: B batch, C channels, L text tokens, D text width, R rank, M width of the conditioning
vector, X all that is told by that vector.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pnp_core.guide.kind import DecoderInput
from pnp_core.guide.maths import Gain, add_all, zero_module
from pnp_core.guide.unet import EntranceChannels


class Told(NamedTuple):
    """What an adapter is told of t, w and the prompt: by direction, ``(B, R, 1)``."""

    scale_BR1: Tensor
    shift_BR1: Tensor
    gain_BR1: Tensor


class EntranceMatrices(NamedTuple):
    """How an entrance reads features, and what it adds to them; C channels a feature."""

    down: tuple[Tensor, ...]  # (R, C) a feature
    bias_R1: Tensor
    up: Tensor  # (sum of C, R)


class EntranceAdapter(nn.Module):
    """Reads hidden states and skips at an up block's entrance, returns residuals for them."""

    def __init__(self, channels: EntranceChannels, rank: int, embedding_dim: int) -> None:
        super().__init__()
        self.split = (channels.hidden, *channels.skips)
        total = sum(self.split)
        self.down = nn.Conv2d(total, rank, 1)
        self.modulation = nn.Linear(embedding_dim, 2 * rank)
        self.mix = nn.Conv2d(rank, rank, 3, padding=1)
        self.up = zero_module(nn.Conv2d(rank, total, 1, bias=False))
        self.offset = nn.Parameter(torch.zeros(rank))

    def matrices(self) -> EntranceMatrices:
        """The weights in the shapes that :meth:`residuals` takes them in; once a run."""
        assert self.down.bias is not None
        down = self.down.weight.flatten(1).split(self.split, dim=1)
        return EntranceMatrices(down, self.down.bias[:, None], self.up.weight.flatten(1))

    def residuals(
        self, features: Sequence[Tensor], told: Told, matrices: EntranceMatrices
    ) -> list[Tensor]:
        """Residuals for the features, in this module's dtype."""
        down, bias_R1, up = matrices
        batch, _, *size = features[0].shape
        # 1. down to the rank, features of different magnitudes brought to one root mean square;
        # dividing what comes out of the projection costs less than dividing what goes in; no
        # gradient goes through the norms, where it would take time and teach nothing
        norms = torch.stack([norm_of(x.detach()) for x in features]).clamp(min=1e-6)
        norms = norms.to(bias_R1.dtype).view(len(features), batch, 1, 1)
        h = bias_R1
        for x, part, norm in zip(features, down, norms.unbind(), strict=True):
            # a product of matrices: on a CPU a convolution would first copy what it reads
            read = torch.bmm(part.expand(batch, -1, -1), x.flatten(2).to(part.dtype))
            h = torch.addcdiv(h, read, norm, value=x.shape[1:].numel() ** 0.5)
        # 2. what t, w and the prompt ask for
        h = F.silu(torch.addcmul(told.shift_BR1, h, told.scale_BR1))
        # 3. look around, then project back
        h = h + self.mix(F.silu(h).view(batch, -1, *size)).flatten(2)
        residual = torch.bmm(up.expand(batch, -1, -1), told.gain_BR1 * F.silu(h))
        return list(residual.view(batch, -1, *size).split(self.split, dim=1))


def norm_of(x: Tensor) -> Tensor:
    """Of each sample of ``(B, C, H, W)``: ``(B,)``, float32."""
    return torch.linalg.vector_norm(x, dim=(1, 2, 3), dtype=torch.float32)


class TextAdapter(nn.Module):
    """A residual on the text states that the UNet attends to, from prompt minus negative."""

    def __init__(self, text_dim: int, rank: int, embedding_dim: int) -> None:
        super().__init__()
        self.down = nn.Linear(text_dim, rank)
        self.modulation = nn.Linear(embedding_dim, 2 * rank)
        self.up = zero_module(nn.Linear(rank, text_dim, bias=False))
        self.offset = nn.Parameter(torch.zeros(rank))

    def forward(self, down_BLR: Tensor, told: Told) -> Tensor:
        """The residual, ``(B, L, D)``, from the difference as :attr:`down` gives it."""
        scale, shift, gain = (x.mT for x in told)
        residual: Tensor = self.up(gain * F.silu(torch.addcmul(shift, down_BLR, scale)))
        return residual


class PreparedResiduals:
    """These adapters, once they know a run's conditions.

    Args:
        text: on the text states; None: there is none.
        entrances: one an up block, or none at all.
        difference_BLD: of the text states of prompt and negative prompt, both normed.
        gain: how much a guide is to do.
    """

    def __init__(
        self,
        text: TextAdapter | None,
        entrances: Sequence[EntranceAdapter],
        difference_BLD: Tensor,
        gain: Gain,
    ) -> None:
        self.text, self.entrances = text, entrances
        self.down_BLR = None if text is None else text.down(difference_BLD)
        self.matrices = [entrance.matrices() for entrance in entrances]
        told = [part for part in (text, *entrances) if part is not None]
        # one matrix of all that reads the conditioning vector; scales are about 1
        self.weight_XM = torch.cat([part.modulation.weight for part in told])
        ranks = [len(part.offset) for part in told]
        bias = torch.cat([part.modulation.bias for part in told])
        ones = [x for r in ranks for x in (bias.new_ones(r), bias.new_zeros(r))]
        self.bias_X = bias + torch.cat(ones)
        self.split = [rank for rank in ranks for _ in range(2)]
        gains = gain.with_offset(torch.cat([part.offset for part in told]))
        self.gains = gains[..., None].split(ranks, dim=1)

    def at(self, embedding_BM: Tensor) -> "Residuals":
        """What this timestep's conditioning vector makes of them."""
        told_BX = F.linear(embedding_BM, self.weight_XM, self.bias_X)
        parts = told_BX[..., None].split(self.split, dim=1)
        return Residuals(self, list(map(Told, parts[::2], parts[1::2], self.gains)))


class Residuals:
    """What is added in one forward."""

    def __init__(self, prepared: PreparedResiduals, told: list[Told]) -> None:
        self.entrances, self.matrices = prepared.entrances, prepared.matrices
        self.told = told if prepared.text is None else told[1:]
        self.text_BLD = None
        if prepared.text is not None:
            self.text_BLD = prepared.text(prepared.down_BLR, told[0])

    def steer(self, c_BLD: Tensor) -> Tensor:
        """The prompt's states, ``(B, L, D)``, with their residual."""
        return c_BLD if self.text_BLD is None else c_BLD + self.text_BLD.to(c_BLD.dtype)

    def enter(self, index: int, entering: DecoderInput) -> DecoderInput:
        """The hidden states and the skips with the residuals of this entrance."""
        if not self.entrances:
            return entering
        features = (entering.hidden_states, *entering.skips)
        entrance = self.entrances[index]
        residuals = entrance.residuals(features, self.told[index], self.matrices[index])
        hidden, *skips = add_all(features, residuals)
        return DecoderInput(hidden, tuple(skips))
