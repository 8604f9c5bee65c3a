"""A pipeline's forwards: whether a guide can stand in for them, and halves of doubled batches.

A batch that is doubled for classifier-free guidance is one or more blocks, each of all samples
under their negative prompts and then of the same samples under their prompts.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pnp_core.pipelines import ASKS, VIEWS

NEGATIVE, POSITIVE = 0, 1
WITHOUT_ROWS = ("ip_adapter_masks",)  # a tensor of one row an adapter


class Forwards:
    """Sees to it that a pipeline of this name and way runs one forward a step, as it should.

    Args:
        name: of the pipeline's class.
        way: of its class, see :mod:`pnp_core.pipelines`.
        doubles: whether its batch is doubled.
    """

    def __init__(self, name: str, way: str, *, doubles: bool) -> None:
        self.name = name
        self.way = way
        self.doubles = doubles
        self.number = 0
        self.num_steps: int | None = None
        self.last_timestep: Any = None

    def check(
        self, arguments: Mapping[str, Any], num_prompts: int | None, num_steps: int | None
    ) -> None:
        """Raise ValueError if this forward is not of a row a prompt, or two, or is one too many.

        Or if some of the text is masked, which a guide reads as a whole.

        Args:
            arguments: of the forward by name.
            num_prompts: as encoded, images a prompt included; None: not known.
            num_steps: of the whole run, as the scheduler says; None: not known. What it says in the
                first forward counts: another call in a callback may share the scheduler.
        """
        num_rows = len(arguments["sample"])
        if arguments.get("encoder_attention_mask") is not None:
            raise ValueError(
                f"{self.name} masks a part of the text by encoder_attention_mask, and a guide "
                "reads all of it: use it unplugged."
            )
        if num_prompts is not None:
            self.check_rows(num_rows, num_prompts)
        if self.way == VIEWS:
            return
        if self.number == 0:
            self.num_steps = num_steps
        self.number += 1
        timestep, last = arguments["timestep"], self.last_timestep
        again = isinstance(timestep, Tensor) and isinstance(last, Tensor)
        again = again and timestep.data_ptr() == last.data_ptr()
        if again or (self.num_steps is not None and self.number > self.num_steps):
            raise ValueError(
                f"{self.name} runs its UNet more than once a step, so it has a guidance of its "
                "own, which a guide can't replace: use it unplugged."
            )
        self.last_timestep = timestep  # held, so that no other tensor gets its address

    def check_rows(self, num_rows: int, num_prompts: int) -> None:
        """Raise ValueError if a forward of so many rows is not what so many prompts make."""
        if self.way == VIEWS and num_prompts > 1:
            raise ValueError(
                f"{self.name} confuses the rows of several prompts or images, with a guide and "
                "without: ask for one image a call."
            )
        expected = 2 * num_prompts if self.doubles else num_prompts
        odd = num_rows != expected if self.way == ASKS else num_rows % expected
        if odd:
            raise ValueError(
                f"{self.name} runs its UNet on {num_rows} rows for {num_prompts} prompts, where a "
                f"guide needs {expected}, so it has a guidance of its own, which a guide can't "
                "replace: use it unplugged."
            )


def check_text(name: str, sample: Tensor, text: Tensor, negative: Tensor) -> None:
    """Raise ValueError if prompts and negative prompts are not as many, or not as long.

    Args:
        name: of the pipeline's class.
        sample: what the forward is run on, a row a sample.
        text: states of the prompts.
        negative: of the negative prompts; one row may serve all samples.
    """
    if len(text) != len(sample) or len(negative) not in (1, len(sample)):
        raise ValueError(
            f"{name} runs its UNet on {len(sample)} samples with {len(text)} prompts and "
            f"{len(negative)} negative prompts: a guide needs one of each a sample."
        )
    if text.shape[1] != negative.shape[1]:
        raise ValueError(
            f"{name} runs its UNet under prompts of {text.shape[1]} tokens and has negative ones "
            f"of {negative.shape[1]}: a guide needs as many of both."
        )


def check_both(name: str, arguments: Mapping[str, Any], *, asks: bool) -> None:
    """Raise ValueError if a callback has left states of the prompt alone in a doubled batch.

    Args:
        name: of the pipeline's class.
        arguments: of the forward by name.
        asks: whether the class asks if there is guidance.
    """
    num_rows, text = len(arguments["sample"]), arguments["encoder_hidden_states"]
    if asks and len(text) != num_rows:
        raise ValueError(
            f"{name} runs its UNet on {num_rows} rows with {len(text)} text states: with exact "
            "steps a callback has to give those of the negative prompt too, torch.cat([negative, "
            "prompt])."
        )


def half(value: Any, num_rows: int, num_samples: int, which: int = POSITIVE) -> Any:
    """Rows under the prompts, or the negative ones.

    Args:
        value: a tensor, or tensors in tuples, lists and dicts; what does not have ``num_rows``
            rows stays as it is.
        num_rows: of the doubled batch.
        num_samples: of a block; a block has twice as many rows.
        which: ``POSITIVE`` or ``NEGATIVE``.
    """
    if isinstance(value, Tensor):
        if value.ndim == 0 or len(value) != num_rows:
            return value
        return value.unflatten(0, (-1, 2, num_samples))[:, which].flatten(0, 1)
    if isinstance(value, Mapping):
        return {
            k: each if k in WITHOUT_ROWS else half(each, num_rows, num_samples, which)
            for k, each in value.items()
        }
    if isinstance(value, list | tuple):
        halves = [half(each, num_rows, num_samples, which) for each in value]
        is_named = hasattr(value, "_fields")
        return type(value)(*halves) if is_named else type(value)(halves)
    return value


def doubled(output: Any, num_samples: int) -> Any:
    """What a UNet returned, a tuple or diffusers' own class, with both halves the same."""
    is_tuple = isinstance(output, tuple)
    blocks = (output[0] if is_tuple else output.sample).unflatten(0, (-1, num_samples))
    both = torch.stack([blocks, blocks], dim=1).flatten(0, 2)
    return (both, *output[1:]) if is_tuple else type(output)(sample=both)


