"""Stage 2, its end: what a guide makes in few steps is matched to CFG, as a distribution.

A halved guide is a mean over what a step can't tell apart; in few steps that shows as blur and as a
weak pull towards the prompt. Here it learns by its own states instead (distribution matching: Yin
et al. 2024, DMD2; step by step along its own run: Luo et al. 2025, TDM). A step ``t -> s`` of its
DDIM run ends at ``z_s``, which is noised to a ``tau`` in ``(s, t]``. There the score of the
teacher, CFG on the frozen base, is compared with the score of the guide's own states: the
difference says where they should have been.

The own score is told by a copy of the base with low-rank changes and a guide of its own, the fake
one, trained beside it to denoise those states. No image of the data is seen, only prompts. Where
there are companions, they and the base take turns as in distillation.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from operator import itemgetter
from os.path import exists
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from pnp_core.cache import Latents, TeacherCache
from pnp_core.cache.read import as_float
from pnp_core.calls import checkpointing
from pnp_core.denoiser import CFGDenoiser, Denoiser, GuidedDenoiser
from pnp_core.distill import check_companions, turn_of
from pnp_core.fake_score import CHANGED, RANK, FakeScore, Matched
from pnp_core.files import write_directory
from pnp_core.guide import Guide
from pnp_core.guiders import Guider
from pnp_core.halve import Batch, draw_batch
from pnp_core.schedule import NoiseSchedule, sampling_timesteps
from pnp_core.seeds import step_generator
from pnp_core.settings import FEW_STEPS, GuiderConfig, TrainConfig
from pnp_core.shards import Ahead, pinning
from pnp_core.train import RECIPE, Report, agreed, config_hash, rank_and_world, train

NEAREST = 1 / 25  # of a step: where tau is nearer to its end, noise tells little of the states
NUM_NOISED = 2  # times that a state is noised for the fake scores
SEEDS = 2**16
KEPT = 0.5  # of the halved guide's weights, in the end; at FEW_STEPS or fewer, nothing
EVERY = 2  # steps of the fake scores to one of the guide, which they must keep up with

MATCHING = (
    f"kept {KEPT} above {FEW_STEPS} steps, every {EVERY}, nearest {NEAREST}, noised {NUM_NOISED}, "
    f"rank {RANK} of {CHANGED}"
)
"""Beside the recipe of all training, whatever makes another run of a matching."""


@dataclass(frozen=True, kw_only=True)
class MatchConfig:
    """The end of stage 2, for one number of steps.

    Attributes:
        train: how to train; in its warm-up the fake scores learn alone.
        guidance_scale: range of ``w``, drawn uniformly, one a sample.
        guider: the teacher's rule.
    """

    train: TrainConfig
    num_steps: int
    guidance_scale: tuple[float, float] = (1.0, 8.0)
    timestep_spacing: str = "trailing"
    guider: GuiderConfig = field(default_factory=GuiderConfig)


class Drawn(NamedTuple):
    """What a step of training, or a part of it, sees; as many rows each."""

    latents: Latents
    w_B: Tensor
    number_B: Tensor  # of the guide's step
    shares: Tensor  # of that step, at which its end is noised: (1 + NUM_NOISED, B)
    noises: Tensor  # (1 + NUM_NOISED, B, C, H, W)


class Noised:
    """States at ``s`` with noise up to ``tau``, in ``(s, t]``.

    Attributes:
        z: the states, ``(B, C, H, W)``.
        tau_B: their timesteps.
        noise, added: what was added, of unit variance, and times what.
        alpha, sigma: of the schedule, at ``tau``.
    """

    def __init__(  # noqa: PLR0913, the quantities of a step
        self,
        schedule: NoiseSchedule,
        z_s: Tensor,
        s_B: Tensor,
        t_B: Tensor,
        share_B: Tensor,
        noise: Tensor,
    ) -> None:
        length_B = t_B - s_B
        least_B = (length_B * NEAREST).long().clamp(min=1)
        self.tau_B = s_B + least_B + (share_B * (length_B - least_B + 1)).long()
        alpha_s, sigma_s = schedule.alpha_sigma(s_B, z_s)
        self.alpha, self.sigma = schedule.alpha_sigma(self.tau_B, z_s)
        kept = self.alpha / alpha_s
        self.added = (self.sigma.square() - (kept * sigma_s).square()).clamp(min=1e-8).sqrt()
        self.noise = noise
        self.z = kept * z_s + self.added * noise


def own_states(  # noqa: PLR0913, a run, and up to where
    student: Denoiser,
    schedule: NoiseSchedule,
    grid: Tensor,
    latents: Latents,
    w_B: Tensor,
    number_B: Tensor,
) -> Tensor:
    """Where the student's DDIM run from ``latents.noise`` is before its steps ``number_B``."""
    z = latents.noise.clone()
    for number in range(int(number_B.max())):
        rows = (number_B > number).nonzero().flatten()
        t_B, s_B = (grid[at].expand(len(rows)).to(z.device) for at in (number, number + 1))
        rows = rows.to(z.device)
        conditions = latents.map(itemgetter(rows)).conditions(w_B[rows])
        eps = student(z[rows], t_B, conditions).float()
        z[rows] = schedule.ddim_step(z[rows], eps, t_B, s_B)
    return z


