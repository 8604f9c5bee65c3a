"""Sampling, against an ordinary differential equation whose solution is known."""

import pytest
import torch
from torch import Tensor

from pnp_core.conditions import Conditions
from pnp_core.sample import sample
from pnp_core.schedule import NoiseSchedule
from tests.toy import ddim

MEAN, STD = 0.7, 0.4
SCHEDULER = ddim()
SCHEDULE = NoiseSchedule.from_scheduler(SCHEDULER)
CONDITIONS = Conditions.at_scale(1.0, c_BLD=torch.zeros(3, 1, 1), n_BLD=torch.zeros(1, 1, 1))
Z_T = torch.randn((3, 4, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def exact_eps(z: Tensor, t_B: Tensor, conditions: Conditions) -> Tensor:
    """Of one Gaussian: z_t is normal with mean alpha mu and variance alpha^2 s^2 + sigma^2."""
    alpha, sigma = SCHEDULE.alpha_sigma(t_B, z)
    return sigma * (z - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)


def end_of_the_flow(z_T: Tensor) -> Tensor:
    """Along the probability flow, (z_t - alpha mu) / sqrt(alpha^2 s^2 + sigma^2) stays the same."""
    alpha, sigma = SCHEDULE.alpha_sigma(torch.full((len(z_T),), 999), z_T)
    return MEAN + STD * (z_T - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2).sqrt()


def error(solver: str, num_steps: int) -> float:
    made = sample(
        exact_eps,
        SCHEDULER,
        z_T=Z_T,
        conditions=CONDITIONS,
        num_steps=num_steps,
        solver=solver,
    )
    return float((made - end_of_the_flow(Z_T)).abs().max())


@pytest.mark.parametrize("solver", ["ddim", "dpmsolver++", "unipc"])
def test_more_steps_come_nearer_to_the_end_of_the_flow(solver: str) -> None:
    assert error(solver, 64) < 0.5 * error(solver, 16) < 0.3


@pytest.mark.parametrize("solver", ["dpmsolver++", "unipc"])
def test_second_order_solvers_are_nearer_than_ddim_in_as_many_steps(solver: str) -> None:
    assert error(solver, 64) < 0.6 * error("ddim", 64)


def test_a_single_step_of_any_solver_is_the_x_prediction() -> None:
    assert abs(error("ddim", 1) - error("dpmsolver++", 1)) < 1e-5


def test_an_unknown_solver_is_named() -> None:
    with pytest.raises(ValueError, match="no solver 'euler'; the solvers are ddim, dpmsolver"):
        error("euler", 4)
