"""Letting a guide act in a UNet, by hooks on its cross-attentions, layers and up blocks.

The hooks are registered once and stay; whoever guides the UNet, be it a plugged pipeline or a
denoiser, is a user of theirs, and they go with the last user. They do nothing but in the forwards
of a :class:`pnp_core.calls.Call` that has been entered in the same thread.
"""

import logging
import threading
import weakref
from collections.abc import Mapping
from operator import is_
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.utils import scale_lora_layers, unscale_lora_layers
from torch import nn

from pnp_core.arguments import by_name
from pnp_core.calls import Acting, CompiledBlock, Negatives, call_of, now
from pnp_core.compiled import forget_compiled, is_compiled
from pnp_core.features import FirstHook, GatherHook, decoder_inputs
from pnp_core.guide.unet import (
    NORMS,
    Span,
    copies_of_norms,
    modulated_layers,
    repeated_blocks,
    text_attentions,
)
from pnp_core.hooks import (
    AFTER,
    BEFORE,
    AttendHook,
    EnterHook,
    ModulateHook,
    NegativeHook,
    QueryHook,
    place,
)

REPLICA = (
    "This UNet carries a guide, which does not act in the replicas that DataParallel makes of it: "
    "run it on one device."
)
INSTEAD = (
    "a compiled engine, a trace, a captured graph or an attention processor that does not call "
    "to_out"
)
PASSED_BY = (
    "A guide was to act in this UNet's modules, and none of them has run: something computes in "
    f"their place, as {INSTEAD}. Use it unplugged."
)
PARTLY = (
    "%d of the %d places in which a guide acts in this UNet did not run in the first guided "
    "forward of a call. That is as it should be where a helper such as DeepCache skips them, but "
    f"if something computes in their place ({INSTEAD}), the guide does less than it should there."
)
logger = logging.getLogger(__name__)


class UNetHook:
    """Asks the call under way what its guide does in a forward, before it runs.

    Bound methods of this object are the UNet's hooks, so a deep copy of the UNet has its own.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.users: dict[int, weakref.ref[Any]] = {}
        self.layers: list[Attention] = []
        self.projections: list[nn.Module] = []
        self.blocks: list[tuple[nn.Module, Span]] = []
        self.num_modulated = 0
        self.has_warned = False
        self.first_attention: dict[int, int] = {}
        unet.register_forward_pre_hook(self.before, with_kwargs=True)
        unet.register_forward_hook(self.after, always_call=True)

    def __getstate__(self) -> dict[str, Any]:
        """Of a copied or pickled UNet, whose users are not known yet."""
        return {**vars(self), "users": {}}

    def reach(self, unet: UNet2DConditionModel) -> None:
        """Be in every place where a guide acts, also in parts that have been replaced."""
        place(unet.down_blocks[0], FirstHook())
        for down_block in unet.down_blocks:
            place(down_block, GatherHook())
        for index, block in enumerate(unet.up_blocks):
            place(block, EnterHook(index))
        modulated, self.layers = modulated_layers(unet), text_attentions(unet)
        self.num_modulated = len(modulated)
        self.blocks = repeated_blocks(unet, modulated, self.layers)
        first_layer: dict[int, int] = {}
        first_attention: dict[int, int] = {}
        for _, (layers, attentions) in self.blocks:
            first_layer |= dict.fromkeys(layers, layers.start)
            first_attention |= dict.fromkeys(attentions, attentions.start)
        copies = copies_of_norms(unet)
        for index, layer in enumerate(modulated):
            hook = ModulateHook(index, first_layer.get(index, 0), is_norm=isinstance(layer, NORMS))
            for each in (layer, *copies.get(layer, ())):
                place(each, hook)
        for index, layer in enumerate(self.layers):
            place(layer, NegativeHook(index, first_attention.get(index, 0)))
        self.first_attention = first_attention
        self.follow(again=True)

    def come_last(self, unet: UNet2DConditionModel) -> None:
        """Be the last hook before the UNet's forward: an encoder that it runs needs the others."""
        hooks = unet._forward_pre_hooks
        (key,) = (key for key, hook in hooks.items() if getattr(hook, "__self__", None) is self)
        hooks.move_to_end(key)

    def follow(self, *, again: bool = False) -> None:
        """Be in the projections as they are now: loading a LoRA puts others in place.

        Args:
            again: also if they are the ones of before, of which somebody may have taken the hooks.
        """
        current = []
        for layer in self.layers:  # by what `layer.to_q` and `layer.to_out[0]` look up, in no time
            parts = layer._modules
            current += [parts["to_q"], parts["to_out"]._modules["0"]]
        are_same = len(current) == len(self.projections) and all(
            map(is_, current, self.projections)
        )
        if are_same and not again:
            return
        if not are_same:
            for projection in self.projections:
                displace(projection)
        for index, (to_q, to_out) in enumerate(zip(current[::2], current[1::2], strict=True)):
            place(to_q, QueryHook())
            place(to_out, AttendHook(index, self.first_attention.get(index, 0)))
        self.projections = current

    def follow_compiled(self) -> None:
        """Have blocks that are compiled by themselves told of their part of the guide alone."""
        for block, span in self.blocks:
            compiled = block._compiled_call_impl
            if compiled is not None and not isinstance(compiled, CompiledBlock):
                block._compiled_call_impl = CompiledBlock(compiled, span)

    def leave_compiled(self) -> None:
        """Undo it."""
        for block, _ in self.blocks:
            if isinstance(compiled := block._compiled_call_impl, CompiledBlock):
                block._compiled_call_impl = compiled.inner

    @torch.compiler.disable  # so that what is compiled sees tensors alone
    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before the UNet's forward."""
        now.acting = None
        call = call_of(module)
        if call is None:
            if getattr(module, "_is_replica", False):
                raise ValueError(REPLICA)
            for user in list(self.users.values()):  # other threads' come and go
                if (told := getattr(user(), "tell_others", None)) is not None and told(module):
                    break
            if not self.users:
                leave(module, 0)  # of a copied UNet, which nobody guides
            return None
        for each in now.calls:  # also of a pipeline that has another one run
            each.was_asked = True
        arguments = by_name(module, args, kwargs)
        names = list(arguments)[: len(args)]
        effect = call.begin(arguments)
        if effect is not None:
            self.follow()
            self.follow_compiled()
            if effect.attends:
                self.make_negatives(module, call.negatives, arguments)
            if effect.compares:
                effect.compare(decoder_inputs(module, effect.under_negative(arguments)))
            now.acting = Acting(effect, call.negatives)
        # as they came: who has wrapped the forward, as DeepCache does, may look for them there
        return tuple(arguments.pop(name) for name in names), arguments

    def make_negatives(
        self, unet: nn.Module, negatives: "Negatives", arguments: Mapping[str, Any]
    ) -> None:
        """What a compiled UNet is to find made: made within, it would be compiled twice.

        And one that is trained with checkpoints: a block that is run again would not make it again.
        """
        scale = (arguments.get("cross_attention_kwargs") or {}).get("scale", 1.0)
        negatives.follow(self.layers, scale)
        runs_again = torch.is_grad_enabled() and getattr(unet, "is_gradient_checkpointing", False)
        if None not in negatives.kept or not (is_compiled(unet) or runs_again):
            return
        if any(layer.to_k.weight.device != negatives.n_BLD.device for layer in self.layers):
            return  # offloaded: they come with the forward
        scale_lora_layers(unet, scale)
        for index, layer in enumerate(self.layers):
            negatives.fill(index, layer)
        unscale_lora_layers(unet, scale)

    @torch.compiler.disable
    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:  # noqa: ARG002, torch's hook
        """After the UNet's forward, also one that failed."""
        acting, now.acting = now.acting, None
        call = call_of(module)
        if call is None or output is None:
            return None
        if acting is not None and not call.was_checked:
            self.check_acted(module, acting)
            call.was_checked = True
        return call.end(output)

    def check_acted(self, unet: nn.Module, acting: Acting) -> None:
        """Say if parts of the UNet have run past their hooks.

        Once a call, in its first guided forward: helpers that skip blocks mostly run them all then.

        Raises:
            ValueError: all have.
        """
        effect = acting.effect
        expected_and_seen = (
            (len(unet.up_blocks), acting.num_entered),  # type: ignore[arg-type]
            (len(self.layers) if effect.attends else 0, acting.num_attended),
            (self.num_modulated if effect.modulates else 0, acting.num_modulated),
        )
        missing = sum(max(0, expected - seen) for expected, seen in expected_and_seen)
        num_places = sum(expected for expected, _ in expected_and_seen)
        if missing == num_places:
            raise ValueError(PASSED_BY)
        if missing and not self.has_warned:
            self.has_warned = True
            logger.warning(PARTLY, missing, num_places)


