"""Letting a guide act in a UNet, by hooks on its cross-attentions, layers and up blocks."""

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pnp_core.guide import (
    Conditioning,
    DecoderInput,
    Guide,
    modulated_layers,
    text_attentions,
)


class UpBlockHook:
    """Adds the guide's residuals to what enters one up block, while there is a conditioning."""

    def __init__(self, injector: "Injector", block_index: int) -> None:
        self.injector = injector
        self.block_index = block_index

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        conditioning, guide = self.injector.conditioning, self.injector.guide
        if conditioning is None or guide is None:
            return None
        entering = DecoderInput(kwargs["hidden_states"], kwargs["res_hidden_states_tuple"])
        injected = guide.inject(self.block_index, conditioning, entering)
        return args, {
            **kwargs,
            "hidden_states": injected.hidden_states,
            "res_hidden_states_tuple": injected.skips,
        }


class AttentionHook:
    """Turns up what one cross-attention reads of the prompt, while there is a conditioning.

    Acts between the layer's projections, so that its own queries serve the negative prompt too.
    """

    def __init__(self, injector: "Injector", index: int, layer: Attention) -> None:
        self.injector = injector
        self.index = index
        self.layer = layer
        self.query: Tensor | None = None
        self.hooked: tuple[nn.Module, ...] = ()
        self.handles: list[RemovableHandle] = []

    def refresh(self) -> None:
        """Hook the layer's projections as they are now: loading a LoRA puts others in place."""
        current = (self.layer.to_q, self.layer.to_out[0])
        if len(self.hooked) == 2 and all(map(operator.is_, current, self.hooked)):
            return
        self.remove()
        self.hooked = current
        self.handles = [
            current[0].register_forward_hook(self.keep_query),
            current[1].register_forward_pre_hook(self.before_out),
        ]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def keep_query(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        conditioning = self.injector.conditioning
        if conditioning is not None and conditioning.attention_gains:
            self.query = output

    def before_out(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        conditioning, guide, query = self.injector.conditioning, self.injector.guide, self.query
        if conditioning is None or guide is None or query is None:
            return None
        self.query = None
        read = guide.attend(self.index, conditioning, self.layer, query, args[0])
        return (read, *args[1:])


class LayerHook:
    """Modulates what one layer gives, while there is a conditioning."""

    def __init__(self, injector: "Injector", index: int) -> None:
        self.injector = injector
        self.index = index

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        conditioning, guide = self.injector.conditioning, self.injector.guide
        if conditioning is None or guide is None or not conditioning.modulations:
            return None
        if isinstance(output, tuple):
            return (guide.modulate(self.index, conditioning, output[0]), *output[1:])
        return guide.modulate(self.index, conditioning, output)


class Injector:
    """Hooks in one UNet. Inert until it has a guide and a conditioning."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.guide: Guide | None = None
        self.conditioning: Conditioning | None = None
        self.handles: list[RemovableHandle] = [
            block.register_forward_pre_hook(UpBlockHook(self, index), with_kwargs=True)
            for index, block in enumerate(unet.up_blocks)
        ]
        self.handles += [
            layer.register_forward_hook(LayerHook(self, index))
            for index, layer in enumerate(modulated_layers(unet))
        ]
        self.attentions = [
            AttentionHook(self, index, layer) for index, layer in enumerate(text_attentions(unet))
        ]
        self.refresh()

    def refresh(self) -> None:
        """Follow what has changed in the UNet since the last forward."""
        for hook in self.attentions:
            hook.refresh()

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        for hook in self.attentions:
            hook.remove()


@contextmanager
def injecting(
    unet: UNet2DConditionModel, guide: Guide, conditioning: Conditioning
) -> Iterator[None]:
    """While open, forwards of ``unet`` carry the guide's residuals; afterwards it is as before."""
    injector = Injector(unet)
    injector.guide, injector.conditioning = guide, conditioning
    try:
        yield
    finally:
        injector.remove()
