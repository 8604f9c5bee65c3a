"""The rule by which a teacher turns two predictions into one.

Plain classifier-free guidance is one of several; those of ``diffusers.guiders`` that need nothing
but the two predictions, the guidance scale and the place in the schedule can be distilled as well.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import guiders
from torch import Tensor

from pnp_core.schedule import cfg_target

CFG = "ClassifierFreeGuidance"
GUIDERS = (
    CFG,
    "ClassifierFreeZeroStarGuidance",
    "AdaptiveProjectedGuidance",
    "TangentialClassifierFreeGuidance",
)
# Not functions of (z_t, t, c, w): they depend on steps before, or on where a step comes in its run.
STATEFUL = {
    "adaptive_projected_guidance_momentum": "carries momentum from step to step",
    "zero_init_steps": "depends on the number of the step",
}
RESERVED = ("guidance_scale", "use_original_formulation", "enabled")


@dataclass(frozen=True, kw_only=True)
class GuiderConfig:
    """A guider of ``diffusers.guiders`` by name, with its arguments.

    ``start`` and ``stop``, the share of the schedule in which it guides, are counted in training
    timesteps, from the noise down.

    Raises:
        ValueError: a guider that can't be distilled, or an argument it has not or must not have.
    """

    name: str = CFG
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in GUIDERS:
            why = (
                "it needs more than the predictions with and without the prompt"
                if hasattr(guiders, self.name)
                else "diffusers has none of that name"
            )
            raise ValueError(
                f"The guider {self.name!r} can't be distilled: {why}. Choose one of "
                f"{', '.join(GUIDERS)}."
            )
        known = set(inspect.signature(getattr(guiders, self.name).__init__).parameters)
        for key in self.arguments:
            if key in RESERVED:
                raise ValueError(f"{self.name}: {key} is not for the guider's arguments.")
            if key not in known:
                raise ValueError(f"{self.name} has no argument {key!r}.")
        for key, why in STATEFUL.items():
            if self.arguments.get(key):
                raise ValueError(
                    f"{self.name} with {key} {self.arguments[key]} can't be distilled: it {why}."
                )


class Guider:
    """``(eps_c, eps_n, t_B, w_B) -> eps``, one timestep and one guidance scale a sample."""

    def __init__(self, config: GuiderConfig | None = None, num_train_timesteps: int = 1000) -> None:
        self.config = config or GuiderConfig()
        self.num_train_timesteps = num_train_timesteps
        arguments = dict(self.config.arguments)
        if self.config.name == "ClassifierFreeZeroStarGuidance":
            arguments["zero_init_steps"] = 0
        self.is_plain = self.config.name == CFG and not arguments
        self.guider = getattr(guiders, self.config.name)(**arguments)

    def __call__(self, eps_c: Tensor, eps_n: Tensor, t_B: Tensor, w_B: Tensor) -> Tensor:
        if self.is_plain:
            return cfg_target(eps_c=eps_c, eps_n=eps_n, guidance_scale_B=w_B)
        guided = []
        for c, n, t, w in zip(eps_c, eps_n, t_B.tolist(), w_B.tolist(), strict=True):
            step = self.num_train_timesteps - 1 - int(t)
            self.guider.set_state(step, self.num_train_timesteps, torch.tensor(t))
            self.guider.guidance_scale = w
            guided.append(self.guider.forward(c[None], n[None]).pred)
        return torch.cat(guided)
