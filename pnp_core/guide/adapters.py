"""The parts of a tiny guide.

Each owns its parameters. What they do before the UNet runs is done for all of them together, see
:class:`pnp_core.guide.tiny.PreparedTiny`: one by one, hundreds of small operations would take as
long as the UNet.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pnp_core.guide.kind import KeyValue
from pnp_core.guide.maths import zero_module
from pnp_core.guide.unet import EntranceChannels

GAIN_RANK = 4  # of the gains on one cross-attention
PROJECTION_RANK = 8  # of what is mixed from its channels besides
MAX_WRITTEN_OUT = 2**20  # weights of an attention that stay in a CPU's cache
LEAST_RMS = 1e-4  # of features: with less, a projection divided by it leaves fp16


class Told(NamedTuple):
    """What an entrance is told of t, w and the prompt: by direction, ``(B, R, 1)``."""

    scale_BR1: Tensor
    shift_BR1: Tensor
    gain_BR1: Tensor


class EntranceMatrices(NamedTuple):
    """How an entrance reads features, and what it adds to them; C channels of all features."""

    down_RC: Tensor  # carries the root of the number of each feature's channels
    bias_R1: Tensor
    up_CR: Tensor
    zero: Tensor  # of no dimension


class EntranceAdapter(nn.Module):
    """Reads hidden states and skips at an up block's entrance, returns residuals for them."""

    def __init__(self, channels: EntranceChannels, rank: int, embedding_dim: int) -> None:
        super().__init__()
        self.split = (channels.hidden, *channels.skips)
        total = sum(self.split)
        self.down = nn.Conv2d(total, rank, 1)
        self.modulation = nn.Linear(embedding_dim, 2 * rank)
        self.mix = nn.Conv2d(rank, rank, 3, padding=1)
        self.up = zero_module(nn.Conv2d(rank, total, 1, bias=False))
        self.offset = nn.Parameter(torch.zeros(rank))

    def matrices(self) -> EntranceMatrices:
        """The weights in the shapes that :meth:`residuals` takes them in; once a run."""
        assert self.down.bias is not None
        down = self.down.weight.flatten(1).split(self.split, dim=1)
        down_RC = torch.cat([part * part.shape[1] ** 0.5 for part in down], dim=1)
        up_CR, zero = self.up.weight.flatten(1), down_RC.new_zeros(())
        return EntranceMatrices(down_RC, self.down.bias[:, None], up_CR, zero)

    def residuals(
        self, features: Sequence[Tensor], told: Told, matrices: EntranceMatrices
    ) -> list[Tensor]:
        """Residuals for the features, in this module's dtype."""
        down_RC, bias_R1, up_CR, zero = matrices
        batch, _, *size = features[0].shape
        # 1. down to the rank, features of different magnitudes brought to one root mean square;
        # dividing the projection costs less than dividing what it reads; no gradient goes through
        # the norms, where it would take time and teach nothing
        norms = [norm_of(x.detach())[:, None, None].expand(-1, -1, x.shape[1]) for x in features]
        norms_B1C = torch.cat(norms, dim=2)
        num_positions = features[0].shape[2:].numel()
        least = LEAST_RMS * (num_positions * max(self.split)) ** 0.5
        down_BRC = torch.addcdiv(
            zero, down_RC, norms_B1C.clamp(min=least), value=num_positions**0.5
        ).to(down_RC.dtype)
        h = bias_R1
        for x, part_BRC in zip(features, down_BRC.split(self.split, dim=2), strict=True):
            # a product of matrices: on a CPU a convolution would first copy what it reads
            h = torch.baddbmm(h, part_BRC, x.flatten(2).to(part_BRC.dtype))
        # 2. what t, w and the prompt ask for
        h = F.silu(torch.addcmul(told.shift_BR1, h, told.scale_BR1))
        # 3. look around, then project back
        h = h + self.mix(F.silu(h).view(batch, -1, *size)).flatten(2)
        residual = torch.bmm(up_CR.expand(batch, -1, -1), told.gain_BR1 * F.silu(h))
        return list(residual.view(batch, -1, *size).split(self.split, dim=1))