def displace(module: nn.Module) -> None:
    """Take all of this module's hooks of ours away."""
    for hooks, more in (
        (module._forward_pre_hooks, [module._forward_pre_hooks_with_kwargs]),
        (
            module._forward_hooks,
            [module._forward_hooks_with_kwargs, module._forward_hooks_always_called],
        ),
    ):
        for key, hook in list(hooks.items()):
            if isinstance(getattr(hook, "__self__", hook), (UNetHook, *BEFORE, *AFTER)):
                del hooks[key]
                for table in more:
                    table.pop(key, None)


def hook_in(unet: nn.Module) -> UNetHook | None:
    """The hook in a UNet, if it has one."""
    for hook in unet._forward_pre_hooks.values():
        if isinstance(owner := getattr(hook, "__self__", None), UNetHook):
            return owner
    return None


lock = threading.RLock()


def use(unet: UNet2DConditionModel, user: Any) -> None:
    """Have the hooks in place for as long as ``user`` lives, or until it is through with them.

    Args:
        unet: the one to have hooks; compiled code of it is forgotten if they are new.
        user: if it has a method ``tell_others(unet)``, that is called in forwards of the UNet that
            are no call's, of users one after another until one says yes.
    """
    with lock:
        there = hook_in(unet)
        hook = there or UNetHook(unet)
        # first of all: the last user but this one may go at any time, with the hooks
        if id(user) not in hook.users:
            place_of, key = weakref.ref(unet), id(user)

            def gone(_: Any) -> None:
                if (still := place_of()) is not None:
                    leave(still, key)

            hook.users[key] = weakref.ref(user, gone)
        hook.reach(unet)
        hook.come_last(unet)
        if there is None:
            forget_compiled(unet)


def unuse(unet: nn.Module, user: Any) -> None:
    """``user`` is through with the hooks; the last to go leaves the UNet as it was."""
    leave(unet, id(user))


def leave(unet: nn.Module, key: int) -> None:
    """Forget the user of this id."""
    with lock:
        hook = hook_in(unet)
        if hook is None:
            return
        hook.users.pop(key, None)
        if not hook.users:
            hook.leave_compiled()
            for module in unet.modules():
                displace(module)
            forget_compiled(unet)
