"""The encoder guide: a tiny guide that is told what the encoder makes of the negative prompt.

The frozen UNet's encoder and mid block run a second time, under the negative prompt and with no
guide in them. What then differs at the decoder's entrances enters there once more, by learnt gains
channel by channel and mixed in a few directions. As it is the UNet's own encoder, that of a
fine-tune serves the fine-tune.

Shape legend: B batch, C channels, N positions, M width of the conditioning vector, R rank.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pnp_core.conditions import Conditions
from pnp_core.guide.adapters import GAIN_RANK, AttentionAdapter
from pnp_core.guide.kind import DecoderInput
from pnp_core.guide.maths import add_all
from pnp_core.guide.tiny import PreparedTiny, TinyEffect, TinyGuide, TinyShape
from pnp_core.guide.unet import EntranceChannels

RANK = 4  # of what is mixed from a feature's channels


class EncoderGuide(TinyGuide):
    """A tiny guide with an adapter for each feature that the decoder gets from the encoder."""

    def __init__(self, entrances: Sequence[EntranceChannels], shape: TinyShape, *rest: Any) -> None:
        super().__init__(entrances, shape, *rest)
        self.differences = differences(entrances, shape.embedding_dim)

    def prepare(self, conditions: Conditions, strength: float) -> "PreparedEncoder":
        """Read guidance scales and text once for a run; see :class:`Kind`."""
        return PreparedEncoder(self, conditions, strength)


def differences(entrances: Sequence[EntranceChannels], embedding_dim: int) -> nn.ModuleList:
    """Adapters of what leaves the mid block, then of the skips in the order of the decoder."""
    channels = [entrances[0].hidden, *(c for entrance in entrances for c in entrance.skips)]
    return nn.ModuleList(AttentionAdapter(c, embedding_dim, RANK) for c in channels)


class Mixing(NamedTuple):
    """What is added to a feature, from how it differs from that under the negative prompt."""

    gain_BC1: Tensor
    down_BRC: Tensor
    up_CR: Tensor


class PreparedEncoder(PreparedTiny):
    """An encoder guide that has read a run's conditions."""

    def __init__(self, net: EncoderGuide, conditions: Conditions, strength: float) -> None:
        super().__init__(net, conditions, strength)
        self.adapters = [a for a in net.differences if isinstance(a, AttentionAdapter)]  # all are
        readers = [a.gains.down for a in self.adapters] + [a.code for a in self.adapters]
        self.read_XM = torch.cat([linear.weight for linear in readers])
        self.read_bias_X = torch.cat([linear.bias for linear in readers])
        offsets: list[Tensor] = [a.gains.offset for a in self.adapters]
        offsets += [a.offset for a in self.adapters]
        self.read_gains_BX = self.gain.with_offset(torch.cat(offsets))
        self.n_BLD = conditions.each_negative
        self.added = None if conditions.added is None else conditions.added.negative

    def at(self, sample: Tensor, timestep_B: Tensor) -> "EncoderEffect":
        """Compute all that this timestep decides."""
        embedding_1BM = self.embedding(timestep_B[None])
        codes_BX = F.linear(embedding_1BM[0], self.read_XM, self.read_bias_X) * self.read_gains_BX
        num = len(self.adapters)
        gains, codes = codes_BX.split([num * GAIN_RANK, num * RANK], dim=1)
        mixings = [
            Mixing(
                gain_BC1=adapter.gains.up(gain_BR)[..., None],
                down_BRC=code_BR[..., None] * adapter.down.weight,
                up_CR=adapter.up.weight,
            )
            for adapter, gain_BR, code_BR in zip(
                self.adapters,
                gains.split(GAIN_RANK, dim=1),
                codes.split(RANK, dim=1),
                strict=True,
            )
        ]
        return EncoderEffect(mixings, **self.parts(sample, embedding_1BM)[0])

    def at_each(self, sample: Tensor, timesteps_TB: Tensor) -> list[TinyEffect]:
        """Of the first timestep alone: an effect keeps the features that it has compared."""
        return [self.at(sample, timesteps_TB[0])]


class EncoderEffect(TinyEffect):
    """What an encoder guide does in one forward."""

    compares = True

    def __init__(self, mixings: list[Mixing], *, prepared: PreparedEncoder, **parts: Any) -> None:
        super().__init__(prepared=prepared, **parts)
        self.mixings = mixings
        self.n_BLD, self.added = prepared.n_BLD, prepared.added
        self.negative: Sequence[DecoderInput] = ()

    def under_negative(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The UNet's arguments, with the negative prompt in the place of the prompt."""
        text = self.n_BLD.to(arguments["encoder_hidden_states"].dtype)
        changed: dict[str, Any] = {"encoder_hidden_states": text}
        if self.added is not None:
            changed["added_cond_kwargs"] = {**arguments["added_cond_kwargs"], **self.added}
        return {**arguments, **changed}

    def compare(self, negative: Sequence[DecoderInput]) -> None:
        """Keep what would enter the decoder under the negative prompt."""
        self.negative = negative

    def enter(self, index: int, entering: DecoderInput) -> DecoderInput:
        """Add to the tiny guide's residuals those of the differences."""
        negative = self.negative[index]
        entered = super().enter(index, entering)
        before = sum(len(each.skips) for each in self.negative[:index])
        skips = self.moved(1 + before, entering.skips, negative.skips, entered.skips)
        hidden = entered.hidden_states
        if index == 0:
            pair = [entering.hidden_states], [negative.hidden_states]
            (hidden,) = self.moved(0, *pair, [hidden])
        return DecoderInput(hidden, tuple(skips))

    def moved(
        self,
        first: int,
        theirs: Sequence[Tensor],
        negative: Sequence[Tensor],
        entered: Sequence[Tensor],
    ) -> list[Tensor]:
        """``entered``, with the residuals of the adapters from number ``first`` on."""
        residuals = []
        mixings = self.mixings[first : first + len(theirs)]
        for (gain, down, up), own, other in zip(mixings, theirs, negative, strict=True):
            beyond_BCN = (own - other).flatten(2).to(gain.dtype)
            mixed = torch.bmm(up.expand(len(own), -1, -1), torch.bmm(down, beyond_BCN))
            residuals.append(torch.addcmul(mixed, gain, beyond_BCN).view(own.shape))
        return add_all(entered, residuals)
