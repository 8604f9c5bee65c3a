"""How a guide gets into each class of diffusers pipeline, and which can't have one.

A stock pipeline decides on classifier-free guidance in one of these ways:

- ``ASKS``: it asks its property ``do_classifier_free_guidance``. A plugged one answers no, and runs
  one forward a step. With exact steps it answers as the stock one, and goes as ``DOUBLES``.
- ``DOUBLES``: it doubles the batch in its own code. The hook runs the half under the prompt, and
  gives the guided prediction back for both: ``u + w (c - u)`` then is that prediction exactly.
- ``VIEWS``: as ``DOUBLES``, with several forwards a step, each of other parts of the picture.

Any other is refused by name. Classes are known by their names within diffusers; the nearest known
ancestor speaks for a subclass. One that has none, but whose code looks as if it asks, is taken at
its word, and found out in its first forward if it does otherwise.
"""

from collections.abc import Mapping
from typing import Any

from pnp_core.arguments import signature_with

ASKS = "asks"
DOUBLES = "doubles"
VIEWS = "views"

CFG = "do_classifier_free_guidance"
PARALLEL = "StableDiffusionParadigmsPipeline"

# By name within diffusers.
SERVED: dict[str, str] = {
    **dict.fromkeys(
        (
            "StableDiffusionPipeline",
            "StableDiffusionImg2ImgPipeline",
            "StableDiffusionInpaintPipeline",
            "StableDiffusionDepth2ImgPipeline",
            "StableDiffusionControlNetPipeline",
            "StableDiffusionControlNetImg2ImgPipeline",
            "StableDiffusionControlNetInpaintPipeline",
            "StableDiffusionAdapterPipeline",
            "StableDiffusionLDM3DPipeline",
            "StableDiffusionXLPipeline",
            "StableDiffusionXLImg2ImgPipeline",
            "StableDiffusionXLInpaintPipeline",
            "StableDiffusionXLControlNetPipeline",
            "StableDiffusionXLControlNetImg2ImgPipeline",
            "StableDiffusionXLControlNetInpaintPipeline",
            "StableDiffusionXLControlNetUnionPipeline",
            "StableDiffusionXLControlNetUnionImg2ImgPipeline",
            "StableDiffusionXLControlNetUnionInpaintPipeline",
            "StableDiffusionXLAdapterPipeline",
            "AltDiffusionPipeline",
            "AltDiffusionImg2ImgPipeline",
        ),
        ASKS,
    ),
    **dict.fromkeys(
        (
            "StableDiffusionUpscalePipeline",
            "StableUnCLIPPipeline",
            "StableUnCLIPImg2ImgPipeline",
            "StableDiffusionGLIGENPipeline",
            "StableDiffusionDiffEditPipeline",
            "StableDiffusionInpaintPipelineLegacy",
            "StableDiffusionModelEditingPipeline",
            PARALLEL,
            "BlipDiffusionPipeline",
            "BlipDiffusionControlNetPipeline",
        ),
        DOUBLES,
    ),
    "StableDiffusionPanoramaPipeline": VIEWS,
}

UNPLUGGED = "use it unplugged"

