"""bf16 is used where the hardware computes in it, and nowhere else."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from components import distill, halve
from components.params import Params, load_params
from components.training import check_precision
from pnp_core.cache import TeacherCache
from pnp_core.denoiser import GuidedDenoiser
from pnp_core.distill import distillation_objective
from pnp_core.guide import Guide
from pnp_core.precision import hold_in_bf16, mixed_precision
from pnp_core.settings import TrainConfig
from tests import toy
from tests.conftest import roused
from tests.test_training import DISTILL


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


def test_frozen_weights_held_in_bf16_change_no_gradient_and_take_half(
    pipe: StableDiffusionPipeline, cache: TeacherCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pnp_core.precision.has_bf16", lambda device_type: True)
    unet = pipe.unet.requires_grad_(False)
    guide = roused(Guide.from_unet(unet, DISTILL.guide))
    student = GuidedDenoiser(unet, guide, cache.schedule)
    losses = distillation_objective([student], cache, DISTILL, unet.device)

    def gradients() -> tuple[torch.Tensor, ...]:
        with mixed_precision("cpu", "bf16"):
            loss = losses(0, slice(0, 16)).sum()
        trained = [p for p in guide.parameters() if p.requires_grad]
        return torch.autograd.grad(loss, trained, materialize_grads=True)

    def size() -> int:
        return sum(p.numel() * p.element_size() for p in unet.parameters())

    expected, whole = gradients(), size()
    hold_in_bf16(unet)
    assert size() < 0.55 * whole
    for found, before in zip(gradients(), expected, strict=True):
        assert torch.equal(found, before)


def in_bf16(folder: Path) -> Params:
    """The toy's parameters, with training in bf16."""
    values = toy.toy_params()
    for stage in ("distill", "halve"):
        values[stage]["precision"] = "bf16"
    toy.write_params(folder, values)
    return load_params(folder / "params.yaml")


@pytest.mark.parametrize(
    ("stage", "work"), [("distill", distill.train_guide), ("halve", halve.train_rounds)]
)
def test_workers_of_which_some_have_no_bf16_are_refused_before_they_load_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, work: Any
) -> None:
    monkeypatch.setattr("pnp_core.train.of_all_workers", lambda own, device: [1, 0, 1, 0])
    said = f"^{stage}.precision: bf16, which the hardware of 2 of 4 workers .* rank: 1, 3"
    with pytest.raises(ValueError, match=said):
        work(in_bf16(tmp_path), print)


@pytest.mark.parametrize(("has", "num_lines"), [(True, 0), (False, 1)])
def test_that_bf16_is_asked_for_and_not_there_is_told_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], has: bool, num_lines: int
) -> None:
    monkeypatch.setattr("pnp_core.precision.has_bf16", lambda device_type: has)
    for precision in ("bf16", "fp32"):
        check_precision("distill", TrainConfig(num_images=1, batch_size=1, precision=precision))
    lines = capsys.readouterr().out.splitlines()
    assert lines == num_lines * [
        "distill: precision bf16 is asked for, which this hardware has not: all is in fp32"
    ]
