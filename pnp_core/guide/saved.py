"""Whether what is on disk is a guide, told before and after it is opened."""

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from pnp_core.files import opened_weights

# 2: nothing is done where prompt and negative prompt are the same or w is at most 1. Guides of
# format 1 have the same parameters and are read as such.
# 3: the kind `encoder`; guides of other kinds are as they were, and older versions open them.
FORMATS = {"tiny": 2, "encoder": 3, "full": 2}
FORMAT = max(FORMATS.values())
MOST_STEPS = 10**6
MOST = 10**6  # channels, or what else a guide's shape counts
WEIGHTS = "diffusion_pytorch_model.safetensors"
NEEDED = (
    *("kind", "in_channels", "text_dim", "channels", "attention_channels"),
    "modulated_channels",
)


def check_config(config: Any, path: str | os.PathLike[str]) -> None:
    """Raise ValueError if this is no config that a guide can be made with.

    Args:
        config: what the ``config.json`` in ``path`` says.
        path: of the guide, for the message.
    """
    entries = config if isinstance(config, Mapping) else {}
    version = entries.get("format_version")
    if isinstance(version, int) and version > FORMAT:  # it may be of a kind not known here
        raise ValueError(
            f"The guide in {path} has format {version}, and this version of pnp-guide knows "
            f"formats up to {FORMAT}: install a newer one."
        )
    if missing := [name for name in NEEDED if name not in entries]:
        raise ValueError(
            f"{path} is not a guide, or is damaged: its config.json lacks {', '.join(missing)}."
        )
    kind = entries["kind"]
    if not isinstance(kind, str) or kind not in FORMATS:
        raise ValueError(
            f"The guide in {path} is damaged: its config.json has the kind {kind!r}, "
            f"and there are {', '.join(FORMATS)}."
        )
    if missing := [name for name in _needed_by(kind) if name not in entries]:
        raise ValueError(
            f"The guide in {path} was saved by another version of pnp-guide, or is damaged: its "
            f"config.json lacks {', '.join(missing)}."
        )
    for name, is_right in _rules(entries).items():
        if name in entries and not is_right(entries[name]):
            raise ValueError(
                f"The guide in {path} is damaged: its config.json has {_short(entries[name])} "
                f"for {name}."
            )


def check_types(path: str | os.PathLike[str]) -> None:
    """Raise ValueError if weights in a guide's folder are not stored as floats."""
    file = Path(path) / WEIGHTS
    if not file.exists():  # on a hub, or refused for that
        return
    with opened_weights(file) as weights:
        for name in weights.keys():  # noqa: SIM118
            dtype = weights.get_slice(name).get_dtype()
            if not dtype.startswith(("F", "BF")):
                raise ValueError(
                    f"The guide in {path} can't be used: its {name} is stored as {dtype}, and a "
                    "guide's weights are floats. Save it again from the guide that it was made of."
                )


def check_weights(guide: nn.Module, path: str | os.PathLike[str]) -> None:
    """Raise ValueError if a weight of the guide in ``path`` is NaN or infinite."""
    if name := not_finite(guide):
        raise ValueError(f"The guide in {path} can't be used: its {name} holds NaN or infinity.")


def not_finite(part: nn.Module) -> str | None:
    """The first of its weights that is NaN or infinite, by name."""
    named = part.named_parameters()
    return next((name for name, weight in named if not weight.isfinite().all()), None)


def is_count(value: Any) -> bool:
    """Whether it can be a guide's number of steps."""
    return _is_whole(value) and 1 <= value <= MOST_STEPS


def _rules(entries: Mapping[str, Any]) -> dict[str, Callable[[Any], bool]]:
    """What each entry of a config must be, beside its kind."""
    channels, layers = entries["channels"], entries["modulated_channels"]
    is_full = entries["kind"] == "full"

    def are_ranks(value: Any) -> bool:
        return (is_full and value is None) or (_are_sizes(value) and len(value) == len(channels))

    def are_dims(value: Any) -> bool:
        return value is None or (_are_sizes(value) and len(value) == len(layers))

    def is_shape(value: Any) -> bool:
        return isinstance(value, Mapping) or (not is_full and value is None)

    def is_size(value: Any) -> bool:
        return _is_size(value) or (is_full and value == 0)

    def is_text(value: Any) -> bool:
        return value is None or isinstance(value, str)

    return {
        "in_channels": _is_size,
        "text_dim": _is_size,
        "channels": lambda value: _is_list(value) and bool(value) and all(map(_are_sizes, value)),
        "attention_channels": _are_sizes,
        "modulated_channels": _are_sizes,
        "ranks": are_ranks,
        "text_rank": is_size,
        "embedding_dim": is_size,
        "modulated_dims": are_dims,
        "unet_config": is_shape,
        "base_hash": is_text,
        "prediction_type": lambda value: isinstance(value, str),
        "guidance_scale_range": _is_range,
        "num_steps": lambda value: value is None or is_count(value),
        "timestep_spacing": is_text,
        "format_version": _is_size,
    }


def _needed_by(kind: str) -> tuple[str, ...]:
    """What a config of a kind has beside what all have."""
    return ("unet_config",) if kind == "full" else ("ranks", "text_rank", "embedding_dim")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return _is_whole(value) and 1 <= value <= MOST


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _are_sizes(value: Any) -> bool:
    return _is_list(value) and bool(value) and all(map(_is_size, value))


def _is_range(value: Any) -> bool:
    """Whether it is two guidance scales, the lower one first."""
    if not _is_list(value) or len(value) != 2:
        return False
    is_number = all(isinstance(x, int | float) and not isinstance(x, bool) for x in value)
    return is_number and all(map(math.isfinite, value)) and value[0] <= value[1]


def _short(value: Any) -> str:
    """A value in so few letters that a message can hold it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
