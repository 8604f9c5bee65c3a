"""What a pipeline's ``encode_prompt`` has given before a run's first forward."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pnp_core.arguments import Arguments
from pnp_core.forwards import key_of, shared

BEGAN_UNGUIDED = (
    "guidance_scale has been raised above 1 in the middle of a call that began without guidance, "
    "so the negative prompt is unknown: begin with a guidance_scale above 1."
)
BEFORE = (
    "{} runs its UNet before it hands its call on, and has not asked do_classifier_free_guidance: "
    "no guide acts there."
)
OWN_NEGATIVES = ("negative_prompt", "negative_prompt_2", "negative_prompt_embeds")
NOT_ENCODED = (
    "{} did not call its encode_prompt, by which a guide learns of the negative prompt, or that is "
    "wrapped by what does not name its arguments, as functools.wraps does: use it unplugged."
)


def why_unknown(name: str, *, began_unguided: bool) -> str:
    """Why the negative prompt of a pipeline of this class is not known."""
    return (BEGAN_UNGUIDED if began_unguided else NOT_ENCODED).format(name)


PROMPTS_FIRST = (
    "{} has the prompt's states before those of the negative prompt in its doubled batch, where a "
    "guide takes them for the negative ones: swap them, torch.cat([negative, prompt]), and what "
    "comes of them too, or use it unplugged."
)
NO_NEGATIVE = (
    "This pipeline's encode_prompt was asked for the states of a negative prompt by "
    "do_classifier_free_guidance=True and gave none, and a guide needs them: use it unplugged."
)


class Encoded(NamedTuple):
    """Prompts and negative prompts that were encoded together.

    Attributes:
        positive: text states of the prompts, ``(B, L, D)``.
        negative: of the negative prompts; one row if all samples share it.
        negative_pooled: of an SDXL pipeline, ``(B, D)``.
        has_own: whether a negative prompt was given.
    """

    positive: Tensor
    negative: Tensor
    negative_pooled: Tensor | None
    has_own: bool

    @classmethod
    def of(cls, result: Sequence[Tensor], given: Arguments) -> "Encoded":
        """From what ``encode_prompt`` gives, and is given.

        The negative ones are copied, as the stock pipeline does: what a callback writes into them
        has no effect.

        Raises:
            ValueError: there are none.
        """
        if result[1] is None:
            raise ValueError(NO_NEGATIVE)
        pooled = result[3].clone() if len(result) == 4 else None
        has_own = any(given.get(name) is not None for name in OWN_NEGATIVES)
        return cls(result[0], shared(result[1]).clone(), pooled, has_own)

    def is_run_under(self, text: Tensor) -> bool:
        """Whether a forward has these prompts' states, alone or behind the negative ones."""
        last = text[-len(self.positive) :]
        return last.shape == self.positive.shape and torch.equal(last, self.positive.to(last))

    def is_reversed_in(self, text: Tensor) -> bool:
        """Whether a doubled batch has these prompts' states before those of the negative ones."""
        if len(text) != 2 * len(self.positive) or text.shape[1:] != self.positive.shape[1:]:
            return False
        halves = zip(text.chunk(2), (self.positive, self.negative), strict=True)
        return all(torch.equal(half, own.to(half).expand_as(half)) for half, own in halves)

    def has_negative_of(self, other: "Encoded") -> bool:
        """Whether both have the same negative prompts."""
        ours, theirs = (
            [x for x in (each.negative, each.negative_pooled) if x is not None]
            for each in (self, other)
        )
        return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


class Encodings:
    """All that has been encoded before a run's first forward, in its order."""

    def __init__(self) -> None:
        self.all: list[Encoded] = []
        self.seen: Tensor | None = None  # of the forward before
        self.key: object = None

    def add(self, encoded: Encoded) -> None:
        """One more."""
        self.all.append(encoded)

    def forget(self) -> None:
        """A callback has said what the prompts are."""
        self.all.clear()

    def check_order(self, name: str, text: Tensor) -> None:
        """Raise ValueError if a doubled batch has prompts first, and negative ones behind them."""
        if any(each.is_run_under(text) for each in self.all):
            return
        if any(each.is_reversed_in(text) for each in self.all):
            raise ValueError(PROMPTS_FIRST.format(name))

    def run_under(self, name: str, text: Tensor, *, must: bool) -> Encoded | None:
        """Of several, the one that a forward is run under; None: that of the forward before.

        Args:
            name: of the pipeline's class.
            text: of the forward.
            must: whether nothing else tells the negative prompts.

        Raises:
            ValueError: it can't be told which, at the first forward.
        """
        key = key_of(text)
        if len(self.all) < 2 or key == self.key:
            return None
        is_first = self.seen is None
        self.seen, self.key = text, key  # held, so that no other tensor gets its address
        found = [each for each in self.all if each.is_run_under(text)]
        if not found and not is_first:
            return None
        # weighted or blended, they are guided away from what was given
        found = found or [each for each in self.all if each.has_own] or self.all
        if must and not all(each.has_negative_of(found[0]) for each in found):
            raise ValueError(
                f"{name} has encoded several prompts with different negative prompts before its "
                "first forward, and it can't be told which of these that forward is to be guided "
                "away from: use it unplugged."
            )
        return found[0]
