"""The memory of a training step on a GPU, counted without one.

A step runs on meta tensors, which have shapes and no content, forward and backward, under the casts
that autocast makes on a GPU and with attention that keeps no maps, as fused kernels do. What is
alive is added up, operation by operation. Not counted: the workspace of single kernels, and what
the allocator can't use.
"""

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from pnp_core import calls
from pnp_core.cache.read import Pairs
from pnp_core.calls import checkpointing
from pnp_core.conditions import AddedConditions
from pnp_core.denoiser import GuidedDenoiser
from pnp_core.distill import distillation_loss
from pnp_core.guide import Guide, GuideConfig
from pnp_core.models import pooled_width
from pnp_core.precision import hold_in_bf16
from pnp_core.schedule import NoiseSchedule
from pnp_core.settings import TrainConfig
from pnp_core.soap import sides

TOKENS = 77
RESERVED_GB = 2  # of a GPU: CUDA's context, workspaces of kernels, what the allocator can't use

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


def pair_losses(student: GuidedDenoiser, pairs: Pairs, w_B: Tensor) -> Tensor:
    """Losses ``(B,)`` as :func:`pnp_core.distill.distillation_objective` has them."""
    target = torch.lerp(pairs.eps_n, pairs.eps_c, w_B.reshape(-1, 1, 1, 1))
    eps = student(pairs.z_t, pairs.timestep, pairs.conditions(w_B))
    return distillation_loss(eps, target, pairs.eps_c - pairs.eps_n, w_B, power=1.0)


class Step:
    """A training step of stage 1 on random weights and random samples.

    Args:
        config: the UNet's.
        guide: what is trained.
        settings: of the training; its precision counts here, and its batch where it is refused.
        device: ``meta`` to count.
    """

    def __init__(
        self, config: Mapping[str, Any], guide: GuideConfig, settings: TrainConfig, device: str
    ) -> None:
        self.config, self.device, self.settings = config, device, settings
        with torch.device(device):
            self.unet = UNet2DConditionModel.from_config(self.config).requires_grad_(False).eval()
            self.guide = Guide.from_unet(self.unet, guide)
        self.mixed = self.settings.precision == "bf16"
        self.student = GuidedDenoiser(
            self.unet, self.guide, NoiseSchedule.from_scheduler(DDIMScheduler())
        )
        if self.mixed and guide.kind != "full" and device != "cpu":
            hold_in_bf16(self.unet)
        self._peaks: dict[tuple[int, bool], float] = {}  # a count takes a second or more

    def losses(self, rows: int = 1) -> Tensor:
        """The student's losses on as many cached pairs, `(rows,)`."""
        config = self.config
        size, width = config["sample_size"], config["cross_attention_dim"]
        with torch.device(self.device):
            channels = config["in_channels"], config["out_channels"], config["out_channels"]
            latents = [torch.randn(rows, number, size, size) for number in channels]
            texts = [torch.randn(rows, TOKENS, width) for _ in range(2)]
            added = None
            if config.get("addition_embed_type") == "text_time":
                width_P = pooled_width(config)
                added = AddedConditions(
                    torch.randn(rows, width_P), torch.randn(rows, width_P), torch.ones(rows, 6)
                )
            timestep, w_B = torch.full((rows,), 500), torch.full((rows,), 4.0)
        z_t, eps_c, eps_n = latents
        pairs = Pairs(z_t, timestep, eps_c, eps_n, texts[0], texts[1], added)
        return pair_losses(self.student, pairs, w_B)

    def peak_gb(self, rows: int, *, checkpoints: bool) -> float:
        """Of a GPU's memory where as many samples are computed at once, on the device `meta`.

        Weights, optimizer and average; activations and gradients of the second of two such parts.
        """

        def both() -> None:
            for _ in range(2):
                self.losses(rows).sum().backward()
            self.guide.zero_grad(set_to_none=True)

        key = rows, checkpoints
        if key not in self._peaks:
            with checkpointing([self.unet], checkpoints):
                activations = count(both, mixed=self.mixed).peak
            self._peaks[key] = (self.held() + activations) / 1e9
        return self._peaks[key]

    def held(self) -> int:
        """Bytes between two steps: weights; the guide's average, SOAP's mean, square and turns."""
        # the moments along the guide's sides, and their bases
        turned = sum(2 * side**2 for p in self.guide.parameters() for side in sides(p))
        return num_bytes(self.unet) + 4 * num_bytes(self.guide) + 4 * turned


def fitting(step: Step, memory: float, *, checkpoints: bool) -> int:
    """How many samples at once fit a GPU of so many GB; 0: not even one."""
    room = memory - RESERVED_GB
    one = step.peak_gb(1, checkpoints=checkpoints)
    if one > room:
        return 0
    rows, tried = 2, {1}
    while True:  # about in proportion: each guess is at the slope up to the one before
        tried.add(rows)
        rise = max(step.peak_gb(rows, checkpoints=checkpoints) - one, 1e-9)
        guess = 1 + math.floor((room - one) / rise * (rows - 1))
        guess = min(guess, step.settings.batch_size)
        if guess in tried:
            return min(guess, rows)
        rows = guess


def check_fits(
    what: str, step: Step, peak_gb: float, memory: float, others_gb: float = 0.0
) -> None:
    """Raise ValueError, saying what would fit, if a step does not fit a GPU of so many GB.

    Args:
        what: of which it is a step, for the message.
        step: counts.
        peak_gb: of the step as it is set.
        memory: of the GPU.
        others_gb: that other UNets take of it.
    """
    room = memory - RESERVED_GB - others_gb
    if peak_gb <= room:
        return
    most = step.settings.batch_size
    fit = {c: min(most, fitting(step, memory - others_gb, checkpoints=c)) for c in (False, True)}
    rows = [
        f"micro_batch_size {fit[c]} with gradient_checkpointing {str(c).lower()}"
        for c in fit
        if fit[c]
    ]
    raise ValueError(
        f"{what} takes {peak_gb:.1f} GB at the peak of a training step, and a GPU of {memory:.3g} "
        f"GB has {max(room, 0):.3g} for it. "
        + (f"What fits: {', or '.join(rows)}." if rows else "Not even one sample fits.")
    )
