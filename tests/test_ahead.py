"""What a guide does at steps to come is what it would do at each of them by itself."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler, StableDiffusionPipeline
from torch import Tensor

from pnp_core import ahead
from pnp_core.ahead import StepsAhead, place_of
from pnp_core.guide import KINDS, Guide, GuideConfig
from pnp_core.guide.kind import Effect, Prepared
from pnp_core.plug import plug
from tests.cases import few_of
from tests.conftest import roused


def halve_the_scale(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
    if step == 2:
        pipe._guidance_scale /= 2
    return given


@pytest.mark.parametrize("kind", few_of(KINDS, "tiny"))
@pytest.mark.parametrize(
    ("scheduler", "call"),
    [
        (None, {"num_inference_steps": 20}),
        (None, {"num_inference_steps": 6, "num_images_per_prompt": 3}),
        (None, {"num_inference_steps": 6, "callback_on_step_end": halve_the_scale}),
        (HeunDiscreteScheduler, {"num_inference_steps": 5}),  # each timestep twice
        (EulerDiscreteScheduler, {"num_inference_steps": 5}),  # timesteps are no integers
    ],
    ids=["one", "three", "callback", "heun", "euler"],
)
def test_a_call_gives_what_it_gives_step_by_step(
    pipe: StableDiffusionPipeline,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    scheduler: Any,
    call: dict[str, Any],
) -> None:
    guide = roused(Guide.from_unet(pipe.unet, GuideConfig(kind=kind, max_parameters_ratio=0.2)))
    if scheduler is not None:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    plug(pipe, guide)
    latents = []
    for rows in (ahead.ROWS, 1):
        monkeypatch.setattr(ahead, "ROWS", rows)
        generator = torch.Generator().manual_seed(0)
        given = pipe("a cat", **call, generator=generator, output_type="latent")
        latents.append(given.images)
    torch.testing.assert_close(*latents, rtol=1e-4, atol=1e-4)


class Counted(Prepared):
    """A guide whose effects tell at which timesteps they were made, and that counts how often."""

    def __init__(self) -> None:
        self.times = self.made = 0

    def at(self, sample: Tensor, timestep_B: Tensor) -> Effect:
        return self.at_each(sample, timestep_B[None])[0]

    def at_each(self, sample: Tensor, timesteps_TB: Tensor) -> list[Effect]:
        self.times += 1
        self.made += len(timesteps_TB)
        return [At(t_B) for t_B in timesteps_TB]


class At(Effect):
    def __init__(self, timestep_B: Tensor) -> None:
        self.timestep_B = timestep_B


@torch.no_grad()
@pytest.mark.parametrize(("batch", "times"), [(1, 2), (8, 10), (16, 20), (64, 20)])
def test_each_step_is_given_its_own_and_as_many_are_computed_as_rows_allow(
    batch: int, times: int
) -> None:
    prepared, steps, sample = Counted(), StepsAhead(), torch.zeros(batch, 4, 4, 4)
    timesteps = torch.arange(1000, 0, -50)
    for t in timesteps:
        effect = steps.effect(prepared, sample, t.expand(batch))
        assert isinstance(effect, At) and set(effect.timestep_B.tolist()) == {t.item()}
    assert prepared.times == times


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [lambda timesteps: timesteps.neg_(), lambda timesteps: timesteps[3:].mul_(2)],
    ids=["all", "some"],
)
def test_timesteps_that_are_written_over_are_computed_anew(change: Callable[[Tensor], Any]) -> None:
    prepared, steps, sample = Counted(), StepsAhead(), torch.zeros(1, 4, 4, 4)
    timesteps = torch.arange(1000, 0, -50)
    steps.effect(prepared, sample, timesteps[0])
    change(timesteps)
    effect = steps.effect(prepared, sample, timesteps[4])
    assert isinstance(effect, At) and effect.timestep_B.item() == timesteps[4].item()


@torch.no_grad()
def test_another_guide_dtype_or_size_is_computed_anew() -> None:
    steps, timesteps = StepsAhead(), torch.arange(1000, 0, -50)
    first, second, sample = Counted(), Counted(), torch.zeros(1, 4, 4, 4)
    steps.effect(first, sample, timesteps[0])
    steps.effect(second, sample, timesteps[1])
    steps.effect(second, sample.half(), timesteps[2])
    steps.effect(second, sample.half().repeat(2, 1, 1, 1), timesteps[3])
    assert (first.times, second.times) == (1, 3)


@torch.no_grad()
def test_where_conditions_change_at_each_step_nothing_is_computed_ahead_but_once() -> None:
    steps, timesteps, sample = StepsAhead(), torch.arange(1000, 0, -50), torch.zeros(1, 4, 4, 4)
    prepared = [Counted() for _ in timesteps]
    for one, t in zip(prepared, timesteps, strict=True):
        effect = steps.effect(one, sample, t)
        assert isinstance(effect, At) and effect.timestep_B.item() == t.item()
    assert [one.made for one in prepared] == [16] + [1] * 19
    for t in timesteps[:3]:
        steps.effect(prepared[-1], sample, t)
    assert prepared[-1].times == 2  # it stays


def test_with_gradients_nothing_is_computed_ahead() -> None:
    prepared, timesteps = Counted(), torch.arange(1000, 0, -50)
    steps = StepsAhead()
    for t in timesteps[:4]:
        steps.effect(prepared, torch.zeros(1, 4, 4, 4), t)
    assert prepared.times == 4


def test_a_timestep_tells_its_place_only_where_it_has_one() -> None:
    timesteps = torch.arange(1000, 0, -50)
    for found in (timesteps[7], timesteps[2:][5], timesteps[7:8], timesteps[7].expand(3)):
        place = place_of(found)
        assert place is not None and place.timesteps is timesteps and place.number == 7
    for unknown in (
        torch.tensor(3),
        timesteps[7].clone(),
        timesteps[7].float(),
        timesteps[2:5],  # of several samples
        timesteps.view(4, 5).clone()[1, 2],
    ):
        assert place_of(unknown) is None
    with torch.inference_mode():
        assert place_of(torch.arange(4)[1]) is None
