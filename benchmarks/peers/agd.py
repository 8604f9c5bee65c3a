"""Jensen & Sadat, *Efficient Distillation of Classifier-Free Guidance using Adapters*, TMLR 2025.

Small cross-attention adapters beside every attention layer of the frozen network: queries from the
layer's input; keys and values from the text, the timestep and ``w``; their output added to the
layer's. Some 2 % of the parameters, trained on states that guided sampling visits.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from benchmarks.peers.peer import Peer
from pnp_core.conditions import Conditions
from pnp_core.denoiser import Denoiser, PlainDenoiser
from pnp_core.guide.kind import EMBEDDING_DIM, W_SCALE, frequencies, sinusoidal
from pnp_core.schedule import NoiseSchedule

PARAMETERS_SHARE = 0.02


def attention_layers(unet: UNet2DConditionModel) -> list[Attention]:
    """The layers that an adapter stands beside."""
    return [
        module
        for name, module in unet.named_modules()
        if isinstance(module, Attention) and name.endswith(("attn1", "attn2"))
    ]


class Adapter(nn.Module):
    """Beside one attention layer."""

    def __init__(self, channels: int, text_width: int, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(channels, width, bias=False)
        self.text = nn.Linear(text_width, 2 * width, bias=False)
        self.scalars = nn.Linear(EMBEDDING_DIM, 2 * width)  # a token each for t and w
        self.out = nn.Linear(width, channels, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, x_BNC: Tensor, text_BLD: Tensor, scalars_B2E: Tensor) -> Tensor:
        """What to add to the layer's output, given its input."""
        tokens = torch.cat([self.text(text_BLD), self.scalars(scalars_B2E)], dim=1)
        keys, values = tokens.chunk(2, dim=-1)
        query = self.query(x_BNC)
        weights = F.softmax(query @ keys.transpose(1, 2) * query.shape[-1] ** -0.5, dim=-1)
        result: Tensor = self.out(weights @ values)
        return result


class AttentionAdapters(Peer):
    """Adapters for every attention layer of a UNet."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__(unet)
        self.text_width = unet.config.cross_attention_dim
        self.channels = [layer.query_dim for layer in attention_layers(unet)]
        budget = PARAMETERS_SHARE * sum(p.numel() for p in unet.parameters())
        per_width = sum(2 * c + 2 * self.text_width + 2 * EMBEDDING_DIM + 2 for c in self.channels)
        width = max(1, int(budget / per_width))
        self.adapters = nn.ModuleList(Adapter(c, self.text_width, width) for c in self.channels)

    def denoiser(self, unet: UNet2DConditionModel, schedule: NoiseSchedule) -> Denoiser:
        """The adapters at work in `unet`, which stays frozen."""
        return AdaptedDenoiser(self, unet, schedule)


class AdaptedDenoiser:
    """One forward of a frozen UNet with adapters in its attention layers."""

    def __init__(
        self, peer: AttentionAdapters, unet: UNet2DConditionModel, schedule: NoiseSchedule
    ) -> None:
        self.peer = peer
        self.plain = PlainDenoiser(unet, schedule)

    def __call__(self, z_BCHW: Tensor, t_B: Tensor, conditions: Conditions) -> Tensor:
        """Predicted eps, `(B, C, H, W)`, in one forward; hooks are in place only for it."""
        of = frequencies(z_BCHW.device)
        scalars_B2E = torch.stack(
            [sinusoidal(t_B, of), sinusoidal(W_SCALE * conditions.w_B, of)], dim=1
        )

        def adapted(adapter: nn.Module) -> Any:
            def hook(layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:  # noqa: ARG001, torch's hook
                x_BNC = args[0] if args else kwargs["hidden_states"]
                more: Tensor = adapter(x_BNC, conditions.c_BLD, scalars_B2E)
                return output + more.to(output.dtype)

            return hook

        layers = attention_layers(self.plain.unet)
        handles = [
            layer.register_forward_hook(adapted(adapter), with_kwargs=True)
            for layer, adapter in zip(layers, self.peer.adapters, strict=True)
        ]
        try:
            return self.plain(z_BCHW, t_B, conditions)
        finally:
            for handle in handles:
                handle.remove()