def noise_in(schedule: NoiseSchedule, eps: Tensor, at: Noised) -> Tensor:
    """The noise that a denoiser sees in the states, ``(B, C, H, W)``, also where it gives v."""
    eps = eps.float()
    return at.alpha * eps + at.sigma * at.z if schedule.gives_v else eps


def fake_loss(schedule: NoiseSchedule, eps: Tensor, at: Noised) -> Tensor:
    """Squared error of the noise that was added, ``(B,)``; at its least, eps tells the score.

    The score at ``tau`` is ``-eps / sigma``, and the mean of ``-noise / added`` (Vincent 2011).
    """
    error = at.added / at.sigma * noise_in(schedule, eps, at) - at.noise
    return error.square().mean(dim=(1, 2, 3))


def matching_loss(  # noqa: PLR0913, two predictions, and of what
    schedule: NoiseSchedule,
    teacher: Tensor,
    fake: Tensor,
    at: Noised,
    z_s: Tensor,
    s_B: Tensor,
) -> Tensor:
    """Its gradient moves states to where the teacher has more of them than the guide, ``(B,)``.

    In units of x: the teacher's less the fake one's x-prediction, over the mean distance of the
    states from the teacher's (Yin et al. 2024, eq. 8). The loss is half of that, squared.

    Args:
        schedule: of the base.
        teacher: its eps at the noised states, ``(B, C, H, W)``.
        fake: the eps of the fake score there.
        at: the noised states.
        z_s: the states, with their gradients.
        s_B: their timesteps.
    """
    x = z_s / schedule.alpha_sigma(s_B, z_s)[0]
    teacher_x, fake_x = (schedule.to_x(eps.float(), at.z, at.tau_B) for eps in (teacher, fake))
    distance = (x.detach() - teacher_x).abs().mean(dim=(1, 2, 3), keepdim=True)
    wanted = x.detach() + (teacher_x - fake_x) / (distance + 1e-3)
    return 0.5 * (x - wanted).square().mean(dim=(1, 2, 3))


def seed_of(config: MatchConfig) -> int:
    """Of the batches, apart from those of halving's rounds."""
    return config.train.seed + SEEDS + config.num_steps


