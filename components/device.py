"""Where this process computes, and the base model there."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, UNet2DConditionModel


def device() -> torch.device:
    """This process's GPU if it has one, else the CPU.

    Raises ValueError where there is a GPU whose driver PyTorch can't use.
    """
    if torch.cuda.is_available():
        return torch.device("cuda")
    check_driver()
    return torch.device("cpu")


def check_driver() -> None:
    """Raises ValueError if it is its driver that keeps PyTorch from a GPU.

    PyTorch only warns of it, and the work would be done on the CPU, for days.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return  # no GPU is wanted
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # no GPU, no driver, or a PyTorch without CUDA
        if "too old" in str(error):
            raise ValueError(
                f"PyTorch can't use this machine's GPU: {error} Update the driver, or install a "
                "PyTorch built for it; with CUDA_VISIBLE_DEVICES= (empty) the CPU computes"
            ) from None


def gpu_memory_gb() -> float | None:
    """All the memory of this process's GPU; None without one."""
    if device().type != "cuda":
        return None
    memory: int = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return memory / 1e9


def tell_where_measured(name: str, *, on_gpus: bool) -> None:
    """Say so if images were made on GPUs, and this process, which measures, has none."""
    if on_gpus and device().type == "cpu":
        print(
            f"{name}: this machine has no GPU, as the Ray workers have: judges, guidance_fvu and "
            "costs are of its CPU. On one with a GPU that sees this folder, the same command finds "
            "the images made",
            flush=True,
        )


@contextmanager
def left_to_workers(*owners: Any) -> Iterator[None]:
    """While open, what has a method `to` is in host memory, and this process's GPU is free.

    After an error it stays there: the GPU may be full.
    """
    for owner in owners:
        owner.to(torch.device("cpu"))
    torch.cuda.empty_cache()
    yield
    for owner in owners:
        owner.to(device())


def load_base(path: str, on: torch.device | None = None) -> "DiffusionPipeline":
    """The base at `path`, frozen, on this process's device unless another is named."""
    from pnp_core.models import load_pipeline

    # Where fp32 is asked for, ten bits of mantissa will do, as fp16 has them. The eight of bf16
    # would cost the teacher's guidance, a small difference of large predictions.
    torch.backends.cuda.matmul.allow_tf32 = True
    return frozen(load_pipeline(path, device=on or device()))


def load_for_training(
    path: str, companions: Sequence[Path], *, in_bf16: bool
) -> tuple["DiffusionPipeline", dict[str, "UNet2DConditionModel"]]:
    """The base at `path`, and UNets of its fine-tunes, to train a guide on.

    Of the base, too, the UNet alone is on the device, and its other networks are let go: prompts
    and images are in the cache as the UNet reads them. With `in_bf16`, and where the hardware
    computes in it, weights are kept as they are computed with.
    """
    from pnp_core.models import load_pipeline
    from pnp_core.precision import has_bf16, hold_in_bf16

    torch.backends.cuda.matmul.allow_tf32 = True
    pipe = load_pipeline(path)
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module) and name != "unet":
            setattr(pipe, name, None)
    others = load_companions(companions, pipe)
    for unet in (pipe.unet, *others.values()):
        freeze(unet)
        if in_bf16 and has_bf16(device().type):
            hold_in_bf16(unet)
        unet.to(device())
    return pipe, others


def load_companions(
    paths: Sequence[Path], base: "DiffusionPipeline"
) -> dict[str, "UNet2DConditionModel"]:
    """The UNets of these fine-tunes, frozen, by their identities."""
    from pnp_core.model_files import weights_hash
    from pnp_core.models import load_unet

    companions = {}
    for path in paths:
        companions[weights_hash(path)] = unet = load_unet(path, base=base)
        freeze(unet)
    return companions


def frozen(pipe: "DiffusionPipeline") -> "DiffusionPipeline":
    """The pipeline with its UNet and VAE frozen, and as fast here as they can be."""
    freeze(pipe.unet)
    pipe.vae.requires_grad_(False).eval().to(memory_format=torch.channels_last)
    return pipe


def freeze(unet: "UNet2DConditionModel") -> None:
    """Take a UNet's weights out of training and lay them out as is fastest here, in place."""
    from diffusers.models.attention_processor import AttnProcessor

    unet.requires_grad_(False).eval().to(memory_format=torch.channels_last)
    if device().type == "cpu":
        # The fused kernel's backward pass takes a third of a training step on a CPU.
        unet.set_attn_processor(AttnProcessor())
