"""The hooks on a UNet's parts, by which a guide acts in them.

They do nothing but in the forwards of a :class:`pnp_core.calls.Call`; :mod:`pnp_core.inject` puts
them in place.
"""

from typing import Any

import torch
from torch import Tensor, nn

from pnp_core.arguments import by_name
from pnp_core.calls import Acting, now
from pnp_core.features import FirstHook, GatherHook, Reached
from pnp_core.guide.kind import DecoderInput


class EnterHook:
    """Lets the guide change what enters one up block."""

    def __init__(self, index: int) -> None:
        self.index = index

    def __call__(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before an up block: replaces its hidden states and skips by the guide's."""
        kwargs = by_name(module, args, kwargs)
        if now.features is not None:
            now.features.append(kwargs["hidden_states"])
            raise Reached
        acting = now.acting
        if acting is None:
            return None
        acting.num_entered += 1
        entering = DecoderInput(kwargs["hidden_states"], kwargs["res_hidden_states_tuple"])
        entered = acting.effect.enter(self.index, entering)
        if entered is entering:
            return None
        return (), {
            **kwargs,
            "hidden_states": entered.hidden_states,
            "res_hidden_states_tuple": entered.skips,
        }


class NumberedHook:
    """Knows its place among its like: in the UNet, and in the repeated block that it is in.

    Args:
        index: in the UNet.
        first: of the first one in the same block, or 0.
    """

    def __init__(self, index: int, first: int) -> None:
        self.index = index
        self.in_block = index - first

    def place_in(self, acting: Acting) -> int:
        """Where what is acting has it.

        Compiled code is made again for each number that it reads: blocks that are alike are to
        read like numbers.
        """
        return self.in_block if acting.is_of_block else self.index


class ModulateHook(NumberedHook):
    """Lets the guide change what one layer gives.

    Args:
        index: of the layer.
        first: of its block.
        is_norm: what a norm gives is nobody else's yet, and may be written over. What a block
            gives may be kept, as DeepCache does.
    """

    def __init__(self, index: int, first: int, *, is_norm: bool) -> None:
        super().__init__(index, first)
        self.is_norm = is_norm

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:  # noqa: ARG002, torch's hook
        """After a layer: its output, or a tuple's first entry, as the guide has it."""
        acting = now.acting
        if acting is None or not acting.effect.modulates:
            return None
        acting.num_modulated += 1
        index = self.place_in(acting)
        if isinstance(output, Tensor):
            in_place = self.is_norm and not torch.is_grad_enabled()
            return acting.effect.modulate(index, output, in_place=in_place)
        return (acting.effect.modulate(index, output[0]), *output[1:])


class NegativeHook(NumberedHook):
    """Before a cross-attention: has its keys and values of the negative prompts made."""

    def __call__(self, module: Any, args: tuple[Any, ...]) -> None:  # noqa: ARG002, torch's hook
        """Fill the call's keys and values of this layer, if the guide reads them."""
        acting = now.acting
        if acting is not None and acting.effect.attends:
            acting.negatives.fill(self.place_in(acting), module)


class QueryHook:
    """Keeps a cross-attention's queries, which serve the negative prompt too."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG002, torch's hook
        """Keep the output of ``to_q`` until the same cross-attention's output projection."""
        acting = now.acting
        if acting is not None:
            acting.query = output


class AttendHook(NumberedHook):
    """Lets the guide change what one cross-attention has read, before its output projection."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:  # noqa: ARG002, torch's hook
        """Before the output projection: replaces its input by what the guide makes of it.

        Raises:
            ValueError: the layer's attention processor does not call ``to_q``.
        """
        acting = now.acting
        if acting is None or not acting.effect.attends:
            return None
        acting.num_attended += 1
        index = self.place_in(acting)
        query, negative = acting.query, acting.negatives.kept[index]
        if query is None or negative is None:
            raise ValueError(
                "A cross-attention of this UNet does not compute its queries by its to_q, which a "
                "guide has to see: use one of diffusers' own attention processors."
            )
        acting.query = None
        return (acting.effect.attend(index, query, args[0], negative), *args[1:])


BEFORE = (FirstHook, EnterHook, NegativeHook, AttendHook)
AFTER = (ModulateHook, QueryHook, GatherHook)


def place(module: nn.Module, hook: Any) -> None:
    """Register one of the hooks above, if the module has none of its kind."""
    before = isinstance(hook, BEFORE)
    there = module._forward_pre_hooks if before else module._forward_hooks
    if any(type(other) is type(hook) for other in there.values()):
        return
    if isinstance(hook, FirstHook | EnterHook):
        module.register_forward_pre_hook(hook, with_kwargs=True)
    elif before:
        module.register_forward_pre_hook(hook)
    else:
        module.register_forward_hook(hook)
