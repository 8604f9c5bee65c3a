"""Where a guide's hooks do not run, it is said; what can't be followed is left as it was."""

import copy
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from peft import LoHaConfig, LoraConfig

from pnp_core.calls import now
from pnp_core.conditions import Conditions
from pnp_core.denoiser import GuidedDenoiser
from pnp_core.guide import Guide, GuideConfig
from pnp_core.inject import hook_in
from pnp_core.plug import plug, unplug
from pnp_core.schedule import NoiseSchedule
from tests.conftest import roused
from tests.plugged import generate

X = (torch.zeros(1, 4, 4, 4), 5, torch.zeros(1, 16, 32))


@pytest.fixture
def guide(pipe: StableDiffusionPipeline) -> Guide:
    return roused(Guide.from_unet(pipe.unet, GuideConfig(max_parameters_ratio=0.2)))


def hooks(unet: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in unet.modules())


KINDS = [("tiny", 0.2), ("full", 0.9), ("encoder", 0.2)]


def engine_in(pipe: StableDiffusionPipeline, guide: Guide, part: str) -> None:
    """Plug, with other modules' forward in a part's place, as a trace or a captured graph is."""
    engine = copy.deepcopy(pipe.unet)
    plug(pipe, guide)
    pipe.unet.get_submodule(part).forward = engine.get_submodule(part).forward


@pytest.mark.parametrize(("kind", "ratio"), KINDS)
def test_what_computes_in_place_of_the_unets_modules_is_refused(
    pipe: StableDiffusionPipeline, kind: str, ratio: float
) -> None:
    config = GuideConfig(kind=kind, max_parameters_ratio=ratio)
    engine_in(pipe, roused(Guide.from_unet(pipe.unet, config)), "")
    for _ in range(2):
        with pytest.raises(ValueError, match="none of them has run|does not come to its decoder"):
            generate(pipe)


def test_a_denoiser_is_told_in_each_of_its_forwards(
    pipe: StableDiffusionPipeline, guide: Guide
) -> None:
    engine = copy.deepcopy(pipe.unet)
    denoiser = GuidedDenoiser(pipe.unet, guide, NoiseSchedule.from_scheduler(pipe.scheduler))
    pipe.unet.forward = engine.forward
    text = torch.randn(2, 1, 16, 32, generator=torch.Generator().manual_seed(0))
    conditions = Conditions.at_scale(4.0, c_BLD=text[0], n_BLD=text[1])
    for _ in range(2):
        with torch.no_grad(), pytest.raises(ValueError, match="none of them has run"):
            denoiser(X[0], torch.tensor([5]), conditions)


@pytest.mark.parametrize("part", ["up_blocks.1", "mid_block", "down_blocks.0"])
@pytest.mark.parametrize(("kind", "ratio"), [KINDS[0], KINDS[2]])
def test_what_computes_in_place_of_a_part_is_told_once(
    pipe: StableDiffusionPipeline,
    kind: str,
    ratio: float,
    part: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = GuideConfig(kind=kind, max_parameters_ratio=ratio)
    engine_in(pipe, roused(Guide.from_unet(pipe.unet, config)), part)
    for _ in range(2):
        generate(pipe)
    assert caplog.text.count("in which a guide acts") == 1


class PastToOut:
    """An attention processor that takes ``to_out``'s weights and does not call it."""

    def __call__(self, attn: Any, x: Any, encoder_hidden_states: Any = None, **_: Any) -> Any:
        text = x if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            y.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for y in (attn.to_q(x), attn.to_k(text), attn.to_v(text))
        )
        read = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return F.linear(read, attn.to_out[0].weight, attn.to_out[0].bias)


