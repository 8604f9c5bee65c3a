"""Every setting of the library with its default and its range, in frozen dataclasses.

``XConfig`` is what a function of the library takes; where it has a base ``XSettings``, that is the
part that a user sets. The models of params.yaml are made from these. Nothing heavy is imported, so
that a mistake is told at once.
"""

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Precision = Literal["bf16", "fp32"]
PRECISIONS = get_args(Precision)
SPACINGS = ("leading", "trailing")  # whose steps halve
KINDS = ("tiny", "encoder", "full")
SEEDS = 2**62  # what is counted up from one has 64 bits
# So few steps that nothing of halving is worth keeping: matching has further to go.
FEW_STEPS, TIMES_AS_MANY = 2, 3

CFG = "ClassifierFreeGuidance"
GUIDERS = (
    CFG,
    "ClassifierFreeZeroStarGuidance",
    "AdaptiveProjectedGuidance",
    "TangentialClassifierFreeGuidance",
)
# Not functions of (z_t, t, c, w): they depend on steps before, or on where a step comes in its run.
STATEFUL = {
    "adaptive_projected_guidance_momentum": "carries momentum from step to step",
    "zero_init_steps": "depends on the number of the step",
}
RESERVED = ("guidance_scale", "use_original_formulation", "enabled")

OPTIONAL = {"optional": True}
"""Metadata of a setting that params.yaml need not name."""
MEMORY_ONLY = {"micro_batch_size", "gradient_checkpointing"}
"""Settings that change the memory that training takes, and not what it computes. They are no part
of a run's identity: a run that ran out of memory goes on from its checkpoint with others."""
UNSEEN = MEMORY_ONLY | {"report_every_images", "checkpoint_every_images"}
"""Settings that change nothing that is trained: all those that are no part of a run's identity."""


class SettingError(ValueError):
    """A setting out of its range.

    Attributes:
        name: the setting's field.
        problem: what it is and what it must be, to follow the name.
    """

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(f"{name} {problem}")
        self.name, self.problem = name, problem


def at_least(config: object, minimum: int, *names: str, below: float = math.inf) -> None:
    """Raise SettingError for a field below ``minimum``, or from ``below`` on."""
    for name in names:
        value = getattr(config, name)
        if not minimum <= value < below:
            most = f" and below {below}" if below < math.inf else ""
            raise SettingError(name, f"is {value}; it must be at least {minimum}{most}.")


def positive(config: object, *names: str) -> None:
    """Raise SettingError for a field that is not above zero and finite."""
    for name in names:
        value = getattr(config, name)
        if not 0 < value < math.inf:
            raise SettingError(name, f"is {value}; it must be positive.")


def one_of(config: object, allowed: tuple[str, ...], name: str) -> None:
    """Raise SettingError for a field with another value than those allowed."""
    value = getattr(config, name)
    if value not in allowed:
        raise SettingError(name, f"is {value!r}; it must be one of {', '.join(allowed)}.")


def check_guidance_range(guidance_scale: tuple[float, float]) -> None:
    """Raise SettingError for a range of ``w`` that is empty or reaches below 1."""
    low, high = guidance_scale
    if not 1 <= low < high < math.inf:
        raise SettingError("guidance_scale", f"is [{low}, {high}]; it needs 1 <= low < high.")


def halving_rounds(start: int, end: int) -> tuple[int, ...]:
    """Step counts of the rounds' students: ``halving_rounds(64, 8) == (32, 16, 8)``.

    Raises:
        ValueError: halving ``start`` never gives ``end``.
    """
    rounds = []
    num_steps = start
    while num_steps > end >= 1 and num_steps % 2 == 0:
        num_steps //= 2
        rounds.append(num_steps)
    if num_steps != end:
        raise ValueError(
            f"Halving {start} steps never gives {end}: start_steps must be end_steps times a "
            f"power of two, such as {end * 8}."
        )
    return tuple(rounds)


