"""Guidance as a low-rank change of the weights (Hu et al. 2022), merged before sampling.

LongLive-Plug (arXiv 2609.38154) does this for video models. Here the change is as strong as the
guidance is, so that one training serves a range of ``w``: at ``w`` the weights are
``W + (w - 1) B A``. Merged, it costs nothing, and it is merged into a fine-tune the same way.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.peers.peer import Peer
from pnp_core.conditions import Conditions
from pnp_core.denoiser import Denoiser, PlainDenoiser
from pnp_core.schedule import NoiseSchedule

# The layers of diffusers' LCM-LoRA training script.
TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "time_emb_proj"),
    *("downsamplers.0.conv", "upsamplers.0.conv"),
)


def targets(unet: UNet2DConditionModel) -> dict[str, Any]:
    """The layers that are changed, by name."""
    return {name: layer for name, layer in unet.named_modules() if name.endswith(TARGETS)}


class LowRank(nn.Module):
    """A change of one layer's weights: `B A`, zero until it is trained."""

    def __init__(self, layer: Any, rank: int) -> None:
        super().__init__()
        out, *rest = layer.weight.shape
        self.a = nn.Parameter(torch.empty(rank, *rest))
        self.b = nn.Parameter(torch.zeros(out, rank))
        nn.init.normal_(self.a, std=self.a[0].numel() ** -0.5)

    def forward(self, layer: Any, x: Tensor) -> Tensor:
        """What the change adds to the layer's output, at strength 1."""
        if isinstance(layer, nn.Linear):
            return F.linear(F.linear(x, self.a), self.b)
        inner = F.conv2d(x, self.a, stride=layer.stride, padding=layer.padding)
        return F.conv2d(inner, self.b[:, :, None, None])

    def merged(self) -> Tensor:
        """The change of the weights, at strength 1."""
        return (self.b @ self.a.flatten(1)).unflatten(1, self.a.shape[1:])


class LowRankPeer(Peer):
    """Low-rank changes of the attentions', transformers' and resnets' layers.

    Attributes:
        share: their parameters over the UNet's, at most; the rank follows, at least 1.
    """

    share: ClassVar[float]

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__(unet)
        layers = targets(unet)
        of_rank_1 = sum(p.numel() for m in layers.values() for p in LowRank(m, 1).parameters())
        budget = self.share * sum(p.numel() for p in unet.parameters())
        self.rank = max(1, int(budget / of_rank_1))
        self.changes = nn.ModuleDict(
            {name.replace(".", "/"): LowRank(layer, self.rank) for name, layer in layers.items()}
        )

    def strength(self, w_B: Tensor) -> Tensor:
        """How much of the change counts at each guidance scale."""
        return w_B - 1

    def denoiser(self, unet: UNet2DConditionModel, schedule: NoiseSchedule) -> Denoiser:
        """The changed network; `unet` itself stays as it is."""
        return LowRankDenoiser(self, unet, schedule)


class LowRankDenoiser:
    """One forward of a UNet whose weights are changed."""

    def __init__(
        self, peer: LowRankPeer, unet: UNet2DConditionModel, schedule: NoiseSchedule
    ) -> None:
        self.peer = peer
        self.plain = PlainDenoiser(unet, schedule)

    def __call__(self, z_BCHW: Tensor, t_B: Tensor, conditions: Conditions) -> Tensor:
        """Predicted eps, `(B, C, H, W)`: merged where one strength serves all, and in sampling."""
        strength_B = self.peer.strength(conditions.w_B)
        if not torch.is_grad_enabled() and bool((strength_B == strength_B[0]).all()):
            return self._merged(z_BCHW, t_B, conditions, strength_B[0])
        unet = self.plain.unet
        layers = targets(unet)

        def changed(change: nn.Module) -> Any:
            def hook(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
                own = strength_B.reshape(-1, *(1,) * (output.ndim - 1)).to(output.dtype)
                return output + own * change(layer, args[0]).to(output.dtype)

            return hook

        handles = [
            layers[name.replace("/", ".")].register_forward_hook(changed(change))
            for name, change in self.peer.changes.items()
        ]
        try:
            return self.plain(z_BCHW, t_B, conditions)
        finally:
            for handle in handles:
                handle.remove()

    def _merged(
        self, z_BCHW: Tensor, t_B: Tensor, conditions: Conditions, strength: Tensor
    ) -> Tensor:
        unet, layers = self.plain.unet, targets(self.plain.unet)
        weights = {}
        for key, change in self.peer.changes.items():
            name = key.replace("/", ".")
            assert isinstance(change, LowRank)
            weights[f"{name}.weight"] = layers[name].weight + strength * change.merged()
        added = None if conditions.added is None else conditions.added.positive
        prediction = functional_call(
            unet,
            weights,
            (z_BCHW, t_B, conditions.c_BLD),
            {"added_cond_kwargs": added, "return_dict": False},
        )[0]
        return self.plain.schedule.to_eps(prediction, z_BCHW, t_B)


class SmallLoRA(LowRankPeer):
    """As many parameters as a guide has."""

    share = 0.01


class LargeLoRA(LowRankPeer):
    """Eight times as many."""

    share = 0.08
