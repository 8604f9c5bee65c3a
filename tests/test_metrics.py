"""What needs no images: agreement with CFG, memory."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from pnp_core.conditions import Conditions
from pnp_core.denoiser import CFGDenoiser, PlainDenoiser
from pnp_core.metrics import guidance_fvu_terms, peak_bytes
from pnp_core.schedule import NoiseSchedule

KILOBYTE = 1024


def test_guidance_fvu_is_nothing_for_cfg_itself_and_one_for_no_guidance(
    pipe: StableDiffusionPipeline,
) -> None:
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn((3, 4, 4, 4), generator=generator)
    states = torch.randn((2, 3, 16, 32), generator=generator)
    conditions = Conditions.at_scale(3.0, c_BLD=states[0], n_BLD=states[1])
    teacher, t_B = CFGDenoiser(pipe.unet, schedule), torch.tensor([999, 500, 60])

    with torch.no_grad():
        eps_w = teacher(z, t_B, conditions)
        eps_c = PlainDenoiser(pipe.unet, schedule)(z, t_B, conditions)

    def half(z: Tensor, t_B: Tensor, conditions: Conditions) -> Tensor:
        return (eps_w + eps_c) / 2

    for student, expected in ((teacher, 0), (PlainDenoiser(pipe.unet, schedule), 1), (half, 0.25)):
        terms = guidance_fvu_terms(student, teacher, z_t=z, t_B=t_B, conditions=conditions)
        shares = terms.unexplained_B / terms.total_B
        torch.testing.assert_close(shares, torch.full((3,), float(expected)), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(terms.eps_w, eps_w)
        torch.testing.assert_close(
            terms.total_B, (eps_c - eps_w).square().sum(dim=(1, 2, 3)), rtol=1e-4, atol=0
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's allocator rounds sizes")
def test_peak_memory_is_that_of_the_tensors_alive_at_a_time() -> None:
    given = torch.zeros(256 * KILOBYTE // 4)  # is there before, so it does not count

    def work() -> None:
        x = given[: 4 * KILOBYTE // 4] + 1  # 4 KB
        y = x.view(-1, 2).t()  # a view
        z = torch.cat([y, y])  # 8 KB more
        del x, y
        for _ in range(5):
            z = z + 1  # two of 8 KB, whatever the number of rounds

    assert peak_bytes(work) == 16 * KILOBYTE
