"""The memory of a training step on a GPU, counted without one.

A step runs on meta tensors, which have shapes and no content, forward and backward, under the casts
that autocast makes on a GPU and with attention that keeps no maps, as fused kernels do. What is
alive is added up, operation by operation. Not counted: the workspace of single kernels, and what
the allocator can't use.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from pnp_core import calls

# Of autocast's lists for CUDA (PyTorch's "Automatic Mixed Precision"), what a UNet uses.
IN_BF16 = {
    F.linear, F.conv2d, F.scaled_dot_product_attention, torch.matmul, torch.mm, torch.bmm,
    torch.addmm, torch.baddbmm, Tensor.matmul, Tensor.__matmul__,
}  # fmt: skip
IN_FP32 = {F.group_norm, F.layer_norm, F.softmax, Tensor.softmax}


class AsOnCuda(TorchFunctionMode):
    """Autocast to bf16 as on a GPU, which PyTorch has not for meta tensors, and fused attention."""

    def __init__(self, *, mixed: bool) -> None:
        super().__init__()
        self.mixed = mixed

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run a function of PyTorch's."""
        kwargs = dict(kwargs or {})
        if self.mixed and func in IN_BF16:
            args, kwargs = cast((args, kwargs), torch.bfloat16)
        elif self.mixed and func in IN_FP32:
            args, kwargs = cast((args, kwargs), torch.float32)
        if func is F.scaled_dot_product_attention:
            scale = kwargs.get("scale")
            return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3], scale=scale)[0]
        return func(*args, **kwargs)


def cast(values: Any, dtype: torch.dtype) -> Any:
    """The same with all floating-point tensors in ``dtype``."""

    def one(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return tree_map(one, values)


class Alive(TorchDispatchMode):
    """Adds up the bytes of the tensors that are made while it is open and still alive.

    Attributes:
        peak: the most bytes at any time.
        operations: how often each was run, by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation and look at what it gives."""
        outputs = func(*args, **(kwargs or {}))
        self.operations[str(func)] += 1
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if is_tensor(x)}
        for output in filter(is_tensor, tree_leaves(outputs)):
            storage = output.untyped_storage()
            key = storage._cdata
            if key not in given and key not in self.sizes:
                self.sizes[key] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.forget, key)
        return outputs

    def forget(self, key: int) -> None:
        """A tensor is gone."""
        self.now -= self.sizes.pop(key)


def is_tensor(value: Any) -> bool:
    """For filters."""
    return isinstance(value, Tensor)


def count(step: Callable[[], object], *, mixed: bool) -> Alive:
    """What one call makes, on meta tensors.

    Args:
        step: makes its inputs itself, if they are to be counted.
        mixed: whether autocast to bf16 is on.
    """
    as_on_cuda = AsOnCuda(mixed=mixed)

    @contextmanager
    def again(acting: calls.Acting | None) -> Iterator[None]:
        with acting_again(acting), as_on_cuda:
            yield

    acting_again = calls.acting_again
    # PyTorch leaves such modes out where checkpoints run a part of the forward again.
    with patch.object(calls, "acting_again", again), as_on_cuda, Alive() as alive:
        step()
    return alive


def num_bytes(module: torch.nn.Module) -> int:
    """Of its parameters and buffers."""
    return sum(x.numel() * x.element_size() for x in [*module.parameters(), *module.buffers()])
