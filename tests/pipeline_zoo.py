"""Tiny random pipelines of every class that a guide serves, and a call that each understands."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    ControlNetUnionModel,
    DDIMInverseScheduler,
    DDIMParallelScheduler,
    DDPMScheduler,
    PriorTransformer,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
    UnCLIPScheduler,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
    StableUnCLIPImageNormalizer,
)
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

SIZE = 32
PHOTO = Image.new("RGB", (SIZE, SIZE), (200, 40, 90))
LEFT_HALF = Image.new("L", (SIZE, SIZE), 0)
LEFT_HALF.paste(255, (0, 0, SIZE // 2, SIZE))


class Parts:
    """What pipelines are made of."""

    def __init__(self, base: StableDiffusionPipeline, xl: StableDiffusionXLPipeline) -> None:
        self.base = base
        self.xl = xl

    def sd(self, *names: str, **changes: Any) -> dict[str, Any]:
        """Parts of Stable Diffusion: those named, or all."""
        return pick(self.base.components, names) | changes

    def sdxl(self, **changes: Any) -> dict[str, Any]:
        """All parts of SDXL."""
        return dict(self.xl.components) | changes

    def unet(self, **changes: Any) -> UNet2DConditionModel:
        """A random UNet of another config."""
        return UNet2DConditionModel.from_config({**plain(self.base.unet.config), **changes})

    def image_encoder(self) -> CLIPVisionModelWithProjection:
        """For IP-Adapters and unCLIP."""
        return CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=32, projection_dim=32, num_hidden_layers=2, num_attention_heads=2,
                intermediate_size=37, image_size=SIZE, patch_size=8,
            )
        )  # fmt: skip

    def image_processor(self) -> CLIPImageProcessor:
        """Of the image encoder."""
        size = {"height": SIZE, "width": SIZE}
        return CLIPImageProcessor(size=size, crop_size=size)


def plain(config: Any) -> dict[str, Any]:
    """Entries alone; what diffusers notes beside them would undo a change of a default."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def pick(parts: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: parts[name] for name in names} if names else dict(parts)


def stirred(module: nn.Module) -> Any:
    """With no zeros left where a ControlNet starts from zeros."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return module


def controlnet(unet: UNet2DConditionModel, kind: Any = ControlNetModel) -> Any:
    """A random ControlNet for this UNet."""
    return stirred(kind.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 8, 8)))


def adapter() -> T2IAdapter:
    """A random T2I-Adapter for two levels."""
    return stirred(
        T2IAdapter(
            in_channels=3, channels=[32, 64], num_res_blocks=1, downscale_factor=8,
            adapter_type="full_adapter",
        )
    )  # fmt: skip


CORE = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
SAFE = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
IMG2IMG = {"image": PHOTO, "strength": 1.0}
MASKED = {**IMG2IMG, "mask_image": LEFT_HALF, "height": SIZE, "width": SIZE}
XL_SIZE = {"height": SIZE, "width": SIZE}


@dataclass(frozen=True, kw_only=True)
class Case:
    """How a pipeline of one class is made and called."""

    parts: Callable[[Parts], dict[str, Any]]
    call: dict[str, Any] = field(default_factory=dict)
    prompt: Any = "a cat"
    negative: str = "negative_prompt"  # the name of that argument
    num_prompts: int = 1
    ready: Callable[[Any, dict[str, Any]], dict[str, Any]] = lambda pipe, call: call


def sd(**changes: Callable[[Parts], Any]) -> Callable[[Parts], dict[str, Any]]:
    """Parts of a class that is put together as Stable Diffusion is."""
    return lambda p: p.sd(*CORE) | SAFE | {k: make(p) for k, make in changes.items()}


def sd_control(p: Parts) -> dict[str, Any]:
    return p.sd(*CORE) | SAFE | {"controlnet": controlnet(p.base.unet)}


def xl(**changes: Callable[[Parts], Any]) -> Callable[[Parts], dict[str, Any]]:
    """Parts of a class that is put together as SDXL is."""
    return lambda p: p.sdxl(**{k: make(p) for k, make in changes.items()})


def xl_control(p: Parts) -> dict[str, Any]:
    return p.sdxl(controlnet=controlnet(p.xl.unet))


def xl_union(p: Parts) -> dict[str, Any]:
    config = plain(controlnet(p.xl.unet).config) | {"num_control_type": 6}
    narrow = {"num_trans_channel": 32, "num_trans_head": 4, "num_proj_channel": 32}
    union = ControlNetUnionModel.from_config({**config, **narrow})
    return p.sdxl(controlnet=stirred(union))


def depth_maps(pipe: Any, call: dict[str, Any]) -> dict[str, Any]:
    return {**call, "depth_map": torch.rand(1, SIZE, SIZE, generator=seeded())}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def six_channels(p: Parts) -> AutoencoderKL:
    """LDM3D's pictures have a depth map beside their colours."""
    return AutoencoderKL.from_config(
        {**plain(p.base.vae.config), "in_channels": 6, "out_channels": 6}
    )


