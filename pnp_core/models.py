"""Loading bases and fine-tunes as people have them, with errors that say what to do."""

import copy
import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import (
    AutoPipelineForText2Image,
    DiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pnp_core.conditions import AddedConditions
from pnp_core.guide.unet import describe
from pnp_core.single_file import has_all_parts, is_lora, load_single_file

PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
LORA_FILE = "pytorch_lora_weights.safetensors"
# What a base's UNet and a fine-tune's have in common.
ARCHITECTURE = (
    "in_channels",
    "block_out_channels",
    "layers_per_block",
    "cross_attention_dim",
    "down_block_types",
    "up_block_types",
)


def check_model_files(path: str | Path) -> None:
    """Look at a local model's files without loading them.

    A ``path`` that is neither a file nor a folder here passes only in the form of a hub id.

    Raises:
        ValueError: nothing is there; a file is pickled, truncated or missing.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix in PICKLES:
            raise ValueError(
                f"{path} is a pickled checkpoint, which can run code when opened: convert it to "
                ".safetensors."
            )
        if path.suffix != ".safetensors":
            raise ValueError(f"{path} is not a model: expected a folder or a .safetensors file.")
        check_safetensors(path)
        return
    if is_hub_id(path):
        return
    if not path.is_dir():
        raise ValueError(f"No model at {path}: the path does not exist.")
    for folder in model_folders(path):
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            pickled = [f.name for f in folder.iterdir() if f.suffix in PICKLES]
            why = f"only pickled weights ({', '.join(pickled)})" if pickled else "no weights"
            raise ValueError(f"{folder} has {why}: it needs .safetensors files.")
        for file in files:
            check_safetensors(file)
        for index_file in folder.glob("*.safetensors.index.json"):
            listed = set(json.loads(index_file.read_text())["weight_map"].values())
            missing = sorted(listed - {f.name for f in files})
            if missing:
                raise ValueError(f"{folder} lacks {', '.join(missing)}: download it again.")


def check_same_kind(path: str | Path, base: str | Path) -> None:
    """Raise ValueError if configs on disk tell that a UNet is none of the base's architecture."""
    ours, theirs = (Path(folder, "unet", "config.json") for folder in (base, path))
    if not (ours.exists() and theirs.exists()):  # kept in another way: loading will tell
        return
    base_config, config = json.loads(ours.read_text()), json.loads(theirs.read_text())
    for field in ARCHITECTURE:
        if base_config.get(field) != config.get(field):
            raise ValueError(
                f"{path} is no fine-tune of {base}: its UNet has {field} {config.get(field)}, the "
                f"base's {base_config.get(field)}"
            )


def is_hub_id(path: str | Path) -> bool:
    """Whether a path that is not here has the form of a hub id, ``owner/name``."""
    path = Path(path)
    return len(path.parts) == 2 and not path.exists() and not path.parent.exists()


@cache
def hub_revision(hub_id: str) -> str:
    """The commit that a hub id stands for: the newest, or the one kept here if the hub is away.

    One answer a process, so that what is loaded and what is recorded are the same.

    Raises:
        ValueError: there is no such model, or neither the hub nor this machine tells.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    try:
        revision = huggingface_hub.HfApi().model_info(hub_id).sha
        why = "the hub names no commit of it"
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise ValueError(f"No model {hub_id} on the hub: {error}") from None
    except Exception as error:  # each of the hub's clients has its own
        folder = f"models--{hub_id.replace('/', '--')}"
        ref = Path(constants.HF_HUB_CACHE, folder, "refs", "main")
        revision, why = (ref.read_text().strip() if ref.exists() else None), str(error)
    if not revision:
        raise ValueError(f"{hub_id}: which revision it is can't be told, and none is here: {why}")
    return revision


def model_folders(path: Path) -> Iterator[Path]:
    """The folders under ``path`` that must hold weights."""
    if (path / "model_index.json").exists():
        try:
            index = json.loads((path / "model_index.json").read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path / 'model_index.json'} is not valid JSON: {error}.") from None
        for name, kind in index.items():
            with_weights = ("unet", "vae", "text_encoder", "text_encoder_2")
            if name in with_weights and isinstance(kind, list) and kind[0] is not None:
                if not (path / name).is_dir():
                    raise ValueError(f"{path} lacks its folder {name}/: download it again.")
                yield path / name
    elif (path / "unet").is_dir():
        yield path / "unet"
    elif (path / LORA_FILE).exists():
        yield path
    else:
        raise ValueError(
            f"{path} is not a model: it has no model_index.json, no unet/ and no {LORA_FILE}."
        )


def is_whole(path: str | Path) -> bool:
    """Whether a model brings all parts of a pipeline, not a UNet or a LoRA alone."""
    path = Path(path)
    if path.is_file():
        return not is_lora(path) and has_all_parts(path)
    return is_hub_id(path) or (path / "model_index.json").exists()


def check_safetensors(path: Path) -> None:
    """Raise ValueError if the file is not whole."""
    try:
        with safe_open(path, "pt"):
            pass
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or only partly downloaded ({error}): get it again."
        ) from None


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
        ValueError: see :func:`check_model_files` and :func:`load_single_file`.
    """
    check_model_files(path)
    if Path(path).is_file():
        if is_lora(Path(path)):
            raise ValueError(f"{path} is a LoRA: it can be a fine-tune of a base, but not a base.")
        pipe = load_single_file(Path(path), dtype=dtype, like=like)
    else:
        index = Path(path) / "model_index.json"
        is_xl_folder = index.exists() and "text_encoder_2" in json.loads(index.read_text())
        options: dict[str, Any] = {} if is_xl_folder else {"safety_checker": None}  # SDXL has none
        if is_hub_id(path):
            options["revision"] = hub_revision(str(path))
        pipe = AutoPipelineForText2Image.from_pretrained(
            path, use_safetensors=True, torch_dtype=dtype, **options
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


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
        ValueError: damaged files, or an architecture that is not the base's; both are named.
    """
    check_model_files(path)
    path = Path(path)
    dtype = dtype or base.unet.dtype
    if path.is_dir() and not (path / "unet").is_dir():
        path = path / LORA_FILE
    if path.is_file() and is_lora(path):
        return load_lora_unet(path, base=base).to(dtype)
    if path.is_file():
        with tempfile.TemporaryDirectory() as config:  # spares asking the hub for it
            base.unet.save_config(f"{config}/unet")
            try:
                unet = UNet2DConditionModel.from_single_file(
                    str(path), torch_dtype=dtype, config=config, subfolder="unet"
                )
            except (ValueError, RuntimeError) as error:
                raise ValueError(
                    f"The UNet in {path} is not a fine-tune of the base: {error}"
                ) from None
    else:
        revision = hub_revision(str(path)) if is_hub_id(path) else None
        unet = UNet2DConditionModel.from_pretrained(
            path, subfolder="unet", torch_dtype=dtype, use_safetensors=True, revision=revision
        )
    check_is_fine_tune(unet, base.unet, path)
    return unet.to(base.unet.device)


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
        ValueError: the LoRA is not for this UNet.
    """
    unet = copy.deepcopy(base.unet)
    state, alphas, metadata = base.lora_state_dict(
        str(path), unet_config=unet.config, return_lora_metadata=True
    )
    if not any(key.startswith("unet.") for key in state):
        raise ValueError(f"The LoRA {path} has nothing for a UNet.")
    try:
        base.load_lora_into_unet(state, network_alphas=alphas, unet=unet, metadata=metadata)
    except RuntimeError as error:
        raise ValueError(f"The LoRA {path} is not for the base's UNet: {error}") from None
    unet.fuse_lora()
    unet.unload_lora()
    return unet


class TextStates(NamedTuple):
    """N prompts as a UNet reads them. L tokens, D text width, P width of the pooled text."""

    states_NLD: Tensor
    pooled_NP: Tensor | None  # SDXL's


@torch.no_grad()
def encode_prompts(
    pipe: DiffusionPipeline, prompts: Sequence[str], batch_size: int = 64
) -> TextStates:
    """The prompts as the pipeline's UNet reads them, float32 on the CPU.

    The empty prompt stands for no prompt: where the pipeline has zeros for it, so have we.
    """
    states, pooled = [], []
    for start in range(0, len(prompts), batch_size):
        batch = list(prompts[start : start + batch_size])
        encoded = pipe.encode_prompt(
            batch,
            device=pipe.text_encoder.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        states.append(encoded[0].float().cpu())
        if is_xl(pipe):
            pooled.append(encoded[2].float().cpu())
    result = TextStates(torch.cat(states), torch.cat(pooled) if pooled else None)
    if pipe.config.get("force_zeros_for_empty_prompt"):
        empty_N = torch.tensor([prompt == "" for prompt in prompts])
        for x in result:
            if x is not None:
                x[empty_N] = 0
    return result


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


def weights_hash(path: str | Path) -> str:
    """Identity of a base or a fine-tune, which guides record.

    SHA-256 over its UNet's weights, or its LoRA's, and its scheduler's config; of a hub id, over
    its name and revision.

    What else a base is made of: :func:`pnp_core.identity.base_identity`.

    Raises:
        ValueError: see :func:`check_model_files` and :func:`hub_revision`.
    """
    check_model_files(path)
    path = Path(path)
    digest = hashlib.sha256()
    if path.is_file():
        files = [path, *sorted(path.with_suffix("").glob("scheduler/*.json"))]
    elif path.is_dir():
        files = sorted((path / "unet").glob("*.safetensors")) or [path / LORA_FILE]
        files += sorted((path / "scheduler").glob("*.json"))
    else:
        digest.update(f"{path}@{hub_revision(str(path))}".encode())
        files = []
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
