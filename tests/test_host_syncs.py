"""Nothing that a plugged step, our sampler or a training step does waits for the device."""

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from benchmarks.plug import Operations, counted_forwards, waits
from pnp_core.cache import TeacherCache
from pnp_core.conditions import Conditions
from pnp_core.denoiser import GuidedDenoiser
from pnp_core.guide import KINDS, Guide, GuideConfig
from pnp_core.models import encode_prompts
from pnp_core.plug import plug
from pnp_core.sample import initial_noise, sample
from pnp_core.schedule import NoiseSchedule
from pnp_core.train import TrainConfig, train
from tests.conftest import roused

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("kind", KINDS)
def test_a_plugged_step_after_the_first_waits_for_nothing(
    pipe: StableDiffusionPipeline, kind: str
) -> None:
    guide = Guide.from_unet(pipe.unet, GuideConfig(kind=kind, max_parameters_ratio=0.2))
    plug(pipe, roused(guide))
    with counted_forwards(pipe.unet) as counted:
        pipe("a cat", negative_prompt="a dog", num_inference_steps=3, output_type="latent")
    assert len(counted) == 3 and not any(counted[1:])


def test_our_sampler_waits_for_nothing_in_a_step(pipe: StableDiffusionPipeline) -> None:
    guide = roused(Guide.from_unet(pipe.unet, GuideConfig(max_parameters_ratio=0.2)))
    denoiser = GuidedDenoiser(pipe.unet, guide, NoiseSchedule.from_scheduler(pipe.scheduler))
    text, null = (encode_prompts(pipe, [prompt]).states_NLD for prompt in ("a cat", ""))
    counts = []
    for num_steps in (1, 5):
        with Operations(waits) as found:
            sample(
                denoiser,
                pipe.scheduler,
                z_T=initial_noise((4, 4, 4), [0]),
                conditions=Conditions.at_scale(4.0, c_BLD=text, n_BLD=null),
                num_steps=num_steps,
            )
        counts.append(found.found)
    assert counts[0] == counts[1]  # of the scheduler's own tables, which are on the CPU


def test_training_waits_only_where_it_reports(cache: TeacherCache) -> None:
    weight = torch.nn.Linear(4, 4)
    config = TrainConfig(
        num_images=64, batch_size=4, precision="fp32", report_every_images=64,
        checkpoint_every_images=64,
    )  # fmt: skip
    per_step: list[int] = []
    found = Operations(waits)

    def loss_fn(step: int, part: slice) -> torch.Tensor:
        per_step.append(found.found.total())
        return weight(torch.full((4, 4), float(step + 1))).square().mean(dim=1)

    with found:
        train(loss_fn, weight, config, run_hash="run")
    # the first four calls are before training; every tenth step turns the optimizer's bases
    between = [b - a for a, b in zip(per_step[4:-1], per_step[5:], strict=True)]
    assert len(between) == 15 and not any(n for step, n in enumerate(between) if step % 10)


@pytest.mark.gpu
@NEEDS_CUDA
def test_pytorch_finds_no_wait_in_a_plugged_step_on_a_gpu(pipe: StableDiffusionPipeline) -> None:
    pipe.to("cuda")
    plug(pipe, roused(Guide.from_unet(pipe.unet, GuideConfig(max_parameters_ratio=0.2))))
    forward, steps = pipe.unet._call_impl, []

    def strict(*args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        torch.cuda.set_sync_debug_mode("error" if len(steps) > 1 else "default")
        try:
            return forward(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    pipe.unet._call_impl = strict
    pipe("a cat", num_inference_steps=3, output_type="latent")
    assert len(steps) == 3


@pytest.mark.gpu
@NEEDS_CUDA
def test_cuda_graphs_give_the_same_image(pipe: StableDiffusionPipeline) -> None:
    pipe.to("cuda")
    plug(pipe, roused(Guide.from_unet(pipe.unet, GuideConfig(max_parameters_ratio=0.2))))

    def made() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipe(
            "a cat", num_inference_steps=4, output_type="latent", generator=generator
        ).images

    expected = made()
    pipe.unet.compile(mode="reduce-overhead", fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(made(), expected, atol=1e-3, rtol=1e-3)
