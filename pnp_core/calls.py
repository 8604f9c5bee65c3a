"""Runs of a guide, each knowing what it was told, and what the running forward is told by them.

What a call knows belongs to it: calls in other threads, or one inside another, don't see it.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pnp_core.guide.kind import Effect, KeyValue
from pnp_core.guide.unet import Span


class Call(ABC):
    """A run of a guide in one UNet.

    Attributes:
        unet: whose forwards it is asked about.
        negatives: keys and values of its negative prompts.
        was_asked: whether a forward has begun, of this UNet or in a call within this one.
        was_checked: whether the guide is known to act where it should.
    """

    unet: nn.Module
    negatives: "Negatives"
    was_asked = False
    was_checked = False

    @abstractmethod
    def begin(self, arguments: dict[str, Any]) -> Effect | None:
        """What the guide does in the forward that is about to run; None: nothing.

        Args:
            arguments: of that forward by name; may be changed.
        """

    def end(self, output: Any) -> Any:
        """What the forward is to return in place of ``output``."""
        return output


class Suspended(Call):
    """While a user's own code runs in the middle of a call: forwards are nobody's."""

    unet = nn.Module()

    def begin(self, arguments: dict[str, Any]) -> Effect | None:  # noqa: ARG002, the interface's
        """Never called: no UNet's hook knows of this call."""
        raise AssertionError("asked of no forward")


class Acting:
    """A guide at work in the forward that is running.

    Attributes:
        is_of_block: whether it is of one repeated block alone, whose places count from 0.
        query: of the cross-attention that is running.
        num_entered, num_attended, num_modulated: how often so far, by kind of place.
    """

    def __init__(
        self, effect: Effect, negatives: "Negatives", *, is_of_block: bool = False
    ) -> None:
        self.effect = effect
        self.negatives = negatives
        self.is_of_block = is_of_block
        self.query: Tensor | None = None
        self.num_entered = self.num_attended = self.num_modulated = 0


class Now(threading.local):
    """What goes on in this thread."""

    calls: tuple[Call, ...] = ()  # the innermost is the last
    acting: Acting | None = None
    features: "list[Tensor] | None" = None  # of an encoder that runs for its features alone


now = Now()


@contextmanager
def entered(call: Call) -> Iterator[None]:
    """While open, forwards of the call's UNet in this thread are the call's."""
    before, acting = now.calls, now.acting
    now.calls = (*before, call)
    try:
        yield
    finally:
        # also after what torch calls no hooks for, as a KeyboardInterrupt in a forward
        now.calls, now.acting = before, acting


@contextmanager
def suspended() -> Iterator[None]:
    """While open, forwards in this thread belong to none of the calls under way."""
    with entered(Suspended()):
        yield


@contextmanager
def acting_again(acting: Acting | None) -> Iterator[None]:
    """While open, the guide acts as it did in a forward that is over."""
    before = now.acting
    now.acting = acting
    try:
        yield
    finally:
        now.acting = before


