"""What can be told of a model by its files, without loading it.

Nothing here imports torch or diffusers, which takes seconds: a mistake in params.yaml is told at
once.
"""

import hashlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pnp_core.files import read_json

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
# A LoRA's matrix (rank, text width) where attention reads text, by diffusers or by kohya's tools.
READS_TEXT = re.compile(r"attn2.*to_[kv][._].*(lora_A|down)\b.*\.weight$")
PARTS = {
    "VAE": ("first_stage_model.",),
    "text encoder": ("cond_stage_model.", "conditioner."),
}

# Of single files in the original layout, see :mod:`pnp_core.single_file`.
LAYOUTS = Path(__file__).parent / "layouts"
LAYOUT_OF_TEXT_WIDTH = {768: "sd15", 1024: "sd21", 2048: "sdxl"}
CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
TEXT_TO_KEY = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"


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
        check_weight_files(folder)


def check_weight_files(folder: Path) -> None:
    """Raise ValueError if a folder's weights are pickled, truncated, not all there, or none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(f.name for f in folder.iterdir() if f.suffix in PICKLES)
        why = f"only pickled weights ({', '.join(pickled)})" if pickled else "no weights"
        raise ValueError(f"{folder} has {why}: it needs .safetensors files.")
    for file in files:
        check_safetensors(file)
    for index_file in folder.glob("*.safetensors.index.json"):
        listed = set(read_json(index_file)["weight_map"].values())
        missing = sorted(listed - {f.name for f in files})
        if missing:
            raise ValueError(f"{folder} lacks {', '.join(missing)}: download it again.")


def check_same_kind(path: str | Path, base: str | Path) -> None:
    """Raise ValueError if files on disk tell that a UNet is none of the base's architecture.

    Of a single file and of a LoRA, shapes of weights tell; of a folder, its config.
    """
    path = Path(path)
    ours = (configs_of(base) or Path(base)) / "unet" / "config.json"
    if path == Path(base) or not ours.exists():  # kept in another way: loading will tell
        return
    config = read_json(ours)
    for field, value in architecture_of(path).items():
        own = config.get(field)
        if field == "block_out_channels" and len(value) == 1:  # the first is what shapes tell
            own = (own or [])[:1]
        if value != own and not (field == "cross_attention_dim" and isinstance(own, list)):
            raise ValueError(
                f"{path} is no fine-tune of {base}: its UNet has {field} {value}, the base's {own}"
            )


def architecture_of(path: Path) -> dict[str, Any]:
    """What a fine-tune's files tell of the UNet that it has or is for, of `ARCHITECTURE`."""
    config = path / "unet" / "config.json"
    if config.exists():
        return {field: read_json(config).get(field) for field in ARCHITECTURE}
    file = path / LORA_FILE if path.is_dir() else path
    if not file.is_file():
        return {}
    found: dict[str, Any] = {}
    with safe_open(file, "np") as weights:
        for key in weights.keys():  # noqa: SIM118
            if key == CONV_IN:
                width, found["in_channels"] = weights.get_slice(key).get_shape()[:2]
                found["block_out_channels"] = [width]
            elif key == TEXT_TO_KEY or READS_TEXT.search(key):
                found["cross_attention_dim"] = weights.get_slice(key).get_shape()[1]
    return found


def model_folders(path: Path) -> Iterator[Path]:
    """The folders under ``path`` that must hold weights."""
    if (path / "model_index.json").exists():
        for name, kind in read_json(path / "model_index.json").items():
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
        with safe_open(path, "np"):
            pass
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or only partly downloaded ({error}): get it again."
        ) from None


def is_whole(path: str | Path) -> bool:
    """Whether a model brings all parts of a pipeline, not a UNet or a LoRA alone."""
    path = Path(path)
    if path.is_file():
        return not is_lora(path) and has_all_parts(path)
    return is_hub_id(path) or (path / "model_index.json").exists()


def is_lora(path: Path) -> bool:
    """Whether a .safetensors file holds a LoRA, in the layout of diffusers or of kohya's tools."""
    with safe_open(path, "np") as file:
        return any("lora_" in key or ".lora." in key for key in file.keys())  # noqa: SIM118


