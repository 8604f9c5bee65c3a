"""The tiny guide: adapters of text, attentions, layers and entrances that share a conditioning.

It acts by a residual on the text states, by turning up and mixing what each cross-attention reads
of the prompt beyond what it would read of the negative prompt, by scaling and shifting the channels
of what the layers from there on give, and by residuals at the entrances of the decoder. All of it
carries the factor ``w - 1`` and starts from zero projections. Halving adds a learnt offset to that
factor, since fewer steps need mending at every w.

Shape legend: T timesteps, B batch, C channels, N positions, L text tokens, D text width, R rank,
K layers that are equally wide, M width of the conditioning vector, X all that is told by it.
"""

import copy
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pnp_core.conditions import Conditions
from pnp_core.guide.adapters import (
    GAIN_RANK,
    PROJECTION_RANK,
    AttentionAdapter,
    EntranceAdapter,
    Modulations,
    TextAdapter,
    Told,
    groups_of,
    read_negative,
    scaled_and_shifted,
)
from pnp_core.guide.embeddings import EMBEDDING_DIM, W_SCALE, frequencies, sinusoidal
from pnp_core.guide.kind import DecoderInput, Effect, KeyValue, Kind, Prepared
from pnp_core.guide.maths import Gain, add_all, rms_normed, zero_module
from pnp_core.guide.unet import EntranceChannels
from pnp_core.precision import is_mixed

PROMPT_RANK = 8  # of what the whole prompt adds to the conditioning vector


class TinyShape(NamedTuple):
    """Widths of a tiny guide."""

    ranks: list[int]  # one an entrance
    text_rank: int
    embedding_dim: int


