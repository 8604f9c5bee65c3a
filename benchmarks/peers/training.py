"""Trains methods on one base and one cache, all alike."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from benchmarks.peers.peer import Peer
from components.device import load_base, load_companions
from components.params import Params, companion_paths, teacher_guider
from components.progress import Progress
from components.training import train_config
from pnp_core.cache import TeacherCache
from pnp_core.distill import DistillConfig
from pnp_core.guide import GuideConfig
from pnp_core.halve import HalveConfig, Round, halving_objective, rounds_of
from pnp_core.train import RECIPE, config_hash, train


class Trainer:
    """Trains peers by `distill` and `halve` of params.yaml, but for what is said here.

    Args:
        params: all of them.
        cache: the teachers' pairs.
        folder: for checkpoints; an interrupted training goes on from its own.
    """

    def __init__(self, params: Params, cache: TeacherCache, folder: Path) -> None:
        self.params, self.cache, self.folder = params, cache, folder
        self.pipe = load_base(params.base)
        self.unet: UNet2DConditionModel = self.pipe.unet
        self._companions: dict[str, UNet2DConditionModel] | None = None

    @property
    def companions(self) -> Mapping[str, UNet2DConditionModel]:
        """What add-ons are trained beside, in turns with the base."""
        if self._companions is None:
            self._companions = load_companions(companion_paths(self.params), self.pipe)
        return self._companions

    def fit(  # noqa: PLR0913, a method, and by name what differs from training to training
        self,
        name: str,
        make: Callable[[UNet2DConditionModel], Peer],
        *,
        learning_rate: float,
        num_images: int,
        batch_size: int,
        losses: list[float] | None = None,
        is_trial: bool = False,
    ) -> Peer:
        """A peer that has seen so many images. Raises DivergedError if it diverges.

        Args:
            name: of the method, for progress and checkpoints.
            make: a fresh one, for the base.
            learning_rate: of the optimizer.
            num_images: in all.
            batch_size: of a step.
            losses: gets what is reported on the way.
            is_trial: short, and made anew if it is interrupted.
        """
        full = train_config(self.params.distill)
        torch.manual_seed(full.seed)
        peer = make(self.unet).to(self.unet.device)
        config = DistillConfig(
            train=replace(
                full,
                learning_rate=learning_rate,
                num_images=num_images,
                batch_size=batch_size,
                warmup_images=min(full.warmup_images, num_images // 5),
            ),
            guide=GuideConfig(),
            guidance_scale=self.params.distill.guidance_scale,
            guider=teacher_guider(self.params),
        )
        others = self.companions.values() if peer.is_add_on else ()
        students = [peer.denoiser(unet, self.cache.schedule) for unet in (self.unet, *others)]
        progress = Progress(f"{name} at {learning_rate:g}", num_images, "images")
        checkpoint = self.folder / f"{name}-{learning_rate:g}-{num_images}.pt"

        def report(done: int, metrics: Mapping[str, float]) -> None:
            progress(done, f"loss {metrics['loss']:.4f}")
            if losses is not None:
                losses.append(metrics["loss"])

        return train(
            peer.objective(students, self.cache, config, self.unet.device),
            peer,
            config.train,
            run_hash=config_hash(config, self.cache.content_hash, name, RECIPE),
            checkpoint=None if is_trial else checkpoint,
            report=report,
        )

    def halve(
        self, name: str, peer: Peer, *, learning_rate: float, end_steps: int
    ) -> dict[int, Peer]:
        """The peer by number of steps: as it is for the most, halved for fewer."""
        section = self.params.halve
        config = HalveConfig(
            train=replace(train_config(section), learning_rate=learning_rate),
            start_steps=section.start_steps,
            end_steps=end_steps,
            guidance_scale=self.params.distill.guidance_scale,
            guidance_gain=section.guidance_gain,
            timestep_spacing=section.timestep_spacing,
        )
        peers = {config.start_steps: peer}
        for this in rounds_of(config):
            teacher = peers[2 * this.num_steps].requires_grad_(False).eval()
            peers[this.num_steps] = self._halved(name, teacher, config, this)
        return peers

    def _halved(self, name: str, teacher: Peer, config: HalveConfig, this: Round) -> Peer:
        student = copy.deepcopy(teacher).requires_grad_(True)
        own, theirs = (peer.denoiser(self.unet, self.cache.schedule) for peer in (student, teacher))
        progress = Progress(f"{name}, {this.num_steps} steps", config.train.num_images, "images")
        scheduler, device = self.pipe.scheduler, self.unet.device
        identity = (self.cache.content_hash, name, str(this), fingerprint(teacher), RECIPE)
        return train(
            halving_objective(own, theirs, self.cache, scheduler, config, this, device),
            student,
            config.train,
            run_hash=config_hash(config, *identity),
            checkpoint=self.folder / f"{name}-steps-{this.num_steps}.pt",
            report=lambda done, metrics: progress(done, f"loss {metrics['loss']:.4f}"),
        )


def fingerprint(peer: Peer) -> str:
    """Tells trainings of one method apart."""
    numbers: list[Tensor] = [p.detach().double().norm() for p in peer.parameters()]
    return " ".join(f"{float(x):.9g}" for x in numbers)
