"""The guide: a small external network that replaces classifier-free guidance.

A guide returns residuals for the hidden states and skip connections that enter each block of the
UNet's decoder, from what has been computed by then. A tiny one acts before that as well: by a
residual on the text states, by turning up and mixing what each cross-attention reads of the prompt
beyond what it would read of the negative prompt, and by scaling and shifting the channels of what
the layers from there on give. All of it carries the factor ``w - 1`` and starts from zero
projections: at ``guidance_scale = 1``, or untrained, the base is unchanged. Halving adds a learnt
offset to that factor, since fewer steps need mending at every w.

Shape legend: B batch, C channels, H W latent size, N positions, L text tokens, D text width,
R rank, M width of the conditioning vector.
"""

import copy
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin, Transformer2DModel, UNet2DConditionModel
from diffusers.configuration_utils import FrozenDict, register_to_config
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from torch import Tensor, nn

KINDS = ("tiny", "full")
EMBEDDING_DIM = 64  # sinusoidal embedding of t and of w
PROMPT_RANK = 8  # of what the whole prompt adds to the conditioning vector
GAIN_RANK = 4  # of the gains on one cross-attention
PROJECTION_RANK = 8  # of what is mixed from its channels besides
MODULATED = (
    nn.GroupNorm,
    nn.LayerNorm,
    Attention,
    FeedForward,
    ResnetBlock2D,
    Transformer2DModel,
    Downsample2D,
    Upsample2D,
)


@dataclass(frozen=True, kw_only=True)
class GuideConfig:
    """What kind of guide to build.

    Attributes:
        kind: ``tiny`` (acts on the text states, the cross-attentions, the layers' outputs and at
            the decoder's entrances, with at most ``max_parameters_ratio`` of the base's
            parameters) or ``full`` (a trainable copy of the base's encoder).
        max_parameters_ratio: parameters of a tiny guide over the base UNet's; its rank follows.

    Raises:
        ValueError: an unknown kind, or a ratio outside (0, 1).
    """

    kind: str = "tiny"
    max_parameters_ratio: float = 0.01

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"guide kind is {self.kind!r}; it must be one of {', '.join(KINDS)}.")
        if not 0 < self.max_parameters_ratio < 1:
            raise ValueError(
                f"max_parameters_ratio is {self.max_parameters_ratio}; it must lie in (0, 1)."
            )


class Modulation(NamedTuple):
    """What a layer's output is multiplied by and what is added then, by channel, ``(B, C)``."""

    factor: Tensor
    shift: Tensor


class Conditioning(NamedTuple):
    """What a guide knows before the UNet runs; computed once a step."""

    gain_B: Tensor  # strength * (w - 1)
    strength: float
    embedding_BM: Tensor | None = None  # of t, w and the prompt as a whole
    text_residual_BLD: Tensor | None = None
    attention_gains: tuple[Tensor, ...] | None = None  # (B, C + R) for each cross-attention
    negative_BLD: Tensor | None = None  # text states of the negative prompt; one row: all share it
    modulations: tuple[Modulation, ...] | None = None  # one a layer
    encoder_features: tuple[Tensor, ...] | None = None  # a full guide's own skips and mid


class DecoderInput(NamedTuple):
    """What enters one up block of the UNet."""

    hidden_states: Tensor
    skips: tuple[Tensor, ...]


class EntranceChannels(NamedTuple):
    """Channels of what enters one up block."""

    hidden: int
    skips: tuple[int, ...]


def decoder_entrances(unet: UNet2DConditionModel) -> list[EntranceChannels]:
    """Channels of the hidden states and skips that enter each of the UNet's up blocks."""
    stack = [unet.conv_in.out_channels]
    for block in unet.down_blocks:
        stack += [resnet.out_channels for resnet in block.resnets]
        stack += [down.out_channels for down in block.downsamplers or []]
    entrances = []
    hidden = stack[-1]
    for block in unet.up_blocks:
        num_skips = len(block.resnets)
        entrances.append(EntranceChannels(hidden, tuple(stack[-num_skips:])))
        del stack[-num_skips:]
        hidden = block.resnets[-1].out_channels
    return entrances