def drawing(
    cache: TeacherCache, config: MatchConfig, device: torch.device
) -> Callable[[int, slice], Drawn]:
    """What a step sees, by its number and the part of its batch; the next is read ahead."""
    batch_size, seed = config.train.batch_size, seed_of(config)

    @lru_cache(maxsize=2)  # a batch may come in parts, and the next step's among them
    def drawn(step: int) -> tuple[Batch, Tensor, Tensor]:
        generator = step_generator(seed, step)
        batch = draw_batch(
            cache, generator, config.guidance_scale,
            num_steps=config.num_steps, batch_size=batch_size, seed=seed, step=step,
        )  # fmt: skip
        shares = torch.rand(1 + NUM_NOISED, batch_size, generator=generator)
        noises = torch.randn(1 + NUM_NOISED, *batch.draws.noise.shape, generator=generator)
        return batch, shares, noises

    def read(step: int, part: slice) -> Drawn:
        batch, *noising = drawn(step)
        latents, pin = cache.latents(batch.indices, batch.draws, part), pinning(device)
        numbers = batch.w_B[part], batch.number_B[part], *(x[:, part] for x in noising)
        return Drawn(latents.map(pin), *map(pin, numbers))

    ahead = Ahead(read)

    def draw(step: int, part: slice) -> Drawn:
        drawn = ahead(step, part)
        latents = drawn.latents.map(lambda x: as_float(x, device))
        w_B, shares, noises = (as_float(x, device) for x in (drawn.w_B, drawn.shares, drawn.noises))
        return Drawn(latents, w_B, drawn.number_B, shares, noises)

    return draw


