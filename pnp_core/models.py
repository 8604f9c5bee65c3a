"""Loading bases and fine-tunes as people have them, with errors that say what to do."""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pnp_core.guide import describe

PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
LORA_FILE = "pytorch_lora_weights.safetensors"


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
    if not path.is_dir():
        if len(path.parts) == 2 and not path.parent.exists():
            return  # owner/name on the hub
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
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> StableDiffusionPipeline:
    """A base from a diffusers folder, a single .safetensors file or a hub id.

    Raises:
        ValueError: see :func:`check_model_files`.
    """
    check_model_files(path)
    options: dict[str, Any] = {"torch_dtype": dtype, "safety_checker": None}
    if Path(path).is_file():
        pipe = StableDiffusionPipeline.from_single_file(str(path), **options)
    else:
        pipe = StableDiffusionPipeline.from_pretrained(
            path, use_safetensors=True, requires_safety_checker=False, **options
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def load_unet(
    path: str | Path,
    *,
    base: StableDiffusionPipeline,
    dtype: torch.dtype | None = None,
) -> UNet2DConditionModel:
    """The UNet of a fine-tune of ``base``, on the base's device.

    ``path`` is a pipeline folder, a folder with only ``unet/``, a folder with a LoRA, a single
    .safetensors file or a hub id.

    Raises:
        ValueError: damaged files, or an architecture that is not the base's; both are named.
    """
    check_model_files(path)
    path = Path(path)
    dtype = dtype or base.unet.dtype
    if path.is_dir() and not (path / "unet").is_dir():
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
        unet = UNet2DConditionModel.from_pretrained(
            path, subfolder="unet", torch_dtype=dtype, use_safetensors=True
        )
    theirs, ours = describe(unet), describe(base.unet)
    for key, value in theirs.items():
        if value != ours[key]:
            raise ValueError(
                f"The UNet of {path} is not a fine-tune of the base: it has {key} = {value}, the "
                f"base has {ours[key]}."
            )
    return unet.to(base.unet.device)


def load_lora_unet(path: Path, *, base: StableDiffusionPipeline) -> UNet2DConditionModel:
    """A copy of the base's UNet with a LoRA merged into it."""
    import copy

    pipe = StableDiffusionPipeline(**{**base.components, "unet": copy.deepcopy(base.unet)})
    pipe.load_lora_weights(path, weight_name=LORA_FILE)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    return pipe.unet


@torch.no_grad()
def encode_prompts(
    pipe: StableDiffusionPipeline, prompts: Sequence[str], batch_size: int = 64
) -> Tensor:
    """Text states ``(N, L, D)`` of the prompts, float32 on the CPU."""
    states = []
    for start in range(0, len(prompts), batch_size):
        batch = list(prompts[start : start + batch_size])
        embeds = pipe.encode_prompt(batch, pipe.text_encoder.device, 1, False)[0]
        states.append(embeds.float().cpu())
    return torch.cat(states)


def weights_hash(path: str | Path) -> str:
    """Identity of a base: SHA-256 over its UNet's weights and its scheduler's config.

    Raises:
        ValueError: see :func:`check_model_files`.
    """
    check_model_files(path)
    path = Path(path)
    digest = hashlib.sha256()
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted((path / "unet").glob("*.safetensors"))
        files += sorted((path / "scheduler").glob("*.json"))
    else:
        digest.update(str(path).encode())
        files = []
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
