"""The models of params.yaml, opened as they are."""

from pathlib import Path

from diffusers import DiffusionPipeline

from components.device import frozen, load_base
from components.params import Model
from pnp_core.fine_tunes import load_model, skip_layers
from pnp_core.model_files import configs_of


def load_row(row: Model, base: str) -> DiffusionPipeline:
    """A model of params.yaml as it is, frozen, on this process's device.

    Raises ValueError if it is no fine-tune of the base at `base`, or has no layers to skip.
    """
    pipe = load_base(base)
    if not is_same(row.path, base):
        pipe = load_model(row.path, base=pipe, configs=configs_of(base))
    skip_layers(pipe, row.clip_skip)
    return frozen(pipe)


def is_same(path: str, other: str) -> bool:
    """Whether two paths name one model, however they are written. A hub's names are paths too."""
    return Path(path).resolve() == Path(other).resolve()