class TextAdapter(nn.Module):
    """A residual on the text states that the UNet attends to, from prompt minus negative."""

    def __init__(self, text_dim: int, rank: int, embedding_dim: int) -> None:
        super().__init__()
        self.down = nn.Linear(text_dim, rank)
        self.modulation = nn.Linear(embedding_dim, 2 * rank)
        self.up = zero_module(nn.Linear(rank, text_dim, bias=False))
        self.offset = nn.Parameter(torch.zeros(rank))

    def forward(self, down_BLR: Tensor, told: Told) -> Tensor:
        """Residuals, ``(T, B, L, D)``, from the difference as :attr:`down` gives it.

        Args:
            down_BLR: that.
            told: of T timesteps, scales and shifts ``(T, B, R, 1)``.
        """
        scale, shift, gain = (x.mT for x in told)
        residual: Tensor = self.up(gain * F.silu(torch.addcmul(shift, down_BLR, scale)))
        return residual


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
    """Factors and shifts for the channels of many layers, along one direction a layer.

    All of a forward's are made together, in the order of ``layers``; parameters are in the order of
    their groups, see :func:`groups_of`.

    Attributes:
        layers: by number of dimensions of what they give, 3 or 4, the layers that give such.

    Args:
        channels: of each layer.
        dims: of each layer, that number; None: not known, so that any layer may give either.
        embedding_dim: of the conditioning vector.
    """

    def __init__(
        self, channels: Sequence[int], dims: Sequence[int] | None, embedding_dim: int
    ) -> None:
        super().__init__()
        self.channels = list(channels)
        self.layers = {
            wanted: [n for n in range(len(channels)) if dims is None or dims[n] == wanted]
            for wanted in (3, 4)
        }
        down = nn.Linear(embedding_dim, len(channels))
        # A vector, not a matrix: the optimizer is not to mix directions of different layers.
        self.down = nn.Parameter(down.weight.detach().flatten())
        self.bias = nn.Parameter(down.bias.detach())
        self.factor = nn.Parameter(torch.zeros(sum(channels)))
        self.shift = nn.Parameter(torch.zeros(sum(channels)))
        self.offset = nn.Parameter(torch.zeros(len(channels)))
        # which code and which parameter stands for each channel of all layers
        in_groups = [layer for _, layers in groups_of(channels) for layer in layers]
        widths = [channels[layer] for layer in in_groups]
        codes = [torch.full((width,), number) for number, width in enumerate(widths)]
        parameters = torch.arange(sum(widths)).split(widths)
        order = [in_groups.index(n) for n in (*self.layers[3], *self.layers[4])]
        for name, of in (("code_of", codes), ("parameter_of", parameters)):
            found = [of[n] for n in order] or [torch.zeros(0, dtype=torch.long)]
            self.register_buffer(name, torch.cat(found), persistent=False)

    code_of: Tensor  # (D,): all channels
    parameter_of: Tensor

    def codes(self, codes_BK: Tensor) -> Tensor:
        """Of each channel, ``(B, 1, D)``, from those of all layers."""
        # many times as fast as indexing, and so is its gradient
        return codes_BK.gather(1, self.code_of.expand(len(codes_BK), -1))[:, None]

    def table(self) -> Tensor:
        """Factors and shifts of all channels, ``(2, D)``."""
        return torch.stack([self.factor, self.shift])[:, self.parameter_of]


def norm_of(x: Tensor) -> Tensor:
    """Of each sample of ``(B, C, H, W)``: ``(B,)``, at least in float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=(1, 2, 3), dtype=dtype)


def groups_of(channels: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Which layers have how many channels, by width."""
    return [
        (width, [layer for layer, c in enumerate(channels) if c == width])
        for width in sorted(set(channels))
    ]


def read_negative(query_BNC: Tensor, negative: KeyValue) -> Tensor:
    """What a cross-attention with these queries reads of the negative prompt: ``(..., H, D)``.

    Positions come before the heads H: those of each sample, or in one row those of all.

    Written out where no fused kernel is faster: on a CPU, in training, and where the weights are
    few. The softmax is then taken over the longer stride, which is twice as fast, and in fp32,
    which is three times as fast as in bf16.
    """
    key, value = negative
    if key.dtype != query_BNC.dtype:
        key, value = key.to(query_BNC.dtype), value.to(query_BNC.dtype)
    batch, num_positions, _ = query_BNC.shape
    num_rows, num_heads, num_tokens, _ = key.shape
    # where one row serves all samples, their positions make one attention
    query = query_BNC.view(num_rows, -1, num_heads, key.shape[3]).transpose(1, 2)
    num_weights = batch * num_positions * num_heads * num_tokens
    is_cpu = query.device.type == "cpu"
    if is_cpu and (torch.is_grad_enabled() or num_weights <= MAX_WRITTEN_OUT):
        if num_rows == 1:  # a product of three dimensions takes less time to begin
            query, key, value = query[0], key[0], value[0]
        weights = (key @ query.mT).float().softmax(dim=-2).to(query.dtype)
        read = weights.mT @ value
    else:
        read = F.scaled_dot_product_attention(query, key, value, scale=1.0)
    return read.transpose(-3, -2)


def scaled_and_shifted(x: Tensor, scale: Tensor, shift: Tensor, *, in_place: bool) -> Tensor:
    """``shift + scale * x``, each channel by its own; ``in_place`` writes it over ``x``."""
    if x.device.type == "cpu" and x.ndim == 4:
        # a fused operation that reads a channel's two numbers is not vectorised there
        return (x.mul_(scale) if in_place else x * scale).add_(shift)
    if in_place:
        return torch.addcmul(shift, x, scale, out=x)
    return torch.addcmul(shift, x, scale)
