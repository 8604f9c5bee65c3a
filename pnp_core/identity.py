"""What a base is, by content: parts of it that other things are computed from."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

from pnp_core.files import read_json, sha256_file
from pnp_core.model_files import (
    LAYOUTS,
    check_model_files,
    config_folder,
    configs_of,
    is_hub_id,
    is_whole,
    weights_hash,
)

PARTS = {  # and their folders
    "unet": ("unet",),
    "scheduler": ("scheduler",),
    "text": ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    "vae": ("vae",),
}
WORDS = {
    "unet": "UNet",
    "scheduler": "scheduler",
    "text": "text encoder or tokenizer",
    "vae": "VAE",
}
CONTENT = (".safetensors", ".json", ".txt", ".model")  # neither pictures nor READMEs
# What configs say of who wrote them, and where.
WRITER = ("_diffusers_version", "_name_or_path", "name_or_path", "transformers_version")
# What a pipeline says of how its text is read.
TEXT_KEYS = ("_class_name", "force_zeros_for_empty_prompt")


@dataclass(frozen=True, kw_only=True)
class BaseIdentity:
    """Hashes of a base's parts. Each is of weights and configs alike.

    Attributes:
        base_hash: as guides record it, see :func:`pnp_core.model_files.weights_hash`.
        text: text encoders, tokenizers, and what stands for an empty prompt.
    """

    base_hash: str
    unet: str
    scheduler: str
    text: str
    vae: str

    def differs(self, other: "BaseIdentity") -> list[str]:
        """Parts in which ``other`` is another base, in words."""
        ours, theirs = asdict(self), asdict(other)
        different = [words for field, words in WORDS.items() if ours[field] != theirs[field]]
        if not different and self.base_hash != other.base_hash:
            return ["file of its UNet or scheduler"]
        return different


def base_identity(path: str | Path, like: Path | None = None) -> BaseIdentity:
    """Identity of the base at ``path``: a folder, a single file, or a hub id at its revision.

    ``like``: see :func:`pnp_core.models.load_pipeline`.

    Raises:
        ValueError: see :func:`pnp_core.model_files.check_model_files`; a part is missing.
    """
    base_hash, path = weights_hash(path), Path(path)
    check_model_files(path)
    if is_hub_id(path):
        return BaseIdentity(**dict.fromkeys(PARTS, base_hash), base_hash=base_hash)
    if path.is_file():
        folder, weights = config_folder(path, like), [path]
    else:
        folder, weights = path, []
    index = read_json(folder / "model_index.json")
    reading = json.dumps({key: index.get(key) for key in TEXT_KEYS})
    parts = {}
    for part, names in PARTS.items():
        files = [file for name in names for file in content_of(folder / name)]
        if part == "text" and folder.parent == LAYOUTS:
            files += content_of(LAYOUTS / "tokenizer")
        if not files:
            raise ValueError(f"{path} is no base: it lacks its {' or '.join(names)} folder.")
        files += weights if part != "scheduler" else []
        parts[part] = hash_of(files, folder, reading if part == "text" else "")
    return BaseIdentity(**parts, base_hash=base_hash)


def model_identity(path: str | Path, base: str | Path) -> str:
    """SHA-256 over all that images of a model depend on: its parts, and what it has of the base.

    Raises:
        ValueError: see :func:`base_identity`.
    """
    check_model_files(path)
    own = base_identity(path, configs_of(base)) if is_whole(path) else None
    if own is None:
        own = replace(base_identity(base), unet=weights_hash(path), base_hash=weights_hash(path))
    return hashlib.sha256(json.dumps(asdict(own), sort_keys=True).encode()).hexdigest()


def content_of(folder: Path) -> list[Path]:
    """A part's files, in order; none if there is no such folder."""
    return sorted(file for file in folder.glob("*") if file.suffix in CONTENT)


def hash_of(files: Iterable[Path], folder: Path, more: str = "") -> str:
    """SHA-256 over names and contents."""
    digest = hashlib.sha256(more.encode())
    for file in files:
        name = file.relative_to(folder) if file.is_relative_to(folder) else file.suffix
        stat = file.stat()
        digest.update(f"\0{name}\0{content_hash(file, stat.st_size, stat.st_mtime_ns)}".encode())
    return digest.hexdigest()


@lru_cache(maxsize=256)
def content_hash(file: Path, size: int, mtime_ns: int) -> str:  # noqa: ARG001, part of the lru_cache's key
    """SHA-256 of a file; of a config, of what it says. Weights are gigabytes: read once."""
    if file.suffix == ".json":
        value = read_json(file)
        if isinstance(value, dict):
            value = {key: value[key] for key in value if key not in WRITER}
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    return sha256_file(file)
