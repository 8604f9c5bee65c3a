"""Whether a guide and a pipeline go together, said before anything runs."""

from collections.abc import Iterator
from typing import Any

from diffusers import DiffusionPipeline, UNet2DConditionModel
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from pnp_core.bundle import GuideBundle
from pnp_core.compiled import compiles_its_own
from pnp_core.guide.unet import MODULATED, NORMS, text_attentions
from pnp_core.pipelines import check_class


def bare_unet(pipe: Any) -> Any:
    """The pipeline's UNet without a wrapper of ``torch.compile``; None if it has none."""
    unet = getattr(pipe, "unet", None)
    return getattr(unet, "_orig_mod", unet)


def check_unet(pipe: DiffusionPipeline, bundle: GuideBundle) -> None:
    """Raise ValueError if the pipeline can't have a guide, or has no UNet that all guides fit."""
    check_class(type(pipe))
    unet = bare_unet(pipe)
    check_not_wrapped(unet)
    if unet is None or not hasattr(unet, "up_blocks"):
        raise ValueError(f"{type(pipe).__name__} has no UNet with up blocks to plug a guide into.")
    if not isinstance(unet, UNet2DConditionModel):
        raise ValueError(
            f"A guide works in a UNet2DConditionModel; this pipeline's UNet is a "
            f"{type(unet).__name__}."
        )
    check_copies(unet)
    check_weights(unet)
    check_processors(unet)
    for guide in bundle.guides.values():
        guide.check_fits(unet)


def check_prediction_type(pipe: DiffusionPipeline, bundle: GuideBundle) -> None:
    """Raise ValueError if the guides were made for a base that predicts something else.

    Or if the scheduler is one of EDM's or of flow matching, which takes it for something else.
    """
    name = type(pipe.scheduler).__name__
    if hasattr(pipe.scheduler, "precondition_inputs") or name.startswith("Flow"):
        raise ValueError(
            f"A guide corrects what a UNet predicts of the noise, and under a {name} it predicts "
            "something else: take a scheduler of the base's own kind."
        )
    prediction_type = pipe.scheduler.config.get("prediction_type", "epsilon")
    for guide in bundle.guides.values():
        if guide.config.prediction_type != prediction_type:
            raise ValueError(
                f"This guide was made for a base with prediction_type "
                f"{guide.config.prediction_type!r}; this pipeline's scheduler has "
                f"{prediction_type!r}."
            )


def check_weights(unet: UNet2DConditionModel) -> None:
    """Raise ValueError if the UNet is quantised, or spread over several devices."""
    config = unet.config.get("quantization_config")
    method = config.get("quant_method") if isinstance(config, dict) else config
    odd: list[Any] = [
        p for p in unet.parameters() if type(p.data) is not Tensor or not p.is_floating_point()
    ]
    read = (
        part for layer in text_attentions(unet) for part in (layer.to_q, layer.to_k, layer.to_v)
    )
    odd += [part for part in read if not isinstance(getattr(part, "weight", None), Tensor)]
    if method is not None or getattr(unet, "hf_quantizer", None) is not None or odd:
        how = method or (kind_of(odd[0]) if odd else "by a hf_quantizer")
        raise ValueError(
            f"A guide works beside a UNet of ordinary floating-point weights, but this UNet is "
            f"quantised ({how}): load it without quantization_config."
        )
    devices = {str(device) for device in (getattr(unet, "hf_device_map", None) or {}).values()}
    if len(devices) < 2:
        own = own_parameters(unet)
        devices = {str(p.device) for p in own if p.device.type != "meta"}
    if len(devices) > 1:
        raise ValueError(
            f"A guide works beside a UNet on one device, but this UNet is spread over "
            f"{', '.join(sorted(devices))}: load it without device_map, or use "
            "pipe.enable_model_cpu_offload()."
        )


def own_parameters(unet: nn.Module) -> Iterator[nn.Parameter]:
    """Those of the UNet, and none of an adapter's: one that rests may lie on another device."""
    adapters: set[nn.Parameter] = set()
    for layer in unet.modules():
        if isinstance(layer, BaseTunerLayer):
            tables = (getattr(layer, name) for name in layer.adapter_layer_names)
            adapters.update(p for table in tables for p in table.parameters())
    return (p for p in unet.parameters() if p not in adapters)