def has_all_parts(path: Path) -> bool:
    """Whether a .safetensors file holds a VAE and a text encoder beside the UNet."""
    with safe_open(path, "np") as file:
        keys = list(file.keys())
    return all(any(key.startswith(prefixes) for key in keys) for prefixes in PARTS.values())


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


def configs_of(path: str | Path) -> Path | None:
    """The folder of configs of a model on disk; None of a hub id."""
    path = Path(path)
    if path.is_file():
        return config_folder(path)
    return path if (path / "model_index.json").exists() else None


def config_folder(path: Path, like: Path | None = None) -> Path:
    """The folder of configs that a single file's pipeline is made by.

    Args:
        path: of the file.
        like: configs of the base that the file is a fine-tune of: its own, where it has none.

    Raises:
        ValueError: the file is no whole checkpoint, or of a kind whose configs aren't known.
    """
    with safe_open(path, "np") as file:
        keys = list(file.keys())
        if CONV_IN not in keys or TEXT_TO_KEY not in keys:
            raise ValueError(
                f"{path} is not a checkpoint in the original Stable Diffusion layout: it has no "
                f"{CONV_IN if CONV_IN not in keys else TEXT_TO_KEY}."
            )
        channels, in_channels = file.get_slice(CONV_IN).get_shape()[:2]
        text_width = file.get_slice(TEXT_TO_KEY).get_shape()[1]
    for part, prefixes in PARTS.items():
        if not any(key.startswith(prefixes) for key in keys):
            raise ValueError(
                f"{path} has no {part}: it can be a fine-tune of a base, but not a base."
            )
    beside = path.with_suffix("")
    if (beside / "model_index.json").exists():
        return beside
    if like is not None:
        return like
    layout = LAYOUT_OF_TEXT_WIDTH.get(text_width)
    if layout is None or (channels, in_channels) != (320, 4):
        raise ValueError(
            f"The UNet in {path} ({in_channels} input channels, {channels} wide, text width "
            f"{text_width}) is not that of Stable Diffusion 1.5, 2.1 or XL. Put the configs and "
            f"the tokenizer of its diffusers folder into {beside}, beginning with model_index.json."
        )
    return LAYOUTS / layout


def image_size(base: str | Path) -> int | None:
    """How wide and high a base's images are, in pixels; None where no configs here say it.

    Raises:
        ValueError: see :func:`config_folder`.
    """
    configs = configs_of(base)
    if configs is None:
        return None
    unet, vae = (configs / part / "config.json" for part in ("unet", "vae"))
    if not (unet.exists() and vae.exists()):
        return None
    size, widths = read_json(unet).get("sample_size"), read_json(vae).get("block_out_channels")
    return size * 2 ** (len(widths) - 1) if isinstance(size, int) and widths else None


def check_clip_skip(path: str | Path, base: str | Path, clip_skip: int) -> None:
    """Raise ValueError if configs on disk tell that a model can't leave out so many layers."""
    configs, path = configs_of(base), Path(path)
    if configs is None or not (configs / "unet" / "config.json").exists():
        return
    own = config_folder(path, configs) if path.is_file() and is_whole(path) else path
    text = own if (own / "text_encoder" / "config.json").exists() else configs
    text /= "text_encoder/config.json"
    kind = read_json(configs / "unet" / "config.json").get("addition_embed_type")
    num_layers = read_json(text).get("num_hidden_layers") if text.exists() else None
    refuse_clip_skip(clip_skip, is_xl=kind == "text_time", num_layers=num_layers)


def refuse_clip_skip(clip_skip: int, *, is_xl: bool, num_layers: int | None) -> None:
    """Raise ValueError if a text encoder of so many layers, None if unknown, has not as many."""
    if clip_skip and is_xl:
        raise ValueError(
            "clip_skip is for bases with one text encoder: SDXL's are read before the last layer "
            "as they are. Leave it out for this model."
        )
    if clip_skip and num_layers is not None and clip_skip >= num_layers:
        raise ValueError(f"clip_skip is {clip_skip}: the text encoder has {num_layers} layers.")


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