class CompiledBlock:
    """A compiled repeated block that is told of its own part of the guide alone.

    Code compiled for one block then serves all that are like it.

    Args:
        inner: runs it.
        span: its places in the UNet.
    """

    def __init__(self, inner: Callable[..., Any], span: Span) -> None:
        self.inner = inner
        self.span = span

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it."""
        whole = now.acting
        if whole is None or whole.is_of_block:
            return self.inner(*args, **kwargs)
        layers, attentions = self.span
        kept, own = slice(attentions.start, attentions.stop), Negatives(whole.negatives.n_BLD)
        own.kept = whole.negatives.kept[kept]
        part = Acting(whole.effect.within(layers, attentions), own, is_of_block=True)
        with acting_again(part):
            output = self.inner(*args, **kwargs)
        whole.negatives.kept[kept] = own.kept
        whole.num_attended += part.num_attended
        whole.num_modulated += part.num_modulated
        return output


def run_checkpointed(module: nn.Module, *args: Any) -> Any:
    """Run one block of a UNet so that it keeps its inputs only, and runs again for gradients.

    It then runs after the UNet's forward, and on a GPU in another thread, where no guide would act:
    it is told of the one that acts now.
    """
    acting = now.acting
    return checkpoint(
        module.__call__,
        *args,
        use_reentrant=False,
        preserve_rng_state=False,  # nothing is random in a frozen UNet
        context_fn=lambda: (nullcontext(), acting_again(acting)),
    )


@contextmanager
def checkpointing(unets: Iterable[UNet2DConditionModel], enabled: bool) -> Iterator[None]:
    """While open, and if ``enabled``, blocks of these UNets run as :func:`run_checkpointed`."""
    ours = [unet for unet in unets if enabled and not unet.is_gradient_checkpointing]
    for unet in ours:
        unet.enable_gradient_checkpointing(run_checkpointed)
    try:
        yield
    finally:
        for unet in ours:
            unet.disable_gradient_checkpointing()


def call_of(unet: nn.Module) -> Call | None:
    """The call under way in this thread whose forward this is."""
    for call in reversed(now.calls):
        if isinstance(call, Suspended):
            return None
        if call.unet is unet:
            return call
    return None


class Negatives:
    """Keys and values of negative prompts in each cross-attention of a UNet.

    They are made where they are first wanted, and again when what makes them has changed: another
    adapter, another scale of one, other weights.

    Args:
        n_BLD: text states of the negative prompts; one row if all samples share it.
    """

    def __init__(self, n_BLD: Tensor) -> None:
        self.n_BLD = n_BLD
        self.kept: list[KeyValue | None] = []
        self.made_by: list[tuple[Any, ...]] = []

    def follow(self, layers: list[Attention], more: Any = None) -> None:
        """Forget what these layers would now make in another way.

        Args:
            layers: the cross-attentions, in the order of ``fill``'s ``index``.
            more: whatever else it depends on.
        """
        made_by = [(more, *state_of(a.to_k), *state_of(a.to_v)) for a in layers]
        if made_by != self.made_by:
            self.made_by = made_by
            self.kept = [None] * len(layers)

    def doubt(self) -> None:
        """Forget all: what has been written into weights through their ``data`` can't be seen."""
        self.made_by = []

    def fill(self, index: int, layer: Attention) -> KeyValue:
        """What ``layer`` makes of them."""
        kept = self.kept[index]
        if kept is None:
            dtype = layer.to_k.weight.dtype
            n_BLD = self.n_BLD if dtype.itemsize == 1 else self.n_BLD.to(dtype)  # fp8 is storage
            key, value = (
                x.unflatten(-1, (layer.heads, -1)).transpose(1, 2)
                for x in (layer.to_k(n_BLD) * layer.scale, layer.to_v(n_BLD))
            )
            kept = self.kept[index] = KeyValue(key, value)
        return kept


def state_of(linear: nn.Module) -> tuple[Any, ...]:
    """Tells whether a layer, with a LoRA or without, still is what it was."""
    # as peft's layers keep it; asking by name for what a module lacks takes long
    base: Any = linear._modules.get("base_layer", linear)
    state: tuple[Any, ...] = (id(linear), *version_of(base.weight))
    if base is not linear:
        lora: Any = linear
        weights = [w for name in lora.active_adapters for w in weights_of(lora, name)]
        scales = getattr(lora, "scaling", {})
        state += (lora.disable_adapters, *lora.active_adapters)
        state += tuple(version_of(s) if isinstance(s, Tensor) else s for s in scales.values())
        state += tuple(lora.merged_adapters)
        state += tuple(part for weight in weights for part in version_of(weight))
    return state


def weights_of(lora: Any, adapter: str) -> list[Tensor]:
    """The weights of one adapter of peft's in a layer."""
    tables = (getattr(lora, name) for name in lora.adapter_layer_names)
    return [p for table in tables if adapter in table for p in parameters_of(table[adapter])]


def parameters_of(part: nn.Module | Tensor) -> list[Tensor]:
    """Peft keeps an adapter's parts as modules, or as bare parameters."""
    return [part] if isinstance(part, Tensor) else list(part.parameters())


def version_of(weight: Tensor) -> tuple[int, int]:
    """Changes when a tensor is replaced or written to."""
    return id(weight), 0 if weight.is_inference() else weight._version
