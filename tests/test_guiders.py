"""Teachers other than plain CFG, against diffusers' own guiders."""

import pytest
import torch
from diffusers import guiders

from pnp_core.guiders import GUIDERS, Guider, GuiderConfig

T = torch.tensor([999, 600, 10])
W = torch.tensor([2.0, 4.5, 7.0])


def predictions() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    eps_c = torch.randn((3, 4, 8, 8), generator=generator)
    return eps_c, eps_c + 0.3 * torch.randn((3, 4, 8, 8), generator=generator)


@pytest.mark.parametrize("name", GUIDERS)
def test_each_sample_is_guided_as_diffusers_would_with_its_guidance_scale(name: str) -> None:
    eps_c, eps_n = predictions()
    guided = Guider(GuiderConfig(name=name))(eps_c, eps_n, T, W)
    for i, w in enumerate(W.tolist()):
        options = {"zero_init_steps": 0} if "ZeroStar" in name else {}
        reference = getattr(guiders, name)(guidance_scale=w, **options)
        reference.set_state(0, 50, T[i])
        expected = reference.forward(eps_c[i : i + 1], eps_n[i : i + 1]).pred
        torch.testing.assert_close(guided[i : i + 1], expected, atol=1e-5, rtol=1e-5)


def test_guiders_differ_from_one_another() -> None:
    # By its defaults APG is plain CFG as long as guidance is weak.
    arguments = {"AdaptiveProjectedGuidance": {"eta": 0.0}}
    configs = [GuiderConfig(name=name, arguments=arguments.get(name, {})) for name in GUIDERS]
    outputs = [Guider(config)(*predictions(), T, W) for config in configs]
    for i, one in enumerate(outputs):
        assert all(not torch.allclose(one, other, atol=1e-3) for other in outputs[i + 1 :])


def test_guidance_can_be_limited_to_an_interval_of_the_schedule() -> None:
    eps_c, eps_n = predictions()
    limited = Guider(GuiderConfig(arguments={"start": 0.2, "stop": 0.8}))(eps_c, eps_n, T, W)
    plain = Guider()(eps_c, eps_n, T, W)
    assert torch.equal(limited[0], eps_c[0])  # t = 999: not yet
    torch.testing.assert_close(limited[1], plain[1])
    assert torch.equal(limited[2], eps_c[2])  # t = 10: no more


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("SkipLayerGuidance", {}, "needs more than the predictions with and without the prompt"),
        ("NoSuchGuidance", {}, "diffusers has none of that name"),
        (
            "AdaptiveProjectedGuidance",
            {"adaptive_projected_guidance_momentum": -0.5},
            "carries momentum from step to step",
        ),
        (
            "ClassifierFreeZeroStarGuidance",
            {"zero_init_steps": 1},
            "depends on the number of the step",
        ),
        ("ClassifierFreeGuidance", {"guidance_scale": 3.0}, "guidance_scale is not for"),
        ("ClassifierFreeGuidance", {"etta": 3.0}, "has no argument 'etta'"),
        ("ClassifierFreeGuidance", {"self": 1.0}, "has no argument 'self'"),
        ("ClassifierFreeGuidance", {"start": 0.8, "stop": 0.1}, "start 0.8 to stop 0.1, never"),
        ("TangentialClassifierFreeGuidance", {"start": 2.0}, "start 2.0 to stop 1.0, never"),
        ("ClassifierFreeGuidance", {"stop": float("nan")}, "never"),
    ],
)
def test_what_cannot_be_distilled_is_refused_by_name(
    name: str, arguments: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        GuiderConfig(name=name, arguments=arguments)
    assert name in str(error.value)
