"""Sampling by each solver, against diffusers' own pipelines with its schedulers."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)

from pnp_core.conditions import Conditions
from pnp_core.denoiser import CFGDenoiser
from pnp_core.models import encode_prompts
from pnp_core.sample import initial_noise, sample
from pnp_core.schedule import NoiseSchedule

PROMPTS = ["red disc", "blue ring"]
SCALE = 4.0
STOCK = {
    "ddim": DDIMScheduler,
    "dpmsolver++": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
}


def ours(pipe: StableDiffusionPipeline, num_steps: int, **options: object) -> torch.Tensor:
    conditions = Conditions.at_scale(
        SCALE,
        c_BLD=encode_prompts(pipe, PROMPTS).states_NLD,
        n_BLD=encode_prompts(pipe, [""]).states_NLD,
    )
    return sample(
        CFGDenoiser(pipe.unet, NoiseSchedule.from_scheduler(pipe.scheduler)),
        pipe.scheduler,
        z_T=initial_noise((4, 4, 4), [3, 4]),
        conditions=conditions,
        num_steps=num_steps,
        **options,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("solver", "num_steps"), [(s, n) for s in STOCK for n in (1, 2, 4, 8)])
def test_a_solver_gives_the_latents_of_the_stock_pipeline_with_its_scheduler(
    pipe: StableDiffusionPipeline, solver: str, num_steps: int, prediction_type: str
) -> None:
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, prediction_type=prediction_type
    )
    made = ours(pipe, num_steps, solver=solver)
    pipe.scheduler = STOCK[solver].from_config(pipe.scheduler.config)
    expected = pipe(
        PROMPTS,
        num_inference_steps=num_steps,
        guidance_scale=SCALE,
        latents=initial_noise((4, 4, 4), [3, 4]),
        output_type="latent",
    ).images
    torch.testing.assert_close(made, expected, atol=2e-4, rtol=1e-3)


def test_ddim_is_the_default(pipe: StableDiffusionPipeline) -> None:
    assert torch.equal(ours(pipe, 4), ours(pipe, 4, solver="ddim"))
    assert not torch.allclose(ours(pipe, 4), ours(pipe, 4, solver="dpmsolver++"), atol=1e-3)


@pytest.mark.parametrize("solver", ["dpmsolver++", "unipc"])
def test_the_spacing_that_is_asked_for_is_the_solvers(
    pipe: StableDiffusionPipeline, solver: str
) -> None:
    made = ours(pipe, 4, solver=solver, timestep_spacing="leading")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="leading")
    assert torch.equal(made, ours(pipe, 4, solver=solver))


def test_a_solver_that_can_not_take_so_many_steps_is_refused(
    pipe: StableDiffusionPipeline,
) -> None:
    with pytest.raises(ValueError, match="num_steps is 1001"):
        ours(pipe, 1001, solver="unipc")
