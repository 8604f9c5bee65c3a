"""What can be told of a model by its files, without loading it.

Nothing here imports torch or diffusers, which takes seconds: a mistake in params.yaml is told at
once.
"""

import hashlib
import re
from functools import cache
from pathlib import Path
from typing import Any

from pnp_core.files import opened_weights, read_object
from pnp_core.lora_files import check_lora_keys, check_lora_shapes

PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
LORA_FILE = "pytorch_lora_weights.safetensors"
# The weights of a pipeline's parts by the one name that they are loaded by; of the others, files of
# which one is needed.
WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
}
TOKENIZERS = ("tokenizer.json", "vocab.json")
OTHERS = {
    "tokenizer": TOKENIZERS,
    "tokenizer_2": TOKENIZERS,
    "scheduler": ("scheduler_config.json",),
}
# What a part is made by, beside what it is told by: files that are JSON objects, where they are.
CONFIGS = ("config.json", "scheduler_config.json", "tokenizer_config.json", *TOKENIZERS)
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
ORIGINAL_UNET = "model.diffusion_model."
CONV_IN = f"{ORIGINAL_UNET}input_blocks.0.0.weight"
TEXT_TO_KEY = f"{ORIGINAL_UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight"
# The same in a UNet's own file, as diffusers writes it.
OWN_CONV_IN = "conv_in.weight"
OWN_TEXT_TO_KEY = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"


def check_model_files(path: str | Path) -> None:
    """Look at a local model's files without loading them.

    A ``path`` that is neither a file nor a folder here passes only in the form of a hub id.

    Raises:
        ValueError: nothing is there; a file is pickled, truncated or missing; or it is a model of
            another kind.
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
        check_is_unet(path)
        return
    if is_hub_id(path):
        return
    if not path.is_dir():
        hint = ", and ~ is not expanded here: write it out" if str(path).startswith("~") else ""
        raise ValueError(f"No model at {path}: the path does not exist{hint}.")
    if (path / "model_index.json").exists():
        check_pipeline_folder(path)
    elif (path / "unet").is_dir():
        check_part(path, "unet")
    elif (path / LORA_FILE).exists():
        check_weight_files(path)
        check_is_unet(path / LORA_FILE)
    else:
        raise ValueError(
            f"{path} is not a model: it has no model_index.json, no unet/ and no {LORA_FILE}."
        )


def check_pipeline_folder(path: Path) -> None:
    """Raise ValueError if a pipeline's folder has no UNet, or lacks a part that its index names."""
    index = read_object(path / "model_index.json")
    parts = {name for name, kind in index.items() if isinstance(kind, list) and any(kind)}
    if "unet" not in parts:
        raise ValueError(
            f"{path} is a {index.get('_class_name')}, not a Stable Diffusion model: it has no UNet."
        )
    for name in sorted(parts & (WEIGHTS.keys() | OTHERS.keys())):
        check_part(path, name)


def check_part(path: Path, name: str) -> None:
    """Raise ValueError if a part of a pipeline's folder is not there, or not all of it."""
    folder = path / name
    if not folder.is_dir():
        raise ValueError(f"{path} lacks its folder {name}/: download it again.")
    if name in WEIGHTS:
        check_weight_files(folder, WEIGHTS[name])
    needed = OTHERS.get(name, ("config.json",))
    if not any((folder / file).exists() for file in needed):
        raise ValueError(f"{folder} lacks {' or '.join(needed)}: download it again.")
    for file in CONFIGS:
        if (folder / file).exists():
            read_object(folder / file)


def check_base(path: str | Path) -> None:
    """Raise ValueError if a local model is a UNet or a LoRA alone: no base, but a fine-tune."""
    path = Path(path)
    if path.is_file() and is_lora(path):
        raise ValueError(f"{path} is a LoRA: it can be a fine-tune of a base, but not a base.")
    if path.is_dir() and not is_whole(path):
        raise ValueError(
            f"{path} has no model_index.json, so it is a UNet or a LoRA alone: it can be a "
            "fine-tune of a base, but not a base."
        )


def check_is_unet(path: Path) -> None:
    """Raise ValueError if a .safetensors file has neither a UNet nor a LoRA for one."""
    with opened_weights(path) as file:
        keys = list(file.keys())
    if is_lora(path):
        check_lora_keys(path, keys)
    elif not any(key.startswith(ORIGINAL_UNET) or key == OWN_CONV_IN for key in keys):
        what = f"its first weight is {min(keys)}" if keys else "it is empty"
        raise ValueError(f"{path} has no Stable Diffusion UNet, and is no LoRA for one: {what}.")


