"""What a pipeline's methods or a module's forward are given, by the names that they have for it.

A subclass may take ``*args, **kwargs`` and hand them on: the names are then an ancestor's.
"""

import functools
import inspect
from collections.abc import Mapping
from types import CodeType, FrameType
from typing import Any

from torch import nn

Place = tuple[CodeType, int]  # in a pipeline's call: its code, and a line
SIZES = ("original_size", "crops_coords_top_left", "target_size")
NO_NEGATIVE_SIZES = (
    "negative_original_size, negative_crops_coords_top_left, negative_target_size and a refiner's "
    "negative_aesthetic_score have no effect where a guide acts: it knows the negative prompt by "
    "its text alone."
)


class Arguments:
    """Of one call of a pipeline's method, which a name may be looked up in and changed.

    Args:
        signature: has the names, ``self`` first.
        args: by position, without ``self``.
        kwargs: by name.
    """

    def __init__(
        self, signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.names = list(signature.parameters)[1:]
        self.args, self.kwargs = args, kwargs

    def get(self, name: str) -> Any:
        """What is given under this name, None if nothing is."""
        at = self.names.index(name) if name in self.names else len(self.args)
        return self.args[at] if at < len(self.args) else self.kwargs.get(name)

    def put(self, name: str, value: Any) -> None:
        """Give this instead, in the way in which it has been given."""
        at = self.names.index(name)
        if at < len(self.args):
            self.args = (*self.args[:at], value, *self.args[at + 1 :])
        else:
            self.kwargs = {**self.kwargs, name: value}


def has_negative_sizes(given: Arguments, *, is_refiner: bool) -> bool:
    """Whether SDXL's sizes, or a refiner's aesthetic score, are others for the negative prompt.

    Args:
        given: to ``_get_add_time_ids``.
        is_refiner: whether there are scores.
    """
    names = (*SIZES, "aesthetic_score") if is_refiner else SIZES
    return any(given.get(f"negative_{name}") not in (None, given.get(name)) for name in names)


def signature_with(pipeline_class: type[Any], method: str, name: str) -> inspect.Signature | None:
    """The signature of a method in the nearest class that has an argument of this name.

    None if there is no such method or name, or if a nearer class does not hand on what it is given.
    """
    for ancestor in pipeline_class.__mro__:
        found = vars(ancestor).get(method)
        if not callable(found):
            continue
        signature = inspect.signature(found)
        if name in signature.parameters:
            return signature
        if not rest_of(signature):
            return None
    return None


def rest_of(signature: inspect.Signature) -> str:
    """What a method calls the keyword arguments that it does not name; empty if it takes none."""
    parameters = signature.parameters.values()
    return next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), "")


def told_to(pipeline_class: type[Any], bound: inspect.BoundArguments) -> dict[str, Any]:
    """The arguments of a pipeline's call, those that an ancestor's ``__call__`` names included."""
    told: dict[str, Any] = {}
    for ancestor in reversed(pipeline_class.__mro__):
        if "__call__" in vars(ancestor):
            parameters = inspect.signature(vars(ancestor)["__call__"]).parameters
            given = {name: parameter.default for name, parameter in parameters.items()}
            told |= {name: value for name, value in given.items() if is_told(value, told, name)}
    for given in (bound.arguments, bound.arguments.get(rest_of(bound.signature), {})):
        told |= {name: value for name, value in given.items() if is_told(value, told, name)}
    return told


def is_told(value: Any, told: dict[str, Any], name: str) -> bool:
    """Whether it says more than an ancestor: a default of None leaves it to that."""
    return value is not None or name not in told


def handed_on_to(pipeline_class: Any) -> Any:
    """Diffusers' own class to which a user's class may hand its calls on; None: it has none."""
    calling = [ancestor for ancestor in pipeline_class.__mro__ if "__call__" in vars(ancestor)]
    own = [ancestor for ancestor in calling if ancestor.__module__.startswith("diffusers.")]
    return own[0] if own and own[0] is not calling[0] else None


def is_by_name(code: CodeType, own: Any) -> bool:
    """Whether this runs in the ``__call__`` of a class that was to be reached by ``super()``."""
    return own is not None and code is getattr(inspect.unwrap(own.__call__), "__code__", None)


def codes_of_call(pipeline_class: type[Any]) -> set[CodeType]:
    """Of the ``__call__`` of a class and those of its ancestors, without decorators."""
    methods = (vars(c)["__call__"] for c in pipeline_class.__mro__ if "__call__" in vars(c))
    return {code for m in methods if (code := getattr(inspect.unwrap(m), "__code__", None))}


def place_in_call(pipeline_class: type[Any], frame: FrameType | None) -> Place | None:
    """Where the innermost ``__call__`` of a class's own or its ancestors' stands, by code and line.

    Args:
        pipeline_class: the pipeline's.
        frame: what runs in that ``__call__``, or is called by it.

    Returns:
        None: no such ``__call__`` can be found.
    """
    codes = codes_of_call(pipeline_class)
    while frame is not None:
        if frame.f_code in codes:
            return frame.f_code, frame.f_lineno
        frame = frame.f_back
    return None


def by_name(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a module's forward, those by position under their names."""
    module_class: Any = type(module)  # mypy thinks that it can't be hashed
    names = parameter_names(module_class)[1 : 1 + len(args)] if args else []
    return {**dict(zip(names, args, strict=True)), **kwargs}


@functools.cache
def parameter_names(module_class: type[nn.Module]) -> list[str]:
    """Of the forward, in order; of an ancestor's that a subclass hands on to.

    Reading them takes as long as one of the UNet's layers.
    """
    forwards = [vars(cls)["forward"] for cls in module_class.__mro__ if "forward" in vars(cls)]
    named = [list(inspect.signature(forward).parameters) for forward in forwards]
    return next((names for names in named if "sample" in names), named[0])
