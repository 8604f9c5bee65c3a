"""One contract for everything that denoises: ``(z_BCHW, t_B, conditions) -> eps_BCHW``.

Where a schedule's last timestep has no signal, v stands for eps, see :mod:`pnp_core.schedule`.
"""

import threading
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from pnp_core.ahead import StepsAhead
from pnp_core.calls import Call, Negatives, entered, run_checkpointed, version_of
from pnp_core.conditions import Conditions
from pnp_core.cores import go_on
from pnp_core.guide import Guide
from pnp_core.guide.kind import Effect
from pnp_core.guiders import Guider
from pnp_core.inject import use
from pnp_core.precision import is_mixed
from pnp_core.schedule import NoiseSchedule


class Denoiser(Protocol):
    """Predicts eps.

    Args:
        z_BCHW: latents at ``t_B``.
        t_B: timesteps.
        conditions: prompts, negative prompts and guidance scales. Where a run passes the same
            object at each step, what it fixes is computed once.
    """

    def __call__(self, z_BCHW: Tensor, t_B: Tensor, conditions: Conditions) -> Tensor:
        """Predicted eps, ``(B, C, H, W)``, at latents ``z_BCHW`` and training timesteps ``t_B``."""
        ...


class PlainDenoiser:
    """The base as it is, without guidance: one forward under the prompt."""

    def __init__(self, unet: UNet2DConditionModel, schedule: NoiseSchedule) -> None:
        self.unet = unet
        self.schedule = schedule

    def predict(
        self, z_BCHW: Tensor, t_B: Tensor, text_BLD: Tensor, added: Mapping[str, Tensor] | None
    ) -> Tensor:
        """Predicted eps, ``(B, C, H, W)``, under one prompt, with its ``added_cond_kwargs``."""
        go_on()
        prediction = self.unet(z_BCHW, t_B, text_BLD, added_cond_kwargs=added, return_dict=False)[0]
        return self.schedule.to_eps(prediction, z_BCHW, t_B)

    def __call__(self, z_BCHW: Tensor, t_B: Tensor, conditions: Conditions) -> Tensor:
        """Predicted eps, ``(B, C, H, W)``; negative prompts and ``w_B`` play no part."""
        added = conditions.added
        return self.predict(
            z_BCHW, t_B, conditions.c_BLD, None if added is None else added.positive
        )


class CFGDenoiser:
    """The teacher: classifier-free guidance, two forwards in one doubled batch.

    Args:
        guider: combines the two predictions; plain CFG by default.
    """

    def __init__(
        self, unet: UNet2DConditionModel, schedule: NoiseSchedule, guider: Guider | None = None
    ) -> None:
        self.plain = PlainDenoiser(unet, schedule)
        self.guider = guider or Guider()

    def pair(self, z_BCHW: Tensor, t_B: Tensor, conditions: Conditions) -> tuple[Tensor, Tensor]:
        """``eps_c`` and ``eps_n``."""
        texts = torch.cat([conditions.c_BLD, conditions.each_negative])
        both, added = None, conditions.added
        if added is not None:
            both = {
                key: torch.cat([value, added.negative[key]])
                for key, value in added.positive.items()
            }
        eps = self.plain.predict(z_BCHW.repeat(2, 1, 1, 1), t_B.repeat(2), texts, both)
        eps_c, eps_n = eps.chunk(2)
        return eps_c, eps_n

    def __call__(self, z_BCHW: Tensor, t_B: Tensor, conditions: Conditions) -> Tensor:
        """Guided eps, ``(B, C, H, W)``, by the guider at the scales ``conditions.w_B``."""
        eps_c, eps_n = self.pair(z_BCHW, t_B, conditions)
        return self.guider(eps_c, eps_n, t_B, conditions.w_B)


class GuidedDenoiser:
    """The student: a frozen UNet with a guide, one forward.

    Args:
        strength: multiplies all that the guide does.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        guide: Guide,
        schedule: NoiseSchedule,
        *,
        strength: float = 1.0,
    ) -> None:
        guide.check_fits(unet)
        use(unet, self)
        self.plain = PlainDenoiser(unet, schedule)
        self.guide = guide
        self.strength = strength
        self.last = LastCall()

    def __call__(self, z_BCHW: Tensor, t_B: Tensor, conditions: Conditions) -> Tensor:
        """Guided eps, ``(B, C, H, W)``: the UNet's own forward, with the guide at work in it."""
        with entered(self.call_for(conditions, z_BCHW.device.type)):
            return self.plain(z_BCHW, t_B, conditions)

    def call_for(self, conditions: Conditions, device_type: str) -> "DenoiserCall":
        """The call of the step before, if nothing that it rests on is another."""
        unet, guide = self.plain.unet, self.guide
        if torch.is_grad_enabled():  # the guide may be another after this step
            check_not_checkpointed(unet)
            return DenoiserCall(unet, guide, conditions, self.strength)
        weights = [(p.data_ptr(), *version_of(p)) for p in guide.parameters()]
        made_for = (conditions, is_mixed(device_type), weights)
        last = self.last
        if last.call is None or made_for != last.made_for:
            last.call = DenoiserCall(unet, guide, conditions, self.strength)
            last.made_for = made_for
        return last.call


class LastCall(threading.local):
    """What a denoiser ran last in this thread, and all that it rests on."""

    call: "DenoiserCall | None" = None
    made_for: tuple[Any, ...] = ()


def check_not_checkpointed(unet: UNet2DConditionModel) -> None:
    """Raise ValueError if the UNet would run its blocks again, without a guide, for gradients."""
    blocks = (*unet.down_blocks, unet.mid_block, *unet.up_blocks)
    if any(
        getattr(block, "gradient_checkpointing", False)
        and block._gradient_checkpointing_func is not run_checkpointed
        for block in blocks
    ):
        raise ValueError(
            "A guide can't be trained through these gradient checkpoints, where the UNet runs its "
            "blocks again without it: unet.disable_gradient_checkpointing(), and "
            "pnp_core.calls.checkpointing in its place."
        )


class DenoiserCall(Call):
    """A guide under conditions that are given."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        guide: Guide,
        conditions: Conditions,
        strength: float = 1.0,
    ) -> None:
        self.unet = unet
        self.conditions = conditions
        self.negatives = Negatives(conditions.n_BLD)
        self.prepared = guide.prepare(conditions, strength)
        self.ahead = StepsAhead()

    def begin(self, arguments: dict[str, Any]) -> Effect:
        """What the guide does in this forward; sets ``encoder_hidden_states`` in ``arguments``."""
        effect = self.ahead.effect(self.prepared, arguments["sample"], arguments["timestep"])
        arguments["encoder_hidden_states"] = effect.steer(arguments["encoder_hidden_states"])
        return effect
