"""What a UNet is made of: the places where a guide can act, in the order of the forward."""

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

from diffusers import Transformer2DModel, UNet2DConditionModel
from diffusers.models.attention import FeedForward, GatedSelfAttentionDense
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from torch import nn

from pnp_core.model_configs import check_told

NORMS = (nn.GroupNorm, nn.LayerNorm)
MODULATED = (
    *NORMS,
    Attention,
    FeedForward,
    ResnetBlock2D,
    Transformer2DModel,
    Downsample2D,
    Upsample2D,
)


class EntranceChannels(NamedTuple):
    """Channels of what enters one up block."""

    hidden: int
    skips: tuple[int, ...]


def decoder_entrances(unet: UNet2DConditionModel) -> list[EntranceChannels]:
    """Channels of the hidden states and skips that enter each of the UNet's up blocks."""
    conv_in: Any = unet.conv_in
    while hasattr(conv_in, "base_layer"):  # in a LoRA, or in several adapters of other kinds
        conv_in = conv_in.base_layer
    stack = [conv_in.out_channels]
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
    layers = [*in_order(unet), unwrapped(unet.conv_norm_out)]
    first = layers.index(text_attentions(unet)[0])
    return [layer for layer in layers[first:] if isinstance(layer, MODULATED)]


class Span(NamedTuple):
    """What a part of a UNet has of the places where a guide acts."""

    layers: range  # of modulated_layers
    attentions: range  # of text_attentions


def repeated_blocks(
    unet: UNet2DConditionModel, modulated: list[nn.Module], attentions: list[Attention]
) -> list[tuple[nn.Module, Span]]:
    """The blocks that diffusers compiles by themselves, and what is in each.

    Args:
        unet: whose blocks.
        modulated: its :func:`modulated_layers`.
        attentions: its :func:`text_attentions`.
    """
    places = [{layer: n for n, layer in enumerate(layers)} for layers in (modulated, attentions)]
    names = unet._repeated_blocks or ()
    found = []
    for block in unet.modules():
        if type(block).__name__ in names:
            inside = ([of[m] for m in block.modules() if m in of] for of in places)
            found.append((block, Span(*map(range_of, inside))))
    return found


def range_of(numbers: list[int]) -> range:
    """Numbers without gaps, in any order."""
    return range(min(numbers), max(numbers) + 1) if numbers else range(0)


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
    """A module's parts before the module itself.

    Without what GLIGEN adds to a base, and without an attention's own norm, which is given the
    channels in another place than other norms.
    """
    if isinstance(module, GatedSelfAttentionDense):
        return
    for name, child in module.named_children():
        if not (isinstance(module, Attention) and name == "group_norm"):
            yield from inside_out(unwrapped(child))
    yield module


def unwrapped(module: nn.Module) -> nn.Module:
    """A norm without what peft puts around it to train it; any other module as it is."""
    for name in ("base_layer", "original_module"):
        inner = module._modules.get(name)
        if isinstance(inner, NORMS):
            return inner
    return module


def copies_of_norms(unet: nn.Module) -> dict[nn.Module, list[nn.Module]]:
    """What peft keeps beside a norm, to run in its place while an adapter is active."""
    inside = ((unwrapped(module), module) for module in unet.modules())
    return {
        norm: [copy for copy in module.modules() if isinstance(copy, NORMS) and copy is not norm]
        for norm, module in inside
        if norm is not module
    }


def modulated_channels(layer: nn.Module) -> int:
    """Channels of what one of :func:`modulated_layers` gives."""
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


def modulated_dims(layer: nn.Module) -> int:
    """Number of dimensions of what a layer of :func:`modulated_layers` gives: maps have four."""
    if isinstance(layer, Attention):
        return 3 if layer.group_norm is None else 4
    return 3 if isinstance(layer, nn.LayerNorm | FeedForward) else 4


def describe(unet: UNet2DConditionModel) -> dict[str, Any]:
    """The facts about a UNet that a guide depends on.

    Raises:
        ValueError: it has nothing that attends to a text, is told more than a guide knows of, or
            is guidance-distilled itself.
    """
    attentions = text_attentions(unet)
    if not attentions:
        raise ValueError(
            "This UNet has no cross-attention to a text in plain transformer blocks, where a guide "
            "acts."
        )
    check_told(unet.config)
    if (width := unet.config.get("time_cond_proj_dim")) is not None:
        raise ValueError(
            f"This UNet is guidance-distilled itself (time_cond_proj_dim is {width}): it needs no "
            "guide."
        )
    layers = modulated_layers(unet)
    return {
        "in_channels": unet.config.in_channels,
        "text_dim": unet.config.cross_attention_dim,
        "channels": [[e.hidden, *e.skips] for e in decoder_entrances(unet)],
        "attention_channels": [layer.inner_dim for layer in attentions],
        "modulated_channels": [modulated_channels(layer) for layer in layers],
        "modulated_dims": [modulated_dims(layer) for layer in layers],
    }


def plain(value: Any) -> Any:
    """Tuples as lists, so that what JSON gave back compares equal."""
    return [plain(v) for v in value] if isinstance(value, list | tuple) else copy.copy(value)
