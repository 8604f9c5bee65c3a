"""What the encoder of a UNet makes of a prompt: its own forward, left where the decoder begins."""

from typing import Any

import torch
from torch import nn

from pnp_core.arguments import by_name
from pnp_core.calls import now
from pnp_core.guide.kind import DecoderInput


class Reached(Exception):  # noqa: N818, it is no error
    """An encoder that ran for its features alone is through."""


@torch.no_grad()
def decoder_inputs(unet: Any, arguments: dict[str, Any]) -> list[DecoderInput]:
    """What enters each up block in a forward with these arguments, in which no guide acts.

    It is the UNet's own forward, left where the decoder begins; what ControlNets add to the encoder
    is in it.

    Raises:
        ValueError: the forward does not come to the decoder.
    """
    # the forward takes a T2I adapter's out of their list
    arguments = {k: list(v) if isinstance(v, list) else v for k, v in arguments.items()}
    now.acting, now.features = None, []
    try:
        unet.forward(**arguments)
    except Reached:
        *skips, hidden = now.features
    else:
        raise ValueError(
            "An encoder guide runs a UNet's encoder twice a step, and this UNet's forward does not "
            "come to its decoder: something has replaced it, as DeepCache does. Use a tiny guide."
        )
    finally:
        now.features = None
    if arguments.get("mid_block_additional_residual") is not None:
        added = arguments["down_block_additional_residuals"]
        skips = [skip + more for skip, more in zip(skips, added, strict=True)]
    found = []
    for block in unet.up_blocks:
        num = len(block.resnets)
        found.append(DecoderInput(hidden, tuple(skips[-num:])))  # in later blocks `hidden` is old
        del skips[-num:]
    return found


class FirstHook:
    """Before the first down block: keeps what comes in, the first skip, where it is wanted."""

    def __call__(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Begin the features under way."""
        if now.features is not None:
            now.features.append(by_name(module, args, kwargs)["hidden_states"])


class GatherHook:
    """After a down block: keeps its skips, where they are wanted."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ARG002, torch's hook
        """Add them to the features under way."""
        if now.features is not None:
            now.features += output[1]
