"""Users' own pipeline classes, attention processors and methods: served as meant, or told."""

import asyncio
import copy
import inspect
import logging
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionUpscalePipeline
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from pnp_core.guide import Guide, GuideConfig
from pnp_core.pipelines import check_class
from pnp_core.plug import plug, unplug
from tests.conftest import roused
from tests.pipeline_zoo import CASES, Parts
from tests.plugged import generate

LOOP = inspect.unwrap(StableDiffusionPipeline.__call__)
ENCODES = "prompt_embeds, negative_prompt_embeds = self.encode_prompt("


@pytest.fixture
def guide(pipe: StableDiffusionPipeline) -> Guide:
    return roused(Guide.from_unet(pipe.unet, GuideConfig(max_parameters_ratio=0.2)))


def of_class(cls: Any, pipe: StableDiffusionPipeline) -> Any:
    """A pipeline of this class with the same parts."""
    other = cls(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return other


def with_loop(before_encoding: str, after_encoding: str = "", switch: str = "") -> Any:
    """A class with a loop of its own: diffusers', with these statements in it.

    Args:
        before_encoding: one before it encodes its prompts.
        after_encoding: another, after that.
        switch: one at the end of each step.
    """
    source = textwrap.dedent(inspect.getsource(LOOP))
    changed = source[source.index("def __call__") :]
    for there, statement in (
        (f"    {ENCODES}", before_encoding),
        ("    if self.do_classifier_free_guidance:\n        prompt_embeds = torch", after_encoding),
        ("            if callback_on_step_end is not None:", switch),
    ):
        assert changed.count(there) == 1
        indent = " " * (len(there) - len(there.lstrip()))
        changed = changed.replace(there, f"{indent}{statement}\n{there}" if statement else there)
    names = dict(vars(sys.modules[LOOP.__module__]))
    exec(f"@torch.no_grad()\n{changed}", names)
    return type("OwnLoop", (StableDiffusionPipeline,), {"__call__": names["__call__"]})


def test_what_is_encoded_before_a_runs_own_prompts_has_no_effect(
    pipe: StableDiffusionPipeline, guide: Guide
) -> None:
    own = of_class(with_loop("self.encode_prompt('blue dog', self.device, 1, True, 'red')"), pipe)
    call: dict[str, Any] = {"negative_prompt": "leaf", "num_images_per_prompt": 2}
    assert np.array_equal(generate(own, **call), generate(pipe, **call))
    plug(pipe, guide)
    plug(own, guide)
    guided = generate(pipe, **call)
    assert np.array_equal(generate(own, **call), guided)
    assert not np.array_equal(generate(own, **{**call, "negative_prompt": "dog house"}), guided)


COUNTS = "self.encode_prompt(prompt, self.device, 1, False)"
STYLE = "style, _ = self.encode_prompt('blue dog', self.device, 1, {})"


@pytest.mark.parametrize("exact_steps", [0, 2])
def test_a_token_counter_gives_no_negative_prompt(
    pipe: StableDiffusionPipeline, guide: Guide, exact_steps: int
) -> None:
    own = of_class(with_loop(COUNTS), pipe)
    for each in (pipe, own):
        plug(each, guide, exact_steps=exact_steps)
    expected = generate(pipe, negative_prompt="leaf")
    assert np.array_equal(generate(own, negative_prompt="leaf"), expected)


def test_a_doubled_batch_with_prompts_first_is_refused_where_it_would_be_guided_the_wrong_way(
    pipe: StableDiffusionPipeline, guide: Guide
) -> None:
    swap = "prompt_embeds, negative_prompt_embeds = negative_prompt_embeds, prompt_embeds"
    own = of_class(with_loop("pass", f"if self.do_classifier_free_guidance: {swap}"), pipe)
    assert np.isfinite(generate(plug(own, guide), negative_prompt="leaf")).all()
    unplug(own)
    plug(own, guide, exact_steps=2)
    with pytest.raises(ValueError, match="prompt's states before those of the negative prompt"):
        generate(own, negative_prompt="leaf")
    same = generate(own, "a cat", negative_prompt="a cat")
    plug(pipe, guide, exact_steps=2)
    assert np.array_equal(same, generate(pipe, "a cat", negative_prompt="a cat"))


def test_text_that_a_loop_makes_longer_than_it_was_encoded_runs_with_exact_steps(
    pipe: StableDiffusionPipeline, guide: Guide
) -> None:
    longer = "prompt_embeds, negative_prompt_embeds = (torch.cat([x, x[:, -1:]], 1) for x in "
    own = of_class(with_loop("pass", f"{longer}(prompt_embeds, negative_prompt_embeds))"), pipe)
    stock = generate(own, negative_prompt="leaf")
    plug(own, guide, exact_steps=100)
    assert np.array_equal(generate(own, negative_prompt="leaf"), stock)
    unplug(own)
    plug(own, guide, exact_steps=1)
    assert np.isfinite(generate(own, negative_prompt="leaf")).all()


@pytest.mark.parametrize("asked", ["False", "True", "self.do_classifier_free_guidance"])
@pytest.mark.parametrize("exact_steps", [0, 2])
def test_blended_prompts_are_guided_away_from_the_negative_one_that_was_given(
    pipe: StableDiffusionPipeline, guide: Guide, asked: str, exact_steps: int
) -> None:
    blend = "prompt_embeds = 0.5 * (prompt_embeds + style)"
    own = of_class(with_loop(STYLE.format(asked), blend), pipe)
    prompt, negative = pipe.encode_prompt("a cat", pipe.device, 1, True, "leaf")
    style, _ = pipe.encode_prompt("blue dog", pipe.device, 1, False)
    given = {"prompt_embeds": 0.5 * (prompt + style), "negative_prompt_embeds": negative}
    for each in (pipe, own):
        plug(each, guide, exact_steps=exact_steps)
    expected = generate(pipe, None, **given)
    assert np.array_equal(generate(own, negative_prompt="leaf"), expected)


def test_a_loop_that_switches_prompts_switches_their_negative_ones(
    pipe: StableDiffusionPipeline, guide: Guide
) -> None:
    pair = "later = torch.cat(self.encode_prompt('dog', self.device, 1, True, 'red')[::-1])"
    own = of_class(with_loop(pair, switch="prompt_embeds = later[-1:]"), pipe)

    def callback(running: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        prompt, negative = running.encode_prompt("dog", running.device, 1, True, "red")
        return {**given, "prompt_embeds": torch.cat([negative, prompt])}

    options = {**OPTIONS, "callback_on_step_end": callback}
    for each in (pipe, own):
        plug(each, guide)
    expected = generate(pipe, negative_prompt="leaf", **options)
    assert np.abs(generate(own, negative_prompt="leaf") - expected).max() < 1e-5  # leaf: 4e-3


def test_the_same_prompts_encoded_with_two_negative_ones_are_refused(
    pipe: StableDiffusionPipeline, guide: Guide
) -> None:
    own = of_class(with_loop("self.encode_prompt(prompt, self.device, 1, True, 'red')"), pipe)
    plug(own, guide)
    with pytest.raises(ValueError, match="with different negative prompts before its first"):
        generate(own, negative_prompt="leaf")
    generate(own, negative_prompt="red")
    generate(own, guidance_scale=1.0)


class Inverting(StableDiffusionPipeline):
    """Runs its UNet without guidance before its run, and hands the result on."""

    def invert(self, prompt: Any) -> Tensor:
        text, _ = self.encode_prompt(prompt, self.device, 1, False)
        with torch.no_grad():
            inverted: Tensor = self.unet(torch.ones(1, 4, 4, 4), 5, text).sample
        return inverted

    def __call__(self, prompt: Any, **rest: Any) -> Any:
        return super().__call__(prompt, latents=self.invert(prompt), **rest)


@pytest.mark.parametrize("exact_steps", [0, 2])
def test_forwards_before_a_subclass_hands_its_call_on_are_as_unplugged(
    pipe: StableDiffusionPipeline,
    guide: Guide,
    caplog: pytest.LogCaptureFixture,
    exact_steps: int,
) -> None:
    inverting = of_class(Inverting, pipe)
    latents = inverting.invert("a cat")
    for each in (pipe, inverting):
        plug(each, guide, exact_steps=exact_steps)
    expected = generate(pipe, latents=latents)
    for scale in (1.0, 4.0, 1.0):
        made = generate(inverting, guidance_scale=scale)
        assert np.array_equal(made, expected) == (scale > 1)
        assert ("before it hands its call on" in caplog.text) == (scale > 1)
        caplog.clear()
        inverting._pnp_plug.warned.clear()


class ByName(StableDiffusionUpscalePipeline):
    def __call__(self, prompt: Any, **rest: Any) -> Any:
        return StableDiffusionUpscalePipeline.__call__(self, prompt, guidance_scale=3.0, **rest)


def test_an_ancestors_call_by_name_is_refused_where_the_guide_would_not_see_its_scale(
    pipe: StableDiffusionPipeline, xl_pipe: Any
) -> None:
    case = CASES["StableDiffusionUpscalePipeline"]
    upscaler = ByName(**case.parts(Parts(pipe, xl_pipe)))
    plug(upscaler, roused(Guide.from_unet(upscaler.unet, GuideConfig(max_parameters_ratio=0.2))))
    with pytest.raises(ValueError, match=r"by name.*super\(\).__call__"):
        upscaler("a cat", **case.call)


def test_a_call_that_only_begins_or_runs_in_another_thread_is_not_taken_for_unguided(
    pipe: StableDiffusionPipeline, guide: Guide, caplog: pytest.LogCaptureFixture
) -> None:
    class Waiting(StableDiffusionPipeline):
        async def __call__(self, prompt: Any, **rest: Any) -> Any:
            return super().__call__(prompt, **rest)

    class Threaded(StableDiffusionPipeline):
        def __call__(self, prompt: Any, **rest: Any) -> Any:
            call = super().__call__
            with ThreadPoolExecutor(1) as other:
                return other.submit(call, prompt, **rest).result()

    waiting, threaded = of_class(Waiting, pipe), of_class(Threaded, pipe)
    for each in (pipe, waiting, threaded):
        plug(each, guide)
    expected = generate(pipe)
    call: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 4.0, "output_type": "np"}
    noise = torch.Generator().manual_seed(3)
    assert np.array_equal(asyncio.run(waiting("a cat", generator=noise, **call)).images, expected)
    assert np.array_equal(generate(threaded), expected)
    assert not caplog.records


class Soft(StableDiffusionPipeline):
    def __call__(self, prompt: Any, **rest: Any) -> Any:
        return super().__call__(prompt, guidance_rescale=0.7, **rest)


def test_what_a_subclass_asks_of_its_ancestor_is_refused_if_it_has_to_be(
    pipe: StableDiffusionPipeline, guide: Guide
) -> None:
    soft = of_class(Soft, pipe)
    plug(soft, guide)
    with pytest.raises(ValueError, match="guidance_rescale does not work with a guide"):
        generate(soft)
    generate(soft, guidance_scale=1.0)


def test_a_rescale_that_a_callback_sets_is_refused(
    pipe: StableDiffusionPipeline, guide: Guide
) -> None:
    def callback(running: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        running._guidance_rescale = 0.7
        return given

    plug(pipe, guide)
    with pytest.raises(ValueError, match="guidance_rescale does not work with a guide"):
        generate(pipe, callback_on_step_end=callback)
    generate(pipe)


class Mild(StableDiffusionUpscalePipeline):
    scale = 3.0

    def __call__(self, prompt: Any, **rest: Any) -> Any:
        return super().__call__(prompt, guidance_scale=self.scale, **rest)


@pytest.mark.parametrize("scale", [3.0, 1.0])
def test_a_scale_that_a_subclass_fixes_is_the_one_that_the_guide_is_told(
    pipe: StableDiffusionPipeline, xl_pipe: Any, scale: float
) -> None:
    case = CASES["StableDiffusionUpscalePipeline"]
    parts = case.parts(Parts(pipe, xl_pipe))
    stock, mild = StableDiffusionUpscalePipeline(**parts), Mild(**parts)
    guide = roused(Guide.from_unet(stock.unet, GuideConfig(max_parameters_ratio=0.2)))

    def made(of: Any, **more: Any) -> Tensor:
        noise = torch.Generator().manual_seed(3)
        latents: Tensor = of(
            prompt="a cat", num_inference_steps=2, generator=noise, **case.call, **more
        ).images
        return latents

    for each in (stock, mild):
        each.set_progress_bar_config(disable=True)
        plug(each, guide)
    mild.scale = scale
    assert torch.equal(made(mild), made(stock, guidance_scale=scale))


class Louder(StableDiffusionPipeline):
    """Turns up the prompts in the middle of a run."""

    def __call__(self, *args: Any, **rest: Any) -> Any:
        return super().__call__(*args, **OPTIONS, **rest)


def louder(running: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
    if step == 1:
        negative, prompt = given["prompt_embeds"].chunk(2)
        given["prompt_embeds"] = torch.cat([negative, 1.5 * prompt])
    return given


OPTIONS = {
    "callback_on_step_end": louder,
    "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
}


class Wrapping(StableDiffusionPipeline):
    """Puts its own callback around the one that it is given."""

    def __call__(self, prompt: Any, callback_on_step_end: Any, **rest: Any) -> Any:
        self.encode_prompt(prompt, self.device, 1, True, ["red"] * len(prompt))

        def around(*args: Any) -> Any:
            return callback_on_step_end(*args)

        return super().__call__(prompt, callback_on_step_end=around, **rest)


@pytest.mark.parametrize("prompts", [["a cat"], ["a cat", "red toy"]])
def test_a_callback_sees_both_halves_whoever_hands_it_in(
    pipe: StableDiffusionPipeline, guide: Guide, prompts: list[str]
) -> None:
    fixed, wrapping = of_class(Louder, pipe), of_class(Wrapping, pipe)
    for each in (pipe, fixed, wrapping):
        plug(each, guide)
    expected = generate(pipe, prompts, **OPTIONS)
    assert not np.array_equal(expected, generate(pipe, prompts))
    assert np.array_equal(generate(fixed, prompts), expected)
    assert np.array_equal(generate(wrapping, prompts, **OPTIONS), expected)


def test_a_class_that_decides_otherwise_on_guidance_has_none(
    pipe: StableDiffusionPipeline, guide: Guide
) -> None:
    class AboveTwo(StableDiffusionPipeline):
        @property
        def do_classifier_free_guidance(self) -> bool:
            return bool(self._guidance_scale > 2)

    own = of_class(AboveTwo, pipe)
    plug(pipe, guide)
    plug(own, guide)
    assert np.array_equal(generate(own, guidance_scale=1.5), generate(pipe, guidance_scale=1.0))
    assert np.array_equal(generate(own, guidance_scale=4.0), generate(pipe, guidance_scale=4.0))


def test_a_call_that_hides_its_scale_is_refused_where_the_pipeline_does_not_tell_it(
    pipe: StableDiffusionPipeline, xl_pipe: Any
) -> None:
    class Patched(StableDiffusionUpscalePipeline):
        pass

    case = CASES["StableDiffusionUpscalePipeline"]
    upscaler = Patched(**case.parts(Parts(pipe, xl_pipe)))
    guide = roused(Guide.from_unet(upscaler.unet, GuideConfig(max_parameters_ratio=0.2)))
    before = StableDiffusionUpscalePipeline.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            StableDiffusionUpscalePipeline, "__call__", lambda *args, **rest: before(*args, **rest)
        )
        plug(upscaler, guide)
        with pytest.raises(ValueError, match="does not name its guidance_scale"):
            upscaler("a cat", **case.call)
        unplug(upscaler)


class Others:
    """As users write them."""

    def __call__(self, *args: Any, **rest: Any) -> Any:
        return AttnProcessor()(*args, **rest)


def test_processors_that_are_none_of_diffusers_are_named_once(
    pipe: StableDiffusionPipeline, guide: Guide, caplog: pytest.LogCaptureFixture
) -> None:
    plug(pipe, guide)
    with caplog.at_level(logging.WARNING):
        generate(pipe)
        assert not caplog.records
        pipe.unet.set_attn_processor(Others())
        for _ in range(2):
            generate(pipe)
            generate(copy.copy(pipe))  # as a server makes one for each request
    assert [r.getMessage().split(" is none")[0] for r in caplog.records] == ["Others"]


def test_image_tokens_behind_the_text_are_refused(
    pipe: StableDiffusionPipeline, guide: Guide
) -> None:
    class Appended(Others):
        num_tokens = 4
        to_k_ip = None

    plug(pipe, guide)
    pipe.unet.set_attn_processor(Appended())
    with pytest.raises(ValueError, match="use pipe.load_ip_adapter"):
        generate(pipe)


def test_prompts_longer_than_the_negative_ones_are_refused(
    pipe: StableDiffusionPipeline, guide: Guide
) -> None:
    def append(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        text = kwargs["encoder_hidden_states"]
        return args, {**kwargs, "encoder_hidden_states": torch.cat([text, text[:, :4]], dim=1)}

    pipe.unet.register_forward_pre_hook(append, with_kwargs=True)
    plug(pipe, guide)
    with pytest.raises(ValueError, match="a guide needs as many of both"):
        generate(pipe)


def test_a_scale_beyond_single_precision_is_refused(
    pipe: StableDiffusionPipeline, guide: Guide
) -> None:
    plug(pipe, guide)
    with pytest.raises(ValueError, match="more than a guide can compute with"):
        generate(pipe, guidance_scale=1e39)


def test_another_method_that_runs_the_pipelines_loop_is_told_that_no_guide_acts(
    pipe: StableDiffusionPipeline, guide: Guide, caplog: pytest.LogCaptureFixture
) -> None:
    def gated(self: Any, *args: Any, **rest: Any) -> Any:
        self._guidance_scale = 4.0
        return self.unet(torch.zeros(2, 4, 4, 4), 5, torch.zeros(2, 16, 32))

    own: Any = pipe
    own.gated = MethodType(gated, pipe)
    plug(pipe, guide)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            own.gated()
    (said,) = caplog.records
    assert "StableDiffusionPipeline.gated runs the UNet" in said.getMessage()


@pytest.mark.parametrize(
    "name", ["StyleAlignedSDXLPipeline", "RegionalPromptingStableDiffusionPipeline"]
)
def test_community_pipelines_that_need_both_halves_are_refused_in_whatever_module(
    name: str,
) -> None:
    cls = type(name, (StableDiffusionPipeline,), {"__module__": "mine"})
    with pytest.raises(ValueError, match="two halves of CFG's batch"):
        check_class(cls)
    with pytest.raises(ValueError, match="two halves of CFG's batch"):
        check_class(type("Derived", (cls,), {}))


class Asking(StableDiffusionPipeline):
    """Makes the negative prompt stronger where it is told that there is guidance."""

    def encode_prompt(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        prompt, negative = super().encode_prompt(*args, **kwargs)
        return prompt, 2 * negative if self.do_classifier_free_guidance else negative


class HandingOn(StableDiffusionPipeline):
    """Encodes as it knows that there is guidance, whatever it is told."""

    def encode_prompt(self, prompt: Any, device: Any, num: int, cfg: bool, *rest: Any, **more: Any):  # type: ignore[no-untyped-def]
        guided = self.do_classifier_free_guidance
        return super().encode_prompt(prompt, device, num, guided, *rest, **more)


class WithoutNegative(StableDiffusionPipeline):
    """Has no negative prompts."""

    def encode_prompt(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return super().encode_prompt(*args, **kwargs)[0], None


@pytest.mark.parametrize("exact_steps", [0, 2])
@pytest.mark.parametrize(("cls", "factor"), [(Asking, 2), (HandingOn, 1)])
def test_a_class_that_asks_while_it_encodes_is_told_what_the_stock_one_is(
    pipe: StableDiffusionPipeline, guide: Guide, cls: Any, factor: int, exact_steps: int
) -> None:
    own = of_class(cls, pipe)
    prompt, negative = pipe.encode_prompt("a cat", pipe.device, 1, True, "leaf")
    given = {"prompt_embeds": prompt, "negative_prompt_embeds": factor * negative}
    assert np.array_equal(generate(own, negative_prompt="leaf"), generate(pipe, None, **given))
    for each in (pipe, own):
        plug(each, guide, exact_steps=exact_steps)
    assert np.array_equal(generate(own, negative_prompt="leaf"), generate(pipe, None, **given))


def test_a_class_that_encodes_no_negative_prompt_is_told_to_go_unplugged(
    pipe: StableDiffusionPipeline, guide: Guide
) -> None:
    own = of_class(WithoutNegative, pipe)
    unguided = generate(own, guidance_scale=1.0)
    plug(own, guide)
    with pytest.raises(ValueError, match=r"gave none, and a guide needs them: use it unplugged"):
        generate(own)
    assert np.array_equal(generate(own, guidance_scale=1.0), unguided)
