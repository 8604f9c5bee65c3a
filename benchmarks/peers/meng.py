"""Meng et al., *On Distillation of Guided Diffusion Models*, CVPR 2023, section 3.1.

Stage 1 tunes the whole network, which is told ``w`` by an embedding added to the timestep's.
"""

import copy

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from benchmarks.peers.peer import Peer
from pnp_core.conditions import Conditions
from pnp_core.denoiser import Denoiser
from pnp_core.guide.embeddings import EMBEDDING_DIM, W_SCALE, frequencies, sinusoidal
from pnp_core.schedule import NoiseSchedule


class WholeUNet(Peer):
    """A copy of the base with every weight trained."""

    is_add_on = False

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__(unet)
        config = {key: value for key, value in unet.config.items() if not key.startswith("_")}
        self.student = UNet2DConditionModel.from_config(
            {**config, "time_cond_proj_dim": EMBEDDING_DIM}
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

    def __call__(self, z_BCHW: Tensor, t_B: Tensor, conditions: Conditions) -> Tensor:
        """Predicted eps, `(B, C, H, W)`, in one forward of a UNet that is told the scale."""
        w_BE = sinusoidal(W_SCALE * conditions.w_B, frequencies(z_BCHW.device))
        added = conditions.added
        prediction = self.unet(
            z_BCHW,
            t_B,
            conditions.c_BLD,
            timestep_cond=w_BE,
            added_cond_kwargs=None if added is None else added.positive,
            return_dict=False,
        )[0]
        return self.schedule.to_eps(prediction, z_BCHW, t_B)
