"""The rule by which a teacher turns two predictions into one.

Plain classifier-free guidance is one of several; those of ``diffusers.guiders`` that need nothing
but the two predictions, the guidance scale and the place in the schedule can be distilled as well.
"""

import copy

import torch
from diffusers import guiders
from torch import Tensor

from pnp_core.schedule import cfg_target
from pnp_core.settings import CFG
from pnp_core.settings import GUIDERS as GUIDERS
from pnp_core.settings import GuiderConfig as GuiderConfig


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
        """Guided eps, ``(B, C, H, W)``, from those under the prompt and the negative prompt.

        Args:
            eps_c: under the prompts, ``(B, C, H, W)``.
            eps_n: under the negative prompts, ``(B, C, H, W)``.
            t_B: training timesteps; some guiders act in a part of them.
            w_B: guidance scales.
        """
        if self.is_plain:
            return cfg_target(eps_c=eps_c, eps_n=eps_n, guidance_scale_B=w_B)
        guided = []
        guider = copy.copy(self.guider)  # another thread's may be told another step and scale
        for c, n, t, w in zip(eps_c, eps_n, t_B.tolist(), w_B.tolist(), strict=True):
            step = self.num_train_timesteps - 1 - int(t)
            guider.set_state(step, self.num_train_timesteps, torch.tensor(t))
            guider.guidance_scale = w
            guided.append(guider.forward(c[None], n[None]).pred)
        return torch.cat(guided)
