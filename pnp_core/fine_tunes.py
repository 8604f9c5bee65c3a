"""Fine-tunes as their makers ship them: whole, with text encoder, tokenizer, VAE and scheduler."""

import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from pnp_core.model_files import check_model_files, is_whole, refuse_clip_skip
from pnp_core.models import check_is_fine_tune, is_xl, load_pipeline, load_unet

# What configs say of where and by what they were written.
WRITTEN = ("transformers_version", "dtype", "torch_dtype", "architectures")


def load_model(
    path: str | Path, *, base: DiffusionPipeline, configs: Path | None = None
) -> DiffusionPipeline:
    """A fine-tune of ``base`` as a pipeline, on the base's device; the base stays as it is.

    A pipeline folder, a whole single file or a hub id is opened as it is; a part that is the base's
    to the last bit is then the base's module, so that memory holds it once. A folder with only
    ``unet/``, a LoRA or a file with only a UNet has the base's other parts. ``configs`` is the
    folder of the base's, for a single file, which has none.

    Raises:
        ValueError: see :func:`pnp_core.models.load_pipeline` and :func:`pnp_core.models.load_unet`.
    """
    check_model_files(path)
    if is_whole(path):
        unet = base.unet
        pipe = load_pipeline(path, dtype=unet.dtype, device=unet.device, like=configs)
        check_is_fine_tune(pipe.unet, unet, path)
        for name, part in base.components.items():
            if isinstance(part, nn.Module) and is_same(getattr(pipe, name, None), part):
                setattr(pipe, name, part)
        return pipe
    pipe = copy.copy(base)
    pipe.unet = load_unet(path, base=base)
    return pipe


def is_same(module: Any, other: nn.Module) -> bool:
    """Whether two modules are of one class, config and weights, to the last bit."""
    if type(module) is not type(other) or _config(module) != _config(other):
        return False
    ours, theirs = module.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def skip_layers(pipe: DiffusionPipeline, clip_skip: int) -> None:
    """Have the pipeline read its text encoder this many layers before the end, in place.

    As diffusers counts: 1 leaves out the last layer, which web interfaces call clip skip 2. What
    the layer before gives passes through the encoder's last norm, so an encoder without the last
    layers is what is asked for; it shares its weights with the one that was there.

    Raises:
        ValueError: the base is SDXL, which reads the last layer but one as it is, or the encoder
            has no more layers than that.
    """
    if clip_skip == 0:
        return
    encoder = pipe.text_encoder
    num_layers = encoder.config.num_hidden_layers
    refuse_clip_skip(clip_skip, is_xl=is_xl(pipe), num_layers=num_layers)
    config = copy.deepcopy(encoder.config)
    config.num_hidden_layers = num_layers - clip_skip
    shorter = type(encoder)(config).to(encoder.device, encoder.dtype).eval()
    shorter.load_state_dict(encoder.state_dict(), strict=False, assign=True)
    pipe.text_encoder = shorter.requires_grad_(False)


def _config(module: Any) -> dict[str, Any]:
    config = module.config
    values = dict(config) if isinstance(config, dict) else config.to_dict()
    return {k: v for k, v in values.items() if not k.startswith("_") and k not in WRITTEN}
