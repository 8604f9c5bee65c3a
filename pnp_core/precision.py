"""bf16 where it is fast."""

import torch
from torch import nn


def has_bf16(device_type: str) -> bool:
    """Whether arithmetic in bf16 is done by this machine's hardware.

    Emulated, a convolution takes ten times as long as in full precision.
    """
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type == "cpu":
        supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return torch.backends.mkldnn.is_available() and supported
    return True


def mixed_precision(device_type: str, precision: str) -> torch.autocast:
    """A context that computes in bf16 if ``precision`` says so and the hardware has it."""
    enabled = precision == "bf16" and has_bf16(device_type)
    return torch.autocast(device_type, dtype=torch.bfloat16, enabled=enabled)


def hold_in_bf16(module: nn.Module) -> None:
    """Keep frozen weights of convolutions and linear layers in bf16, in place.

    Autocast would cast them at each use: what it computes stays the same, bit for bit, in half the
    memory and without the casts. Norms stay as they are, as autocast computes them in fp32.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            part.to(torch.bfloat16)


def is_mixed(device_type: str) -> bool:
    """Whether autocast is on for this kind of device."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