def unclip_unet(p: Parts) -> UNet2DConditionModel:
    return p.unet(class_embed_type="projection", projection_class_embeddings_input_dim=64)


def noising(p: Parts) -> dict[str, Any]:
    return {
        "image_normalizer": StableUnCLIPImageNormalizer(embedding_dim=32),
        "image_noising_scheduler": DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        "unet": unclip_unet(p),
    }


def stable_unclip(p: Parts) -> dict[str, Any]:
    text = copy.deepcopy(p.base.text_encoder.config)
    prior = PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, embedding_dim=32, num_layers=1,
        num_embeddings=16,
    )  # fmt: skip
    return (
        p.sd(*CORE)
        | noising(p)
        | {
            "prior_tokenizer": p.base.tokenizer,
            "prior_text_encoder": CLIPTextModelWithProjection(text),
            "prior": prior,
            "prior_scheduler": UnCLIPScheduler(
                variance_type="fixed_small_log", prediction_type="sample", num_train_timesteps=1000
            ),
        }
    )


def stable_unclip_img2img(p: Parts) -> dict[str, Any]:
    encoder = {"feature_extractor": p.image_processor(), "image_encoder": p.image_encoder()}
    return p.sd(*CORE) | noising(p) | encoder


def gated_unet(p: Parts) -> UNet2DConditionModel:
    """With GLIGEN's layers, and their gates open."""
    unet = p.unet(attention_type="gated")
    unet.load_state_dict(p.base.unet.state_dict(), strict=False)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "alpha_" in name:
                parameter.fill_(0.5)
    return unet


def inverted(pipe: Any, call: dict[str, Any]) -> dict[str, Any]:
    """DiffEdit's mask and inversion, which it makes before its call."""
    mask = pipe.generate_mask(
        PHOTO, "a cat", source_prompt="a dog", num_inference_steps=2, num_maps_per_mask=1,
        generator=seeded(),
    )  # fmt: skip
    latents = pipe.invert(
        "a dog", PHOTO, num_inference_steps=call["num_inference_steps"], generator=seeded(),
        inpaint_strength=1.0,
    ).latents  # fmt: skip
    return {**call, "mask_image": mask, "image_latents": latents, "inpaint_strength": 1.0}


class OnCPU(nn.Module):
    """A part of a pipeline."""

    device = torch.device("cpu")
    dtype = torch.float32


class ContextEncoder(OnCPU):
    """BLIP-Diffusion's text encoder reads its subject too; this one gives it back."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip = clip
        self.text_model = SimpleNamespace(config=clip.config)

    def forward(
        self, input_ids: Tensor, ctx_embeddings: Tensor | None = None, **more: Any
    ) -> tuple[Tensor]:
        states = self.clip(input_ids)[0]
        return (states if ctx_embeddings is None else torch.cat([ctx_embeddings, states], dim=1),)


class QueryEncoder(OnCPU):
    """BLIP-Diffusion's encoder of the subject, so far as it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_query_tokens=2)

    def forward(self, image_input: Tensor, text_input: Any, **more: Any) -> Tensor:
        return image_input.mean() * torch.ones(len(image_input), 2, 32)


class Pictures:
    """BLIP-Diffusion's image processor, so far as it is asked."""

    def preprocess(self, image: Any, **more: Any) -> dict[str, Tensor]:
        return {"pixel_values": torch.full((1, 3, SIZE, SIZE), 0.3)}

    def postprocess(self, image: Tensor, **more: Any) -> Tensor:
        return image


def blip(p: Parts) -> dict[str, Any]:
    return p.sd("tokenizer", "vae", "unet", "scheduler") | {
        "text_encoder": ContextEncoder(p.base.text_encoder),
        "qformer": QueryEncoder(),
        "image_processor": Pictures(),
    }


BLIP_CALL: dict[str, Any] = {
    "reference_image": PHOTO,
    "source_subject_category": ["dog"],
    "target_subject_category": ["cat"],
    "height": 8,
    "width": 8,
    "prompt_reps": 1,
    "output_type": "pt",
}