@dataclass(frozen=True, kw_only=True)
class GuiderConfig:
    """A guider of ``diffusers.guiders`` by name, with its arguments.

    ``start`` and ``stop``, the share of the schedule in which it guides, are counted in training
    timesteps, from the noise down.

    Raises:
        ValueError: a guider that can't be distilled, or an argument it has not or must not have.
    """

    name: str = CFG
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name == CFG and not self.arguments:
            return
        from diffusers import guiders

        if self.name not in GUIDERS:
            why = (
                "it needs more than the predictions with and without the prompt"
                if hasattr(guiders, self.name)
                else "diffusers has none of that name"
            )
            raise ValueError(
                f"The guider {self.name!r} can't be distilled: {why}. Choose one of "
                f"{', '.join(GUIDERS)}."
            )
        known = set(inspect.signature(getattr(guiders, self.name).__init__).parameters) - {"self"}
        for key in self.arguments:
            if key in RESERVED:
                raise ValueError(f"{self.name}: {key} is not for the guider's arguments.")
            if key not in known:
                raise ValueError(f"{self.name} has no argument {key!r}.")
        start, stop = self.arguments.get("start", 0.0), self.arguments.get("stop", 1.0)
        if not 0 <= start < stop <= 1:
            raise ValueError(f"{self.name} guides from start {start} to stop {stop}, never.")
        for key, why in STATEFUL.items():
            if self.arguments.get(key):
                raise ValueError(
                    f"{self.name} with {key} {self.arguments[key]} can't be distilled: it {why}."
                )


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """What to compute once.

    Attributes:
        num_forward: teacher pairs at forward-noised states.
        num_trajectory: teacher pairs along CFG trajectories, of all teachers together: half of them
            the base's, as half of the training steps are.
        trajectory_steps: DDIM steps of a trajectory, and so its states.
        guidance_scale: range of the trajectories' ``w``, drawn uniformly.
        negative_fraction: share of pairs whose negative is another sample's prompt, not null.
        batch_size: of the UNet's forwards, before CFG doubles it. Of what is computed, it changes
            roundings alone: shards of another one are kept.
        shard_size: most rows in a shard.
        precision: ``bf16`` (where the hardware has it) or ``fp32``.

    Raises:
        ValueError: a value out of range, named.
    """

    num_forward: int
    num_trajectory: int
    trajectory_steps: int = 20
    guidance_scale: tuple[float, float] = (1.0, 8.0)
    negative_fraction: float = 0.1
    batch_size: int = 64
    shard_size: int = 2048
    precision: str = "bf16"
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(self, 0, "num_forward", "num_trajectory")
        at_least(self, 0, "seed", below=SEEDS)
        if self.num_forward + self.num_trajectory == 0:
            raise ValueError("num_forward and num_trajectory are both 0: nothing to cache.")
        at_least(self, 1, "trajectory_steps", "batch_size", "shard_size")
        check_guidance_range(self.guidance_scale)
        share = self.negative_fraction
        if not 0 <= share <= 1:
            raise SettingError("negative_fraction", f"is {share}; it must lie in [0, 1].")
        one_of(self, PRECISIONS, "precision")

    @property
    def trajectories_per_shard(self) -> int:
        """Trajectories that fill a shard, each ``trajectory_steps`` pairs; at least one."""
        return max(1, self.shard_size // self.trajectory_steps)


@dataclass(frozen=True, kw_only=True)
class CacheConfig(CacheSettings):
    """The teacher cache.

    Attributes:
        guider: the teacher's rule, which the trajectories follow.
    """

    guider: GuiderConfig = field(default_factory=GuiderConfig)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long and how fast to train.

    Attributes:
        num_images: training samples seen in total, over all workers.
        batch_size: global batch size, over all workers.
        learning_rate: peak, reached after warm-up; falls to zero along a cosine.
        warmup_images: length of the linear warm-up; less than num_images.
        ema_halflife_images: half-life of the averaged weights; the result of training.
        max_grad_norm: gradients are clipped to this norm.
        precision: ``bf16`` (where the hardware has it) or ``fp32``.
        report_every_images: how often the loss is reported.
        checkpoint_every_images: how often the state is written.
        micro_batch_size: how many samples of its share of a batch a worker computes at once; None:
            all. Gradients are those of the whole batch.
        gradient_checkpointing: whether the UNet's blocks keep their inputs only, and are computed
            again for gradients.

    Raises:
        ValueError: a value out of range, named.
    """

    num_images: int
    batch_size: int
    learning_rate: float = 1e-3
    warmup_images: int = 0
    ema_halflife_images: int = 5_000
    max_grad_norm: float = 1.0
    precision: str = "bf16"
    seed: int = 0
    report_every_images: int = 2_000
    checkpoint_every_images: int = 20_000
    micro_batch_size: int | None = field(default=None, metadata=OPTIONAL)
    gradient_checkpointing: bool = field(default=False, metadata=OPTIONAL)

    def __post_init__(self) -> None:
        at_least(self, 1, "num_images", "batch_size", "ema_halflife_images")
        if self.micro_batch_size is not None:
            at_least(self, 1, "micro_batch_size")
        at_least(self, 1, "report_every_images", "checkpoint_every_images")
        positive(self, "learning_rate", "max_grad_norm")
        at_least(self, 0, "warmup_images")
        at_least(self, 0, "seed", below=SEEDS)
        if self.warmup_images >= self.num_images:
            raise SettingError(
                "warmup_images",
                f"is {self.warmup_images}, and training ends after {self.num_images} images, still "
                "in the warm-up: set it below num_images.",
            )
        one_of(self, PRECISIONS, "precision")

    @property
    def num_steps(self) -> int:
        """Training steps: batches that it takes to see ``num_images`` images."""
        return math.ceil(self.num_images / self.batch_size)


@dataclass(frozen=True, kw_only=True)
class GuideConfig:
    """What kind of guide to build.

    Attributes:
        kind: ``tiny`` (acts on the text states, the cross-attentions, the layers' outputs and at
            the decoder's entrances, with at most ``max_parameters_ratio`` of the base's
            parameters), ``encoder`` (a tiny one that is told, besides, what the base's encoder
            makes of the negative prompt) or ``full`` (a trainable copy of the base's encoder).
        max_parameters_ratio: parameters of a guide that is not full over the base UNet's; its rank
            follows.

    Raises:
        ValueError: an unknown kind, or a ratio outside (0, 1).
    """

    kind: str = "tiny"
    max_parameters_ratio: float = 0.01

    def __post_init__(self) -> None:
        one_of(self, KINDS, "kind")
        ratio = self.max_parameters_ratio
        if not 0 < ratio < 1:
            raise SettingError("max_parameters_ratio", f"is {ratio}; it must lie in (0, 1).")


@dataclass(frozen=True, kw_only=True)
class DistillSettings:
    """What to distil.

    Attributes:
        guidance_scale: range of ``w``, drawn uniformly, one a sample.

    Raises ValueError for a range of w that is empty or reaches below 1.
    """

    guide: GuideConfig
    guidance_scale: tuple[float, float] = (1.0, 8.0)

    def __post_init__(self) -> None:
        check_guidance_range(self.guidance_scale)


@dataclass(frozen=True, kw_only=True)
class DistillConfig(DistillSettings):
    """Stage 1.

    Attributes:
        guider: the teacher's rule.
    """

    train: TrainConfig
    guider: GuiderConfig = field(default_factory=GuiderConfig)


@dataclass(frozen=True, kw_only=True)
class HalveSettings:
    """From how many sampling steps to how few.

    Attributes:
        start_steps: the first teacher's number of steps.
        end_steps: the last student's.
        guidance_gain: see :func:`pnp_core.halve.raised_guidance_scale`; 1: the guide as it is.
        timestep_spacing: of the sampler, in diffusers' terms, leading or trailing.
        match_steps: guides for so many steps or fewer, 0 for none, are matched in the end, see
            :mod:`pnp_core.match`.
        match_images, match_learning_rate: of each matching, see :attr:`matched`.

    Raises:
        ValueError: step counts that halving does not connect; a gain outside [1, 2); a spacing
            whose steps do not halve.
    """

    start_steps: int = 64
    end_steps: int = 8
    guidance_gain: float = 1.0
    timestep_spacing: str = "trailing"
    match_steps: int = 0
    match_images: int = 6400
    match_learning_rate: float = 4e-4

    def __post_init__(self) -> None:
        at_least(self, 1, "start_steps", "end_steps")
        if not 1 <= self.guidance_gain < 2:
            raise SettingError("guidance_gain", f"is {self.guidance_gain}; it must lie in [1, 2).")
        if not halving_rounds(self.start_steps, self.end_steps):
            raise ValueError(f"start_steps and end_steps are both {self.end_steps}: no halving.")
        if self.timestep_spacing == "linspace":
            # 2 N times have 2 N - 1 steps between them, and N have N - 1; nor does diffusers' DDIM
            # step from one of them to the next.
            raise SettingError(
                "timestep_spacing",
                "is 'linspace', where two steps of 2 N are not one of N; take trailing or leading.",
            )
        one_of(self, SPACINGS, "timestep_spacing")
        at_least(self, 0, "match_steps", "match_images")
        warmup_images = getattr(self, "warmup_images", 0)  # where training's are beside these
        if self.match_steps and self.match_images <= warmup_images:
            raise SettingError(
                "match_images",
                f"is {self.match_images}, all in the warm-up (warmup_images {warmup_images}): "
                "raise it, or set match_steps: 0.",
            )
        positive(self, "match_learning_rate")

    @property
    def matched(self) -> dict[int, int]:
        """On how many samples guides are matched, by step count, in the order of halving."""
        counts = halving_rounds(self.start_steps, self.end_steps)
        times = {n: TIMES_AS_MANY if n <= FEW_STEPS else 1 for n in counts}
        return {n: times[n] * self.match_images for n in counts if n <= self.match_steps}


@dataclass(frozen=True, kw_only=True)
class HalveConfig(HalveSettings):
    """Stage 2.

    Attributes:
        train: of one round.
        guidance_scale: range of ``w``, drawn uniformly, one a sample.

    Raises:
        ValueError: a range of w that is empty or reaches below 1.
    """

    train: TrainConfig
    guidance_scale: tuple[float, float] = (1.0, 8.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_guidance_range(self.guidance_scale)
