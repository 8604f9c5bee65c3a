"""The parts of a tiny guide.

Each owns its parameters. What they do before the UNet runs is done for all of them together, see
:class:`pnp_core.guide.tiny.PreparedTiny`: one by one, hundreds of small operations would take as
long as the UNet.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pnp_core.guide.kind import KeyValue
from pnp_core.guide.maths import zero_module

GAIN_RANK = 4  # of the gains on one cross-attention
PROJECTION_RANK = 8  # of what is mixed from its channels besides


class Gains(nn.Module):
    """Factors that the conditioning vector sets, channel by channel."""

    def __init__(self, channels: int, rank: int, embedding_dim: int) -> None:
        super().__init__()
        self.down = nn.Linear(embedding_dim, rank)
        self.up = zero_module(nn.Linear(rank, channels, bias=False))
        self.offset = nn.Parameter(torch.zeros(rank))


class AttentionAdapter(nn.Module):
    """How much more a cross-attention is to make of what the prompt says beyond the negative one.

    Channel by channel, and by a projection of ``rank`` directions that mixes channels.
    """

    def __init__(self, channels: int, embedding_dim: int, rank: int = PROJECTION_RANK) -> None:
        super().__init__()
        self.gains = Gains(channels, GAIN_RANK, embedding_dim)
        self.down = nn.Linear(channels, rank, bias=False)
        self.code = nn.Linear(embedding_dim, rank)
        self.up = zero_module(nn.Linear(rank, channels, bias=False))
        self.offset = nn.Parameter(torch.zeros(rank))


class Modulations(nn.Module):
    """Factors and shifts for the channels of many layers, along a few directions a layer.

    All of a forward's are made together, in the order of ``layers``; parameters are in the order of
    their groups, see :func:`groups_of`.

    Attributes:
        layers: by number of dimensions of what they give, 3 or 4, the layers that give such.

    Args:
        channels: of each layer.
        dims: of each layer, that number; None: not known, so that any layer may give either.
        embedding_dim: of the conditioning vector.
        num_directions: of each layer.
    """

    def __init__(
        self,
        channels: Sequence[int],
        dims: Sequence[int] | None,
        embedding_dim: int,
        num_directions: int,
    ) -> None:
        super().__init__()
        self.channels = list(channels)
        self.layers = {
            wanted: [n for n in range(len(channels)) if dims is None or dims[n] == wanted]
            for wanted in (3, 4)
        }
        down = nn.Linear(embedding_dim, num_directions * len(channels))
        # A vector, not a matrix: the optimizer is not to mix directions of different layers.
        self.down = nn.Parameter(down.weight.detach().flatten())
        self.bias = nn.Parameter(down.bias.detach())
        self.factor = nn.Parameter(torch.zeros(num_directions * sum(channels)))
        self.shift = nn.Parameter(torch.zeros(num_directions * sum(channels)))
        self.offset = nn.Parameter(torch.zeros(num_directions * len(channels)))
        # which code and which parameter stands for a channel of a layer, in each direction
        codes: dict[int, Tensor] = {}
        parameters: dict[int, Tensor] = {}
        start = 0
        for width, layers in groups_of(channels):
            for layer in layers:
                ends = torch.arange(start, start + num_directions * width).view(-1, width)
                codes[layer] = torch.arange(num_directions)[:, None] + num_directions * len(codes)
                codes[layer] = codes[layer].expand_as(ends)
                parameters[layer] = ends
                start += ends.numel()
        order = [*self.layers[3], *self.layers[4]]
        for name, places in (("code_of", codes), ("parameter_of", parameters)):
            found = [places[layer] for layer in order] or [torch.zeros(num_directions, 0).long()]
            self.register_buffer(name, torch.cat(found, dim=1), persistent=False)

    code_of: Tensor  # (R, D): D channels, R directions
    parameter_of: Tensor

    def codes(self, codes_BX: Tensor) -> Tensor:
        """Of each channel in each direction, ``(R, B, 1, D)``, from those of all layers."""
        index_BX = self.code_of.flatten().expand(len(codes_BX), -1)
        # many times as fast as indexing, and as its gradient
        codes_BRD = codes_BX.gather(1, index_BX).view(len(codes_BX), *self.code_of.shape)
        return codes_BRD.transpose(0, 1)[:, :, None]

    def tables(self) -> Tensor:
        """Factors and shifts of all channels in each direction, ``(R, 2, D)``."""
        both = torch.stack([self.factor, self.shift])
        return both[:, self.parameter_of].transpose(0, 1)


def groups_of(channels: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Which layers have how many channels, by width."""
    return [
        (width, [layer for layer, c in enumerate(channels) if c == width])
        for width in sorted(set(channels))
    ]


def read_negative(query_BNC: Tensor, negative: KeyValue) -> Tensor:
    """What a cross-attention with these queries reads of the negative prompt: ``(B, N, H, D)``.

    Written out where no fused kernel is faster: in training on a CPU, its backward pass is slow
    with so few channels. The softmax is then taken in fp32, which is three times as fast as in
    bf16.
    """
    key, value = (x.to(query_BNC.dtype) for x in negative)
    batch, num_positions, _ = query_BNC.shape
    query = query_BNC.view(batch, num_positions, key.shape[1], -1).transpose(1, 2)
    if shared := len(key) < batch:  # all samples' positions make one attention
        query = query.transpose(0, 1).flatten(1, 2)[None]
    is_cpu = query.device.type == "cpu"
    if query.device.type in ("cuda", "meta") or (is_cpu and not torch.is_grad_enabled()):
        read = F.scaled_dot_product_attention(query, key, value, scale=1.0)
    else:
        weights = query @ key.mT
        if is_cpu:
            weights = weights.float()
        read = weights.softmax(dim=-1).to(query.dtype) @ value
    if shared:
        return read[0].unflatten(1, (batch, -1)).permute(1, 2, 0, 3)
    return read.transpose(1, 2)