# Why not, and what to do instead.
REFUSED: dict[str, str] = {
    **{
        f"StableDiffusion{kind.replace('+', 'PAG')}Pipeline": (
            "perturbed-attention guidance runs a forward more a step and starts from the unguided "
            f"prediction: use StableDiffusion{kind.replace('+', '')}Pipeline.from_pipe(pipe)"
        )
        for kind in (
            *("+", "+Img2Img", "+Inpaint", "ControlNet+", "ControlNet+Inpaint"),
            *("XL+", "XL+Img2Img", "XL+Inpaint", "XLControlNet+", "XLControlNet+Img2Img"),
        )
    },
    **dict.fromkeys(
        (
            "AnimateDiffPipeline",
            "AnimateDiffControlNetPipeline",
            "AnimateDiffSDXLPipeline",
            "AnimateDiffSparseControlNetPipeline",
            "AnimateDiffVideoToVideoPipeline",
            "AnimateDiffVideoToVideoControlNetPipeline",
            "AnimateDiffPAGPipeline",
            "PIAPipeline",
        ),
        "its UNet has motion modules between the base's layers, and a guide is made for the base "
        f"alone: {UNPLUGGED}",
    ),
    **dict.fromkeys(
        ("KolorsPipeline", "KolorsImg2ImgPipeline", "KolorsPAGPipeline"),
        "its UNet projects the states of its language model before it attends to them, where a "
        f"guide does not see them: {UNPLUGGED}",
    ),
    **dict.fromkeys(
        ("StableDiffusionInstructPix2PixPipeline", "StableDiffusionXLInstructPix2PixPipeline"),
        "it guides by an image beside the prompt, with three predictions a step and two scales: "
        f"{UNPLUGGED}",
    ),
    **dict.fromkeys(
        (
            "SemanticStableDiffusionPipeline",
            "LEditsPPPipelineStableDiffusion",
            "LEditsPPPipelineStableDiffusionXL",
        ),
        "it guides by editing prompts too, each with a prediction of its own and compared with the "
        f"unguided one: {UNPLUGGED}",
    ),
    "StableDiffusionPipelineSafe": (
        "its safety guidance adds a third prediction a step and starts from the unguided one: use "
        "StableDiffusionPipeline with a negative prompt"
    ),
    "StableDiffusionSAGPipeline": (
        "self-attention guidance runs a forward more a step and starts from the unguided "
        "prediction: use StableDiffusionPipeline"
    ),
    **dict.fromkeys(
        ("StableDiffusionAttendAndExcitePipeline", "StableDiffusionPix2PixZeroPipeline"),
        f"it steers by gradients through further forwards of its UNet: {UNPLUGGED}",
    ),
    "StableDiffusionGLIGENTextImagePipeline": (
        "it takes the unguided prediction from a second forward, without the grounding: use "
        "StableDiffusionGLIGENPipeline"
    ),
    "CycleDiffusionPipeline": (
        f"it guides a second picture in the same forward, at a scale of its own: {UNPLUGGED}"
    ),
    **dict.fromkeys(
        ("TextToVideoZeroPipeline", "TextToVideoZeroSDXLPipeline"),
        "its attention processors look for the frames under both prompts in one batch: "
        f"{UNPLUGGED}",
    ),
    **dict.fromkeys(
        ("StableDiffusionControlNetXSPipeline", "StableDiffusionXLControlNetXSPipeline"),
        "its UNet and its ControlNet-XS are one model of a class of its own: use a ControlNet",
    ),
    **dict.fromkeys(
        ("StableDiffusionImageVariationPipeline", "PaintByExamplePipeline"),
        f"it is given an image in place of a prompt, which no guide is made for: {UNPLUGGED}",
    ),
    "StableDiffusionLatentUpscalePipeline": (
        f"its UNet is made of other blocks than Stable Diffusion's: {UNPLUGGED}"
    ),
    "StableDiffusionXLModularPipeline": (
        "it leaves guidance to a guider component, which runs a forward for each prompt: use "
        "StableDiffusionXLPipeline with the same components"
    ),
    **{
        f"OnnxStableDiffusion{kind}": (
            "its UNet is an ONNX graph, which nothing can act in: use StableDiffusion"
            f"{kind.removesuffix('Legacy')}"
        )
        for kind in (
            *("Pipeline", "Img2ImgPipeline", "InpaintPipeline", "InpaintPipelineLegacy"),
            "UpscalePipeline",
        )
    },
    # of other families, with a UNet2DConditionModel all the same
    **dict.fromkeys(
        (
            *("IFPipeline", "IFImg2ImgPipeline", "IFInpaintingPipeline"),
            *("IFSuperResolutionPipeline", "IFImg2ImgSuperResolutionPipeline"),
            "IFInpaintingSuperResolutionPipeline",
            *("KandinskyPipeline", "KandinskyImg2ImgPipeline", "KandinskyInpaintPipeline"),
            *("KandinskyCombinedPipeline", "KandinskyImg2ImgCombinedPipeline"),
            *("KandinskyInpaintCombinedPipeline", "KandinskyV22Pipeline"),
            *("KandinskyV22Img2ImgPipeline", "KandinskyV22InpaintPipeline"),
            *("KandinskyV22ControlnetPipeline", "KandinskyV22ControlnetImg2ImgPipeline"),
            *("KandinskyV22CombinedPipeline", "KandinskyV22Img2ImgCombinedPipeline"),
            *("KandinskyV22InpaintCombinedPipeline", "UnCLIPPipeline"),
            "UnCLIPImageVariationPipeline",
        ),
        "its UNet has none of Stable Diffusion's transformer blocks, where a guide acts: "
        f"{UNPLUGGED}",
    ),
    **dict.fromkeys(
        (
            *("VersatileDiffusionPipeline", "VersatileDiffusionDualGuidedPipeline"),
            "VersatileDiffusionImageVariationPipeline",
            "VersatileDiffusionTextToImagePipeline",
        ),
        f"its UNet attends to a prompt and an image in layers of its own: {UNPLUGGED}",
    ),
    **dict.fromkeys(
        ("AudioLDMPipeline", "MusicLDMPipeline"),
        f"its UNet is told the prompt as a class, not by cross-attention: {UNPLUGGED}",
    ),
    "LDMTextToImagePipeline": (
        f"it takes no negative prompt, and guides at scales below 1 too: {UNPLUGGED}"
    ),
}

