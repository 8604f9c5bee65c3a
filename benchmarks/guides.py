"""Other shapes of a tiny guide, as large as the default one, for the ablations.

Each is a kind of guide (:class:`pnp_core.guide.kind.Kind`) that takes the network's place in a
:class:`pnp_core.guide.Guide`.

Shape legend: B batch, C channels, H W latent size, N positions, L text tokens, D text width,
R rank, M width of the conditioning vector.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from pnp_core.calls import entered
from pnp_core.conditions import Conditions
from pnp_core.denoiser import DenoiserCall, GuidedDenoiser
from pnp_core.guide import Guide
from pnp_core.guide.embeddings import EMBEDDING_DIM, W_SCALE, frequencies, sinusoidal
from pnp_core.guide.kind import DecoderInput, Effect, KeyValue, Kind, Prepared
from pnp_core.guide.maths import Gain, add_all, rms_normed, zero_module
from pnp_core.guide.tiny import PROMPT_RANK, TinyGuide, TinyShape
from pnp_core.guide.unet import decoder_entrances, describe, modulated_layers, text_attentions
from pnp_core.schedule import NoiseSchedule

WIDTH = 32  # of the conditioning vector, the default guide's on the embedded base


class Parts(NamedTuple):
    """Which parts of the default guide there are."""

    text: bool = True
    attentions: bool = True
    modulations: bool = True
    entrances: bool = True


class PartialGuide(Kind):
    """The default guide without some of its parts, the others wider."""

    def __init__(self, unet: UNet2DConditionModel, rank: int, parts: Parts) -> None:
        super().__init__()
        facts = describe(unet)
        entrances = decoder_entrances(unet) if parts.entrances else []
        self.parts = parts
        self.net = TinyGuide(
            entrances,
            TinyShape([rank] * len(entrances), rank if parts.text else 0, WIDTH),
            facts["text_dim"],
            facts["attention_channels"] if parts.attentions else [],
            facts["modulated_channels"] if parts.modulations else [],
            facts["modulated_dims"] if parts.modulations else [],
        )

    def prepare(self, conditions: Conditions, strength: float) -> "PreparedPartial":
        """As the whole guide, whose parts are left out only when they act."""
        return PreparedPartial(self.net.prepare(conditions, strength), self.parts)


class PreparedPartial(Prepared):
    """A partial guide that has read a run's conditions."""

    def __init__(self, whole: Prepared, parts: Parts) -> None:
        self.whole = whole
        self.parts = parts

    def at(self, sample: Tensor, timestep_B: Tensor) -> "PartialEffect":
        """The whole guide's effect at this timestep, less the parts that are left out."""
        return PartialEffect(self.whole.at(sample, timestep_B), self.parts)


class PartialEffect(Effect):
    """What a guide does, but for parts that it does not have."""

    def __init__(self, whole: Effect, parts: Parts) -> None:
        self.whole = whole
        self.parts = parts
        self.attends = parts.attentions
        self.modulates = parts.modulations

    def steer(self, c_BLD: Tensor) -> Tensor:
        """The prompt's text states, `(B, L, D)`, changed only with the part `text`."""
        return self.whole.steer(c_BLD) if self.parts.text else c_BLD

    def attend(self, index: int, query_BNC: Tensor, read_BNC: Tensor, negative: KeyValue) -> Tensor:
        """As the whole guide; not asked without the part `attentions`."""
        return self.whole.attend(index, query_BNC, read_BNC, negative)

    def modulate(self, index: int, output: Tensor, *, in_place: bool = False) -> Tensor:
        """As the whole guide; not asked without the part `modulations`."""
        return self.whole.modulate(index, output, in_place=in_place)

    def enter(self, index: int, entering: DecoderInput) -> DecoderInput:
        """As the whole guide, or unchanged without the part `entrances`."""
        return self.whole.enter(index, entering) if self.parts.entrances else entering


