"""The full guide: a trainable copy of the base's encoder that reads the negative prompt.

The frozen UNet has the prompt's features already; the copy adds those under the negative prompt,
and zero projections of the difference between the two enter the decoder.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from pnp_core.conditions import Conditions
from pnp_core.guide.embeddings import EMBEDDING_DIM, W_SCALE, frequencies, sinusoidal
from pnp_core.guide.kind import DecoderInput, Effect, Kind, Prepared
from pnp_core.guide.maths import Gain, add_all, rms_normed, zero_module
from pnp_core.guide.unet import decoder_entrances


class FullGuide(Kind):
    """A copy of the base's encoder and mid block, with projections into the decoder."""

    def __init__(self, unet_config: Mapping[str, Any], num_skips: Sequence[int]) -> None:
        super().__init__()
        config = {k: v for k, v in unet_config.items() if not k.startswith("_")}
        self.encoder = UNet2DConditionModel.from_config(
            {**config, "time_cond_proj_dim": EMBEDDING_DIM}
        )
        self.num_skips = tuple(num_skips)
        entrances = decoder_entrances(self.encoder)
        skip_channels = [c for e in reversed(entrances) for c in e.skips]
        self.projections = nn.ModuleList(
            zero_module(nn.Conv2d(c, c, 1, bias=False))
            for c in (*skip_channels, entrances[0].hidden)
        )
        self.offset = nn.Parameter(torch.zeros(len(self.projections)))
        del self.encoder.up_blocks, self.encoder.conv_norm_out, self.encoder.conv_out
        zero_module(self.encoder.time_embedding.cond_proj)

    def load_encoder(self, unet: UNet2DConditionModel) -> None:
        """Start from the base's encoder and mid block."""
        own = self.encoder.state_dict()
        source = unet.state_dict()
        own.update({k: source[k].to(v.dtype) for k, v in own.items() if k in source})
        self.encoder.load_state_dict(own)

    def prepare(self, conditions: Conditions, strength: float) -> "PreparedFull":
        """Embed guidance scales and text once for a run; see :class:`Kind`."""
        return PreparedFull(self, conditions, strength)


class PreparedFull(Prepared):
    """A full guide that has read a run's conditions."""

    def __init__(self, net: FullGuide, conditions: Conditions, strength: float) -> None:
        self.net = net
        dtype = net.encoder.dtype
        c, n = conditions.c_BLD.to(dtype), conditions.n_BLD.to(dtype)
        gain = Gain.of(conditions.w_B, rms_normed(c) - rms_normed(n), strength)
        self.gains_BK = gain.with_offset(net.offset)
        self.n_BLD = n.expand(len(c), -1, -1)
        self.w_BE = sinusoidal(W_SCALE * conditions.w_B, frequencies(c.device)).to(dtype)
        self.added = None if conditions.added is None else conditions.added.negative

    def at(self, sample: Tensor, timestep_B: Tensor) -> "FullEffect":
        """Run the encoder on ``sample``: its features are what enters the decoder."""
        encoder = self.net.encoder
        sample = sample.to(encoder.dtype)
        # 1. time and guidance scale
        t_emb = encoder.get_time_embed(sample=sample, timestep=timestep_B)
        emb = encoder.time_embedding(t_emb, self.w_BE)
        aug_emb = encoder.get_aug_embed(
            emb=emb, encoder_hidden_states=self.n_BLD, added_cond_kwargs=self.added or {}
        )
        emb = emb if aug_emb is None else emb + aug_emb
        # 2. encoder
        hidden = encoder.conv_in(sample)
        features = [hidden]
        for block in encoder.down_blocks:
            text = {"encoder_hidden_states": self.n_BLD} if attends(block) else {}
            hidden, skips = block(hidden_states=hidden, temb=emb, **text)
            features += skips
        # 3. mid block
        if encoder.mid_block is not None:
            text = {"encoder_hidden_states": self.n_BLD} if attends(encoder.mid_block) else {}
            hidden = encoder.mid_block(hidden, emb, **text)
        return FullEffect(self.net, [*features, hidden], self.gains_BK)


class FullEffect(Effect):
    """What a full guide does in one forward: residuals at the decoder's entrances."""

    def __init__(self, net: FullGuide, features: list[Tensor], gains_BK: Tensor) -> None:
        self.net = net
        self.features = features  # the skips, then what leaves the mid block
        self.gains_BK = gains_BK

    def enter(self, index: int, entering: DecoderInput) -> DecoderInput:
        """Add the encoder's projected features to the skips, and before block 0 to the rest."""
        num_skips = self.net.num_skips
        stop = len(self.features) - 1 - sum(num_skips[:index])
        numbers = range(stop - num_skips[index], stop)
        hidden = entering.hidden_states
        if index == 0:
            (hidden,) = add_all([hidden], [self.project(len(self.features) - 1, hidden)])
        pairs = zip(numbers, entering.skips, strict=True)
        skips = add_all(entering.skips, [self.project(number, skip) for number, skip in pairs])
        return DecoderInput(hidden, tuple(skips))

    def project(self, number: int, theirs: Tensor) -> Tensor:
        """The residual for a feature of the base, from what it is under the negative prompt."""
        own = self.features[number]
        gain = self.gains_BK[:, number, None, None, None].to(own.dtype)
        return gain * self.net.projections[number](own - theirs.to(own.dtype))


def attends(block: nn.Module) -> bool:
    """Whether a block takes text states."""
    return bool(getattr(block, "has_cross_attention", False))
