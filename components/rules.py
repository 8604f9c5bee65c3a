"""The section `promote` of params.yaml: what a guide must be to become champion."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from components.section import Count, Positive, Section

LossOrZero = Annotated[float, Field(ge=0)]
# What every method's images are measured by.
ScoreName = Literal["fid", "kid", "clip_score", "diversity"]


class ScoreRule(Section, frozen=True):
    """What a score of the guide's images must be. A rule that is null does not hold."""

    min_gain: float | None  # of what CFG gains over no guidance, the share that the guide gains
    ratio: Positive | None  # to CFG's score, where that gain says nothing: the worst that passes
    max_loss: LossOrZero | None  # of either, against the champion


class NumberRule(Section, frozen=True):
    """What a number that is no matter of images or steps must be; lower is better."""

    most: Positive
    max_loss: LossOrZero | None  # against the champion


Rule = ScoreRule | NumberRule


class Promote(Section, frozen=True):
    """A candidate becomes champion only if all of this holds, for every model and step count."""

    min_images: Count  # of each method and setting
    guidance_fvu: NumberRule
    flops_ratio: NumberRule  # guided over CFG, of a step
    scores: dict[ScoreName, ScoreRule]  # by their names in an evaluation
    # In place of these at some number of steps; None: no score decides there.
    at_steps: dict[int, dict[ScoreName, ScoreRule] | None]

    @property
    def ruled_steps(self) -> list[int]:
        """The numbers of steps that have a rule of their own which is not null."""
        return [
            num_steps
            for num_steps, rules in self.at_steps.items()
            if any(value is not None for rule in (rules or {}).values() for _, value in rule)
        ]

    def at(self, num_steps: int) -> dict[ScoreName, ScoreRule]:
        """The rules for scores at a number of steps."""
        own = self.at_steps.get(num_steps, {})
        return {} if own is None else {**self.scores, **own}

    def lacking(self, num_images: int, num_steps: Sequence[int], *, reads_text: bool) -> list[str]:
        """What an evaluation to come will lack for these rules, in words.

        Args:
            num_images: that will be sampled of each method and setting.
            num_steps: at which.
            reads_text: whether the first judge gives a CLIP score.
        """
        found = []
        if num_images < self.min_images:
            found.append(f"{num_images} images, and promote.min_images is {self.min_images}")
        for steps in {*self.ruled_steps} - {*num_steps}:
            found.append(f"promote.at_steps has a rule for {steps} steps, which are not sampled")
        if not reads_text and any("clip_score" in self.at(steps) for steps in num_steps):
            found.append("promote has a rule for clip_score, and the first judge reads no text")
        return found
