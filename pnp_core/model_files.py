"""What can be told of a model by its files, without loading it.

Nothing here imports torch or diffusers, which takes seconds: a mistake in params.yaml is told at
once.
"""

import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

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
PARTS = {
    "VAE": ("first_stage_model.",),
    "text encoder": ("cond_stage_model.", "conditioner."),
}


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
            listed = set(read_json(index_file)["weight_map"].values())
            missing = sorted(listed - {f.name for f in files})
            if missing:
                raise ValueError(f"{folder} lacks {', '.join(missing)}: download it again.")


def check_same_kind(path: str | Path, base: str | Path) -> None:
    """Raise ValueError if configs on disk tell that a UNet is none of the base's architecture."""
    ours, theirs = (Path(folder, "unet", "config.json") for folder in (base, path))
    if not (ours.exists() and theirs.exists()):  # kept in another way: loading will tell
        return
    base_config, config = read_json(ours), read_json(theirs)
    for field in ARCHITECTURE:
        if base_config.get(field) != config.get(field):
            raise ValueError(
                f"{path} is no fine-tune of {base}: its UNet has {field} {config.get(field)}, the "
                f"base's {base_config.get(field)}"
            )


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