def check_processors(unet: UNet2DConditionModel) -> None:
    """Raise ValueError if the text's keys and values are made where a guide does not see it.

    Or if image tokens stand behind the text's, as diffusers' own IP-Adapter does not have them.
    """
    for layer in text_attentions(unet):
        name = type(layer.processor).__name__
        if hasattr(layer.processor, "to_k_custom_diffusion"):
            raise ValueError(
                f"A guide makes the negative prompt's keys by each attention's own to_k, and a "
                f"{name} has another: use Custom Diffusion unplugged."
            )
        appends = hasattr(layer.processor, "num_tokens") and hasattr(layer.processor, "to_k_ip")
        if appends and unet.encoder_hid_proj is None:
            raise ValueError(
                f"A {name} of this UNet reads an image's tokens behind the text's, where a guide "
                "would take them for text: use pipe.load_ip_adapter and ip_adapter_image_embeds, "
                "or use it unplugged."
            )


def processors_of_others(unet: UNet2DConditionModel) -> set[str]:
    """The classes of the UNet's attention processors that are none of diffusers' own."""
    kinds = {type(processor) for processor in unet.attn_processors.values()}
    return {kind.__name__ for kind in kinds if not kind.__module__.startswith("diffusers.")}


def check_copies(unet: UNet2DConditionModel) -> None:
    """Raise ValueError if peft keeps a copy of a part in which a guide acts; of norms it may."""
    for name, module in unet.named_modules():
        kept = module._modules.get("original_module")
        if kept is None or isinstance(kept, NORMS):
            continue
        if any(isinstance(part, MODULATED) for part in kept.modules()):
            raise ValueError(
                f"An adapter of peft keeps a copy of {name} in this UNet (modules_to_save) and "
                "runs one of the two, and a guide would act in the other: load the adapter without "
                "that part, or put the copy in its place for good."
            )


def check_face_embeddings(unet: Any, num_samples: int, *, with_exact_steps: bool) -> None:
    """Raise ValueError if CLIP embeddings of an IP-Adapter FaceID-Plus don't fit a call's steps."""
    projections = getattr(unet.encoder_hid_proj, "image_projection_layers", ())
    for number, layer in enumerate(projections):
        kept = getattr(layer, "clip_embeds", None)
        if kept is not None and with_exact_steps:
            raise ValueError(
                "An IP-Adapter FaceID-Plus has as many clip_embeds as all steps have rows, and an "
                "exact step has twice as many as a guided one: plug the guide with exact_steps=0."
            )
        if kept is not None and len(kept) == 2 * num_samples:
            raise ValueError(
                "The clip_embeds of an IP-Adapter FaceID-Plus are of both prompts, and a guided "
                "step runs under the prompt alone: take their second half, "
                f"layer.clip_embeds = layer.clip_embeds.chunk(2)[1] with layer = pipe.unet."
                f"encoder_hid_proj.image_projection_layers[{number}]."
            )


def check_keeps_nothing(unet: Any) -> None:
    """Raise ValueError if something may keep what a part of the UNet gave, for later steps.

    In an exact step the UNet has twice the rows of the step before. Offloading is no such thing.
    """
    for part in unet.modules():
        for hook in getattr(vars(part).get("_diffusers_hook"), "hooks", {}).values():
            if hook._is_stateful:
                raise ValueError(
                    f"A {type(hook).__name__} keeps what parts of this UNet gave in earlier steps, "
                    "which does not fit exact steps: take it off, or plug the guide with "
                    "exact_steps=0."
                )
        is_offloaded = not {"_hf_hook", "_diffusers_hook"}.isdisjoint(vars(part))
        is_own = "forward" not in vars(part) or compiles_its_own(part)
        if part is unet or is_offloaded or is_own:
            continue
        raise ValueError(
            f"A forward within this UNet has been replaced, of {type(part).__name__}, as DeepCache "
            "and T-GATE do, whose kept features don't fit exact steps: take it off, or plug the "
            "guide with exact_steps=0."
        )


def check_not_wrapped(unet: Any) -> None:
    """Raise ValueError if the UNet is within another module that runs it past its hooks."""
    if isinstance(unet, PeftModel):
        raise ValueError(
            f"A guide does not see the forwards of a UNet within a {type(unet).__name__}: "
            "pipe.unet = pipe.unet.merge_and_unload(), or load the adapter with "
            "pipe.load_lora_weights or pipe.unet.add_adapter."
        )
    if isinstance(unet, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise ValueError(
            f"A guide does not see the forwards of a UNet within a {type(unet).__name__}: "
            "pipe.unet = pipe.unet.module."
        )


def kind_of(weight: Tensor | nn.Module) -> str:
    """What a weight is, or a layer that hides it."""
    if isinstance(weight, nn.Module):
        return type(weight).__name__
    return f"{type(weight.data).__name__} of {weight.dtype}"
