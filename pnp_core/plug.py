"""Plugging a guide into a stock diffusers pipeline.

A stock pipeline whose UNet has ``time_cond_proj_dim`` set runs one UNet forward a step and hands
the UNet an embedding of the guidance scale (diffusers' support for guidance-distilled models).
That is the way in: a hook takes the embedding out of the call and lets the guide act. The guidance
scale and the negative prompt come from the pipeline itself.
"""

import inspect
import logging
import os
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from pnp_core.bundle import GuideBundle
from pnp_core.guide import Guide
from pnp_core.inject import Injector

logger = logging.getLogger(__name__)

HOOK = "_pnp_guide"  # attribute of a plugged UNet
GUIDANCE_EMBEDDING_DIM = 4  # any that a pipeline can compute: the embedding is not used


class GuideHook:
    """Runs the guide before each forward of a plugged UNet.

    Bound methods of this object are the UNet's hooks, so that a deep copy of the UNet gets a hook
    of its own.
    """

    def __init__(self, unet: UNet2DConditionModel, bundle: GuideBundle, strength: float) -> None:
        self.bundle = bundle
        self.strength = strength
        self.injector = Injector(unet)
        self.pipe: DiffusionPipeline | None = None  # the one that encoded its prompts last
        self.positive: Tensor | None = None  # text states from that
        self.negative: Tensor | None = None
        self.negative_pooled: Tensor | None = None  # of an SDXL pipeline
        self.has_time_ids = False  # since the prompts were encoded
        self.time_cond_proj_dim: int | None = unet.config.time_cond_proj_dim
        self.warned: set[str] = set()
        self.handles = [
            unet.register_forward_pre_hook(self.before_forward, with_kwargs=True),
            unet.register_forward_hook(self.after_forward),
        ]

    def remove(self) -> None:
        self.injector.remove()
        for handle in self.handles:
            handle.remove()

    def before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        call = {**dict(zip(("sample", "timestep", "encoder_hidden_states"), args, strict=False))}
        call |= kwargs
        self.injector.conditioning = None
        self.injector.refresh()
        if call.get("timestep_cond") is None:
            return args, kwargs
        kwargs = {**kwargs, "timestep_cond": None}
        sample, text = call["sample"], call["encoder_hidden_states"]
        negative = self.negative_for(text)
        guidance_scale = float(self.pipe.guidance_scale)  # type: ignore[union-attr]
        guide = self.guide_in_use()
        if self.strength == 0 or (guidance_scale == 1 and guide.config.num_steps is None):
            return args, kwargs  # it would add zeros
        guide.to(device=sample.device)
        self.check_range(guide, guidance_scale)
        self.injector.guide = guide
        conditioning = guide(
            sample,
            torch.as_tensor(call["timestep"]),
            text,
            torch.tensor(guidance_scale),
            negative,
            self.strength,
            self.negative_added(call.get("added_cond_kwargs")),
        )
        self.injector.conditioning = conditioning
        steered = guide.steer(text, conditioning)
        if len(args) > 2:
            return (*args[:2], steered, *args[3:]), kwargs
        return args, {**kwargs, "encoder_hidden_states": steered}

    def after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.injector.conditioning = None

    def guide_in_use(self) -> Guide:
        num_steps = getattr(getattr(self.pipe, "scheduler", None), "num_inference_steps", None)
        return self.bundle.for_steps(num_steps or max(self.bundle.num_steps))

    def negative_for(self, text: Tensor) -> Tensor:
        known = (
            self.positive is not None
            and self.positive.shape == text.shape
            and torch.equal(self.positive.to(text), text)
        )
        if not known or self.negative is None:
            raise ValueError(
                "This UNet carries a guide, but the pipeline that runs it has not been plugged, so "
                "its negative prompt is unknown: call plug(pipe, guide) on this pipeline too."
            )
        return self.negative.to(text)

    def negative_added(self, added: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
        """``added_cond_kwargs`` as they would be in a forward under the negative prompt."""
        if added is None or self.negative_pooled is None:
            return added
        return {**added, "text_embeds": self.negative_pooled.to(added["text_embeds"])}

    def check_range(self, guide: Guide, guidance_scale: float) -> None:
        low, high = guide.config.guidance_scale_range
        if not low <= guidance_scale <= high:
            self.warn_once(
                f"guidance_scale {guidance_scale:g} is outside [{low:g}, {high:g}], the range "
                "this guide was trained for."
            )

    def warn_once(self, message: str) -> None:
        if message not in self.warned:
            self.warned.add(message)
            logger.warning(message)


class EncodePrompt:
    """Stands in for a plugged pipeline's ``encode_prompt``: keeps the negative prompt's states.

    A pipeline that runs one forward a step would not encode the negative prompt at all.
    """

    def __init__(self, pipe: DiffusionPipeline, hook: GuideHook) -> None:
        self.pipe = pipe
        self.hook = hook

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if getattr(self.pipe, "_guidance_rescale", 0.0):
            raise ValueError(
                "guidance_rescale does not work with a guide: it needs the unguided prediction, "
                "which a guide does away with. Pass guidance_rescale=0."
            )
        original = type(self.pipe).encode_prompt
        bound = inspect.signature(original).bind(self.pipe, *args, **kwargs)
        bound.arguments["do_classifier_free_guidance"] = True
        result = original(*bound.args, **bound.kwargs)
        self.hook.pipe, self.hook.has_time_ids = self.pipe, False
        positive, negative = result[0], result[1]
        if torch.equal(negative, negative[:1].expand_as(negative)):
            negative = negative[:1]  # all share it
        self.hook.positive, self.hook.negative = positive, negative
        self.hook.negative_pooled = result[3] if len(result) == 4 else None  # SDXL
        return result


class AddTimeIds:
    """Stands in for a plugged SDXL pipeline's ``_get_add_time_ids``: says what has no effect.

    Text-to-image pipelines call it again for a negative size that is given; image-to-image and
    inpainting pass both sizes in one call.
    """

    def __init__(self, pipe: DiffusionPipeline, hook: GuideHook) -> None:
        self.pipe = pipe
        self.hook = hook

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        original = type(self.pipe)._get_add_time_ids
        given = inspect.signature(original).bind(self.pipe, *args, **kwargs).arguments
        differs = any(
            given.get(f"negative_{name}") not in (None, given.get(name))
            for name in ("original_size", "crops_coords_top_left", "target_size")
        )
        if differs or self.hook.has_time_ids:
            self.hook.warn_once(
                "negative_original_size, negative_crops_coords_top_left and negative_target_size "
                "have no effect with a guide: it knows the negative prompt by its text alone."
            )
        self.hook.has_time_ids = True
        return original(self.pipe, *args, **kwargs)


class SaveConfig:
    """Stands in for a plugged UNet's ``save_config``: the file gets the UNet's own value."""

    def __init__(self, unet: UNet2DConditionModel, hook: GuideHook) -> None:
        self.unet = unet
        self.hook = hook

    def __call__(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        plugged = self.unet.config.time_cond_proj_dim
        self.unet.register_to_config(time_cond_proj_dim=self.hook.time_cond_proj_dim)
        try:
            type(self.unet).save_config(self.unet, save_directory, **kwargs)
        finally:
            self.unet.register_to_config(time_cond_proj_dim=plugged)


def plug(
    pipe: DiffusionPipeline, guide: Guide | GuideBundle, *, strength: float = 1.0
) -> DiffusionPipeline:
    """Let ``guide`` replace classifier-free guidance in a stock pipeline, in place.

    ``guidance_scale`` and ``negative_prompt`` keep their meaning; a step costs one UNet forward.
    Of a bundle, the guide for the call's ``num_inference_steps`` is used. A pipeline made with
    ``from_pipe`` shares the plugged UNet: plug it too, with the same guide.

    Args:
        strength: multiplies the guide's residuals.

    Returns:
        ``pipe``.

    Raises:
        ValueError: no UNet of a supported kind (a quantised or sharded one is not), one of another
            architecture or prediction type than the guide's, or a pipeline that is plugged
            already. The pipeline is unchanged.
    """
    bundle = guide if isinstance(guide, GuideBundle) else as_bundle(guide)
    unet = getattr(pipe, "unet", None)
    if unet is None or not hasattr(unet, "up_blocks"):
        raise ValueError(f"{type(pipe).__name__} has no UNet with up blocks to plug a guide into.")
    check_weights(unet)
    hook: GuideHook | None = getattr(unet, HOOK, None)
    if hook is not None and list(hook.bundle.guides.values()) != list(bundle.guides.values()):
        raise ValueError("This pipeline's UNet has another guide plugged in: unplug(pipe) first.")
    if "encode_prompt" in vars(pipe):
        raise ValueError("This pipeline is plugged already: unplug(pipe) first.")
    prediction_type = pipe.scheduler.config.get("prediction_type", "epsilon")
    for one in bundle.guides.values():
        one.check_fits(unet)
        if one.config.prediction_type != prediction_type:
            raise ValueError(
                f"This guide was made for a base with prediction_type "
                f"{one.config.prediction_type!r}; this pipeline's scheduler has "
                f"{prediction_type!r}."
            )
    if hook is None:
        if unet.config.time_cond_proj_dim is not None:
            raise ValueError(
                "This UNet is guidance-distilled itself (time_cond_proj_dim is "
                f"{unet.config.time_cond_proj_dim}): it needs no guide."
            )
        hook = GuideHook(unet, bundle, strength)
        setattr(unet, HOOK, hook)
        unet.register_to_config(time_cond_proj_dim=GUIDANCE_EMBEDDING_DIM)
        unet.save_config = SaveConfig(unet, hook)
    hook.strength = strength
    pipe.encode_prompt = EncodePrompt(pipe, hook)
    if hasattr(pipe, "_get_add_time_ids"):
        pipe._get_add_time_ids = AddTimeIds(pipe, hook)
    return pipe


def unplug(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Take the guide out again; the pipeline is as it was, bit for bit.

    Raises:
        ValueError: nothing is plugged in.
    """
    hook: GuideHook | None = getattr(pipe.unet, HOOK, None)
    if hook is None and "encode_prompt" not in vars(pipe):
        raise ValueError("This pipeline has no guide plugged in.")
    if hook is not None:
        hook.remove()
        pipe.unet.register_to_config(time_cond_proj_dim=hook.time_cond_proj_dim)
        delattr(pipe.unet, HOOK)
        del pipe.unet.save_config
    for name in ("encode_prompt", "_get_add_time_ids"):
        vars(pipe).pop(name, None)
    return pipe


def check_weights(unet: UNet2DConditionModel) -> None:
    """Raise ValueError if the UNet is quantised, or spread over several devices."""
    config = unet.config.get("quantization_config")
    method = config.get("quant_method") if isinstance(config, dict) else config
    odd = [p for p in unet.parameters() if type(p.data) is not Tensor or not p.is_floating_point()]
    if method is not None or getattr(unet, "hf_quantizer", None) is not None or odd:
        how = method or (
            f"{type(odd[0].data).__name__} of {odd[0].dtype}" if odd else "by a hf_quantizer"
        )
        raise ValueError(
            f"A guide works beside a UNet of ordinary floating-point weights, but this UNet is "
            f"quantised ({how}): load it without quantization_config."
        )
    devices = {str(device) for device in (getattr(unet, "hf_device_map", None) or {}).values()}
    if len(devices) < 2:
        devices = {str(p.device) for p in unet.parameters() if p.device.type != "meta"}
    if len(devices) > 1:
        raise ValueError(
            f"A guide works beside a UNet on one device, but this UNet is spread over "
            f"{', '.join(sorted(devices))}: load it without device_map, or use "
            "pipe.enable_model_cpu_offload()."
        )


def as_bundle(guide: Guide) -> GuideBundle:
    return GuideBundle({guide.config.num_steps or 50: guide})
