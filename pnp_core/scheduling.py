"""The scheduler that a guide is best with, as a bundle records it."""

from dataclasses import dataclass
from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from diffusers.schedulers import KarrasDiffusionSchedulers

# In diffusers' terms; "unknown" is what :func:`of_scheduler` says of one without a spacing.
SPACINGS = ("leading", "linspace", "trailing", "unknown")


@dataclass(frozen=True, kw_only=True)
class SchedulerChoice:
    """A scheduler of diffusers', and how its timesteps are spaced.

    Raises:
        ValueError: diffusers has no such scheduler for these pipelines, or no such spacing.
    """

    name: str
    timestep_spacing: str

    def __post_init__(self) -> None:
        if self.name not in KarrasDiffusionSchedulers.__members__:
            known = ", ".join(KarrasDiffusionSchedulers.__members__)
            raise ValueError(f"{self.name!r} is no scheduler that a guide works with: {known}.")
        if self.timestep_spacing not in SPACINGS:
            raise ValueError(
                f"{self.timestep_spacing!r} is no spacing of timesteps: {', '.join(SPACINGS)}."
            )

    def __str__(self) -> str:
        return f"{self.name} with {self.timestep_spacing} spacing"

    def set(self, pipe: DiffusionPipeline) -> None:
        """Give a pipeline this scheduler, of its own noise schedule, in place."""
        # DDIM clips by default, for which no guide is trained, and others don't know the word.
        only = {"clip_sample": False} if self.name == "DDIMScheduler" else {}
        pipe.scheduler = getattr(diffusers, self.name).from_config(
            pipe.scheduler.config, timestep_spacing=self.timestep_spacing, **only
        )

    def is_of(self, scheduler: Any) -> bool:
        """Whether a pipeline's scheduler is this one."""
        return self == of_scheduler(scheduler)


def of_scheduler(scheduler: Any) -> SchedulerChoice | None:
    """What a pipeline has; None for a scheduler that is none of diffusers'."""
    name = type(scheduler).__name__
    if name not in KarrasDiffusionSchedulers.__members__:
        return None
    spacing = scheduler.config.get("timestep_spacing", "unknown")
    return SchedulerChoice(name=name, timestep_spacing=spacing)
