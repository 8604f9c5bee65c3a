"""What kinds of guides compute alike: how much to do, and sums.

B batch, R directions, L text tokens, D text width.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

SAME_PROMPT = 0.1  # root mean square of a difference between two prompts below which it fades out


Layer = TypeVar("Layer", bound=nn.Module)


class Gain(NamedTuple):
    """How much a guide is to do, one row a sample: ``scale + offset * learnt offset``.

    Both are zero where there is nothing to guide.
    """

    scale_B1: Tensor  # strength * (w - 1)
    offset_B1: Tensor  # strength, from 0 at w = 1 to 1 at w = 2

    @classmethod
    def of(cls, w_B: Tensor, difference_BLD: Tensor, strength: float) -> "Gain":
        """The gain at these guidance scales.

        Args:
            w_B: guidance scales; below 1 counts as 1.
            difference_BLD: of the text states of prompt and negative prompt, :func:`rms_normed`.
            strength: multiplies both gains.
        """
        above_B = (w_B.float() - 1).clamp(min=0)
        ramp_B = above_B.clamp(max=1)
        distance_B = difference_BLD.float().square().mean(dim=(1, 2)) / SAME_PROMPT**2
        distance_B = distance_B.clamp(max=1)
        share_B = strength * distance_B * (2 - distance_B)  # smooth at both ends
        ramp_B = ramp_B.square() * (3 - 2 * ramp_B)
        return cls((share_B * above_B)[:, None], (share_B * ramp_B)[:, None])

    def with_offset(self, offset_R: Tensor) -> Tensor:
        """The gains of R directions, ``(B, R)``, in the dtype of ``offset_R``."""
        gain_BR = torch.addcmul(self.scale_B1, self.offset_B1, offset_R.float())
        return gain_BR.to(offset_R.dtype)


def rms_normed(x: Tensor) -> Tensor:
    """Rows of the last dimension at a root mean square of 1."""
    return nn.functional.rms_norm(x, x.shape[-1:])


def zero_module(module: Layer) -> Layer:
    """The module with all its parameters at zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def add_all(features: Sequence[Tensor], residuals: Sequence[Tensor]) -> list[Tensor]:
    """Sums, each in the dtype of the feature; in one operation.

    Without gradients they take the memory of the residuals, which are nobody else's.
    """
    residuals = [r.to(x.dtype) for x, r in zip(features, residuals, strict=True)]
    if torch.is_grad_enabled():
        return list(torch._foreach_add(list(features), residuals))
    torch._foreach_add_(residuals, list(features))
    return residuals
