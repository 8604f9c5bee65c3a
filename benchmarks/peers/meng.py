"""Meng et al., *On Distillation of Guided Diffusion Models*, CVPR 2023, section 3.1.

Stage 1 tunes the whole network, which is told ``w`` by an embedding added to the timestep's.
"""

import copy

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from pnp_core.denoiser import Denoiser
from pnp_core.guide import sinusoidal
from pnp_core.models import AddedConditions
from pnp_core.schedule import NoiseSchedule

W_EMBEDDING = 64  # channels of pnp_core.guide.sinusoidal


class WholeUNet(nn.Module):
    """A copy of the base with every weight trained."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        config = {key: value for key, value in unet.config.items() if not key.startswith("_")}
        self.student = UNet2DConditionModel.from_config(
            {**config, "time_cond_proj_dim": W_EMBEDDING}
        )
        self.student.load_state_dict(unet.state_dict(), strict=False)
        nn.init.zeros_(self.student.time_embedding.cond_proj.weight)
        self.student.set_attn_processor(copy.copy(unet.attn_processors))
        self.base = {name: value.detach().clone() for name, value in unet.state_dict().items()}

    @torch.no_grad()
    def denoiser(self, unet: UNet2DConditionModel, schedule: NoiseSchedule) -> Denoiser:
        """On a fine-tune, what training changed is added to the fine-tune's weights.

        The paper has no such transfer: a tuned network is a network of its own. Adding the
        difference is the kindest reading of it.
        """
        weights = unet.state_dict()
        if all(torch.equal(weights[name], value) for name, value in self.base.items()):
            return WDenoiser(self.student, schedule)
        moved = copy.deepcopy(self.student)
        for name, value in moved.state_dict().items():
            if name in self.base:
                value.add_(weights[name] - self.base[name])
        return WDenoiser(moved, schedule)


class WDenoiser:
    """One forward of a UNet that is told ``w``."""

    def __init__(self, unet: UNet2DConditionModel, schedule: NoiseSchedule) -> None:
        self.unet = unet
        self.schedule = schedule

    def __call__(
        self,
        z_BCHW: Tensor,
        t_B: Tensor,
        c_BLD: Tensor,
        w_B: Tensor,
        n_BLD: Tensor,
        added: AddedConditions | None = None,
    ) -> Tensor:
        prediction = self.unet(
            z_BCHW, t_B, c_BLD, timestep_cond=sinusoidal(w_B, 30), return_dict=False
        )[0]
        return self.schedule.to_eps(prediction, z_BCHW, t_B)
