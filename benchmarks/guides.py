"""Other shapes of a tiny guide, as large as the default one, for the ablations.

Each is a network that stands in for a guide's own: it has the same `condition` and `residuals`.

Shape legend: B batch, C channels, H W latent size, L text tokens, D text width, R rank, M width of
the conditioning vector.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from pnp_core.guide import (
    Conditioning,
    DecoderInput,
    Guide,
    TextAdapter,
    TinyGuide,
    TinyShape,
    attention,
    decoder_entrances,
    modulated_channels,
    modulated_layers,
    rms_normed,
    text_attentions,
    zero_module,
)

EMBEDDING_DIM = 32  # width M, the default guide's on the embedded base


class Silent(nn.Module):
    """No residual on the text states."""

    def forward(self, *args: object) -> None:
        return None


class FeatureReading(TinyGuide):
    """Adapters at the decoder's entrances alone."""

    def __init__(self, unet: UNet2DConditionModel, rank: int) -> None:
        entrances = decoder_entrances(unet)
        shape = TinyShape([rank] * len(entrances), rank, EMBEDDING_DIM)
        super().__init__(entrances, shape, unet.config.cross_attention_dim)
        self.text = Silent()  # type: ignore[assignment]


class TextResidual(TinyGuide):
    """A residual on the text states alone."""

    def __init__(self, unet: UNet2DConditionModel, rank: int) -> None:
        text_dim = unet.config.cross_attention_dim
        super().__init__([], TinyShape([], 4, EMBEDDING_DIM), text_dim)
        self.text = TextAdapter(text_dim, rank, EMBEDDING_DIM)

    def residuals(
        self, block_index: int, conditioning: Conditioning, entering: DecoderInput
    ) -> list[Tensor | None]:
        return [None] * (1 + len(entering.skips))


class WithoutGains(TinyGuide):
    """The default, wider, without gains on the cross-attentions."""

    def __init__(self, unet: UNet2DConditionModel, rank: int) -> None:
        entrances = decoder_entrances(unet)
        shape = TinyShape([rank] * len(entrances), rank, EMBEDDING_DIM)
        text_dim = unet.config.cross_attention_dim
        super().__init__(entrances, shape, text_dim, (), channels_of_layers(unet))


class WithoutText(TinyGuide):
    """The default, wider, without a residual on the text states."""

    def __init__(self, unet: UNet2DConditionModel, rank: int) -> None:
        entrances = decoder_entrances(unet)
        shape = TinyShape([rank] * len(entrances), rank, EMBEDDING_DIM)
        channels = [layer.inner_dim for layer in text_attentions(unet)]
        text_dim = unet.config.cross_attention_dim
        super().__init__(entrances, shape, text_dim, channels, channels_of_layers(unet))
        self.text = Silent()  # type: ignore[assignment]


class WithoutModulations(TinyGuide):
    """The default, wider, without modulating what layers give."""

    def __init__(self, unet: UNet2DConditionModel, rank: int) -> None:
        entrances = decoder_entrances(unet)
        shape = TinyShape([rank] * len(entrances), rank, EMBEDDING_DIM)
        channels = [layer.inner_dim for layer in text_attentions(unet)]
        super().__init__(entrances, shape, unet.config.cross_attention_dim, channels)


class WithoutEntrances(TinyGuide):
    """The default, its text residual wider, without adapters at the decoder's entrances."""

    def __init__(self, unet: UNet2DConditionModel, rank: int) -> None:
        shape = TinyShape([], rank, EMBEDDING_DIM)
        channels = [layer.inner_dim for layer in text_attentions(unet)]
        text_dim = unet.config.cross_attention_dim
        super().__init__([], shape, text_dim, channels, channels_of_layers(unet))

    def residuals(
        self, block_index: int, conditioning: Conditioning, entering: DecoderInput
    ) -> list[Tensor | None]:
        return [None] * (1 + len(entering.skips))


def channels_of_layers(unet: UNet2DConditionModel) -> list[int]:
    return [modulated_channels(layer) for layer in modulated_layers(unet)]


