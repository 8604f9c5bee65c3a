"""What the ablations compare: one change each to the default."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.guides import External, Shape, without


class Weights(NamedTuple):
    """What an error of eps counts, by timestep: functions of alpha_t^2, averaging 1."""

    eps: Callable[[Tensor], Tensor] = staticmethod(torch.ones_like)
    v: Callable[[Tensor], Tensor] = staticmethod(lambda alpha2: 1 / alpha2)
    x: Callable[[Tensor], Tensor] = staticmethod(lambda alpha2: (1 - alpha2) / alpha2)
    # Hang et al., ICCV 2023: an error of x counts min(SNR, 5)
    min_snr: Callable[[Tensor], Tensor] = staticmethod(
        lambda alpha2: (5 * (1 - alpha2) / alpha2).clamp(max=1)
    )


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One guide to train.

    Attributes:
        shape: of the guide's network; None: the tiny guide's.
        size: parameters of the tiny guide, over those that params.yaml allows.
        in_decoder: what acts on the text acts in the decoder alone.
        states: which of the base's pairs: ``trajectory``, ``forward`` or ``mixed``.
        weight: of an error of eps, a field of :class:`Weights`.
        relative: errors count relative to the guidance of the same pair.
        guidance_scale: range of w in training.
        power: w is drawn as ``low + (high - low) u**power``.
        w_weighted: errors count ``1 / max(w - 1, 1)^2``.
        companions: train on the cache's companions in turns in every other step, else on the base.
        perturbed: train on the base and on copies with noise in their weights in turns.
    """

    shape: Shape | None = None
    size: float = 1.0
    in_decoder: bool = False
    states: str = "trajectory"
    weight: str = "eps"
    relative: bool = True
    guidance_scale: tuple[float, float] = (1.0, 8.0)
    power: float = 1.0
    w_weighted: bool = True
    companions: bool = True
    perturbed: bool = False


VARIANTS = {
    "the default": {"every other step the base, companions in turns": Variant()},
    "the guide's shape, at equal parameters": {
        "external: reads the latent": Variant(shape=External),
        "reads features alone": Variant(
            shape=without(text=False, attentions=False, modulations=False)
        ),
        "text residual alone": Variant(
            shape=without(attentions=False, modulations=False, entrances=False)
        ),
        "without gains on attention": Variant(shape=without(attentions=False)),
        "without text residual": Variant(shape=without(text=False)),
        "without modulating layers": Variant(shape=without(modulations=False)),
        "without adapters at the decoder's entrances": Variant(shape=without(entrances=False)),
        "in the decoder alone": Variant(in_decoder=True),
        "up to 2.5 times as large": Variant(size=2.5),
    },
    "loss: not relative to each pair's guidance": {
        "on eps": Variant(relative=False),
        "on v": Variant(relative=False, weight="v"),
        "on x": Variant(relative=False, weight="x"),
        "on x, min-SNR 5": Variant(relative=False, weight="min_snr"),
    },
    "guidance scales in training": {
        "uniform in [1, 5]": Variant(guidance_scale=(1.0, 5.0)),
        "more low ones: 1 + 7 u^2": Variant(power=2.0),
        "errors not divided by (w - 1)^2": Variant(w_weighted=False),
    },
    "trained on the base alone": {
        "trajectories": Variant(companions=False),
        "noised images": Variant(companions=False, states="forward"),
        "both": Variant(companions=False, states="mixed"),
        "trajectories, also with noise in the weights": Variant(companions=False, perturbed=True),
    },
}
