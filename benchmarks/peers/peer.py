"""What a peer is: another way to make one forward do what guidance does in two."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from pnp_core.cache import TeacherCache
from pnp_core.conditions import Conditions
from pnp_core.denoiser import CFGDenoiser, Denoiser, PlainDenoiser
from pnp_core.distill import DistillConfig, Drawn, distillation_objective, drawing
from pnp_core.metrics import count_flops
from pnp_core.schedule import NoiseSchedule


class Peer(nn.Module, ABC):
    """A method, for the UNets of one architecture. Its parameters are what is trained.

    Attributes:
        is_add_on: it leaves the UNet as it is, so that it can be trained beside fine-tunes too.
    """

    is_add_on: ClassVar[bool] = True

    @abstractmethod
    def __init__(self, unet: UNet2DConditionModel) -> None:
        """Fresh, for ``unet``, whose predictions it leaves unchanged until it is trained."""
        super().__init__()

    @abstractmethod
    def denoiser(self, unet: UNet2DConditionModel, schedule: NoiseSchedule) -> Denoiser:
        """The student on this UNet: the one it was made for, or a fine-tune of it."""

    def objective(
        self,
        students: Sequence[Denoiser],
        cache: TeacherCache,
        config: DistillConfig,
        device: torch.device,
    ) -> Callable[[int, slice], Tensor]:
        """What its training minimises; by default what a guide's does."""
        if type(self).losses is Peer.losses:
            return distillation_objective(students, cache, config, device)
        draw = drawing(len(students), cache, config, device)

        def loss_fn(step: int, part: slice) -> Tensor:
            drawn = draw(step, part)
            return self.losses(students[drawn.teacher], drawn, cache.schedule)

        return loss_fn

    def losses(self, student: Denoiser, drawn: Drawn, schedule: NoiseSchedule) -> Tensor:
        """A loss of its own, one a sample, for a peer whose official code has one."""
        raise NotImplementedError

    def cost(
        self,
        unet: UNet2DConditionModel,
        schedule: NoiseSchedule,
        *,
        z_BCHW: Tensor,
        t_B: Tensor,
        conditions: Conditions,
    ) -> dict[str, float]:
        """What it costs on a frozen UNet, by the shapes of this batch.

        Returns:
            ``params_ratio``, its parameters over the UNet's; ``flops_ratio``, FLOPs of the first
            step of a run over CFG's; ``train_flops_ratio``, those of a training step, forward and
            backward, over a plain forward's. The teacher is in the cache and not counted.
        """

        def flops(denoiser: Denoiser) -> int:
            with torch.no_grad():
                return count_flops(lambda: denoiser(z_BCHW, t_B, conditions))

        student = self.denoiser(unet, schedule)
        training = count_flops(backward(student, z_BCHW, t_B, conditions))
        self.zero_grad(set_to_none=True)
        own, base = (sum(p.numel() for p in module.parameters()) for module in (self, unet))
        return {
            "params_ratio": own / base,
            "flops_ratio": flops(student) / flops(CFGDenoiser(unet, schedule)),
            "train_flops_ratio": training / flops(PlainDenoiser(unet, schedule)),
        }


def backward(
    student: Denoiser, z_BCHW: Tensor, t_B: Tensor, conditions: Conditions
) -> Callable[[], None]:
    """A training step but for its update."""

    def run() -> None:
        student(z_BCHW, t_B, conditions).square().sum().backward()

    return run