class External(TinyGuide):
    """A narrow convolutional network that reads the noisy latent, not the UNet's features.

    A zero projection of what it finds enters the decoder with the hidden states and each skip.
    """

    def __init__(self, unet: UNet2DConditionModel, rank: int) -> None:
        self.split = [(e.hidden, *e.skips) for e in decoder_entrances(unet)]
        text_dim = unet.config.cross_attention_dim
        super().__init__([], TinyShape([], rank, EMBEDDING_DIM), text_dim)
        self.text = Silent()  # type: ignore[assignment]
        self.conv_in = nn.Conv2d(unet.config.in_channels, rank, 3, padding=1)
        self.blocks = nn.ModuleList(Block(rank, EMBEDDING_DIM) for _ in range(2))
        self.query = nn.Linear(rank, rank)
        self.key = nn.Linear(text_dim, rank)
        self.value = nn.Linear(text_dim, rank)
        self.attended = nn.Linear(rank, rank, bias=False)
        self.up = nn.ModuleList(
            zero_module(nn.Conv2d(rank, sum(parts), 1, bias=False)) for parts in self.split
        )

    def condition(
        self,
        sample: Tensor,
        timestep_B: Tensor,
        c_BLD: Tensor,
        n_BLD: Tensor,
        w_B: Tensor,
        strength: float,
        negative_added: Mapping[str, Tensor] | None,
    ) -> Conditioning:
        found = super().condition(sample, timestep_B, c_BLD, n_BLD, w_B, strength, negative_added)
        assert found.embedding_BM is not None
        h = self.blocks[0](self.conv_in(sample), found.embedding_BM)
        query = heads(self.query(h.flatten(2).transpose(1, 2)))
        normed = [rms_normed(text) for text in (c_BLD, n_BLD)]
        positive, negative = (
            attention(query, heads(self.key(text)), heads(self.value(text))) for text in normed
        )
        attended = self.attended((positive - negative).transpose(1, 2).flatten(2))
        h = h + attended.transpose(1, 2).reshape(h.shape)
        h = F.silu(self.blocks[1](h, found.embedding_BM))
        return found._replace(encoder_features=(found.gain_B.to(h)[:, None, None, None] * h,))

    def residuals(
        self, block_index: int, conditioning: Conditioning, entering: DecoderInput
    ) -> list[Tensor | None]:
        assert conditioning.encoder_features
        (h,) = conditioning.encoder_features
        height, width = entering.hidden_states.shape[-2:]
        h = F.adaptive_avg_pool2d(h, (height, width))
        return list(self.up[block_index](h).split(self.split[block_index], dim=1))


def heads(x_BNA: Tensor) -> Tensor:
    """``(B, N, A)`` to ``(B, heads, N, A / heads)``, with heads of at least 16 channels."""
    num_heads = max(1, x_BNA.shape[-1] // 32)
    return x_BNA.unflatten(-1, (num_heads, -1)).transpose(1, 2)


class Block(nn.Module):
    """A residual block, modulated by the conditioning vector."""

    def __init__(self, rank: int, embedding_dim: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(embedding_dim, 2 * rank)
        self.conv = nn.Conv2d(rank, rank, 3, padding=1)

    def forward(self, h: Tensor, embedding_BM: Tensor) -> Tensor:
        scale, shift = self.modulation(embedding_BM)[..., None, None].chunk(2, dim=1)
        result: Tensor = h + self.conv(F.silu(h * (1 + scale) + shift))
        return result


Shape = Callable[[UNet2DConditionModel, int], TinyGuide]


def widest(make: Shape, unet: UNet2DConditionModel, max_parameters: int) -> int:
    """The largest rank within a number of parameters."""
    rank = 4
    while True:
        with torch.device("meta"):
            larger = sum(p.numel() for p in make(unet, rank + 1).parameters())
        if larger > max_parameters:
            return rank
        rank += 1


def shaped_guide(make: Shape, unet: UNet2DConditionModel, guide: Guide) -> Guide:
    """``guide`` with a network of another shape that has at most as many parameters."""
    guide.net = make(unet, widest(make, unet, sum(p.numel() for p in guide.parameters())))
    return guide
