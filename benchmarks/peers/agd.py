"""Jensen & Sadat, *Efficient Distillation of Classifier-Free Guidance using Adapters*, TMLR 2025.

Small cross-attention adapters beside the cross-attention layers of the frozen network: queries from
the layer's input; keys and values from ``w``, the timestep and the text, each mapped to one width;
their output added to the layer's. Some 2 % of the parameters, trained on states that guided
sampling visits.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from benchmarks.peers.peer import Peer
from pnp_core.conditions import Conditions
from pnp_core.denoiser import Denoiser, PlainDenoiser
from pnp_core.schedule import NoiseSchedule

PARAMETERS_SHARE = 0.02
MLP_RATIO = 4
MAX_PERIOD = 10_000.0


def attention_layers(unet: UNet2DConditionModel) -> list[Attention]:
    """The layers that an adapter stands beside: the official code skips each up block's last."""
    blocks = [*unet.down_blocks, unet.mid_block]
    layers = [list(getattr(block, "attentions", [])) for block in blocks]
    layers += [list(getattr(block, "attentions", []))[:-1] for block in unet.up_blocks]
    return [
        block.attn2
        for transformers in layers
        for transformer in transformers
        for block in transformer.transformer_blocks
    ]


class ScalarEncoder(nn.Module):
    """Random Fourier features, a perceptron and a layer norm."""

    frequencies: Tensor
    phases: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(width))
        self.register_buffer("phases", torch.rand(width))
        first, second = nn.Linear(width, MLP_RATIO * width), nn.Linear(MLP_RATIO * width, width)
        self.layers = nn.Sequential(first, nn.ReLU(), second, nn.LayerNorm(width))
        for layer in (first, second):
            nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(2))
            nn.init.zeros_(layer.bias)

    def forward(self, x_B: Tensor) -> Tensor:
        """(B,) to (B, width)."""
        phases = self.frequencies * x_B.float()[:, None] + self.phases
        result: Tensor = self.layers(torch.cos(2 * torch.pi * phases))
        return result


class Adapter(nn.Module):
    """Beside one cross-attention layer."""

    def __init__(self, channels: int, text_width: int, time_width: int, width: int) -> None:
        super().__init__()
        self.w = ScalarEncoder(width)
        self.time = nn.Linear(time_width, width)
        self.text = nn.Linear(text_width, width)
        self.query = nn.Linear(channels, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, channels)
        for layer in (self.query, self.key, self.value):
            nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x_BNC: Tensor, text_BLD: Tensor, time_BE: Tensor, w_B: Tensor) -> Tensor:
        """What to add to the layer's output, given its input."""
        scalars = torch.stack([self.w(w_B), self.time(time_BE)], dim=1)
        tokens = torch.cat([scalars, self.text(text_BLD)], dim=1)
        tokens = tokens + positions(tokens.shape[1], tokens.shape[2], tokens.device)
        attended = F.scaled_dot_product_attention(
            self.query(x_BNC)[:, None], self.key(tokens)[:, None], self.value(tokens)[:, None]
        )
        result: Tensor = self.out(attended[:, 0])
        return result


def positions(length: int, width: int, device: torch.device) -> Tensor:
    """Sines, then cosines, of each token's place (Vaswani et al. 2017): (length, width)."""
    at = torch.arange(length, device=device)[:, None]
    halves = torch.arange(0, width, 2, device=device) / width
    angles = at * MAX_PERIOD**-halves
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class AttentionAdapters(Peer):
    """Adapters for the cross-attention layers of a UNet, as wide as 2 % of its parameters allow."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__(unet)
        channels = [layer.query_dim for layer in attention_layers(unet)]
        widths = unet.config.cross_attention_dim, unet.time_embedding.linear_2.out_features
        budget = PARAMETERS_SHARE * sum(p.numel() for p in unet.parameters())

        def size(width: int) -> int:
            with torch.device("meta"):
                made = (Adapter(c, *widths, width) for c in channels)
                return sum(p.numel() for adapter in made for p in adapter.parameters())

        width = 2
        while size(width + 2) <= budget:
            width += 2  # sines and cosines need it even
        self.adapters = nn.ModuleList(Adapter(c, *widths, width) for c in channels)

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
        unet = self.plain.unet
        time_BE = unet.time_embedding(unet.get_time_embed(sample=z_BCHW, timestep=t_B))

        def adapted(adapter: nn.Module) -> Any:
            def hook(layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:  # noqa: ARG001, torch's hook
                x_BNC = args[0] if args else kwargs["hidden_states"]
                more: Tensor = adapter(x_BNC, conditions.c_BLD, time_BE, conditions.w_B)
                return output + more.to(output.dtype)

            return hook

        handles = [
            layer.register_forward_hook(adapted(adapter), with_kwargs=True)
            for layer, adapter in zip(attention_layers(unet), self.peer.adapters, strict=True)
        ]
        try:
            return self.plain(z_BCHW, t_B, conditions)
        finally:
            for handle in handles:
                handle.remove()