def text_attentions(unet: UNet2DConditionModel) -> list[Attention]:
    """The layers that attend to the text, in the order of the forward."""
    blocks = (*unet.down_blocks, unet.mid_block, *unet.up_blocks)
    return [
        block.attn2
        for outer in blocks
        for transformer in getattr(outer, "attentions", [])
        for block in getattr(transformer, "transformer_blocks", [])
        if block.attn2 is not None
    ]


def modulated_layers(unet: UNet2DConditionModel) -> list[nn.Module]:
    """The layers whose outputs a tiny guide modulates, in the order in which they give them.

    They start with the first cross-attention: what lies before it needs no gradients in training.
    Parts that a LoRA may replace are not among them.
    """
    layers = [*in_order(unet), unet.conv_norm_out]
    first = layers.index(text_attentions(unet)[0])
    return [layer for layer in layers[first:] if isinstance(layer, MODULATED)]


def in_order(unet: UNet2DConditionModel) -> Iterator[nn.Module]:
    """All modules of the UNet's blocks, as their forwards end."""
    blocks = (*unet.down_blocks, unet.mid_block, *unet.up_blocks)
    for block in (block for block in blocks if block is not None):
        first, second = list(block.resnets), list(getattr(block, "attentions", []))
        if block is unet.mid_block:  # which has a resnet more than attentions
            yield from inside_out(first.pop(0))
            first, second = second, first
        for index, layer in enumerate(first):
            yield from inside_out(layer)
            if index < len(second):
                yield from inside_out(second[index])
        for samplers in ("downsamplers", "upsamplers"):
            for sampler in getattr(block, samplers, None) or []:
                yield from inside_out(sampler)


def inside_out(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield from inside_out(child)
    yield module


def modulated_channels(layer: nn.Module) -> int:
    match layer:
        case nn.GroupNorm():
            return layer.num_channels
        case nn.LayerNorm():
            return layer.normalized_shape[0]
        case Attention():
            return int(layer.out_dim)
        case FeedForward():
            return int(layer.net[-1].out_features)
    assert isinstance(layer, ResnetBlock2D | Transformer2DModel | Downsample2D | Upsample2D)
    return int(layer.out_channels)


Layer = TypeVar("Layer", bound=nn.Module)


def zero_module(module: Layer) -> Layer:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def rms_normed(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:])


