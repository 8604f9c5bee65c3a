"""What every kind of guide does: read a run's conditions, then each step's timestep, then act."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from pnp_core.conditions import Conditions


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

    def at_each(self, sample: Tensor, timesteps_TB: Tensor) -> "Sequence[Effect]":
        """What it does at several timesteps, as far as it can tell before their latents are known.

        Args:
            sample: the first one's latents, ``(B, C, H, W)``.
            timesteps_TB: T of them; one a sample, or one for all.

        Returns:
            Effects of the first timesteps, of one at least.
        """
        return [self.at(sample, timesteps_TB[0])]


class Kind(nn.Module, ABC):
    """A kind of guide."""

    @abstractmethod
    def prepare(self, conditions: Conditions, strength: float) -> Prepared:
        """Read what does not change from step to step.

        Args:
            conditions: prompts, negative prompts and guidance scales of the batch.
            strength: multiplies all that the guide does.
        """
