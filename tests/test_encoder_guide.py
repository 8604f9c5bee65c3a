"""What the encoder guide does beyond a tiny one."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor

from pnp_core.calls import entered, now
from pnp_core.conditions import AddedConditions, Conditions
from pnp_core.denoiser import DenoiserCall, GuidedDenoiser
from pnp_core.guide import Guide, GuideConfig
from pnp_core.guide.adapters import GAIN_RANK
from pnp_core.guide.encoder import RANK, EncoderGuide
from pnp_core.inject import use
from pnp_core.schedule import NoiseSchedule
from tests.conftest import roused

BATCH = 2
ENCODER = GuideConfig(kind="encoder", max_parameters_ratio=0.3)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def told() -> dict[str, Any]:
    """A forward's arguments under the prompt."""
    return {
        "sample": normal(BATCH, 4, 4, 4),
        "timestep": torch.tensor([20, 900]),
        "encoder_hidden_states": normal(BATCH, 16, 32, seed=1),
    }


NEGATIVE = normal(1, 16, 32, seed=2)


def negating(unet: UNet2DConditionModel, *, mixed: bool) -> Guide:
    """At w = 2 it takes away all by which the decoder's inputs differ, and does nothing else."""
    guide = Guide.from_unet(unet, ENCODER)
    assert isinstance(guide.net, EncoderGuide)
    for adapter in guide.net.differences:
        channels = adapter.down.in_features
        for linear in (adapter.gains.down, adapter.code):
            torch.nn.init.zeros_(linear.weight)
        torch.nn.init.constant_(adapter.gains.down.bias, -1 / GAIN_RANK)
        torch.nn.init.ones_(adapter.gains.up.weight)
        if mixed:  # the first channels by the projection, the others by their gains
            basis = torch.eye(channels)[:RANK]
            adapter.down.weight.data = basis
            adapter.up.weight.data = basis.T.clone()
            torch.nn.init.constant_(adapter.code.bias, -1)
            adapter.gains.up.weight.data[:RANK] = 0
    return guide


@contextmanager
def decoding(unet: UNet2DConditionModel, inputs: list[dict[str, Any]] | None) -> Iterator[Any]:
    """Keeps what enters the decoder, or puts what was kept in the place of what does."""
    kept: list[dict[str, Any]] = []
    names = ("hidden_states", "res_hidden_states_tuple")

    def before(index: int) -> Any:
        def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            kept.append({name: kwargs[name] for name in names})
            if inputs is None:
                return None
            changed = dict(inputs[index])
            if index:  # what the block before gave
                del changed["hidden_states"]
            return args, {**kwargs, **changed}

        return hook

    handles = [
        block.register_forward_pre_hook(before(index), with_kwargs=True)
        for index, block in enumerate(unet.up_blocks)
    ]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def residuals_of_a_controlnet(unet: UNet2DConditionModel) -> dict[str, Any]:
    """As large as the encoder's features."""
    with decoding(unet, None) as kept:
        unet(**told())
    skips = [skip for each in kept[::-1] for skip in each["res_hidden_states_tuple"]]
    return {
        "down_block_additional_residuals": [
            normal(*skip.shape, seed=5 + number) for number, skip in enumerate(skips)
        ],
        "mid_block_additional_residual": normal(*kept[0]["hidden_states"].shape, seed=4),
    }


def residuals_of_a_t2i_adapter(unet: UNet2DConditionModel) -> dict[str, Any]:
    """One after each down block, as large as what it gives."""
    given: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda _, __, output: given.append(output[0]))
        for block in unet.down_blocks
    ]
    unet(**told())
    for handle in handles:
        handle.remove()
    # a block with attentions adds it before its downsampler
    sizes = [normal(BATCH, 4, 4, 4).shape[2:], *(x.shape[2:] for x in given)]
    return {
        "down_intrablock_additional_residuals": [
            normal(BATCH, given[number].shape[1], *sizes[number], seed=9)
            if getattr(block, "has_cross_attention", False)
            else normal(*given[number].shape, seed=9)
            for number, block in enumerate(unet.down_blocks)
        ]
    }


MORE = {
    "alone": lambda _: {},
    "with a ControlNet": residuals_of_a_controlnet,
    "with a T2I adapter": residuals_of_a_t2i_adapter,
}


