"""What a user's callback sees of a plugged pipeline's call: what it would see of the stock one.

With classifier-free guidance most of what a callback may ask for has two halves, under the negative
prompts and under the prompts. A plugged pipeline goes on with the second alone.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from diffusers.callbacks import PipelineCallback
from torch import Tensor

from pnp_core.forwards import key_of

# Of a callback's tensors, what CFG has in two halves.
CONDITIONS = ("prompt_embeds", "add_text_embeds", "add_time_ids")
# The same in both of them.
IMAGES = ("mask", "masked_image_latents", "depth_mask")
CONTROL_IMAGES = ("image", "control_image")  # once in guess mode


class Shown(NamedTuple):
    """A tensor that a callback has been shown with both halves.

    Attributes:
        own: as the pipeline has it.
        both: as shown.
        key: tells whether ``both`` still is what it was.
    """

    own: Tensor
    both: Tensor
    key: tuple[Any, ...] | None


class Halves:
    """Tensors as a callback has them, in two halves, and as the pipeline goes on with them."""

    def __init__(self) -> None:
        self.shown: dict[str, list[Shown]] = {}

    def show(
        self, given: dict[str, Any], first_halves: Mapping[str, Tensor | None], num_samples: int
    ) -> None:
        """Put both halves in the place of the second.

        Args:
            given: to the callback, by name; is changed. A list has a tensor for each ControlNet.
            first_halves: of what may be in it; None: the same as the second.
            num_samples: rows of a half; what has another number stays as it is.
        """
        self.shown = {}
        for name, first in first_halves.items():
            value = given.get(name)
            parts: list[Any] = value if isinstance(value, list) else [value]
            if not all(isinstance(part, Tensor) and len(part) == num_samples for part in parts):
                continue
            self.shown[name] = shown = []
            for own in parts:
                half = own if first is None else first.to(own).expand_as(own)
                both = torch.cat([half, own])
                shown.append(Shown(own, both, key_of(both)))
            boths = [each.both for each in shown]
            given[name] = boths if isinstance(value, list) else boths[0]

    def take_back(self, returned: Any, names: Iterable[str], num_samples: int) -> dict[str, Tensor]:
        """Leave the second halves alone in what a callback returns; the first ones it has changed.

        The UNet is not the only one to be given them: a ControlNet comes first. What a callback has
        written into a tensor counts, returned or not: the stock pipeline shows its own.

        Args:
            returned: by the callback; is changed.
            names: of what may come in two halves, also where none were shown: guidance may begin
                again.
            num_samples: rows of a half, as the callback leaves them.
        """
        changed: dict[str, Tensor] = {}
        for name in names:
            shown = self.shown.get(name, [])
            for own, both, key in shown:
                if key_of(both) != key or both.is_inference():
                    changed[name], second = both.chunk(2)
                    own.copy_(second)
            value = returned.get(name) if isinstance(returned, dict) else None
            parts = list(value) if isinstance(value, list) else [value]
            for at, part in enumerate(parts):
                same = [each.own for each in shown if each.both is part]
                if same:
                    parts[at] = same[0]
                elif isinstance(part, Tensor) and len(part) == 2 * num_samples:
                    changed[name], parts[at] = part.chunk(2)
            if value is not None:
                returned[name] = parts if isinstance(value, list) else parts[0]
        return changed


class OfficialCallback(PipelineCallback):
    """Stands in for one of diffusers' own callbacks, which pipelines know by their class."""

    def __init__(self, callback: Any, called: Callable[..., Any]) -> None:
        self.callback = callback
        self.called = called

    @property
    def tensor_inputs(self) -> list[str]:
        """Names of what it wants to be given."""
        return self.callback.tensor_inputs

    def __call__(self, *args: Any) -> Any:
        """Call what stands in for the callback, with the pipeline's arguments."""
        return self.called(*args)


def guesses(pipe: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether its ControlNet sees the prompts alone, in the stock pipeline too."""
    net = getattr(pipe, "controlnet", None)
    net = getattr(net, "_orig_mod", net)
    first = getattr(net, "nets", [net])[0]
    pools = getattr(getattr(first, "config", None), "global_pool_conditions", False)
    return bool(arguments.get("guess_mode") or pools)