def forwards_left(pipe: Any, timestep: Tensor, end: Any = None) -> int:
    """How many forwards a run has that is at its first.

    Image-to-image and the like begin late in the scheduler's timesteps, and some end early. Most
    pipelines note how many they go through, SDXL's with a ControlNet before they leave out the
    last; of others it is those from this one on.

    Args:
        pipe: runs.
        timestep: of the first forward, ``(1,)``.
        end: the call's ``denoising_end``.

    Raises:
        ValueError: the scheduler has no such timestep.
    """
    counts = []
    if (noted := getattr(pipe, "_num_timesteps", None)) is not None:
        counts.append(int(noted))
    if (timesteps := getattr(pipe.scheduler, "timesteps", None)) is not None:
        timesteps = torch.as_tensor(timesteps)  # a user's own scheduler may have NumPy's
        left = timesteps[place_among(timesteps, timestep) :]
        if isinstance(end, float) and 0 < end < 1:  # the rule of diffusers
            num_train_timesteps = pipe.scheduler.config.num_train_timesteps
            left = left[left >= round((1 - end) * num_train_timesteps)]
        if len(left):
            counts.append(len(left))
    if counts:
        return min(counts)
    raise ValueError(
        f"{type(pipe).__name__} does not say how many steps it takes, among which exact_steps are "
        "to be spread: plug it with exact_steps=0."
    )


def place_among(timesteps: Tensor, timestep: Tensor) -> int:
    """Which of a scheduler's timesteps this is; their number if it is none of them.

    By where it lies in memory, if that is among them: some schedulers have a timestep twice.
    """
    is_view = timestep.untyped_storage().data_ptr() == timesteps.untyped_storage().data_ptr()
    if is_view and timestep.dtype == timesteps.dtype and timesteps.is_contiguous():
        number = int(timestep.storage_offset() - timesteps.storage_offset())
        if 0 <= number < len(timesteps):
            return number
    found = (timesteps == timestep.to(timesteps.device)).nonzero()
    return int(found[0]) if len(found) else len(timesteps)


def steps_of(scheduler: Any) -> int | None:
    """How many steps a scheduler is set to; None: it does not say."""
    if getattr(scheduler, "custom_timesteps", False):  # DDPM's keeps the number of the run before
        return len(scheduler.timesteps)
    return getattr(scheduler, "num_inference_steps", None)


def key_of(tensor: Tensor | None) -> tuple[Any, ...] | None:
    """Tells whether a tensor is the one of the step before, without looking at its values."""
    if tensor is None:
        return None
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, version


def take_apart(arguments: dict[str, Any], num_samples: int) -> tuple[Tensor | None, Tensor | None]:
    """Leave a forward the second half of states of both prompts, as CFG has them.

    Some pipelines give them whatever they are told, and so does a callback that ends guidance.

    Returns:
        The negative prompts' text and pooled states; None: they were not among them.
    """
    both, added = 2 * num_samples, arguments.get("added_cond_kwargs") or {}
    of_text = (arguments.get("encoder_hidden_states"), added.get("text_embeds"))
    text, pooled = (
        states.chunk(2)[0] if states is not None and len(states) == both else None
        for states in of_text
    )
    for name in {"encoder_hidden_states", "added_cond_kwargs"} & arguments.keys():
        arguments[name] = half(arguments[name], both, num_samples)
    return text, pooled


def timestep_of(arguments: Mapping[str, Any]) -> Tensor:
    """A forward's timesteps, one for all or one a row, where its latents are."""
    timestep, device = arguments["timestep"], arguments["sample"].device
    if not isinstance(timestep, Tensor):
        return torch.full((1,), timestep, device=device)
    return timestep.to(device).reshape(-1)


def shared(negative: Tensor) -> Tensor:
    """One row of text states where all samples share it, which is faster."""
    first = negative[:1]
    is_shared = len(negative) == 1 or torch.equal(negative, first.expand_as(negative))
    return first if is_shared else negative
