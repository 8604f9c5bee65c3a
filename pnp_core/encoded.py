"""What a pipeline's ``encode_prompt`` has given before a run's first forward."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pnp_core.forwards import shared


class Encoded(NamedTuple):
    """Prompts and negative prompts that were encoded together.

    Attributes:
        positive: text states of the prompts, ``(B, L, D)``.
        negative: of the negative prompts; one row if all samples share it.
        negative_pooled: of an SDXL pipeline, ``(B, D)``.
    """

    positive: Tensor
    negative: Tensor
    negative_pooled: Tensor | None

    @classmethod
    def of(cls, result: Sequence[Tensor]) -> "Encoded":
        """From what ``encode_prompt`` gives.

        The negative ones are copied, as the stock pipeline does: what a callback writes into them
        has no effect.
        """
        pooled = result[3].clone() if len(result) == 4 else None
        return cls(result[0], shared(result[1]).clone(), pooled)

    def is_run_under(self, text: Tensor) -> bool:
        """Whether a forward has these prompts' states, alone or behind the negative ones."""
        last = text[-len(self.positive) :]
        return last.shape == self.positive.shape and torch.equal(last, self.positive.to(last))

    def has_negative_of(self, other: "Encoded") -> bool:
        """Whether both have the same negative prompts."""
        ours, theirs = (
            [x for x in (each.negative, each.negative_pooled) if x is not None]
            for each in (self, other)
        )
        return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def the_one_run(name: str, encodings: Sequence[Encoded], text: Tensor) -> Encoded:
    """Of several, the one that a forward is run under.

    Args:
        name: of the pipeline's class.
        encodings: in their order.
        text: of the forward.

    Raises:
        ValueError: it can't be told whose the negative prompts are.
    """
    found = [each for each in encodings if each.is_run_under(text)] or encodings
    if not all(each.has_negative_of(found[0]) for each in found):
        raise ValueError(
            f"{name} has encoded several prompts with different negative prompts before its first "
            "forward, and it can't be told which of these that forward is to be guided away from: "
            "use it unplugged."
        )
    return found[0]
