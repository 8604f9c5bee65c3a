"""Loading bases and fine-tunes as people have them, with errors that say what to do."""

import copy
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from diffusers import (
    AutoPipelineForText2Image,
    DiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import convert_unet_state_dict_to_peft
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from pnp_core.conditions import AddedConditions
from pnp_core.files import loading_from, read_json
from pnp_core.guide.saved import not_finite
from pnp_core.guide.unet import describe
from pnp_core.model_files import (
    LORA_FILE,
    check_base,
    check_model_files,
    hub_revision,
    is_hub_id,
    is_lora,
)
from pnp_core.single_file import load_single_file, problem_of


def load_pipeline(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    like: Path | None = None,
) -> DiffusionPipeline:
    """A base from a diffusers folder, a single .safetensors file or a hub id.

    Of a fine-tune in a single file without configs, ``like`` is the folder of its base's.

    Raises:
        ValueError: weights that are missing or not finite; see :func:`check_model_files`,
            :func:`check_base` and :func:`load_single_file`.
    """
    check_model_files(path)
    check_base(path)
    if Path(path).is_file():
        pipe = load_single_file(Path(path), dtype=dtype, like=like)
    else:
        index_path = Path(path) / "model_index.json"
        index = read_json(index_path) if index_path.exists() else {}
        # SDXL has none
        options: dict[str, Any] = {} if "text_encoder_2" in index else {"safety_checker": None}
        if is_hub_id(path):
            options["revision"] = hub_revision(str(path))
        options |= load_encoders(path, index, dtype=dtype)
        with nullcontext() if is_hub_id(path) else loading_from(str(path)):
            pipe = AutoPipelineForText2Image.from_pretrained(
                path, use_safetensors=True, torch_dtype=dtype, **options
            )
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            check_weights(part, path)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def load_encoders(
    path: str | Path, index: Mapping[str, Any], *, dtype: torch.dtype
) -> dict[str, nn.Module]:
    """The parts of a pipeline's folder that are transformers' models, by their names in its index.

    Of one on disk. Diffusers would load them too, and where a file lacks weights give random ones
    without a word.

    Raises:
        ValueError: a part's files lack weights, or have some of another shape.
    """
    parts: dict[str, nn.Module] = {}
    for name, entry in index.items():
        library, class_name = entry if isinstance(entry, list) and len(entry) == 2 else ("", "")
        known = library == "transformers" and hasattr(transformers, class_name)
        cls: Any = getattr(transformers, class_name) if known else None
        if not hasattr(cls, "base_model_prefix"):  # tokenizers and image processors have none
            continue
        with loading_from(f"{path}/{name}"):
            part, info = cls.from_pretrained(
                path,
                subfolder=name,
                use_safetensors=True,
                output_loading_info=True,
                dtype=dtype,  # else that of its config, which need not be the file's
                ignore_mismatched_sizes=True,  # told below
            )
        for key, found, expected in info["mismatched_keys"]:
            raise ValueError(
                f"{path}/{name} is damaged ({key} expected shape {list(expected)}, but got "
                f"{list(found)}): get it again."
            )
        if lacking := sorted(info["missing_keys"]):
            raise ValueError(
                f"{path} can't be used: {name}/ lacks {len(lacking)} of its weights, such as "
                f"{lacking[0]}: it may be only partly downloaded or converted; get it again."
            )
        parts[name] = part
    return parts


def load_unet(
    path: str | Path,
    *,
    base: DiffusionPipeline,
    dtype: torch.dtype | None = None,
) -> UNet2DConditionModel:
    """The UNet of a fine-tune of ``base``, on the base's device.

    ``path`` is a pipeline folder, a folder with only ``unet/``, a LoRA (a file, or the folder of
    one), a single .safetensors file or a hub id.

    Raises:
        ValueError: damaged files, weights that are missing or not finite, or an architecture that
            is not the base's; both are named.
    """
    check_model_files(path)
    path = Path(path)
    dtype = dtype or base.unet.dtype
    if path.is_dir() and not (path / "unet").is_dir():
        path = path / LORA_FILE
    if path.is_file() and is_lora(path):
        unet = load_lora_unet(path, base=base).to(dtype)
    elif path.is_file():
        with tempfile.TemporaryDirectory() as config:  # spares asking the hub for it
            base.unet.save_config(f"{config}/unet")
            try:
                unet = UNet2DConditionModel.from_single_file(
                    str(path), torch_dtype=dtype, config=config, subfolder="unet"
                )
            except (ValueError, RuntimeError) as error:
                raise ValueError(
                    f"The UNet in {path} is not a fine-tune of the base: {problem_of(error)}"
                ) from None
    else:
        revision = hub_revision(str(path)) if is_hub_id(path) else None
        with loading_from(f"The UNet in {path}"):
            unet = UNet2DConditionModel.from_pretrained(
                path, subfolder="unet", torch_dtype=dtype, use_safetensors=True, revision=revision
            )
    check_weights(unet, path)
    check_is_fine_tune(unet, base.unet, path)
    return unet.to(base.unet.device)


def check_weights(part: nn.Module, path: str | Path) -> None:
    """Raise ValueError if a part of the model at ``path`` lacks weights, or one is not finite."""
    kind = type(part).__name__
    if lacking := [name for name, weight in part.named_parameters() if weight.is_meta]:
        raise ValueError(
            f"{path} can't be used: its {kind} lacks {lacking[0]}: it may be only partly "
            "downloaded or converted; get it again."
        )
    if name := not_finite(part):
        raise ValueError(f"{path} can't be used: {name} of its {kind} holds NaN or infinity.")


def check_is_fine_tune(
    unet: UNet2DConditionModel, base: UNet2DConditionModel, path: str | Path
) -> None:
    """Raise ValueError if the UNet at ``path`` has not the architecture of the base's."""
    theirs, ours = describe(unet), describe(base)
    for key, value in theirs.items():
        if value != ours[key]:
            raise ValueError(
                f"The UNet of {path} is not a fine-tune of the base: it has {key} = {value}, the "
                f"base has {ours[key]}."
            )


def load_lora_unet(path: Path, *, base: DiffusionPipeline) -> UNet2DConditionModel:
    """A copy of the base's UNet with a LoRA file merged into it.

    Raises:
        ValueError: the LoRA is not for this UNet, or a part of it isn't.
    """
    unet = copy.deepcopy(base.unet)
    try:
        state, alphas, metadata = base.lora_state_dict(
            str(path), unet_config=unet.config, return_lora_metadata=True
        )
        wanted = adapted_modules(state)
        if not wanted:
            raise ValueError("it has nothing for a UNet")
        base.load_lora_into_unet(state, network_alphas=alphas, unet=unet, metadata=metadata)
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"The LoRA {path} is not for the base's UNet: {error}") from None
    found = {name for name, part in unet.named_modules() if isinstance(part, BaseTunerLayer)}
    if lacking := sorted(wanted - found):  # diffusers leaves these out, and says nothing
        raise ValueError(
            f"The LoRA {path} is not for the base's UNet: of the {len(wanted)} modules that it "
            f"changes, diffusers does not find {len(lacking)} there, such as {lacking[0]}."
        )
    unet.fuse_lora()
    unet.unload_lora()
    return unet


