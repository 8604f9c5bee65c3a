"""What a guide does at the steps to come, computed for several of them at once.

What the timestep alone decides takes dozens of operations that are small: for one step they take
as long as for many.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pnp_core.guide.kind import Effect, Prepared
from pnp_core.precision import is_mixed

ROWS = 16  # samples times steps computed at once: they take memory


class Place(NamedTuple):
    """Where in a tensor of timesteps one of them stands."""

    timesteps: Tensor
    number: int


class StepsAhead:
    """Effects of a run's steps.

    Samplers take their timesteps from one tensor, in order: which element of it a forward is given
    tells those of the forwards after it, without a look at values. Should it tell wrong, what has
    been computed serves nothing, and is never taken for another step's.
    """

    def __init__(self) -> None:
        self.effects: dict[int, Effect] = {}  # by their timestep's place
        self.computed_for: tuple[Any, ...] = ()
        self.timesteps: Tensor | None = None  # so that no other tensor gets its id
        self.prepared: Prepared | None = None
        self.num_served = 0  # forwards, by that
        self.changes_often = False

    def effect(self, prepared: Prepared, sample: Tensor, timestep: Tensor) -> Effect:
        """What a guide does in the forward that is about to run.

        Args:
            prepared: the guide; the same object as long as its conditions are the same.
            sample: latents, ``(B, C, H, W)``.
            timestep: as the sampler gives it, one for all samples or one each.
        """
        if prepared is not self.prepared:
            # a callback that changes conditions at each step would have 15 of 16 made for nothing
            self.changes_often = self.prepared is not None and self.num_served < 2
            self.prepared, self.num_served, self.effects = prepared, 0, {}
        self.num_served += 1
        place, num_steps = place_of(timestep), max(1, ROWS // len(sample))
        if self.changes_often and self.num_served == 1:
            num_steps = 1
        if place is None or num_steps == 1 or torch.is_grad_enabled():
            return prepared.at(sample, timestep.to(sample.device).reshape(-1))
        timesteps, number = place
        mixed = is_mixed(sample.device.type)
        version = (id(timesteps), timesteps._version)
        computed_for = (*version, sample.shape, sample.dtype, sample.device, mixed)
        if computed_for != self.computed_for or number not in self.effects:
            ahead = timesteps[number : number + num_steps].to(sample.device)
            effects = prepared.at_each(sample, ahead[:, None])
            if len(effects) == 1:  # it may hold features of this step
                return effects[0]
            self.effects = dict(enumerate(effects, start=number))
            self.computed_for, self.timesteps = computed_for, timesteps
        return self.effects[number]


def place_of(timestep: Tensor) -> Place | None:
    """The tensor that a timestep is an element of, and which; None: that can't be told."""
    timesteps = timestep._base
    if timesteps is None or timesteps.is_inference():
        return None
    if timesteps.ndim != 1 or timesteps.dtype != timestep.dtype:
        return None
    is_one = all(
        stride == 0
        for size, stride in zip(timestep.shape, timestep.stride(), strict=True)
        if size > 1
    )
    if not is_one or not timesteps.is_contiguous():
        return None
    return Place(timesteps, int(timestep.storage_offset() - timesteps.storage_offset()))