def sinusoidal(value_B: Tensor, scale: float) -> Tensor:
    return get_timestep_embedding(value_B.float().flatten() * scale, EMBEDDING_DIM)


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

    def forward(self, features: Sequence[Tensor], conditioning: Conditioning) -> list[Tensor]:
        assert conditioning.embedding_BM is not None
        # 1. down to the rank, features of different magnitudes brought to one scale; scaling what
        # comes out of the convolution costs less than scaling what goes in; no gradient goes
        # through the scale, where it would take time and teach nothing
        weight = self.down.weight
        assert self.down.bias is not None
        h = self.down.bias[:, None, None]
        for x, part in zip(features, weight.split(self.split, dim=1), strict=True):
            norm = torch.linalg.vector_norm(
                x.detach(), dim=(1, 2, 3), keepdim=True, dtype=torch.float32
            )
            scale = x[0].numel() ** 0.5 / norm.clamp(min=1e-6)
            h = h + F.conv2d(x.to(weight.dtype), part) * scale.to(weight.dtype)
        # 2. what t, w and the prompt ask for
        scale, shift = self.modulation(conditioning.embedding_BM)[..., None, None].chunk(2, dim=1)
        h = F.silu(h * (1 + scale) + shift)
        # 3. look around, then project back
        h = h + self.mix(F.silu(h))
        gain_BR = conditioning.gain_B[:, None] + conditioning.strength * self.offset
        h = gain_BR.to(h.dtype)[..., None, None] * F.silu(h)
        return list(self.up(h).split(self.split, dim=1))


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Written out on a CPU, where the fused kernel's backward pass is slow with so few channels.

    There the softmax is taken in fp32, which is three times as fast as in bf16.

    Args:
        query: ``(B, heads, N, D)``.
        key, value: ``(B, heads, L, D)``, or ``(1, heads, L, D)`` for all samples.
    """
    key, value = key.to(query), value.to(query)
    batch = len(query)
    if shared := len(key) < batch:  # all samples' positions make one attention
        query = query.transpose(0, 1).flatten(1, 2)[None]
    if query.device.type == "cpu":
        weights = (query @ key.mT * query.shape[-1] ** -0.5).float().softmax(dim=-1)
        read = weights.to(query) @ value
    else:
        read = F.scaled_dot_product_attention(query, key, value)
    return read[0].unflatten(1, (batch, -1)).transpose(0, 1) if shared else read


class TextAdapter(nn.Module):
    """A residual on the text states that the UNet attends to, from prompt minus negative."""

    def __init__(self, text_dim: int, rank: int, embedding_dim: int) -> None:
        super().__init__()
        self.down = nn.Linear(text_dim, rank)
        self.modulation = nn.Linear(embedding_dim, 2 * rank)
        self.up = zero_module(nn.Linear(rank, text_dim, bias=False))
        self.offset = nn.Parameter(torch.zeros(rank))

    def forward(
        self, difference_BLD: Tensor, embedding_BM: Tensor, gain_B: Tensor, strength: float
    ) -> Tensor:
        scale, shift = self.modulation(embedding_BM)[:, None].chunk(2, dim=-1)
        h = F.silu(self.down(difference_BLD) * (1 + scale) + shift)
        gain_BR = gain_B[:, None] + strength * self.offset
        residual: Tensor = self.up(gain_BR.to(h.dtype)[:, None] * h)
        return residual


class Gains(nn.Module):
    """Factors that the conditioning vector sets, channel by channel."""

    def __init__(self, channels: int, rank: int, embedding_dim: int) -> None:
        super().__init__()
        self.down = nn.Linear(embedding_dim, rank)
        self.up = zero_module(nn.Linear(rank, channels, bias=False))
        self.offset = nn.Parameter(torch.zeros(rank))

    def forward(self, embedding_BM: Tensor, gain_B: Tensor, strength: float) -> Tensor:
        gain_BR = gain_B[:, None] + strength * self.offset
        gain_BC: Tensor = self.up(gain_BR.to(embedding_BM) * self.down(embedding_BM))
        return gain_BC


class Modulations(nn.Module):
    """Factors and shifts for the channels of many layers, along one direction a layer.

    There may be hundreds, so all that are equally wide are seen to at once. Parameters are in the
    order of ``groups``, what is found in that of the layers.
    """

    def __init__(self, channels: Sequence[int], embedding_dim: int) -> None:
        super().__init__()
        self.groups = [
            (width, [layer for layer, c in enumerate(channels) if c == width])
            for width in sorted(set(channels))
        ]
        down = nn.Linear(embedding_dim, len(channels))
        # A vector, not a matrix: the optimizer is not to mix directions of different layers.
        self.down = nn.Parameter(down.weight.detach().flatten())
        self.bias = nn.Parameter(down.bias.detach())
        self.factor = nn.Parameter(torch.zeros(sum(channels)))
        self.shift = nn.Parameter(torch.zeros(sum(channels)))
        self.offset = nn.Parameter(torch.zeros(len(channels)))

    def forward(
        self, embedding_BM: Tensor, gain_B: Tensor, strength: float
    ) -> tuple[Modulation, ...]:
        gain_BK = gain_B[:, None] + strength * self.offset
        down_KM = self.down.view(-1, embedding_BM.shape[1])
        code_BK = gain_BK.to(embedding_BM) * F.linear(embedding_BM, down_KM, self.bias)
        found: dict[int, Modulation] = {}
        first, start = 0, 0
        for width, layers in self.groups:
            code_Bk1 = code_BK[:, first : (first := first + len(layers)), None]
            part = slice(start, start := start + width * len(layers))
            factor_kC, shift_kC = (
                x[part].view(-1, width).to(code_BK.dtype) for x in (self.factor, self.shift)
            )
            factors, shifts = 1 + code_Bk1 * factor_kC, code_Bk1 * shift_kC
            found |= zip(layers, map(Modulation, factors.unbind(1), shifts.unbind(1)), strict=True)
        return tuple(found[layer] for layer in range(len(found)))


class AttentionAdapter(nn.Module):
    """How much more a cross-attention is to make of what the prompt says beyond the negative one.

    Channel by channel, and by a projection of few directions that mixes channels.
    """

    def __init__(self, channels: int, embedding_dim: int) -> None:
        super().__init__()
        self.gains = Gains(channels, GAIN_RANK, embedding_dim)
        self.down = nn.Linear(channels, PROJECTION_RANK, bias=False)
        self.code = nn.Linear(embedding_dim, PROJECTION_RANK)
        self.up = zero_module(nn.Linear(PROJECTION_RANK, channels, bias=False))
        self.offset = nn.Parameter(torch.zeros(PROJECTION_RANK))

    def condition(self, embedding_BM: Tensor, gain_B: Tensor, strength: float) -> Tensor:
        """Gains on the channels and on the directions, ``(B, C + R)``."""
        gain_BR = gain_B[:, None] + strength * self.offset
        code_BR = gain_BR.to(embedding_BM) * self.code(embedding_BM)
        return torch.cat([self.gains(embedding_BM, gain_B, strength), code_BR], dim=1)

    def forward(self, difference_BNC: Tensor, gains_BX: Tensor) -> Tensor:
        """What to add to what was read, given the difference to what it reads of the negative."""
        gains_BX = gains_BX.to(difference_BNC.dtype)[:, None]
        gain_B1C, code_B1R = gains_BX.split([self.up.out_features, self.up.in_features], dim=-1)
        down, up = (w.to(difference_BNC.dtype) for w in (self.down.weight, self.up.weight))
        mixed = F.linear(code_B1R * F.linear(difference_BNC, down), up)
        return torch.addcmul(mixed, gain_B1C, difference_BNC)


class TinyShape(NamedTuple):
    """Widths of a tiny guide."""

    ranks: list[int]  # one an entrance
    text_rank: int
    embedding_dim: int


class TinyGuide(nn.Module):
    """Adapters of text, attentions, layers and entrances that share a conditioning vector."""

    def __init__(
        self,
        entrances: Sequence[EntranceChannels],
        shape: TinyShape,
        text_dim: int,
        attention_channels: Sequence[int] = (),
        modulated_channels: Sequence[int] = (),
    ) -> None:
        super().__init__()
        ranks, text_rank, embedding_dim = shape
        self.embed = nn.Sequential(
            nn.Linear(2 * EMBEDDING_DIM, embedding_dim),
            nn.SiLU(),
            nn.Linear(embedding_dim, embedding_dim),
            nn.SiLU(),
        )
        self.prompt = nn.Sequential(
            nn.Linear(text_dim, PROMPT_RANK, bias=False),
            zero_module(nn.Linear(PROMPT_RANK, embedding_dim, bias=False)),
        )
        self.text = TextAdapter(text_dim, text_rank, embedding_dim)
        self.attentions = nn.ModuleList(
            AttentionAdapter(channels, embedding_dim) for channels in attention_channels
        )
        self.modulations = (
            Modulations(modulated_channels, embedding_dim) if modulated_channels else None
        )
        self.entrances = nn.ModuleList(
            EntranceAdapter(channels, rank, embedding_dim)
            for channels, rank in zip(entrances, ranks, strict=True)
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
        dtype = next(self.embed.parameters()).dtype
        gain_B = strength * (w_B - 1)
        # w from 1 to 30 covers about the range of phases that t from 0 to 1000 does
        embedding_B2 = torch.cat([sinusoidal(timestep_B, 1), sinusoidal(w_B, 30)], dim=1)
        difference_BLD = rms_normed(c_BLD.to(dtype)) - rms_normed(n_BLD.to(dtype))
        embedding_BM = self.embed(embedding_B2.to(dtype)) + self.prompt(difference_BLD.mean(dim=1))
        given = (embedding_BM, gain_B, strength)
        return Conditioning(
            gain_B=gain_B,
            strength=strength,
            embedding_BM=embedding_BM,
            text_residual_BLD=self.text(difference_BLD, *given),
            attention_gains=tuple(
                adapter.condition(*given)
                for adapter in self.attentions
                if isinstance(adapter, AttentionAdapter)  # as all are
            ),
            negative_BLD=n_BLD,
            modulations=None if self.modulations is None else self.modulations(*given),
        )

    def residuals(
        self, block_index: int, conditioning: Conditioning, entering: DecoderInput
    ) -> list[Tensor | None]:
        features = (entering.hidden_states, *entering.skips)
        return list(self.entrances[block_index](features, conditioning))


def tiny_shape(
    entrances: Sequence[EntranceChannels],
    *,
    text_dim: int,
    attention_channels: Sequence[int],
    modulated_channels: Sequence[int],
    embedding_dim: int,
    max_parameters: int,
) -> TinyShape | None:
    """The widest tiny guide within a number of parameters; None if there is none.

    Ranks are in proportion to the channels at each entrance, as the base's own cost is: FLOPs then
    grow with the share of parameters.
    """
    best = None
    widest = max(max(e.skips) for e in entrances)
    with torch.device("meta"):  # the same at every rank, and slow to make
        modulations = Modulations(modulated_channels, embedding_dim)
    max_parameters -= sum(p.numel() for p in modulations.parameters())
    for rank in range(4, widest):
        ranks = [max(4, round(rank * sum(e.skips) / len(e.skips) / widest)) for e in entrances]
        # from 32 on, sizes that GPUs like
        ranks = [r if r < 32 else r // 8 * 8 for r in ranks]
        text_rank = rank if rank < 32 else rank // 64 * 32 + 32
        shape = TinyShape(ranks, text_rank, embedding_dim)
        with torch.device("meta"):
            net = TinyGuide(entrances, shape, text_dim, attention_channels)
        if sum(p.numel() for p in net.parameters()) > max_parameters:
            break
        best = shape
    return best


class FullGuide(nn.Module):
    """A trainable copy of the base's encoder that reads the negative prompt.

    The frozen UNet has the prompt's features already; the copy adds those under the negative
    prompt, and zero projections of the difference between the two enter the decoder.
    """

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
        encoder = self.encoder
        sample = sample.to(encoder.dtype)
        n_BLD = n_BLD.to(encoder.dtype).expand(len(sample), -1, -1)
        # 1. time and guidance scale
        t_emb = encoder.get_time_embed(sample=sample, timestep=timestep_B)
        emb = encoder.time_embedding(t_emb, sinusoidal(w_B, 30).to(encoder.dtype))
        aug_emb = encoder.get_aug_embed(
            emb=emb, encoder_hidden_states=n_BLD, added_cond_kwargs=negative_added or {}
        )
        emb = emb if aug_emb is None else emb + aug_emb
        # 2. encoder
        hidden = encoder.conv_in(sample)
        features = [hidden]
        for block in encoder.down_blocks:
            text = {"encoder_hidden_states": n_BLD} if attends(block) else {}
            hidden, skips = block(hidden_states=hidden, temb=emb, **text)
            features += skips
        # 3. mid block
        if encoder.mid_block is not None:
            text = {"encoder_hidden_states": n_BLD} if attends(encoder.mid_block) else {}
            hidden = encoder.mid_block(hidden, emb, **text)
        return Conditioning(
            gain_B=strength * (w_B - 1),
            strength=strength,
            encoder_features=(*features, hidden),
        )

    def residuals(
        self, block_index: int, conditioning: Conditioning, entering: DecoderInput
    ) -> list[Tensor | None]:
        assert conditioning.encoder_features is not None
        *features, mid = conditioning.encoder_features
        projections = list(self.projections)

        def project(index: int, own: Tensor, theirs: Tensor) -> Tensor:
            gain_B = conditioning.gain_B + conditioning.strength * self.offset[index]
            projected = projections[index](own - theirs.to(own.dtype))
            return gain_B.to(own.dtype)[:, None, None, None] * projected

        stop = len(features) - sum(self.num_skips[:block_index])
        start = stop - self.num_skips[block_index]
        result: list[Tensor | None] = [None]
        if block_index == 0:
            result = [project(-1, mid, entering.hidden_states)]
        for index, skip in zip(range(start, stop), entering.skips, strict=True):
            result.append(project(index, features[index], skip))
        return result


def attends(block: nn.Module) -> bool:
    return bool(getattr(block, "has_cross_attention", False))


class Guide(ModelMixin, ConfigMixin):
    """A guide for one UNet architecture; make one with :meth:`from_unet`.

    The config saved beside the weights says which architecture the guide fits and what it was
    trained for. Attributes of the config:

        base_hash: identity of the base it was trained on, see :func:`pnp_core.models.weights_hash`.
        prediction_type: what that base predicts.
        guidance_scale_range: the ``w`` it was trained for.
        num_steps: sampling steps it was halved to; None: any number (stage 1).
        timestep_spacing: of those steps.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        kind: str,
        in_channels: int,
        text_dim: int,
        channels: list[list[int]],
        attention_channels: list[int],
        modulated_channels: list[int],
        ranks: list[int] | None = None,
        text_rank: int = 0,
        embedding_dim: int = 0,
        unet_config: dict[str, Any] | None = None,
        base_hash: str | None = None,
        prediction_type: str = "epsilon",
        guidance_scale_range: tuple[float, float] = (1.0, 8.0),
        num_steps: int | None = None,
        timestep_spacing: str | None = None,
    ) -> None:
        super().__init__()
        entrances = [EntranceChannels(hidden, tuple(skips)) for hidden, *skips in channels]
        self.net: TinyGuide | FullGuide
        if kind == "tiny":
            assert ranks is not None
            shape = TinyShape(ranks, text_rank, embedding_dim)
            self.net = TinyGuide(entrances, shape, text_dim, attention_channels, modulated_channels)
        else:
            assert unet_config is not None
            self.net = FullGuide(unet_config, [len(e.skips) for e in entrances])

    @classmethod
    def from_unet(
        cls, unet: UNet2DConditionModel, config: GuideConfig | None = None, **trained_for: Any
    ) -> "Guide":
        """A fresh guide that fits ``unet`` and leaves it unchanged.

        Args:
            trained_for: config entries such as ``base_hash`` and ``prediction_type``.

        Raises:
            ValueError: the UNet is too small for a tiny guide within its share of parameters, or
                has parts a guide can't work with.
        """
        config = config or GuideConfig()
        architecture = describe(unet)
        if config.kind == "full":
            plain = {k: v for k, v in unet.config.items() if not k.startswith("_")}
            plain["time_cond_proj_dim"] = None
            guide = cls(kind="full", unet_config=plain, **architecture, **trained_for)
            assert isinstance(guide.net, FullGuide)
            guide.net.load_encoder(unet)
            return hold_offsets(guide).to(unet.device)
        base_parameters = sum(p.numel() for p in unet.parameters())
        shape = tiny_shape(
            decoder_entrances(unet),
            text_dim=architecture["text_dim"],
            attention_channels=architecture["attention_channels"],
            modulated_channels=architecture["modulated_channels"],
            embedding_dim=max(32, unet.time_embedding.linear_2.out_features // 16),
            max_parameters=int(config.max_parameters_ratio * base_parameters),
        )
        if shape is None:
            raise ValueError(
                f"No tiny guide is as small as {config.max_parameters_ratio:.1%} of this UNet's "
                f"{base_parameters:,} parameters. Raise max_parameters_ratio."
            )
        guide = cls(kind="tiny", **shape._asdict(), **architecture, **trained_for)
        return hold_offsets(guide).to(unet.device)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **options: Any) -> "Guide":
        """As of any diffusers model, from a folder or a hub id, but nothing is ever unpickled.

        Raises:
            ValueError: the weights are not those of such a guide; another version wrote them.
        """
        guide: Guide
        guide, loading = super().from_pretrained(
            path, **{**options, "use_safetensors": True, "output_loading_info": True}
        )
        if wrong := [*loading["missing_keys"], *loading["unexpected_keys"]]:
            raise ValueError(
                f"The guide in {path} was saved by another version of pnp-guide: {len(wrong)} of "
                f"its parameters are missing or unknown, {wrong[0]} among them. Train it again, or "
                "load it with the version that saved it."
            )
        # Where it lay is no part of it: a copy saved from another folder has the same bytes.
        config = {key: value for key, value in guide.config.items() if key != "_name_or_path"}
        guide._internal_dict = FrozenDict(config)
        return guide

    def weights_digest(self) -> str:
        """Identity of this guide: SHA-256 over its weights."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def check_fits(self, unet: UNet2DConditionModel) -> None:
        """Raise ValueError, naming both sides, if this guide was made for another architecture."""
        theirs = describe(unet)
        for key, value in theirs.items():
            own = self.config[key]
            if _plain(own) != _plain(value):
                raise ValueError(
                    f"This guide was made for a UNet with {key} = {_plain(own)}, "
                    f"but this UNet has {key} = {_plain(value)}."
                )

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        guidance_scale: Tensor,
        negative_hidden_states: Tensor,
        strength: float = 1.0,
        negative_added: Mapping[str, Tensor] | None = None,
    ) -> Conditioning:
        """Read everything known before the UNet runs.

        Args:
            sample: ``(B, C, H, W)``, as given to the UNet.
            timestep: ``(B,)`` or a scalar.
            encoder_hidden_states: text states of the prompt, ``(B, L, D)``.
            guidance_scale: ``(B,)`` or a scalar tensor.
            negative_hidden_states: text states of the negative (or null) prompt, ``(B, L, D)``, or
                ``(1, L, D)`` where all samples share it, which is faster.
            strength: multiplies the residuals.
            negative_added: an SDXL UNet's ``added_cond_kwargs`` under the negative prompt.
        """
        batch = sample.shape[0]
        timestep_B = timestep.to(sample.device).flatten().expand(batch)
        w_B = guidance_scale.to(sample.device, torch.float32).flatten().expand(batch)
        return self.net.condition(
            sample,
            timestep_B,
            encoder_hidden_states,
            negative_hidden_states,
            w_B,
            strength,
            negative_added,
        )

    def steer(self, encoder_hidden_states: Tensor, conditioning: Conditioning) -> Tensor:
        """The text states that the UNet is to read in place of the prompt's, ``(B, L, D)``."""
        return add(encoder_hidden_states, conditioning.text_residual_BLD)

    def attend(
        self, index: int, conditioning: Conditioning, layer: Attention, query: Tensor, read: Tensor
    ) -> Tensor:
        """What cross-attention ``index`` is to have read, before its output projection.

        ``read`` and more of ``read - read_n``, where ``read_n`` is what the layer's own heads read
        of the negative prompt.

        Args:
            layer: the cross-attention.
            query: its queries, ``(B, N, C)``.
            read: what it read of the prompt, ``(B, N, C)``.
        """
        assert isinstance(self.net, TinyGuide)
        assert conditioning.attention_gains and conditioning.negative_BLD is not None
        negative_BLD = conditioning.negative_BLD.to(query.dtype)
        query, key, value = (
            x.unflatten(-1, (layer.heads, -1)).transpose(1, 2)
            for x in (query, layer.to_k(negative_BLD), layer.to_v(negative_BLD))
        )
        read_n = attention(query, key, value).transpose(1, 2).flatten(2).to(read.dtype)
        more: Tensor = self.net.attentions[index](
            read - read_n, conditioning.attention_gains[index]
        )
        return read + more.to(read.dtype)

    def modulate(self, index: int, conditioning: Conditioning, output: Tensor) -> Tensor:
        """What layer ``index`` of :func:`modulated_layers` is to have given.

        Args:
            output: what it gave, ``(B, C, H, W)`` or ``(B, N, C)``.
        """
        assert conditioning.modulations
        each = (..., None, None) if output.ndim == 4 else (slice(None), None)
        factor, shift = (x.to(output.dtype)[each] for x in conditioning.modulations[index])
        return torch.addcmul(shift, output, factor)

    def inject(
        self, block_index: int, conditioning: Conditioning, entering: DecoderInput
    ) -> DecoderInput:
        """Add the guide's residuals to what enters up block ``block_index``."""
        hidden, *skips = self.net.residuals(block_index, conditioning, entering)
        return DecoderInput(
            add(entering.hidden_states, hidden),
            tuple(add(x, r) for x, r in zip(entering.skips, skips, strict=True)),
        )


def add(x: Tensor, residual: Tensor | None) -> Tensor:
    return x if residual is None else x + residual.to(x.dtype)


def hold_offsets(guide: Guide) -> Guide:
    """Keep the offsets of the gains at zero: before halving, w = 1 stays the base itself."""
    for name, parameter in guide.named_parameters():
        if name.endswith("offset"):
            parameter.requires_grad_(False)
    return guide


def describe(unet: UNet2DConditionModel) -> dict[str, Any]:
    """The facts about a UNet that a guide depends on."""
    return {
        "in_channels": unet.config.in_channels,
        "text_dim": unet.config.cross_attention_dim,
        "channels": [[e.hidden, *e.skips] for e in decoder_entrances(unet)],
        "attention_channels": [layer.inner_dim for layer in text_attentions(unet)],
        "modulated_channels": [modulated_channels(layer) for layer in modulated_layers(unet)],
    }


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else copy.copy(value)