def adapted_modules(state: Mapping[str, Tensor]) -> set[str]:
    """Names of a UNet's modules that a LoRA is for, of its weights as diffusers reads them."""
    keys = [key.removeprefix("unet.") for key in state if key.startswith("unet.")]
    keys = list(convert_unet_state_dict_to_peft(dict.fromkeys(keys)))
    return {key.rsplit(".lora_", 1)[0] for key in keys if not key.endswith(".alpha")}


class TextStates(NamedTuple):
    """N prompts as a UNet reads them. L tokens, D text width, P width of the pooled text."""

    states_NLD: Tensor
    pooled_NP: Tensor | None  # SDXL's


@torch.no_grad()
def encode_prompts(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    batch_size: int = 64,
    *,
    dtype: torch.dtype = torch.float32,
) -> TextStates:
    """The prompts as the pipeline's UNet reads them, on the CPU in this dtype.

    The empty prompt stands for no prompt: where the pipeline has zeros for it, so have we.
    """
    result: list[Tensor] = []
    for start in range(0, len(prompts), batch_size):
        batch = list(prompts[start : start + batch_size])
        encoded = pipe.encode_prompt(
            batch,
            device=pipe.text_encoder.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        parts = [encoded[0], encoded[2]] if is_xl(pipe) else [encoded[0]]
        if not result:  # of all prompts at once: they are many GB
            result = [torch.empty((len(prompts), *x.shape[1:]), dtype=dtype) for x in parts]
        for x, part in zip(result, parts, strict=True):
            x[start : start + len(batch)] = part.float().cpu()
    if pipe.config.get("force_zeros_for_empty_prompt"):
        for row, prompt in enumerate(prompts):
            if prompt == "":
                for x in result:
                    x[row] = 0
    return TextStates(result[0], result[1] if len(result) > 1 else None)


def pooled_width(config: Mapping[str, Any]) -> int:
    """Width of the pooled text that an SDXL UNet of this config is told."""
    width = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    return int(width)


def is_xl(pipe: DiffusionPipeline) -> bool:
    """Whether the base is an SDXL one: its UNet is told pooled text and image sizes."""
    return pipe.unet.config.addition_embed_type == "text_time"


def time_ids_of(pipe: DiffusionPipeline) -> Tensor:
    """What an SDXL pipeline says of uncropped square images of the base's size: shape ``(6,)``."""
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    return torch.tensor([size, size, 0, 0, size, size])


def added_conditions(
    pipe: DiffusionPipeline, text: TextStates, negative: TextStates
) -> AddedConditions | None:
    """What an SDXL base is told with these prompts; None for other bases.

    Args:
        pipe: of the base.
        text: of the prompts.
        negative: as many prompts as in ``text``, or a single one.
    """
    if text.pooled_NP is None or negative.pooled_NP is None:
        return None
    return AddedConditions(
        pooled_BP=text.pooled_NP,
        negative_pooled_BP=negative.pooled_NP.expand_as(text.pooled_NP),
        time_ids_B6=time_ids_of(pipe).expand(len(text.pooled_NP), -1),
    )