@pytest.mark.parametrize("chunks", [False, True])  # which run feed-forwards several times
def test_an_attention_processor_that_passes_to_out_by_is_told(
    pipe: StableDiffusionPipeline,
    guide: Guide,
    chunks: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for module in pipe.unet.modules():
        if chunks and isinstance(module, BasicTransformerBlock):
            module.set_chunk_feed_forward(1, dim=1)
    stock = generate(pipe)
    pipe.unet.set_attn_processor(PastToOut())
    np.testing.assert_allclose(generate(pipe), stock, atol=1e-4)
    plug(pipe, guide)
    assert "does not call to_out" not in caplog.text
    generate(pipe)
    assert "does not call to_out" in caplog.text


def test_a_unet_that_is_called_in_another_thread_or_by_its_forward_is_told(
    pipe: StableDiffusionPipeline, guide: Guide, caplog: pytest.LogCaptureFixture
) -> None:
    pool = ThreadPoolExecutor(1)

    class InThread(UNet2DConditionModel):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            with_grad_off = torch.no_grad()(super().__call__)
            return pool.submit(with_grad_off, *args, **kwargs).result()

    class ByForward(UNet2DConditionModel):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self.forward(*args, **kwargs)

    for other in (InThread, ByForward):
        pipe.unet.__class__ = other
        plug(pipe, guide)
        caplog.clear()
        generate(pipe, guidance_scale=1.0)
        assert not caplog.text
        generate(pipe)
        assert "run without its guide" in caplog.text
        unplug(pipe)


def test_a_pipeline_that_has_another_one_run_is_told_nothing(
    pipe: StableDiffusionPipeline, guide: Guide, caplog: pytest.LogCaptureFixture
) -> None:
    plug(pipe, guide)

    class TwoPass(StableDiffusionPipeline):
        def __call__(self, *args: Any, guidance_scale: float = 7.5, **kwargs: Any) -> Any:
            return pipe(*args, guidance_scale=guidance_scale, **kwargs)

    both = TwoPass(**pipe.components, requires_safety_checker=False)
    plug(both, guide)
    assert np.array_equal(generate(both), generate(pipe))
    assert not caplog.text


def test_a_call_that_is_interrupted_at_once_is_told_nothing(
    pipe: StableDiffusionPipeline, guide: Guide, caplog: pytest.LogCaptureFixture
) -> None:
    plug(pipe, guide)

    class Interrupted(type(pipe)):  # type: ignore[misc]
        @property
        def interrupt(self) -> bool:
            self._interrupt = True
            return True

    pipe.__class__ = Interrupted
    generate(pipe)
    assert not caplog.text


def test_masked_text_is_refused(pipe: StableDiffusionPipeline, guide: Guide) -> None:
    class Masking(UNet2DConditionModel):
        def __call__(self, sample: Any, t: Any, encoder_hidden_states: Any, **kwargs: Any) -> Any:
            kwargs["encoder_attention_mask"] = torch.ones(encoder_hidden_states.shape[:2]).bool()
            return super().__call__(sample, t, encoder_hidden_states, **kwargs)

    pipe.unet.__class__ = Masking
    generate(pipe)
    plug(pipe, guide)
    with pytest.raises(ValueError, match="encoder_attention_mask"):
        generate(pipe)


def test_a_pipeline_is_freed_where_its_unet_was_run_by_hand(
    pipe: StableDiffusionPipeline, guide: Guide
) -> None:
    mine = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    plug(mine, guide)
    with torch.no_grad():
        mine.unet(*X)
    gone = weakref.ref(mine)
    del mine
    assert gone() is None
    assert hook_in(pipe.unet) is None


def test_a_forward_that_was_interrupted_guides_nothing_after_it(
    pipe: StableDiffusionPipeline, guide: Guide
) -> None:
    with torch.no_grad():
        stock = pipe.unet.forward(*X).sample
    plug(pipe, guide)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = pipe.unet.up_blocks[1].attentions[0].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        generate(pipe)
    handle.remove()
    assert now.acting is None and not now.calls
    with torch.no_grad():
        assert torch.equal(pipe.unet.forward(*X).sample, stock)


def test_a_copy_of_a_plugged_unet_loses_the_hooks_with_its_first_forward(
    pipe: StableDiffusionPipeline, guide: Guide
) -> None:
    before = hooks(pipe.unet)
    plug(pipe, guide)
    average = copy.deepcopy(pipe.unet)
    with torch.no_grad():
        given = average(*X).sample
    assert hooks(average) == before < hooks(pipe.unet)
    unplug(pipe)
    with torch.no_grad():
        torch.testing.assert_close(given, pipe.unet(*X).sample)


def test_a_deep_copy_of_a_plugged_pipeline_is_plugged_also_after_a_bare_forward(
    pipe: StableDiffusionPipeline, guide: Guide
) -> None:
    plug(pipe, guide)
    twin = copy.deepcopy(pipe)
    with torch.no_grad():
        twin.unet(*X)
    np.testing.assert_allclose(generate(twin), generate(pipe), atol=1e-6)


def test_a_pipeline_in_float64_is_guided(pipe: StableDiffusionPipeline, guide: Guide) -> None:
    plug(pipe, guide)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    single = generate(pipe, latents=latents)
    pipe.to(torch.float64)
    np.testing.assert_allclose(generate(pipe, latents=latents.double()), single, atol=1e-3)


@pytest.mark.parametrize(("kind", "ratio"), KINDS)
def test_blocks_that_are_called_by_position_are_guided(
    pipe: StableDiffusionPipeline, kind: str, ratio: float
) -> None:
    config = GuideConfig(kind=kind, max_parameters_ratio=ratio)
    plug(pipe, roused(Guide.from_unet(pipe.unet, config)))
    expected = generate(pipe)
    first: Any = pipe.unet.down_blocks[0]

    class FirstByPosition(type(first)):  # type: ignore[misc]
        def __call__(self, hidden_states: Any, temb: Any, **rest: Any) -> Any:
            return super().__call__(hidden_states, temb, **rest)

    first.__class__ = FirstByPosition
    block: Any = pipe.unet.up_blocks[1]

    class ByPosition(type(block)):  # type: ignore[misc]
        def __call__(
            self, hidden_states: Any, temb: Any, res_hidden_states_tuple: Any, **rest: Any
        ) -> Any:
            return super().__call__(hidden_states, res_hidden_states_tuple, temb, **rest)

    block.__class__ = ByPosition
    assert np.array_equal(generate(pipe), expected)


def test_adapters_of_two_kinds_on_the_first_convolution_are_served(
    pipe: StableDiffusionPipeline, guide: Guide
) -> None:
    plug(pipe, guide)
    expected = generate(pipe)
    unplug(pipe)
    pipe.unet.add_adapter(LoraConfig(r=4, target_modules=["conv_in"]), adapter_name="a")
    pipe.unet.add_adapter(LoHaConfig(r=4, target_modules=["conv_in"]), adapter_name="b")
    plug(pipe, guide)
    np.testing.assert_allclose(generate(pipe), expected, atol=1e-5)  # adapters begin as nothing


def test_a_scale_that_is_not_a_number_is_no_guidance(
    pipe: StableDiffusionPipeline, guide: Guide
) -> None:
    unguided = generate(pipe, guidance_scale=1.0)
    plug(pipe, guide)
    assert np.array_equal(generate(pipe, guidance_scale=float("nan")), unguided)


def test_an_encode_prompt_wrapped_without_names_is_told(
    pipe: StableDiffusionPipeline, guide: Guide, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = StableDiffusionPipeline.encode_prompt

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return original(self, *args, **kwargs)

    monkeypatch.setattr(StableDiffusionPipeline, "encode_prompt", wrapped)
    plug(pipe, guide)
    with pytest.raises(ValueError, match=r"functools\.wraps"):
        generate(pipe)
