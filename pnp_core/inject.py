"""Letting a guide act in a UNet's decoder, by pre-forward hooks on its up blocks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import UNet2DConditionModel
from torch import nn
from torch.utils.hooks import RemovableHandle

from pnp_core.guide import Conditioning, DecoderInput, Guide


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


class Injector:
    """Hooks on every up block of one UNet. Inert until it has a guide and a conditioning."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.guide: Guide | None = None
        self.conditioning: Conditioning | None = None
        self.handles: list[RemovableHandle] = [
            block.register_forward_pre_hook(UpBlockHook(self, index), with_kwargs=True)
            for index, block in enumerate(unet.up_blocks)
        ]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


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
