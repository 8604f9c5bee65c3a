"""What a sampling run is asked for, and does not change from step to step."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


class AddedConditions(NamedTuple):
    """What an SDXL UNet is told beside the text states of the prompt and the negative prompt."""

    pooled_BP: Tensor
    negative_pooled_BP: Tensor
    time_ids_B6: Tensor  # original size, crop, target size; in pixels, the same for both prompts

    @property
    def positive(self) -> dict[str, Tensor]:
        """``added_cond_kwargs`` of the forward under the prompt."""
        return {"text_embeds": self.pooled_BP, "time_ids": self.time_ids_B6}

    @property
    def negative(self) -> dict[str, Tensor]:
        """``added_cond_kwargs`` of the forward under the negative prompt."""
        return {"text_embeds": self.negative_pooled_BP, "time_ids": self.time_ids_B6}

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "AddedConditions":
        """A copy on a device, and in a dtype if one is given."""
        return AddedConditions(*(x.to(device, dtype) for x in self))

    def part(self, rows: slice) -> "AddedConditions":
        """Those of these samples."""
        return AddedConditions(*(x[rows] for x in self))


@dataclass(frozen=True, kw_only=True, eq=False)
class Conditions:
    """Prompts, negative prompts and guidance scales of a batch.

    B batch, L text tokens, D text width.

    Attributes:
        c_BLD: text states of the prompts, ``(B, L, D)``.
        n_BLD: those of the negative (or null) prompts, ``(B, L, D)``, or ``(1, L, D)`` where all
            samples share one, which is faster.
        w_B: guidance scales as diffusers counts them, 1 is no guidance; ``(B,)``, float32.
        added: what an SDXL base is told besides; None for other bases.
    """

    c_BLD: Tensor
    n_BLD: Tensor
    w_B: Tensor
    added: AddedConditions | None = None

    @classmethod
    def at_scale(
        cls,
        guidance_scale: float,
        *,
        c_BLD: Tensor,
        n_BLD: Tensor,
        added: AddedConditions | None = None,
    ) -> "Conditions":
        """One guidance scale for all samples."""
        w_B = torch.full((len(c_BLD),), guidance_scale, dtype=torch.float32, device=c_BLD.device)
        return cls(c_BLD=c_BLD, n_BLD=n_BLD, w_B=w_B, added=added)

    def with_scale(self, w_B: Tensor) -> "Conditions":
        """The same at other guidance scales."""
        return replace(self, w_B=w_B)

    def part(self, rows: slice) -> "Conditions":
        """Those of these samples."""
        n = self.n_BLD if len(self.n_BLD) == 1 else self.n_BLD[rows]
        added = None if self.added is None else self.added.part(rows)
        return Conditions(c_BLD=self.c_BLD[rows], n_BLD=n, w_B=self.w_B[rows], added=added)

    @property
    def each_negative(self) -> Tensor:
        """The negative prompts' text states, one row a sample."""
        return self.n_BLD.expand(len(self.c_BLD), -1, -1)
