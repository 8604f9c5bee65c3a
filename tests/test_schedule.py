"""The maths, against diffusers' schedulers and explicit steps."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch.utils._python_dispatch import TorchDispatchMode

from pnp_core.schedule import (
    NoiseSchedule,
    cfg_target,
    sampling_timesteps,
    two_step_target,
)
from tests.toy import ddim


def scheduler(**changes: object) -> DDIMScheduler:
    return ddim(**{"set_alpha_to_one": False, **changes})


def latents(seed: int, batch: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((batch, 4, 4, 4), generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("set_alpha_to_one", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_ddim_steps_equal_those_of_diffusers(
    spacing: str, set_alpha_to_one: bool, prediction_type: str
) -> None:
    reference = scheduler(
        timestep_spacing=spacing,
        set_alpha_to_one=set_alpha_to_one,
        prediction_type=prediction_type,
    )
    schedule = NoiseSchedule.from_scheduler(reference)
    grid = sampling_timesteps(reference, 8)
    reference.set_timesteps(8)
    # diffusers takes its own stride from t to the timestep before, whatever the grid
    stride = reference.config.num_train_timesteps // 8
    z = latents(0)
    for t in reference.timesteps:
        output = latents(int(t))
        expected = reference.step(output, t, z).prev_sample
        t_B = t.expand(len(z))
        s_B = t_B - stride
        eps = schedule.to_eps(output, z, t_B)
        # diffusers keeps its schedule in float32
        stepped = schedule.ddim_step(z, eps, t_B, s_B)
        torch.testing.assert_close(stepped, expected, atol=1e-5, rtol=1e-4)
        z = expected
    assert grid[:-1].tolist() == reference.timesteps.tolist()
    assert grid[-1] == -1


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_converting_to_eps_and_back_changes_nothing(prediction_type: str) -> None:
    schedule = NoiseSchedule.from_scheduler(scheduler(prediction_type=prediction_type))
    output, z, t = latents(0), latents(1), torch.tensor([1, 500, 999])
    eps = schedule.to_eps(output, z, t)
    torch.testing.assert_close(schedule.from_eps(eps, z, t), output)


def test_eps_v_and_x_are_those_of_diffusers() -> None:
    x, eps, t = latents(0).float(), latents(1).float(), torch.tensor([1, 500, 999])
    z = scheduler().add_noise(x, eps, t)
    expected = {
        "epsilon": eps,
        "v_prediction": scheduler().get_velocity(x, eps, t),
        "sample": x,
    }
    for prediction_type, prediction in expected.items():
        schedule = NoiseSchedule.from_scheduler(scheduler(prediction_type=prediction_type))
        torch.testing.assert_close(schedule.from_eps(eps, z, t), prediction, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(schedule.to_eps(prediction, z, t), eps, atol=1e-3, rtol=1e-3)


def test_noise_added_by_the_schedule_equals_that_of_diffusers() -> None:
    schedule = NoiseSchedule.from_scheduler(scheduler())
    x, eps, t = latents(0).float(), latents(1).float(), torch.tensor([0, 400, 999])
    torch.testing.assert_close(schedule.add_noise(x, eps, t), scheduler().add_noise(x, eps, t))


def test_cfg_follows_its_formula_with_a_guidance_scale_for_each_sample() -> None:
    eps_c, eps_n = latents(0), latents(1)
    w = torch.tensor([0.0, 1.0, 7.5], dtype=torch.float64)
    guided = cfg_target(eps_c=eps_c, eps_n=eps_n, guidance_scale_B=w)
    assert torch.equal(guided[0], eps_n[0])
    assert torch.equal(guided[1], eps_c[1])
    torch.testing.assert_close(guided[2], eps_n[2] + 7.5 * (eps_c[2] - eps_n[2]))


@pytest.mark.parametrize("set_alpha_to_one", [False, True])
@pytest.mark.parametrize(("t", "m", "s"), [(999, 937, 874), (500, 437, 374), (124, 62, -1)])
def test_one_step_with_the_two_step_target_lands_where_two_explicit_steps_do(
    set_alpha_to_one: bool, t: int, m: int, s: int
) -> None:
    schedule = NoiseSchedule.from_scheduler(scheduler(set_alpha_to_one=set_alpha_to_one))
    t_B, m_B, s_B = (torch.full((3,), value) for value in (t, m, s))
    z_t = latents(0)
    z_m = schedule.ddim_step(z_t, latents(1), t_B, m_B)
    z_s = schedule.ddim_step(z_m, latents(2), m_B, s_B)
    eps = two_step_target(schedule, z_t=z_t, z_s=z_s, t_B=t_B, s_B=s_B)
    torch.testing.assert_close(schedule.ddim_step(z_t, eps, t_B, s_B), z_s)


def test_timesteps_of_trailing_spacing_nest_when_halved() -> None:
    for num_steps in (32, 16, 8, 4, 2, 1):
        coarse = sampling_timesteps(scheduler(), num_steps)
        fine = sampling_timesteps(scheduler(), 2 * num_steps)
        assert coarse[:-1].tolist() == fine[:-1:2].tolist()


def test_a_scheduler_without_a_discrete_schedule_is_refused() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler has no alphas_cumprod"):
        NoiseSchedule.from_scheduler(FlowMatchEulerDiscreteScheduler())


class NoFloat64(TorchDispatchMode):
    """As on Apple's GPUs: tensors elsewhere than on the CPU can't have float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **kwargs or {})
        for each in made if isinstance(made, list | tuple) else [made]:
            if isinstance(each, torch.Tensor) and each.device.type != "cpu":
                assert each.dtype != torch.float64
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_on_another_device_the_schedule_asks_for_no_float64(dtype: torch.dtype) -> None:
    schedule = NoiseSchedule.from_scheduler(scheduler())
    like = torch.zeros(3, 4, 8, 8, dtype=dtype, device="meta")
    with NoFloat64():
        alpha, sigma = schedule.alpha_sigma(torch.tensor([999, 0, -1]), like)
    for found in (alpha, sigma):
        assert found.shape == (3, 1, 1, 1) and found.dtype == dtype
        assert found.device.type == "meta"


def test_a_number_of_steps_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="num_steps is 0"):
        sampling_timesteps(scheduler(), 0)


def test_the_last_step_of_a_scheduler_that_does_not_say_ends_where_ddim_with_its_config_ends() -> (
    None
):
    from diffusers import EulerDiscreteScheduler

    euler = EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.01)
    reference = DDIMScheduler.from_config(euler.config)
    schedule = NoiseSchedule.from_scheduler(euler)
    assert schedule.final_alpha_cumprod == float(reference.final_alpha_cumprod)