CASES: dict[str, Case] = {
    "StableDiffusionPipeline": Case(parts=sd()),
    "StableDiffusionImg2ImgPipeline": Case(parts=sd(), call=IMG2IMG),
    "StableDiffusionInpaintPipeline": Case(parts=sd(), call=MASKED),
    "StableDiffusionDepth2ImgPipeline": Case(
        parts=lambda p: (
            p.sd(*CORE)
            | {"unet": p.unet(in_channels=5), "depth_estimator": None, "feature_extractor": None}
        ),
        call=IMG2IMG,
        ready=depth_maps,
    ),
    "StableDiffusionControlNetPipeline": Case(parts=sd_control, call={"image": PHOTO}),
    "StableDiffusionControlNetImg2ImgPipeline": Case(
        parts=sd_control, call={**IMG2IMG, "control_image": PHOTO}
    ),
    "StableDiffusionControlNetInpaintPipeline": Case(
        parts=sd_control, call={**MASKED, "control_image": PHOTO}
    ),
    "StableDiffusionAdapterPipeline": Case(
        parts=sd(adapter=lambda p: adapter()), call={"image": PHOTO}
    ),
    "StableDiffusionLDM3DPipeline": Case(
        parts=sd(vae=six_channels, image_encoder=lambda p: None), call={"output_type": "np"}
    ),
    "StableDiffusionXLPipeline": Case(parts=xl(), call=XL_SIZE),
    "StableDiffusionXLImg2ImgPipeline": Case(parts=xl(), call=IMG2IMG),
    "StableDiffusionXLInpaintPipeline": Case(parts=xl(), call=MASKED),
    "StableDiffusionXLControlNetPipeline": Case(parts=xl_control, call={"image": PHOTO}),
    "StableDiffusionXLControlNetImg2ImgPipeline": Case(
        parts=xl_control, call={**IMG2IMG, "control_image": PHOTO}
    ),
    "StableDiffusionXLControlNetInpaintPipeline": Case(
        parts=xl_control, call={**MASKED, "control_image": PHOTO}
    ),
    "StableDiffusionXLControlNetUnionPipeline": Case(
        parts=xl_union, call={"control_image": [PHOTO], "control_mode": [1]}
    ),
    "StableDiffusionXLControlNetUnionImg2ImgPipeline": Case(
        parts=xl_union, call={**IMG2IMG, "control_image": [PHOTO], "control_mode": [1]}
    ),
    "StableDiffusionXLControlNetUnionInpaintPipeline": Case(
        parts=xl_union, call={**MASKED, "control_image": [PHOTO], "control_mode": [1]}
    ),
    "StableDiffusionXLAdapterPipeline": Case(
        parts=xl(adapter=lambda p: adapter()), call={"image": PHOTO, **XL_SIZE}
    ),
    "AltDiffusionPipeline": Case(parts=sd()),
    "AltDiffusionImg2ImgPipeline": Case(parts=sd(), call=IMG2IMG),
    "StableDiffusionUpscalePipeline": Case(
        parts=lambda p: (
            p.sd(*CORE)
            | {
                "unet": p.unet(in_channels=7, num_class_embeds=400),
                "low_res_scheduler": DDPMScheduler(),
            }
        ),
        call={"image": PHOTO.resize((8, 8)), "output_type": "latent"},
    ),
    "StableUnCLIPPipeline": Case(parts=stable_unclip, call={"prior_num_inference_steps": 2}),
    "StableUnCLIPImg2ImgPipeline": Case(parts=stable_unclip_img2img, call={"image": PHOTO}),
    "StableDiffusionGLIGENPipeline": Case(
        parts=sd(unet=gated_unet),
        call={
            "gligen_phrases": ["a cat"],
            "gligen_boxes": [[0.1, 0.1, 0.6, 0.6]],
            "gligen_scheduled_sampling_beta": 0.6,
        },
    ),
    "StableDiffusionDiffEditPipeline": Case(
        parts=sd(
            inverse_scheduler=lambda p: DDIMInverseScheduler.from_config(p.base.scheduler.config)
        ),
        ready=inverted,
    ),
    "StableDiffusionInpaintPipelineLegacy": Case(
        parts=sd(), call={"image": PHOTO, "mask_image": LEFT_HALF, "strength": 1.0}
    ),
    "StableDiffusionModelEditingPipeline": Case(parts=sd()),
    "StableDiffusionParadigmsPipeline": Case(
        parts=sd(scheduler=lambda p: DDIMParallelScheduler.from_config(p.base.scheduler.config)),
        prompt=["a cat", "a cow"],
        num_prompts=2,
        call={"parallel": 2, "tolerance": 0.0, "eta": 0.0},
    ),
    "BlipDiffusionPipeline": Case(
        parts=blip, prompt=["swimming"], negative="neg_prompt", call=BLIP_CALL
    ),
    "BlipDiffusionControlNetPipeline": Case(
        parts=lambda p: blip(p) | {"controlnet": controlnet(p.base.unet)},
        prompt=["swimming"],
        negative="neg_prompt",
        call={**BLIP_CALL, "condtioning_image": PHOTO},
    ),
    "StableDiffusionPanoramaPipeline": Case(
        parts=sd(), call={"height": SIZE, "width": 640, "view_batch_size": 2}
    ),
}