@torch.no_grad()
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("more", MORE)
def test_gains_of_minus_one_have_the_decoder_read_the_encoder_of_the_negative_prompt(
    pipe: StableDiffusionPipeline, more: str, *, mixed: bool
) -> None:
    unet = pipe.unet
    beside = MORE[more](unet)

    def run(**changes: Any) -> Tensor:
        copied = {k: list(v) if isinstance(v, list) else v for k, v in beside.items()}
        return unet(**told(), **copied, **changes).sample

    arguments = told()
    negative = NEGATIVE.expand(BATCH, -1, -1)
    with decoding(unet, None) as kept:
        unet(**{**arguments, "encoder_hidden_states": negative}, **{
            k: list(v) if isinstance(v, list) else v for k, v in beside.items()
        })  # fmt: skip
    with decoding(unet, list(kept)):
        expected = run()

    guide = negating(unet, mixed=mixed)
    use(unet, guide)
    conditions = Conditions.at_scale(2.0, c_BLD=arguments["encoder_hidden_states"], n_BLD=NEGATIVE)
    with entered(DenoiserCall(unet, guide, conditions)):
        made = run()
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(made, run(), atol=1e-3)


@torch.no_grad()
def test_the_encoder_of_the_negative_prompt_is_told_its_pooled_states(
    xl_pipe: StableDiffusionXLPipeline,
) -> None:
    unet = xl_pipe.unet
    guide = roused(Guide.from_unet(unet, ENCODER))
    guided = GuidedDenoiser(unet, guide, NoiseSchedule.from_scheduler(xl_pipe.scheduler))
    arguments, width = told(), xl_pipe.text_encoder_2.config.projection_dim
    seen: list[Tensor] = []
    unet.add_embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    pooled, negative = normal(BATCH, width), normal(BATCH, width, seed=3)
    added = AddedConditions(pooled, negative, torch.ones(BATCH, 6))
    c_BLD = normal(BATCH, 16, unet.config.cross_attention_dim, seed=1)
    n_BLD = normal(1, 16, unet.config.cross_attention_dim, seed=2)
    conditions = Conditions.at_scale(3.0, c_BLD=c_BLD, n_BLD=n_BLD, added=added)
    guided(arguments["sample"], arguments["timestep"], conditions)
    first, second = (x[:, :width] for x in seen)
    assert torch.equal(first, negative) and torch.equal(second, pooled)


def test_an_error_in_the_second_run_leaves_nothing_behind(pipe: StableDiffusionPipeline) -> None:
    unet = pipe.unet
    guided = GuidedDenoiser(
        unet, roused(Guide.from_unet(unet, ENCODER)), NoiseSchedule.from_scheduler(pipe.scheduler)
    )
    arguments = told()
    conditions = Conditions.at_scale(2.0, c_BLD=arguments["encoder_hidden_states"], n_BLD=NEGATIVE)
    inputs = arguments["sample"], arguments["timestep"], conditions
    with torch.no_grad():
        before = guided(*inputs)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    handle = unet.mid_block.register_forward_hook(fail)
    with torch.no_grad(), pytest.raises(RuntimeError, match="out of memory"):
        guided(*inputs)
    handle.remove()
    assert now.features is None and now.acting is None
    with torch.no_grad():
        assert torch.equal(guided(*inputs), before)


def test_a_forward_that_does_not_come_to_the_decoder_is_refused(
    pipe: StableDiffusionPipeline,
) -> None:
    guide = roused(Guide.from_unet(pipe.unet, ENCODER))
    guided = GuidedDenoiser(pipe.unet, guide, NoiseSchedule.from_scheduler(pipe.scheduler))
    arguments = told()
    conditions = Conditions.at_scale(2.0, c_BLD=arguments["encoder_hidden_states"], n_BLD=NEGATIVE)
    pipe.unet.forward = lambda sample, *_, **__: (sample,)
    with torch.no_grad(), pytest.raises(ValueError, match="does not come to its decoder"):
        guided(arguments["sample"], arguments["timestep"], conditions)
    assert now.features is None


def test_an_encoder_guide_keeps_to_its_share_of_parameters(pipe: StableDiffusionPipeline) -> None:
    base = sum(p.numel() for p in pipe.unet.parameters())
    guide = Guide.from_unet(pipe.unet, ENCODER)
    assert sum(p.numel() for p in guide.parameters()) <= 0.3 * base
