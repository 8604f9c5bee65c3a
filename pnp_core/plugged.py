"""What a plugged pipeline does otherwise than the stock one.

``plug`` makes a pipeline's class a subclass of the same name. Nothing is kept on the UNet, and
nothing of a call on the pipeline: what a call is told belongs to it, and goes with it.
"""

import functools
import inspect
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any

from diffusers import DiffusionPipeline, ModularPipeline
from torch import nn

from pnp_core.arguments import (
    codes_of_call,
    handed_on_to,
    is_by_name,
    place_in_call,
    rest_of,
    told_to,
)
from pnp_core.calls import entered, now
from pnp_core.compiled import optimized
from pnp_core.fit import (
    bare_unet,
    check_copies,
    check_keeps_nothing,
    check_prediction_type,
    check_processors,
    check_unet,
    processors_of_others,
)
from pnp_core.inject import unuse, use
from pnp_core.pipeline_call import PipelineCall
from pnp_core.pipelines import ASKS, check_arguments, check_class, way_in
from pnp_core.plug_state import STATE, Plug, state_of_plug

CALLBACKS = ("callback_on_step_end", "callback")
NOT_PLUGGED = "This UNet carries a guide, which would not act: its pipeline has not been plugged."
PAST_GUIDE = (
    "{0}.__call__ is running on a plugged pipeline past its guide: it was called by that name, or "
    "before the guide was plugged in. It would run two forwards a step and no guide. Call "
    "pipe(...) anew, or unplug(pipe) first."
)
OTHERS_PROCESSOR = (
    "{} is none of diffusers' attention processors. A guided step has one row a sample, under its "
    "prompt: one that looks for the two halves of CFG's batch does something else there."
)
OTHER_METHOD = (
    "{0}.{1} runs the UNet of a plugged pipeline outside of pipe(...), where no guide acts."
)
BY_NAME = (
    "{0} calls {1}.__call__ by name, so a guide does not see what it hands on, as its scale or a "
    "callback: call super().__call__."
)
counting = threading.Lock()


class Intercepted:
    """A method of a pipeline that a call under way sees first, whoever has wrapped it.

    Being a data descriptor, it is found before what a user has put on the pipeline under the same
    name; that is what it calls.
    """

    def __init__(self, name: str, before: Callable[..., Any]) -> None:
        self.name = name
        self.before = before

    def __get__(self, pipe: Any, owner: type[Any]) -> Any:
        if pipe is None:
            return getattr(super(Plugged, owner), self.name)
        if self.name in vars(pipe):
            method = vars(pipe)[self.name]
        else:
            method = getattr(super(Plugged, pipe), self.name)
        call = call_under_way(pipe)
        return method if call is None else functools.partial(self.before, call, method)

    def __set__(self, pipe: Any, value: Any) -> None:
        vars(pipe)[self.name] = value

    def __delete__(self, pipe: Any) -> None:
        try:
            del vars(pipe)[self.name]
        except KeyError:
            raise AttributeError(self.name) from None


def call_under_way(pipe: Any) -> PipelineCall | None:
    """The innermost call in this thread, if it is this pipeline's and not in a callback."""
    call = now.calls[-1] if now.calls else None
    return call if isinstance(call, PipelineCall) and call.pipe is pipe else None


def is_in_call(pipe: Any) -> bool:
    """Whether a call of this pipeline is under way in this thread."""
    return any(isinstance(call, PipelineCall) and call.pipe is pipe for call in now.calls)