# The same of diffusers' community pipelines, in whatever module.
COMMUNITY: dict[str, str] = dict.fromkeys(
    (
        *("StyleAlignedSDXLPipeline", "StableDiffusionHDPainterPipeline", "FrescoV2VPipeline"),
        "RegionalPromptingStableDiffusionPipeline",
    ),
    "its attention looks for the two halves of CFG's batch: " + UNPLUGGED,
)

# Why there is nothing for a guide to do.
UNAFFECTED: dict[str, str] = {
    **dict.fromkeys(
        ("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline"),
        "its UNet is told the guidance scale and runs one forward a step already",
    ),
    **dict.fromkeys(
        (
            *("MarigoldDepthPipeline", "MarigoldIntrinsicsPipeline", "MarigoldNormalsPipeline"),
            "AudioDiffusionPipeline",
        ),
        "it does without guidance",
    ),
}


def known(pipeline_class: type[Any]) -> str | None:
    """The nearest class among its ancestors and itself that the tables know."""
    for ancestor in pipeline_class.__mro__:
        if ancestor.__module__.startswith("diffusers."):
            for table in (SERVED, REFUSED, UNAFFECTED):
                if ancestor.__name__ in table:
                    return ancestor.__name__
    return None


def check_class(pipeline_class: type[Any]) -> None:
    """Raise ValueError if pipelines of this class are known not to go with a guide."""
    name = known(pipeline_class)
    for ancestor in pipeline_class.__mro__:
        if ancestor.__name__ in COMMUNITY:
            why = COMMUNITY[ancestor.__name__]
            raise ValueError(f"{pipeline_class.__name__} can't have a guide: {why}.")
    if name in REFUSED:
        raise ValueError(f"{pipeline_class.__name__} can't have a guide: {REFUSED[name]}.")
    if name in UNAFFECTED:
        raise ValueError(f"{pipeline_class.__name__} has no use for a guide: {UNAFFECTED[name]}.")


def way_in(pipeline_class: type[Any]) -> str:
    """How a guide gets into pipelines of this class.

    Raises:
        ValueError: it doesn't; why is said.
    """
    check_class(pipeline_class)
    name = known(pipeline_class)
    if name is not None:
        return SERVED[name]
    asks = isinstance(getattr(pipeline_class, CFG, None), property)
    needed = (("__call__", "guidance_scale"), ("encode_prompt", CFG))
    if not asks or not all(signature_with(pipeline_class, *each) for each in needed):
        raise ValueError(
            f"{pipeline_class.__name__} can't have a guide: it derives from no known pipeline, and "
            "does not decide on guidance as Stable Diffusion does, by guidance_scale, "
            "encode_prompt and do_classifier_free_guidance. Derive it from the class it resembles."
        )
    return ASKS


def is_guided(pipe: Any, stock_class: type[Any]) -> bool:
    """Whether a pipeline says so as its stock class does: a subclass may decide otherwise."""
    asked = getattr(stock_class, CFG, None)
    if not isinstance(asked, property) or asked.fget is None:
        return True
    try:
        return bool(asked.fget(pipe))
    except AttributeError:  # not told its scale yet
        return True


def check_exact_steps(pipeline_class: type[Any]) -> None:
    """Raise ValueError if pipelines of this class can't have exact CFG steps in a guided run."""
    if way_in(pipeline_class) == VIEWS or known(pipeline_class) == PARALLEL:
        raise ValueError(
            f"{pipeline_class.__name__} can't have exact steps: a forward of its UNet is not one "
            "step of the whole picture. Plug it with exact_steps=0."
        )


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise ValueError if a call asks for what needs the unguided prediction.

    Args:
        arguments: of the call, by name.
    """
    for name in ("guidance_rescale", "add_predicted_noise"):
        if arguments.get(name):
            raise ValueError(
                f"{name} does not work with a guide: it needs the unguided prediction, which a "
                f"guide does away with. Pass {name}={type(arguments[name])()}."
            )