class TinyGuide(Kind):
    """Adapters of text, attentions, layers and entrances that share a conditioning vector."""

    def __init__(  # noqa: PLR0913, a base's shape
        self,
        entrances: Sequence[EntranceChannels],
        shape: TinyShape,
        text_dim: int,
        attention_channels: Sequence[int],
        modulated_channels: Sequence[int],
        modulated_dims: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        ranks, text_rank, embedding_dim = shape
        self.embed = nn.Sequential(
            nn.Linear(2 * EMBEDDING_DIM, embedding_dim),
            nn.SiLU(),
            nn.Linear(embedding_dim, embedding_dim),
            nn.SiLU(),
        )
        self.prompt = nn.Sequential(
            nn.Linear(text_dim, PROMPT_RANK, bias=False),
            zero_module(nn.Linear(PROMPT_RANK, embedding_dim, bias=False)),
        )
        self.text = TextAdapter(text_dim, text_rank, embedding_dim)
        self.attentions = nn.ModuleList(
            AttentionAdapter(channels, embedding_dim) for channels in attention_channels
        )
        self.modulations = Modulations(modulated_channels, modulated_dims, embedding_dim)
        self.entrances = nn.ModuleList(
            EntranceAdapter(channels, rank, embedding_dim)
            for channels, rank in zip(entrances, ranks, strict=True)
        )
        self.attention_groups = groups_of(attention_channels)

    def prepare(self, conditions: Conditions, strength: float) -> "PreparedTiny":
        """Read guidance scales and text once for a run; see :class:`Kind`."""
        return PreparedTiny(self, conditions, strength)

    def grouped_attentions(self) -> list[list[AttentionAdapter]]:
        """The adapters of attentions that are equally wide, in the order of the groups."""
        adapters = [a for a in self.attentions if isinstance(a, AttentionAdapter)]  # as all are
        return [[adapters[i] for i in indices] for _, indices in self.attention_groups]


class PreparedTiny(Prepared):
    """A tiny guide that has read a run's conditions.

    The small matrices that read the conditioning vector stand in one, whose outputs are, in this
    order: scales and shifts of text and entrances; codes of the attentions' gains and of their
    projections, group by group; codes of the modulations.
    """

    def __init__(self, net: TinyGuide, conditions: Conditions, strength: float) -> None:
        self.net = net
        linear = net.embed[0]
        assert isinstance(linear, nn.Linear) and linear.bias is not None
        dtype = linear.weight.dtype
        c, n = conditions.c_BLD.to(dtype), conditions.n_BLD.to(dtype)
        difference_BLD = rms_normed(c) - rms_normed(n)
        self.gain = gain = Gain.of(conditions.w_B, difference_BLD, strength)
        of_t, of_w = linear.weight.split(EMBEDDING_DIM, dim=1)
        self.of_t = of_t
        self.frequencies = frequencies(c.device)
        w_BE = sinusoidal(W_SCALE * conditions.w_B, self.frequencies)
        self.of_w_BM = F.linear(w_BE.to(dtype), of_w, linear.bias)
        self.prompt_BM = net.prompt(difference_BLD.mean(dim=1))
        self.down_BLR = net.text.down(difference_BLD)
        # one matrix of all that reads the conditioning vector
        told = [net.text, *net.entrances]
        groups = net.grouped_attentions()
        adapters = [adapter for group in groups for adapter in group]
        readers = [part.modulation for part in told]
        readers += [a.gains.down for a in adapters] + [a.code for a in adapters]
        down = net.modulations.down.view(-1, linear.out_features)
        self.weight_XM = torch.cat([*(linear.weight for linear in readers), down])
        ranks = [len(part.offset) for part in told]
        ones = [x for rank in ranks for x in (down.new_ones(rank), down.new_zeros(rank))]
        biases = torch.cat([*(linear.bias for linear in readers), net.modulations.bias])
        self.bias_X = biases + F.pad(torch.cat(ones), (0, len(biases) - 2 * sum(ranks)))
        # the gains they carry
        offsets = [a.gains.offset for g in groups for a in g] + [
            a.offset for g in groups for a in g
        ]
        self.gains_BX = gain.with_offset(torch.cat([*offsets, net.modulations.offset]))
        told_gains = gain.with_offset(torch.cat([part.offset for part in told]))
        self.told_gains = told_gains[..., None].split(ranks, dim=1)
        self.entrances = [e for e in net.entrances if isinstance(e, EntranceAdapter)]  # as all are
        self.matrices = [entrance.matrices() for entrance in self.entrances]
        self.split_told = [rank for rank in ranks for _ in range(2)]
        num = [len(g) for g in groups]
        self.split_driven = [
            *(k * GAIN_RANK for k in num),
            *(k * PROJECTION_RANK for k in num),
            len(net.modulations.channels),
        ]
        # what they drive
        self.gain_up = [torch.stack([a.gains.up.weight.T for a in g]) for g in groups]  # (K, R, C)
        self.down = [torch.stack([a.down.weight for a in g]) for g in groups]  # (K, R, C)
        self.up = [torch.stack([a.up.weight.T for a in g])[:, None] for g in groups]
        self.table_2D = net.modulations.table()
        self.base_21 = torch.eye(2, 1, dtype=dtype, device=c.device)  # a factor of 1, no shift
        # how all channels' factors fall to layers, by number of dimensions of what they give
        self.widths = {
            dims: [net.modulations.channels[layer] for layer in layers]
            for dims, layers in net.modulations.layers.items()
        }

    def at(self, sample: Tensor, timestep_B: Tensor) -> "TinyEffect":
        """Compute all that this timestep decides: gains, directions, factors and shifts."""
        return self.at_each(sample, timestep_B[None])[0]

    def at_each(self, sample: Tensor, timesteps_TB: Tensor) -> list["TinyEffect"]:
        """The same for several timesteps, in as many operations as for one."""
        return [TinyEffect(**parts) for parts in self.parts(sample, self.embedding(timesteps_TB))]

    def embedding(self, timesteps_TB: Tensor) -> Tensor:
        """The conditioning vectors, ``(T, B, M)``."""
        t_TBE = sinusoidal(timesteps_TB, self.frequencies).to(self.of_t.dtype)
        embedding_TBM = F.silu(F.linear(t_TBE, self.of_t) + self.of_w_BM)
        return F.silu(self.net.embed[2](embedding_TBM)) + self.prompt_BM

    def parts(self, sample: Tensor, embedding_TBM: Tensor) -> list[dict[str, Any]]:
        """What :class:`TinyEffect` is made of at each timestep, from the conditioning vectors."""
        # 1. all that reads them
        told_TBX, driven_TBX = F.linear(embedding_TBM, self.weight_XM, self.bias_X).split(
            [sum(self.split_told), self.gains_BX.shape[1]], dim=2
        )
        parts = told_TBX[..., None].split(self.split_told, dim=2)
        text, *told = map(Told, parts[::2], parts[1::2], self.told_gains)
        driven = (driven_TBX * self.gains_BX).split(self.split_driven, dim=2)
        # 2. what that drives
        mixed = is_mixed(sample.device.type)
        dtype = told_TBX.dtype if mixed else sample.dtype
        residuals_TBLD = self.net.text(self.down_BLR, text)
        mixtures = self.mixtures(driven, dtype)
        modulations = self.modulations(driven[-1], dtype)
        return [
            {
                "prepared": self,
                "told": [Told(scale[t], shift[t], gain) for scale, shift, gain in told],
                "text_residual_BLD": residuals_TBLD[t],
                "mixtures": mixtures[t],
                "modulations": modulations[t],
            }
            for t in range(len(embedding_TBM))
        ]

    def mixtures(self, driven: Sequence[Tensor], dtype: torch.dtype) -> list[list["Mixture"]]:
        """At each timestep, what each cross-attention's adapter does, in the forward's order."""
        num_groups, (num_steps, batch, _) = len(self.up), driven[0].shape
        found: list[dict[int, Mixture]] = [{} for _ in range(num_steps)]
        for group, (_, layers) in enumerate(self.net.attention_groups):
            gains_KNR, codes_KNR = (  # N rows: T times B
                x.flatten(0, 1).unflatten(1, (len(layers), -1)).transpose(0, 1)
                for x in (driven[group], driven[num_groups + group])
            )
            gains_KNC = torch.bmm(gains_KNR.to(self.gain_up[group].dtype), self.gain_up[group])
            up_KNRC = self.up[group] * codes_KNR[..., None]
            down = self.down[group].to(dtype).unbind()
            each_step = (
                by_step(x.to(dtype).unflatten(1, (num_steps, batch)), dim=1)
                for x in (gains_KNC[:, :, None], up_KNRC)
            )
            for mixtures, gains_KB1C, up_KBRC in zip(found, *each_step, strict=True):
                each = map(Mixture, gains_KB1C.unbind(), down, up_KBRC.unbind())
                mixtures |= zip(layers, each, strict=True)
        return [[mixtures[layer] for layer in range(len(mixtures))] for mixtures in found]

    def modulations(self, codes_TBK: Tensor, dtype: torch.dtype) -> list["ModulationsByDims"]:
        """At each timestep, what each layer's output is multiplied by and what is added."""
        codes_N1D = self.net.modulations.codes(codes_TBK.flatten(0, 1))
        both_N2D = torch.addcmul(self.base_21, codes_N1D, self.table_2D)
        both_TB2D = both_N2D.to(dtype).unflatten(0, codes_TBK.shape[:2])
        return [self.by_layer(both_B2D) for both_B2D in by_step(both_TB2D, dim=0)]

    def by_layer(self, both_B2D: Tensor) -> "ModulationsByDims":
        """Factors and shifts of all channels, layer by layer."""
        modulations = self.net.modulations
        found: ModulationsByDims = {}
        parts = both_B2D.split([sum(self.widths[3]), sum(self.widths[4])], dim=2)
        for (dims, widths), both_B2C in zip(self.widths.items(), parts, strict=True):
            if dims == 3:
                split = (part[:, None].split(widths, dim=2) for part in both_B2C.unbind(1))
            else:
                split = (part[..., None, None].split(widths, dim=1) for part in both_B2C.unbind(1))
            found[dims] = [None] * len(modulations.channels)
            for layer, factor, shift in zip(modulations.layers[dims], *split, strict=True):
                found[dims][layer] = factor, shift
        return found


def by_step(x: Tensor, dim: int) -> Sequence[Tensor]:
    """Slices that compiled code can't tell from one another: each lies alike in its own memory."""
    slices = x.unbind(dim)
    return slices if len(slices) == 1 else [each.clone() for each in slices]


class Mixture(NamedTuple):
    """What is added to what a cross-attention read, from what it reads beyond the negative."""

    gain_B1C: Tensor
    down_RC: Tensor
    up_BRC: Tensor


ModulationsByDims = dict[int, list[tuple[Tensor, Tensor] | None]]
"""By number of dimensions, of each layer that gives such: factors and shifts, ``(B, 1, C)`` or
``(B, C, 1, 1)``."""


class TinyEffect(Effect):
    """What a tiny guide does in one forward."""

    attends = True
    modulates = True

    def __init__(
        self,
        *,
        prepared: PreparedTiny,
        told: list[Told],
        text_residual_BLD: Tensor,
        mixtures: list[Mixture],
        modulations: ModulationsByDims,
    ) -> None:
        self.entrances, self.matrices = prepared.entrances, prepared.matrices
        self.told = told
        self.text_residual_BLD = text_residual_BLD
        self.mixtures = mixtures
        self.modulations = modulations

    def steer(self, c_BLD: Tensor) -> Tensor:
        """Add the text residual to the prompt's states, ``(B, L, D)``."""
        return c_BLD + self.text_residual_BLD.to(c_BLD.dtype)

    def attend(self, index: int, query_BNC: Tensor, read_BNC: Tensor, negative: KeyValue) -> Tensor:
        """Go beyond what was read of the prompt, away from what the negative prompt gives."""
        gain, down, up = self.mixtures[index]
        if gain.dtype != read_BNC.dtype:
            gain, down, up = (x.to(read_BNC.dtype) for x in (gain, down, up))
        read_n = read_negative(query_BNC, negative)  # not copied to the order of what was read
        beyond = (read_BNC.view(read_n.shape) - read_n).reshape(read_BNC.shape).to(read_BNC.dtype)
        mixed_BRN = torch.bmm(down.expand(len(beyond), -1, -1), beyond.mT)
        more = torch.baddbmm(read_BNC, mixed_BRN.mT, up)
        return more.addcmul_(gain, beyond)

    def modulate(self, index: int, output: Tensor, *, in_place: bool = False) -> Tensor:
        """Scale and shift the output's channels: ``shift + factor * output``."""
        pair = self.modulations[output.ndim][index]
        assert pair is not None
        factor, shift = pair
        if factor.dtype != output.dtype:
            factor, shift = factor.to(output.dtype), shift.to(output.dtype)
        return scaled_and_shifted(output, factor, shift, in_place=in_place)

    def within(self, layers: range, attentions: range) -> "TinyEffect":
        """The same for a part of the UNet: blocks that are alike read what is shaped alike."""
        part = copy.copy(self)
        part.mixtures = self.mixtures[attentions.start : attentions.stop]
        part.modulations = {
            dims: pairs[layers.start : layers.stop] for dims, pairs in self.modulations.items()
        }
        return part

    def enter(self, index: int, entering: DecoderInput) -> DecoderInput:
        """Add this entrance's residuals to the hidden states and the skips."""
        features = (entering.hidden_states, *entering.skips)
        entrance = self.entrances[index]
        residuals = entrance.residuals(features, self.told[index], self.matrices[index])
        hidden, *skips = add_all(features, residuals)
        return DecoderInput(hidden, tuple(skips))


def tiny_shape(  # noqa: PLR0913, a base's shape, by name
    entrances: Sequence[EntranceChannels],
    *,
    text_dim: int,
    attention_channels: Sequence[int],
    modulated_channels: Sequence[int],
    embedding_dim: int,
    max_parameters: int,
) -> TinyShape:
    """The widest tiny guide within a number of parameters; the narrowest if that has more.

    Ranks are in proportion to the channels at each entrance, as the base's own cost is: FLOPs then
    grow with the share of parameters.
    """
    widest = max(max(e.skips) for e in entrances)

    def shape(rank: int) -> TinyShape:
        ranks = [max(4, round(rank * sum(e.skips) / len(e.skips) / widest)) for e in entrances]
        # from 32 on, sizes that GPUs like
        ranks = [r if r < 32 else r // 8 * 8 for r in ranks]
        text_rank = rank if rank < 32 else rank // 64 * 32 + 32
        return TinyShape(ranks, text_rank, embedding_dim)

    with torch.device("meta"):
        net = TinyGuide(entrances, shape(4), text_dim, attention_channels, modulated_channels)
    max_parameters -= num_parameters_of(net) - num_parameters_of(net.text, net.entrances)

    def num_parameters(rank: int) -> int:  # of what depends on it; never falls as the rank rises
        ranks, text_rank, _ = shape(rank)
        with torch.device("meta"):
            text = TextAdapter(text_dim, text_rank, embedding_dim)
            each = [
                EntranceAdapter(channels, r, embedding_dim)
                for channels, r in zip(entrances, ranks, strict=True)
            ]
        return num_parameters_of(text, *each)

    num_fitting = bisect_right(range(4, widest), max_parameters, key=num_parameters)
    return shape(3 + max(num_fitting, 1))


def num_parameters_of(*parts: nn.Module) -> int:
    """Of all of them."""
    return sum(p.numel() for part in parts for p in part.parameters())