def encode_prompt(call: PipelineCall, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Say if what a subclass hands on can't be seen, and go on as :class:`PipelineCall` does.

    Raises:
        ValueError: it decides the scale.
    """
    place = place_in_call(call.plug.stock_class, sys._getframe(1))
    if place is not None and is_by_name(place[0], call.hands_on_to):
        message = BY_NAME.format(call.name, call.hands_on_to.__name__)
        if not call.asks:
            raise ValueError(message)
        call.plug.warn_once(message)
    before, call.is_encoding = call.is_encoding, True
    try:
        return call.encode_prompt(place, method, *args, **kwargs)
    finally:
        call.is_encoding = before


class Plugged:
    """Mixed into a pipeline's class by :func:`plug`."""

    _pnp_stock: type[DiffusionPipeline]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """What a plugged pipeline's class is called for, as ``type(pipe)(**pipe.components)``.

        That is a stock pipeline: another one, which has not been plugged.
        """
        return cls._pnp_stock(*args, **kwargs)

    encode_prompt = Intercepted("encode_prompt", encode_prompt)
    prepare_ip_adapter_image_embeds = Intercepted(
        "prepare_ip_adapter_image_embeds", PipelineCall.prepare_ip_adapter_image_embeds
    )
    _get_add_time_ids = Intercepted("_get_add_time_ids", PipelineCall._get_add_time_ids)

    def __copy__(self) -> Any:
        """A shallow copy, as plugged as this one."""
        twin = object.__new__(type(self))
        vars(twin).update(vars(self))
        plug = state_of_plug(self)
        if plug is not None:
            vars(twin)[STATE] = replace(plug, unet=None, num_calls=0)
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copied or pickled, a pipeline is as plugged as this one: its class is made anew."""
        plug = state_of_plug(self)
        assert plug is not None
        return blank, (plug.stock_class,), vars(self)

    def tell_others(self, unet: nn.Module) -> bool:
        """Raise ValueError if the UNet is being run by a pipeline without its guide.

        It has not been plugged, or its stock class's ``__call__`` has been called on it.

        Whether it is this one's; if not, nothing has been looked at.
        """
        if bare_unet(self) is not unet:
            return False
        # no name for the frame that runs: it would hold itself, and all tensors above it
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            # of methods alone: a frame that was asked for its locals keeps them until it ends
            is_method = frame.f_code.co_varnames[:1] == ("self",)
            owner = frame.f_locals.get("self") if is_method else None
            if isinstance(owner, DiffusionPipeline | ModularPipeline) and bare_unet(owner) is unet:
                if (plug := state_of_plug(owner)) is None:
                    raise ValueError(f"{NOT_PLUGGED} {what_to_do(owner)}")
                is_stock = frame.f_code in codes_of_call(plug.stock_class)
                wants_guidance = getattr(owner, "_guidance_scale", 2.0 if is_stock else 1.0) > 1
                if wants_guidance and not is_in_call(owner):
                    name = plug.stock_class.__name__
                    if is_stock:
                        raise ValueError(PAST_GUIDE.format(name))
                    plug.warn_once(OTHER_METHOD.format(name, frame.f_code.co_name))
                break
            frame = frame.f_back
        return True


def what_to_do(pipe: Any) -> str:
    """With a pipeline that runs a plugged UNet and has not been plugged."""
    try:
        check_class(type(pipe))
    except ValueError as error:
        return (
            f"{error} Unplug the pipeline that it shares its UNet with, or give it a copy of the "
            "UNet."
        )
    return "Call plug(pipe, guide) on this pipeline too."


def blank(stock: Any) -> Any:
    """A plugged pipeline with nothing in it yet."""
    return object.__new__(plugged_class(stock))


def get_ready(pipe: Any, plug: Plug) -> None:
    """Before a call: check what may have been replaced since the one before.

    Raises:
        ValueError: the pipeline has a UNet or scheduler now that the guide does not fit.
    """
    unet = bare_unet(pipe)
    check_prediction_type(pipe, plug.bundle)
    known = None if plug.unet is None else plug.unet()
    if known is not unet:
        check_unet(pipe, plug.bundle)
        if known is not None:
            unuse(known, pipe)
        plug.unet = weakref.ref(unet)
    check_copies(unet)
    check_processors(unet)
    for name in processors_of_others(unet):
        plug.warn_once(OTHERS_PROCESSOR.format(name))
    if plug.exact_steps:
        check_keeps_nothing(unet)
    if pipe.unet is not unet:
        optimized.add(unet)
    use(unet, pipe)


@contextmanager
def counted(plug: Plug) -> Iterator[None]:
    """While open, one more call is under way, which :func:`pnp_core.plug.unplug` would break."""
    with counting:
        plug.num_calls += 1
    try:
        yield
    finally:
        with counting:
            plug.num_calls -= 1


def tell_unasked(call: PipelineCall, num_before: int) -> None:
    """Warn if a guided call is over and no forward of its UNet was seen.

    Args:
        call: that is over.
        num_before: forwards that had begun before it.
    """
    pipe = call.pipe
    cuts_off = isinstance(call.denoising_end, float)  # may leave no step
    was_to_run = getattr(pipe, "_num_timesteps", 1) > 0 and not getattr(pipe, "_interrupt", False)
    was_asked = call.was_asked or call.plug.num_forwards != num_before  # in another thread
    if call.asked_scale > 1 and was_to_run and not cuts_off and not was_asked:
        call.plug.warn_once(
            f"{type(pipe).__name__} has run without its guide: it did not call its UNet, or called "
            "unet.forward, or called it in another thread. A guide acts where the pipeline calls "
            "unet(...) in its own thread."
        )


def guided_call(stock: Any) -> Any:
    """The ``__call__`` of a class, which lets the guide act in what it runs."""
    signature, own = inspect.signature(stock.__call__), handed_on_to(stock)

    @functools.wraps(stock.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807, a method
        plug = state_of_plug(self)
        if plug is None:
            return stock.__call__(self, *args, **kwargs)
        get_ready(self, plug)
        bound = signature.bind(self, *args, **kwargs)
        told = told_to(stock, bound)
        call, num_before = PipelineCall(self, plug, told, own), plug.num_forwards
        if call.asked_scale > 1:
            check_arguments(told)
        for where in (bound.arguments, bound.arguments.get(rest_of(signature), {})):
            for name in CALLBACKS:
                if where.get(name) is not None:
                    where[name] = call.wrapped(where[name])
        if call.asks and "guidance_scale" in told and "_guidance_scale" in vars(self):
            self._guidance_scale = call.asked_scale  # that of the call before is there still
        with counted(plug), entered(call):
            result = stock.__call__(*bound.args, **bound.kwargs)
        if not isinstance(result, Awaitable | Iterator | AsyncIterator):  # which only begin now
            tell_unasked(call, num_before)
        return result

    return __call__


def called_within(stock: Any) -> list[Any]:
    """What stands between a user's subclass and the class that it hands its call on to.

    What a call is told is then what the subclass makes of it. Empty if it has no ``__call__``.
    """
    own = handed_on_to(stock)
    if own is None:
        return []
    return [type(own.__name__, (own,), {"__module__": __name__, "__call__": guided_call(own)})]


@functools.cache
def plugged_class(stock: Any) -> Any:
    """The subclass, of the same name, that a plugged pipeline is of."""
    names: dict[str, Any] = {"__module__": stock.__module__, "__qualname__": stock.__qualname__}
    names |= {"__doc__": stock.__doc__, "_pnp_stock": stock}
    names["__call__"] = guided_call(stock)
    if way_in(stock) == ASKS:

        def do_classifier_free_guidance(self: Any) -> bool:
            """Whether the batch is doubled: in a call only if it has exact steps, then to its end.

            Where prompts are encoded, whether those of both kinds are: as in the stock pipeline.
            """
            asked: Any = super(made, self).do_classifier_free_guidance
            call = call_under_way(self)
            if call is None or call.is_encoding:
                return bool(asked)
            call.has_asked = True
            return call.keeps_both or (bool(asked) and call.doubles)

        names["do_classifier_free_guidance"] = property(do_classifier_free_guidance)
    made: Any = type(stock.__name__, (Plugged, stock, *called_within(stock)), names)
    return made