def check_weight_files(folder: Path, name: str | None = None) -> None:
    """Look at a folder's weights, which are loaded by this name where one is given.

    Raises:
        ValueError: they are pickled, truncated, of another name, not all there, or none.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(f.name for f in folder.iterdir() if f.suffix in PICKLES)
        why = f"only pickled weights ({', '.join(pickled)})" if pickled else "no weights"
        raise ValueError(f"{folder} has {why}: it needs .safetensors files.")
    for file in files:
        check_safetensors(file)
    for index_file in folder.glob("*.safetensors.index.json"):
        listed = read_object(index_file).get("weight_map")
        if not isinstance(listed, dict):
            raise ValueError(f"{index_file} is damaged (it has no weight_map): get it again.")
        missing = sorted({*listed.values()} - {f.name for f in files})
        if missing:
            raise ValueError(f"{folder} lacks {', '.join(missing)}: download it again.")
    if name and not any((folder / file).exists() for file in (name, f"{name}.index.json")):
        raise ValueError(
            f"{folder} has {', '.join(f.name for f in files)} and no {name}, the name that weights "
            "are loaded by: rename what is to be used."
        )


def check_same_kind(path: str | Path, base: str | Path) -> None:
    """Compare the architecture of a fine-tune's UNet with the base's, by files on disk.

    Of a single file and of a LoRA, shapes of weights tell; of a folder, its config. A LoRA's
    modules are compared one by one if the base is a folder.

    Raises:
        ValueError: they differ, or the base is none, see :func:`check_base`.
    """
    path = Path(path)
    check_base(base)
    ours = (configs_of(base) or Path(base)) / "unet" / "config.json"
    if path == Path(base) or not ours.exists():  # kept in another way: loading will tell
        return
    config = read_object(ours)
    for field, value in architecture_of(path).items():
        own = config.get(field)
        if field == "block_out_channels" and len(value) == 1:  # the first is what shapes tell
            own = (own or [])[:1]
        if value != own and not (field == "cross_attention_dim" and isinstance(own, list)):
            raise ValueError(
                f"{path} is no fine-tune of {base}: its UNet has {field} {value}, the base's {own}"
            )
    file = path if path.is_file() else path / LORA_FILE
    if Path(base).is_dir() and not (path / "unet").is_dir() and file.exists() and is_lora(file):
        check_lora_shapes(file, Path(base) / "unet")


def architecture_of(path: Path) -> dict[str, Any]:
    """What a fine-tune's files tell of the UNet that it has or is for, of `ARCHITECTURE`."""
    config = path / "unet" / "config.json"
    if config.exists():
        return {field: read_object(config).get(field) for field in ARCHITECTURE}
    file = path / LORA_FILE if path.is_dir() else path
    if not file.is_file():
        return {}
    found: dict[str, Any] = {}
    with opened_weights(file) as weights:
        for key in weights.keys():  # noqa: SIM118
            if key in (CONV_IN, OWN_CONV_IN):
                width, found["in_channels"] = weights.get_slice(key).get_shape()[:2]
                found["block_out_channels"] = [width]
            elif key in (TEXT_TO_KEY, OWN_TEXT_TO_KEY) or READS_TEXT.search(key):
                found["cross_attention_dim"] = weights.get_slice(key).get_shape()[1]
    return found


def check_safetensors(path: Path) -> None:
    """Raise ValueError if the file is not whole."""
    with opened_weights(path):
        pass


def is_whole(path: str | Path) -> bool:
    """Whether a model brings all parts of a pipeline, not a UNet or a LoRA alone."""
    path = Path(path)
    if path.is_file():
        return not is_lora(path) and has_all_parts(path)
    return is_hub_id(path) or (path / "model_index.json").exists()


def is_lora(path: Path) -> bool:
    """Whether a .safetensors file holds a LoRA, in the layout of diffusers or of kohya's tools."""
    marks = ("lora_", ".lora.", "_lora.")
    with opened_weights(path) as file:
        return any(mark in key for key in file.keys() for mark in marks)  # noqa: SIM118


def has_all_parts(path: Path) -> bool:
    """Whether a .safetensors file holds a VAE and a text encoder beside the UNet."""
    with opened_weights(path) as file:
        keys = list(file.keys())
    return all(any(key.startswith(prefixes) for key in keys) for prefixes in PARTS.values())


def is_hub_id(path: str | Path) -> bool:
    """Whether a path that is not here has the form of a hub id, ``owner/name``."""
    path = Path(path)
    if str(path).startswith("~"):  # a home folder, which nobody expands here
        return False
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
        revision, why = (
            (ref.read_text(encoding="utf-8").strip() if ref.exists() else None),
            str(error),
        )
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
    with opened_weights(path) as file:
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


def check_clip_skip(path: str | Path, base: str | Path, clip_skip: int) -> None:
    """Raise ValueError if configs on disk tell that a model can't leave out so many layers."""
    configs, path = configs_of(base), Path(path)
    if configs is None or not (configs / "unet" / "config.json").exists():
        return
    own = config_folder(path, configs) if path.is_file() and is_whole(path) else path
    text = own if (own / "text_encoder" / "config.json").exists() else configs
    text /= "text_encoder/config.json"
    kind = read_object(configs / "unet" / "config.json").get("addition_embed_type")
    num_layers = read_object(text).get("num_hidden_layers") if text.exists() else None
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
