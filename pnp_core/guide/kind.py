"""What every kind of guide does: read a run's conditions, then each step's timestep, then act."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from pnp_core.conditions import Conditions

EMBEDDING_DIM = 64  # sinusoidal embedding of t and of w
W_SCALE = 30  # w from 1 to 30 covers about the range of phases that t from 0 to 1000 does
SAME_PROMPT = 0.1  # root mean square of a difference between two prompts below which it fades out


Layer = TypeVar("Layer", bound=nn.Module)


class DecoderInput(NamedTuple):
    """What enters one up block of the UNet."""

    hidden_states: Tensor
    skips: tuple[Tensor, ...]


class KeyValue(NamedTuple):
    """What a cross-attention makes of a negative prompt: ``(B, heads, L, D)``, or one row for all.

    Keys carry the attention's scale.
    """

    key: Tensor
    value: Tensor


class Effect:
    """What a guide does in one forward of a UNet: nothing, but for what its kind overrides.

    Attributes:
        attends: whether :meth:`attend` does anything.
        modulates: whether :meth:`modulate` does.
        compares: whether it wants to be told by :meth:`compare`, which takes a second run of the
            encoder.
    """

    attends = False
    modulates = False
    compares = False

    def under_negative(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The UNet's arguments for a run under the negative prompt; of an effect that compares."""
        raise NotImplementedError

    def compare(self, negative: Sequence["DecoderInput"]) -> None:
        """Be told, before the forward, what would enter each up block under the negative prompt."""

    def steer(self, c_BLD: Tensor) -> Tensor:
        """The text states that the UNet is to read in place of the prompt's."""
        return c_BLD

    def attend(self, index: int, query_BNC: Tensor, read_BNC: Tensor, negative: KeyValue) -> Tensor:  # noqa: ARG002, overrides use them
        """What cross-attention ``index`` is to have read, before its output projection.

        Args:
            index: counts the UNet's cross-attentions.
            query_BNC: its queries.
            read_BNC: what it read of the prompt.
            negative: its keys and values of the negative prompt.
        """
        return read_BNC

    def modulate(self, index: int, output: Tensor, *, in_place: bool = False) -> Tensor:  # noqa: ARG002, overrides use them
        """What layer ``index`` of :func:`modulated_layers` is to have given.

        Args:
            index: its place in that list.
            output: what it gave, ``(B, C, H, W)`` or ``(B, N, C)``.
            in_place: whether it may be written over.
        """
        return output

    def enter(self, index: int, entering: DecoderInput) -> DecoderInput:  # noqa: ARG002, overrides use it
        """What is to enter up block ``index``."""
        return entering

    def within(self, layers: range, attentions: range) -> "Effect":
        """The same for a part of the UNet, whose layers and cross-attentions count from 0.

        Args:
            layers: of :func:`modulated_layers`, those in it.
            attentions: of the UNet's cross-attentions, those in it.
        """
        return Within(self, layers.start, attentions.start)


class Within(Effect):
    """An effect in a part of the UNet.

    Args:
        whole: the effect in all of it.
        layer: number of the part's first layer.
        attention: number of its first cross-attention.
    """

    def __init__(self, whole: Effect, layer: int, attention: int) -> None:
        self.whole, self.layer, self.attention = whole, layer, attention
        self.attends, self.modulates = whole.attends, whole.modulates

    def attend(self, index: int, query_BNC: Tensor, read_BNC: Tensor, negative: KeyValue) -> Tensor:
        """As the whole does."""
        return self.whole.attend(self.attention + index, query_BNC, read_BNC, negative)

    def modulate(self, index: int, output: Tensor, *, in_place: bool = False) -> Tensor:
        """As the whole does."""
        return self.whole.modulate(self.layer + index, output, in_place=in_place)


class Prepared(ABC):
    """A guide that has read a run's conditions."""

    @abstractmethod
    def at(self, sample: Tensor, timestep_B: Tensor) -> Effect:
        """What it does at this timestep.

        Args:
            sample: ``(B, C, H, W)``, as given to the UNet.
            timestep_B: one a sample, or one for all.
        """


class Kind(nn.Module, ABC):
    """A kind of guide."""

    @abstractmethod
    def prepare(self, conditions: Conditions, strength: float) -> Prepared:
        """Read what does not change from step to step.

        Args:
            conditions: prompts, negative prompts and guidance scales of the batch.
            strength: multiplies all that the guide does.
        """


class Gain(NamedTuple):
    """How much a guide is to do, one row a sample: ``scale + offset * learnt offset``.

    Both are zero where there is nothing to guide.
    """

    scale_B1: Tensor  # strength * (w - 1)
    offset_B1: Tensor  # strength, from 0 at w = 1 to 1 at w = 2

    @classmethod
    def of(cls, w_B: Tensor, difference_BLD: Tensor, strength: float) -> "Gain":
        """The gain at these guidance scales.

        Args:
            w_B: guidance scales; below 1 counts as 1.
            difference_BLD: of the text states of prompt and negative prompt, :func:`rms_normed`.
            strength: multiplies both gains.
        """
        above_B = (w_B.float() - 1).clamp(min=0)
        ramp_B = above_B.clamp(max=1)
        distance_B = difference_BLD.float().square().mean(dim=(1, 2)) / SAME_PROMPT**2
        distance_B = distance_B.clamp(max=1)
        share_B = strength * distance_B * (2 - distance_B)  # smooth at both ends
        ramp_B = ramp_B.square() * (3 - 2 * ramp_B)
        return cls((share_B * above_B)[:, None], (share_B * ramp_B)[:, None])

    def with_offset(self, offset_R: Tensor) -> Tensor:
        """The gains of R directions, ``(B, R)``, in the dtype of ``offset_R``."""
        gain_BR = torch.addcmul(self.scale_B1, self.offset_B1, offset_R.float())
        return gain_BR.to(offset_R.dtype)


def rms_normed(x: Tensor) -> Tensor:
    """Rows of the last dimension at a root mean square of 1."""
    return nn.functional.rms_norm(x, x.shape[-1:])


def frequencies(device: torch.device) -> Tensor:
    """Of the sinusoidal embedding of a timestep (Vaswani et al. 2017), as diffusers has them."""
    half = EMBEDDING_DIM // 2
    steps = torch.arange(half, dtype=torch.float32, device=device)
    return torch.exp(-math.log(10_000) * steps / (half - 1))


def sinusoidal(value_B: Tensor, frequencies_E: Tensor) -> Tensor:
    """Sinusoidal embedding, ``(B, EMBEDDING_DIM)``, float32."""
    phase_BE = value_B.float()[:, None] * frequencies_E
    return torch.cat([phase_BE.sin(), phase_BE.cos()], dim=1)


def zero_module(module: Layer) -> Layer:
    """The module with all its parameters at zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def add_all(features: Sequence[Tensor], residuals: Sequence[Tensor]) -> list[Tensor]:
    """Sums, each in the dtype of the feature; in one operation.

    Without gradients they take the memory of the residuals, which are nobody else's.
    """
    residuals = [r.to(x.dtype) for x, r in zip(features, residuals, strict=True)]
    if torch.is_grad_enabled():
        return list(torch._foreach_add(list(features), residuals))
    torch._foreach_add_(residuals, list(features))
    return residuals