def matching_objective(  # noqa: PLR0913, three networks for each teacher, data and settings
    students: Sequence[Denoiser],
    fakes: Sequence[Denoiser],
    teachers: Sequence[Denoiser],
    cache: TeacherCache,
    scheduler: Any,
    config: MatchConfig,
    device: torch.device,
) -> Callable[[int, slice], Tensor]:
    """What :func:`pnp_core.train.train` minimises: the fake score's loss, and the guide's.

    Neither has gradients of the other's. In the warm-up, and in every other step after it, the fake
    score learns alone.

    Args:
        students: the guide on the base, and on each companion.
        fakes: the fake scores, in the same order.
        teachers: CFG, in the same order.
        cache: gives prompts, and the schedule.
        scheduler: the base's; it fixes the timesteps.
        config: how to train, and for how many steps.
        device: where all of them are.
    """
    schedule, spacing = cache.schedule, config.timestep_spacing
    grid = sampling_timesteps(scheduler, config.num_steps, spacing)
    draw = drawing(cache, config, device)
    batch_size, warmup_images = config.train.batch_size, config.train.warmup_images

    def loss_fn(step: int, part: slice) -> Tensor:
        turn, _ = turn_of(step // EVERY, len(students))
        student, fake, teacher = students[turn], fakes[turn], teachers[turn]
        latents, w_B, number_B, shares, noises = draw(step, part)
        t_B, s_B = grid[number_B].to(device), grid[number_B + 1].to(device)
        moves = step * batch_size >= warmup_images and step % EVERY == 0
        with torch.no_grad():
            z_t = own_states(student, schedule, grid, latents, w_B, number_B)
        torch.clear_autocast_cache()  # else before 2.10 the casts made without gradients stay
        with torch.set_grad_enabled(moves and torch.is_grad_enabled()):
            eps = student(z_t, t_B, latents.conditions(w_B)).float()
            z_s = schedule.ddim_step(z_t, eps, t_B, s_B)
        first, *others = (
            Noised(schedule, z_s.detach(), s_B, t_B, *draws)
            for draws in zip(shares, noises, strict=True)
        )
        loss = torch.zeros_like(w_B)
        for at in others:
            eps = fake(at.z, at.tau_B, latents.conditions(w_B))
            loss = loss + fake_loss(schedule, eps, at) / len(others)
        if not moves:
            return loss
        with torch.no_grad():
            conditions = latents.conditions(w_B)
            eps = teacher(first.z, first.tau_B, conditions)
            own = fake(first.z, first.tau_B, conditions)
        return loss + matching_loss(schedule, eps, own, first, z_s, s_B)

    return loss_fn


def match(  # noqa: PLR0913, what a run needs, then by name what it may have
    unet: UNet2DConditionModel,
    scheduler: Any,
    halved: Guide,
    first: Guide,
    cache: TeacherCache,
    config: MatchConfig,
    *,
    companions: Mapping[str, UNet2DConditionModel] | None = None,
    directory: Path,
    report: Report = lambda *_: None,
) -> Guide:
    """Train on a halved guide, until what it makes is distributed as what CFG makes.

    Args:
        unet: the base, which is frozen here; its device is where training runs.
        scheduler: the base's; it fixes the timesteps.
        halved: the guide for so many steps; it is not changed.
        first: the guide before halving, which fake scores begin with.
        cache: of this base; it gives the prompts.
        config: how to train, and for how many steps.
        companions: the cache's further teachers by identity, in its order.
        directory: where the result is kept as ``matched-N``, and the checkpoint until then.
        report: called with the number of images so far and metrics, ``num_steps`` among them.

    Returns:
        What was trained, whose weights are averages. Above FEW_STEPS steps, the mean of it and of
        the halved guide: that keeps what halving does better (Wortsman et al. 2022, WiSE-FT).

    Raises:
        ValueError: other companions than the cache's; workers see different files; a loss that is
            not finite.
    """
    companions = companions or {}
    check_companions(list(companions), cache)
    guides = (halved.weights_digest(), first.weights_digest())
    run_hash = config_hash(config, cache.content_hash, *guides, RECIPE, MATCHING)
    finished = directory / f"matched-{config.num_steps}-{run_hash}"
    if agreed(partial(exists, finished), str(finished), unet.device):
        return Guide.from_pretrained(finished).to(unet.device)
    guide = copy.deepcopy(halved).requires_grad_(True)
    checkpoint = directory / f"matching-{config.num_steps}.pt"
    train_beside_fakes(
        guide,
        first,
        (unet, *companions.values()),
        scheduler,
        cache,
        config,
        run_hash=run_hash,
        checkpoint=checkpoint,
        report=lambda done, metrics: report(done, {**metrics, "num_steps": config.num_steps}),
    )
    if config.num_steps > FEW_STEPS:
        move_back(guide, halved)
    if rank_and_world()[0] == 0:
        write_directory(finished, guide.save_pretrained)
        checkpoint.unlink(missing_ok=True)
    return guide


@torch.no_grad()
def move_back(guide: Guide, halved: Guide) -> None:
    """Keep some of what the guide was before it was matched."""
    for p, before in zip(guide.parameters(), halved.parameters(), strict=True):
        p.lerp_(before.to(p), KEPT)


def train_beside_fakes(  # noqa: PLR0913, what a run needs, then by name how to follow it
    guide: Guide,
    first: Guide,
    bases: Sequence[UNet2DConditionModel],
    scheduler: Any,
    cache: TeacherCache,
    config: MatchConfig,
    *,
    run_hash: str,
    checkpoint: Path,
    report: Report,
) -> None:
    """Train the guide in place on these UNets, each with a fake score; see :func:`match`."""
    for base in bases:
        base.requires_grad_(False).eval()
    torch.manual_seed(config.train.seed)
    device = bases[0].device
    scores = [FakeScore(base, first) for base in bases]
    matched = Matched(guide, scores).to(device)
    schedule, guider = cache.schedule, Guider(config.guider, cache.schedule.num_train_timesteps)
    fakes = [GuidedDenoiser(fake.unet, fake.guide, schedule) for fake in scores]

    def name_row(step: int, row: int) -> str:
        batch_size, seed = config.train.batch_size, seed_of(config)
        return cache.name_latent(batch_size=batch_size, seed=seed, step=step, row=row)

    with checkpointing(
        [*bases, *(fake.unet for fake in scores)], config.train.gradient_checkpointing
    ):
        train(
            matching_objective(
                [GuidedDenoiser(base, guide, schedule) for base in bases],
                fakes,
                [CFGDenoiser(base, schedule, guider) for base in bases],
                cache,
                scheduler,
                config,
                device,
            ),
            matched,
            config.train,
            run_hash=run_hash,
            checkpoint=checkpoint,
            report=report,
            name_row=name_row,
            in_threads=True,
        )
