"""Whether a UNet runs compiled, in which of its forms, and forgetting what was compiled."""

import inspect
import weakref

from torch import nn
from torch._dynamo import OptimizedModule, reset_code  # type: ignore[attr-defined]

optimized: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
"""UNets that have been seen in a wrapper of ``torch.compile``."""


def is_compiled(unet: nn.Module) -> bool:
    """Whether it, or a part of it, runs compiled."""
    return unet in optimized or any(
        m._compiled_call_impl is not None
        or isinstance(m, OptimizedModule)
        or hasattr(m.forward, "_torchdynamo_orig_callable")
        for m in unet.modules()
    )


def compiles_its_own(module: nn.Module) -> bool:
    """Whether this module's forward is that of its class, or of the module within, compiled.

    Not one that was replaced before it was compiled, or since.
    """
    forward = module.forward
    own = getattr(forward, "_torchdynamo_orig_callable", None)
    if own is None or getattr(forward, "__wrapped__", None) is not own:
        return False  # functools.wraps copies the first name, and has the second lead elsewhere
    is_of_class = getattr(own, "__func__", None) is type(module).forward
    return isinstance(module, OptimizedModule) or is_of_class


def forget_compiled(unet: nn.Module) -> None:
    """Compiled code does not look at hooks: have it compiled again if there is any."""
    if not is_compiled(unet):
        return
    functions = {nn.Module._call_impl, nn.Module._wrapped_call_impl}
    functions |= {type(module).forward for module in unet.modules()}
    for function in functions | {inspect.unwrap(function) for function in functions}:
        reset_code(function.__code__)
