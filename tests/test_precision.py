"""bf16 is used where the hardware computes in it, and nowhere else."""

import pytest
import torch

from pnp_core.precision import mixed_precision


def product_dtype(precision: str) -> torch.dtype:
    with mixed_precision("cpu", precision):
        return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype


@pytest.mark.parametrize(
    ("precision", "in_hardware", "expected"),
    [
        ("bf16", True, torch.bfloat16),
        ("bf16", False, torch.float32),
        ("fp32", True, torch.float32),
    ],
)
def test_bf16_is_computed_in_where_it_is_wanted_and_there(
    precision: str, in_hardware: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pnp_core.precision.has_bf16", lambda device_type: in_hardware)
    assert product_dtype(precision) is expected
