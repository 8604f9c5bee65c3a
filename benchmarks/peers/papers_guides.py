"""Hsiao et al., *Plug-and-Play Diffusion Distillation*, CVPR 2024: the paper's own two guides.

Both are external: they read the noised latent, the timestep and ``w``, and give feature maps that
are added to what the frozen network's decoder takes from its encoder. The full one is a ControlNet
that reads the prompt too; the tiny one has about 1 % of the parameters. docs/peers.md says what of
them is known from where.
"""

from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.resnet import Downsample2D, ResnetBlock2D
from torch import Tensor, nn

from benchmarks.peers.peer import Peer
from pnp_core.conditions import Conditions
from pnp_core.denoiser import Denoiser
from pnp_core.guide.embeddings import EMBEDDING_DIM, W_SCALE, frequencies, sinusoidal
from pnp_core.guide.maths import zero_module
from pnp_core.schedule import NoiseSchedule

TINY_SHARE = 0.01
WIDTH_STEP = 4

Residuals = tuple[list[Tensor], Tensor]
"""What is added to each skip, in the encoder's order, and to what leaves the mid block."""


class ExternalGuide(Peer):
    """A network beside the frozen one."""

    def residuals(self, z_BCHW: Tensor, t_B: Tensor, conditions: Conditions) -> Residuals:
        """What enters the decoder."""
        raise NotImplementedError

    def denoiser(self, unet: UNet2DConditionModel, schedule: NoiseSchedule) -> Denoiser:
        """The guide at work beside `unet`, which stays frozen."""
        return ExternalDenoiser(self, unet, schedule)


class ExternalDenoiser:
    """One forward of the frozen UNet, and one of the guide."""

    def __init__(
        self, peer: ExternalGuide, unet: UNet2DConditionModel, schedule: NoiseSchedule
    ) -> None:
        self.peer, self.unet, self.schedule = peer, unet, schedule

    def __call__(self, z_BCHW: Tensor, t_B: Tensor, conditions: Conditions) -> Tensor:
        """Predicted eps, `(B, C, H, W)`."""
        skips, middle = self.peer.residuals(z_BCHW, t_B, conditions)
        prediction = self.unet(
            z_BCHW,
            t_B,
            conditions.c_BLD,
            down_block_additional_residuals=skips,
            mid_block_additional_residual=middle,
            added_cond_kwargs=None if conditions.added is None else conditions.added.positive,
            return_dict=False,
        )[0]
        return self.schedule.to_eps(prediction, z_BCHW, t_B)


class PaperFull(ExternalGuide):
    """A ControlNet on the prompt that is told ``w`` with the timestep, and follows no picture."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__(unet)
        self.net = ControlNetModel.from_unet(unet)
        self.net.controlnet_cond_embedding = nn.Identity()
        time = self.net.time_embedding
        time.cond_proj = nn.Linear(EMBEDDING_DIM, time.linear_1.in_features, bias=False)
        nn.init.zeros_(time.cond_proj.weight)
        self.net.requires_grad_(True)  # a copy, of weights that may be frozen

    def residuals(self, z_BCHW: Tensor, t_B: Tensor, conditions: Conditions) -> Residuals:
        """The ControlNet's, from the prompt."""
        w_BE = sinusoidal(W_SCALE * conditions.w_B, frequencies(z_BCHW.device))
        skips, middle = self.net(
            z_BCHW,
            t_B,
            encoder_hidden_states=conditions.c_BLD,
            controlnet_cond=z_BCHW.new_zeros(1, 1, 1, 1),
            timestep_cond=w_BE.to(z_BCHW.dtype),
            added_cond_kwargs=None if conditions.added is None else conditions.added.positive,
            return_dict=False,
        )
        return skips, middle


class PaperTiny(ExternalGuide):
    """A narrow encoder without text, a resnet a skip, as wide as 1 % of the parameters allow."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__(unet)
        budget = TINY_SHARE * sum(p.numel() for p in unet.parameters())

        def size(width: int) -> int:
            with torch.device("meta"):
                return sum(p.numel() for p in NarrowEncoder(unet, width).parameters())

        width = WIDTH_STEP
        while size(width + WIDTH_STEP) <= budget:
            width += WIDTH_STEP
        self.net = NarrowEncoder(unet, width)

    def residuals(self, z_BCHW: Tensor, t_B: Tensor, conditions: Conditions) -> Residuals:
        """The narrow encoder's, each projected to its skip's channels."""
        found = self.net(z_BCHW, t_B, conditions.w_B)
        return found[:-1], found[-1]


class NarrowEncoder(nn.Module):
    """The resolutions of a UNet's encoder at one width, with a projection for every skip."""

    def __init__(self, unet: UNet2DConditionModel, width: int) -> None:
        super().__init__()
        of: dict[str, Any] = {
            "temb_channels": width,
            "groups": WIDTH_STEP,
            "groups_out": WIDTH_STEP,
        }
        self.enter = nn.Conv2d(unet.config.in_channels, width, 3, padding=1)
        self.time = nn.Sequential(
            nn.Linear(2 * EMBEDDING_DIM, width), nn.SiLU(), nn.Linear(width, width)
        )
        layers: list[nn.Module] = []
        channels = [unet.config.block_out_channels[0]]
        for block, out in zip(unet.down_blocks, unet.config.block_out_channels, strict=True):
            layers += [
                ResnetBlock2D(in_channels=width, out_channels=width, **of) for _ in block.resnets
            ]
            channels += [out] * len(block.resnets)
            if block.downsamplers:
                layers.append(Downsample2D(width, use_conv=True, out_channels=width))
                channels.append(out)
        layers.append(ResnetBlock2D(in_channels=width, out_channels=width, **of))
        channels.append(unet.config.block_out_channels[-1])
        self.layers = nn.ModuleList(layers)
        self.projections = nn.ModuleList(zero_module(nn.Conv2d(width, c, 1)) for c in channels)

    def forward(self, z_BCHW: Tensor, t_B: Tensor, w_B: Tensor) -> list[Tensor]:
        """A feature map for each skip, in the encoder's order, and one for the mid block."""
        of = frequencies(z_BCHW.device)
        scalars = torch.cat([sinusoidal(t_B, of), sinusoidal(W_SCALE * w_B, of)], dim=-1)
        emb = self.time(scalars.to(z_BCHW.dtype))
        hidden = self.enter(z_BCHW)
        features = [hidden]
        for layer in self.layers:
            hidden = layer(hidden, emb) if isinstance(layer, ResnetBlock2D) else layer(hidden)
            features.append(hidden)
        pairs = zip(self.projections, features, strict=True)
        return [projection(feature) for projection, feature in pairs]