class External(Kind):
    """A narrow convolutional network that reads the noisy latent, not the UNet's features.

    A zero projection of what it finds enters the decoder with the hidden states and each skip.
    """

    def __init__(self, unet: UNet2DConditionModel, rank: int) -> None:
        super().__init__()
        text_dim = unet.config.cross_attention_dim
        self.split = [(e.hidden, *e.skips) for e in decoder_entrances(unet)]
        self.embed = nn.Sequential(
            nn.Linear(2 * EMBEDDING_DIM, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU()
        )
        self.prompt = nn.Sequential(
            nn.Linear(text_dim, PROMPT_RANK, bias=False),
            zero_module(nn.Linear(PROMPT_RANK, WIDTH, bias=False)),
        )
        self.conv_in = nn.Conv2d(unet.config.in_channels, rank, 3, padding=1)
        self.blocks = nn.ModuleList(Block(rank) for _ in range(2))
        self.query = nn.Linear(rank, rank)
        self.key = nn.Linear(text_dim, rank)
        self.value = nn.Linear(text_dim, rank)
        self.attended = nn.Linear(rank, rank, bias=False)
        self.up = nn.ModuleList(
            zero_module(nn.Conv2d(rank, sum(parts), 1, bias=False)) for parts in self.split
        )

    def prepare(self, conditions: Conditions, strength: float) -> "PreparedExternal":
        """Embed guidance scales and text once for a run."""
        return PreparedExternal(self, conditions, strength)


class PreparedExternal(Prepared):
    """An external guide that has read a run's conditions."""

    def __init__(self, net: External, conditions: Conditions, strength: float) -> None:
        self.net = net
        self.dtype = net.conv_in.weight.dtype
        normed = [rms_normed(x.to(self.dtype)) for x in (conditions.c_BLD, conditions.n_BLD)]
        difference_BLD = normed[0] - normed[1]
        self.gain_B1 = Gain.of(conditions.w_B, difference_BLD, strength).scale_B1
        self.frequencies = frequencies(difference_BLD.device)
        self.w_BE = sinusoidal(W_SCALE * conditions.w_B, self.frequencies)
        self.prompt_BM = net.prompt(difference_BLD.mean(dim=1))
        self.texts = [(heads(net.key(text)), heads(net.value(text))) for text in normed]

    def at(self, sample: Tensor, timestep_B: Tensor) -> "ExternalEffect":
        """Run the network on the noisy latents, `(B, C, H, W)`, for what enters the decoder."""
        net = self.net
        t_BE = sinusoidal(timestep_B, self.frequencies).expand_as(self.w_BE)
        embedding_BM = net.embed(torch.cat([t_BE, self.w_BE], dim=1).to(self.dtype))
        embedding_BM = embedding_BM + self.prompt_BM
        h = net.blocks[0](net.conv_in(sample.to(self.dtype)), embedding_BM)
        query = heads(net.query(h.flatten(2).transpose(1, 2)))
        each = (len(query), -1, -1, -1)  # one negative prompt may stand for all samples
        positive, negative = (
            F.scaled_dot_product_attention(query, key.expand(*each), value.expand(*each))
            for key, value in self.texts
        )
        attended = net.attended((positive - negative).transpose(1, 2).flatten(2))
        h = h + attended.transpose(1, 2).reshape(h.shape)
        h = F.silu(net.blocks[1](h, embedding_BM))
        return ExternalEffect(net, self.gain_B1.to(h.dtype)[..., None, None] * h)


class ExternalEffect(Effect):
    """What an external guide does in one forward."""

    def __init__(self, net: External, h_BRHW: Tensor) -> None:
        self.net = net
        self.h_BRHW = h_BRHW

    def enter(self, index: int, entering: DecoderInput) -> DecoderInput:
        """Add what the network found, pooled to this block's size, to hidden states and skips."""
        features = (entering.hidden_states, *entering.skips)
        height, width = features[0].shape[-2:]
        h = F.adaptive_avg_pool2d(self.h_BRHW, (height, width))
        residuals = self.net.up[index](h).split(self.net.split[index], dim=1)
        hidden, *skips = add_all(features, residuals)
        return DecoderInput(hidden, tuple(skips))


def heads(x_BNA: Tensor) -> Tensor:
    """``(B, N, A)`` to ``(B, heads, N, A / heads)``, with heads of at least 16 channels."""
    num_heads = max(1, x_BNA.shape[-1] // 32)
    return x_BNA.unflatten(-1, (num_heads, -1)).transpose(1, 2)


class Block(nn.Module):
    """A residual block, modulated by the conditioning vector."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(WIDTH, 2 * rank)
        self.conv = nn.Conv2d(rank, rank, 3, padding=1)

    def forward(self, h: Tensor, embedding_BM: Tensor) -> Tensor:
        """The features, changed as the vector says."""
        scale, shift = self.modulation(embedding_BM)[..., None, None].chunk(2, dim=1)
        result: Tensor = h + self.conv(F.silu(h * (1 + scale) + shift))
        return result


Shape = Callable[[UNet2DConditionModel, int], Kind]
"""Makes a network for a UNet, as wide as a rank says."""


def without(**parts: bool) -> Shape:
    """The default guide without some of its parts, as ``without(text=False)``."""
    return partial(PartialGuide, parts=Parts(**parts))


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


class InDecoder(GuidedDenoiser):
    """A guided forward in which the guide acts in the decoder alone, and so do gradients."""

    def __init__(self, unet: UNet2DConditionModel, guide: Guide, schedule: NoiseSchedule) -> None:
        super().__init__(unet, guide, schedule)
        in_decoder = {id(module) for module in (*unet.up_blocks.modules(), unet.conv_norm_out)}
        self.places = Places(
            *(
                {index for index, layer in enumerate(layers) if id(layer) in in_decoder}
                for layers in (text_attentions(unet), modulated_layers(unet))
            )
        )

    def __call__(self, z_BCHW: Tensor, t_B: Tensor, conditions: Conditions) -> Tensor:
        """Guided eps, `(B, C, H, W)`; the encoder reads the prompt's own text states."""
        unet = self.plain.unet
        call = DecoderCall(unet, self.guide, conditions, self.places)

        def with_text(module: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:  # noqa: ARG001, torch's hook
            return args, {**kwargs, "encoder_hidden_states": call.steered_BLD}

        blocks = [block for block in unet.up_blocks if hasattr(block, "attentions")]
        handles = [b.register_forward_pre_hook(with_text, with_kwargs=True) for b in blocks]
        try:
            with entered(call):
                return self.plain(z_BCHW, t_B, conditions)
        finally:
            for handle in handles:
                handle.remove()


class Places(NamedTuple):
    """Where in the decoder a guide can act: numbers of cross-attentions and modulated layers."""

    attentions: set[int]
    layers: set[int]


class DecoderCall(DenoiserCall):
    """A forward whose encoder reads the prompt as it is, and its decoder what a guide makes of it.

    Attributes:
        steered_BLD: what the decoder is to read.
    """

    steered_BLD: Tensor

    def __init__(
        self, unet: UNet2DConditionModel, guide: Guide, conditions: Conditions, places: Places
    ) -> None:
        super().__init__(unet, guide, conditions)
        self.places = places

    def begin(self, arguments: dict[str, Any]) -> Effect:
        """The guide's effect; its text states are kept for the decoder alone."""
        text_BLD = arguments["encoder_hidden_states"]
        effect = super().begin(arguments)
        self.steered_BLD = arguments["encoder_hidden_states"]
        arguments["encoder_hidden_states"] = text_BLD
        return DecoderEffect(effect, self.places)


class DecoderEffect(PartialEffect):
    """What a guide does, in the decoder alone."""

    def __init__(self, whole: Effect, places: Places) -> None:
        super().__init__(whole, Parts(attentions=whole.attends, modulations=whole.modulates))
        self.places = places

    def attend(self, index: int, query_BNC: Tensor, read_BNC: Tensor, negative: KeyValue) -> Tensor:
        """As the guide in cross-attentions of the decoder; elsewhere what was read."""
        if index not in self.places.attentions:
            return read_BNC
        return super().attend(index, query_BNC, read_BNC, negative)

    def modulate(self, index: int, output: Tensor, *, in_place: bool = False) -> Tensor:
        """As the guide in layers of the decoder; elsewhere unchanged."""
        if index not in self.places.layers:
            return output
        return super().modulate(index, output, in_place=in_place)
