"""Every class of SD and SDXL pipeline in diffusers: served, refused or not affected."""

import copy
import inspect
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from torch import Tensor
from torch.utils._pytree import tree_map

from pnp_core.guide import Guide
from pnp_core.pipelines import REFUSED, SERVED, UNAFFECTED, known
from pnp_core.plug import plug, unplug
from pnp_core.sample import initial_noise
from tests.cases import few_of
from tests.pipeline_page import PAGE, class_named, modules, page
from tests.pipeline_zoo import CASES, PHOTO, SIZE, Case, Parts
from tests.reference import (
    CALL,
    SCALE,
    Reference,
    guide_for,
    rows_run,
    run,
    stand_in,
)


def made(name: str, parts: Parts) -> Any:
    """A random pipeline of the class of this name."""
    torch.manual_seed(0)
    case = CASES[name]
    cls = class_named(name)
    mine = {k: v if k == "tokenizer" else copy.deepcopy(v) for k, v in case.parts(parts).items()}
    pipe = cls(**mine)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_of(pipe: Any, case: Case) -> dict[str, Any]:
    """What the pipeline is asked for."""
    call = {
        "prompt": case.prompt,
        case.negative: negative(case, "a dog"),
        "num_inference_steps": 2,
        "guidance_scale": SCALE,
        "output_type": "latent",
        **case.call,
    }
    return case.ready(pipe, call)


def negative(case: Case, text: str) -> Any:
    """A negative prompt, as many as there are prompts."""
    return [text] * case.num_prompts if case.num_prompts > 1 else text


@pytest.mark.parametrize("name", SERVED)
def test_a_served_class_gives_the_guided_prediction_in_one_forward_a_step(
    name: str, parts: Parts
) -> None:
    case, pipe = CASES[name], made(name, parts)
    call = call_of(pipe, case)
    unguided = {**call, "guidance_scale": 1.0}
    unet, cls = pipe.unet, type(pipe)
    guide = guide_for(unet)
    # 1. the stock pipeline, and the stock pipeline with our own denoiser for its UNet
    stock = run(pipe, call)
    rows = rows_run(unet)
    plain = run(pipe, unguided)
    expected_rows = [*rows]
    stand_in(pipe, Reference(unet, guide, case.num_prompts, pipe.scheduler))
    expected = run(pipe, call)
    stand_in(pipe, unet)
    # 2. plugged
    plug(pipe, guide)
    rows.clear()
    guided = run(pipe, call)
    assert rows == expected_rows
    np.testing.assert_allclose(guided, expected, atol=2e-4)
    others = [
        run(pipe, {**call, case.negative: negative(case, "red")}),
        run(pipe, {**call, "guidance_scale": 6.0}),
    ]
    assert all(not np.allclose(each, guided, atol=1e-3) for each in (*others, plain, stock))
    assert np.array_equal(run(pipe, unguided), plain)
    # 3. as before
    unplug(pipe)
    assert type(pipe) is cls
    assert np.array_equal(run(pipe, call), stock)


WITH_CALLBACKS = [
    name
    for name in SERVED
    if "callback_on_step_end" in inspect.signature(class_named(name).__call__).parameters
]


@pytest.mark.parametrize("name", few_of(WITH_CALLBACKS, *WITH_CALLBACKS[::3]))
def test_a_callback_sees_what_it_would_of_the_stock_pipeline_and_may_give_it_back_anew(
    name: str, parts: Parts
) -> None:
    pipe = made(name, parts)
    call = call_of(pipe, CASES[name])
    seen: list[dict[str, Any]] = []

    def look(running: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        seen.append({k: tree_map(shape, value) for k, value in given.items()})
        return tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, given)

    asked = {
        "callback_on_step_end": look,
        "callback_on_step_end_tensor_inputs": pipe._callback_tensor_inputs,
    }
    run(pipe, {**call, **asked})
    stock = [*seen]
    plug(pipe, guide_for(pipe.unet))
    expected = run(pipe, call)
    seen.clear()
    # not bit for bit: what is given anew may be aligned otherwise
    np.testing.assert_allclose(run(pipe, {**call, **asked}), expected, atol=1e-4, rtol=1e-4)
    assert seen == stock and len(seen) == 2


def shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("StableDiffusionInpaintPipeline", "mask"),
        ("StableDiffusionDepth2ImgPipeline", "depth_mask"),
        ("StableDiffusionControlNetPipeline", "image"),
        ("StableDiffusionXLControlNetPipeline", "image"),
        ("StableDiffusionXLPipeline", "add_text_embeds"),
        ("StableDiffusionPipeline", "prompt_embeds"),
    ],
)
def test_what_a_callback_gives_for_both_prompts_counts_under_the_prompt(
    name: str, entry: str, parts: Parts
) -> None:
    """Compared with our own denoiser, which the stock pipeline runs with the same callback."""
    case, pipe = CASES[name], made(name, parts)
    unet = pipe.unet
    guide = guide_for(unet)

    def anew(running: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        return {entry: torch.cat([1 - given[entry][:1]] * 2)}

    def in_place(running: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        given[entry].neg_().add_(1)
        return {}

    for change in (anew, in_place):
        asked = {
            "callback_on_step_end": change,
            "callback_on_step_end_tensor_inputs": [entry],
        }
        call = {**call_of(pipe, case), **asked}
        stand_in(pipe, Reference(unet, guide, 1, pipe.scheduler))
        expected = run(pipe, call)
        stand_in(pipe, unet)
        plug(pipe, guide)
        np.testing.assert_allclose(run(pipe, call), expected, atol=2e-4)
        unplug(pipe)


class WithinAnInterval(Reference):
    """Guides where the pipeline doubles its batch, and does not where a callback has ended that."""

    def forward(self, sample: Tensor, *args: Any, **more: Any) -> Any:
        if len(sample) == self.num_prompts:
            return self.unet(sample, *args, **more)
        return super().forward(sample, *args, **more)


@pytest.mark.parametrize(
    ("name", "entries"),
    [
        ("StableDiffusionPipeline", ["prompt_embeds"]),
        ("StableDiffusionXLPipeline", ["prompt_embeds", "add_text_embeds", "add_time_ids"]),
        ("StableDiffusionControlNetPipeline", ["prompt_embeds", "image"]),
        ("StableDiffusionInpaintPipeline", ["prompt_embeds", "mask", "masked_image_latents"]),
    ],
)
def test_guidance_that_a_callback_ends_and_begins_again_is_as_in_the_stock_pipeline(
    name: str, entries: list[str], parts: Parts
) -> None:
    """Compared with our own denoiser, which the stock pipeline runs with the same callback."""
    pipe = made(name, parts)
    unet = pipe.unet
    guide = guide_for(unet)
    both: dict[str, Tensor] = {}

    def leave_out(running: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            both.update({entry: given[entry] for entry in entries})
            running._guidance_scale = 1.0
            return {entry: value.chunk(2)[1] for entry, value in both.items()}
        running._guidance_scale = SCALE
        return dict(both) if step == 1 else {}

    asked = {"callback_on_step_end": leave_out, "callback_on_step_end_tensor_inputs": entries}
    call = {**call_of(pipe, CASES[name]), **asked, "num_inference_steps": 4}
    stand_in(pipe, WithinAnInterval(unet, guide, 1, pipe.scheduler))
    expected = run(pipe, call)
    stand_in(pipe, unet)
    plug(pipe, guide)
    np.testing.assert_allclose(run(pipe, call), expected, atol=2e-4)


@pytest.mark.parametrize("exact_steps", few_of([0, 2, 4], 2))
@pytest.mark.parametrize("how", ["drop", "branch"])
@pytest.mark.parametrize(
    ("name", "entries"),
    [
        ("StableDiffusionPipeline", ["prompt_embeds"]),
        ("StableDiffusionXLPipeline", ["prompt_embeds", "add_text_embeds", "add_time_ids"]),
        ("StableDiffusionControlNetPipeline", ["prompt_embeds", "image"]),
    ],
)
def test_samples_that_a_callback_drops_or_makes_more_of_come_out_as_alone(
    name: str, entries: list[str], how: str, exact_steps: int, parts: Parts
) -> None:
    pipe = made(name, parts)
    size = {"height": SIZE, "width": SIZE}
    call = call_of(pipe, CASES[name]) | size | {"num_inference_steps": 4}
    rows = {"drop": [0], "branch": [0, 0, 1]}[how]

    def choose(running: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step != 1:
            return given
        chosen = {k: torch.cat([half[rows] for half in given[k].chunk(2)]) for k in entries}
        return {"latents": given["latents"][rows], **chosen}

    asked = {
        "callback_on_step_end": choose,
        "callback_on_step_end_tensor_inputs": ["latents", *entries],
    }
    pairs = [("a cat", "a dog"), ("a cow", "red")]
    prompts = {"prompt": [c for c, _ in pairs], "negative_prompt": [n for _, n in pairs]}
    if "image" in call:
        prompts["image"] = [PHOTO, PHOTO]
    latents = initial_noise((4, 4, 4), [3, 4])
    plug(pipe, guide_for(pipe.unet), exact_steps=exact_steps)
    made_together = run(pipe, {**call, **prompts, **asked, "latents": latents})
    alone = [
        run(pipe, {**call, "prompt": c, "negative_prompt": n, "latents": latents[at : at + 1]})
        for at, (c, n) in enumerate(pairs)
    ]
    expected = np.concatenate([alone[row] for row in rows])
    np.testing.assert_allclose(made_together, expected, atol=5e-4)


def test_in_guess_mode_a_callback_sees_the_control_image_once(parts: Parts) -> None:
    name = "StableDiffusionControlNetPipeline"
    pipe = made(name, parts)
    plug(pipe, guide_for(pipe.unet))
    rows: list[int] = []

    def look(running: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        rows.append(len(given["image"]))
        return given

    asked = {"callback_on_step_end": look, "callback_on_step_end_tensor_inputs": ["image"]}
    run(pipe, {**call_of(pipe, CASES[name]), **asked, "guess_mode": True})
    assert rows == [1, 1]


def test_every_class_with_such_a_unet_is_known() -> None:
    assert {name for name in modules() if known(class_named(name)) is None} == set()


def test_the_tables_name_nothing_that_diffusers_does_not_have() -> None:
    tables = [SERVED, REFUSED, UNAFFECTED]
    assert {name for table in tables for name in table} <= modules().keys()
    assert sum(map(len, tables)) == len({name for table in tables for name in table})


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "run python -m tests.pipeline_page"


# Refused, and unknown.


def without_parts(name: str, parts: Parts) -> Any:
    """A pipeline of a class that needs parts we don't have: a UNet is all that is asked for."""
    pipe = object.__new__(class_named(name))
    vars(pipe)["unet"] = parts.base.unet
    return pipe


@pytest.mark.parametrize("name", [*REFUSED, *UNAFFECTED])
def test_what_is_refused_is_told_by_name_and_left_as_it_was(
    name: str, parts: Parts, guide: Guide
) -> None:
    pipe = without_parts(name, parts)
    cls, before, config = type(pipe), dict(vars(pipe)), dict(parts.base.unet.config)
    answer = "has no use for" if name in UNAFFECTED else "can't have"
    with pytest.raises(ValueError, match=f"^{name} {answer} a guide: .*[^.]\\.$"):
        plug(pipe, guide)
    assert type(pipe) is cls and vars(pipe) == before
    assert dict(parts.base.unet.config) == config
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in parts.base.unet.modules())


def test_a_refused_class_over_a_plugged_unet_is_told_its_way_out(
    parts: Parts, pipe: StableDiffusionPipeline, guide: Guide
) -> None:
    pag = diffusers.StableDiffusionPAGPipeline.from_pipe(pipe)
    pag.set_progress_bar_config(disable=True)
    call = {"prompt": "a cat", "num_inference_steps": 2, "output_type": "latent"}
    before = run(pag, call)
    plug(pipe, guide)
    with pytest.raises(ValueError, match=r"has not been plugged.*can't have.*Unplug the pipeline"):
        run(pag, call)
    pag.unet = copy.deepcopy(pipe.unet)
    np.testing.assert_allclose(run(pag, call), before, atol=1e-4)


def test_a_real_pipeline_of_a_refused_class_goes_on_as_it_was(parts: Parts, guide: Guide) -> None:
    pag = diffusers.StableDiffusionPAGPipeline.from_pipe(parts.base)
    pag.set_progress_bar_config(disable=True)
    call = {"prompt": "a cat", "num_inference_steps": 2, "output_type": "latent"}
    before = run(pag, call)
    with pytest.raises(ValueError, match="use StableDiffusionPipeline.from_pipe"):
        plug(pag, guide)
    assert np.array_equal(run(pag, call), before)


NOT_SAFE = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def of_class(cls: type[Any], parts: Parts) -> Any:
    """Of a class with Stable Diffusion's code, or the same code elsewhere."""
    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    stock = next(each for each in cls.__mro__ if each.__module__.startswith("diffusers.pip"))
    stock = StableDiffusionPipeline if stock.__name__ == "DiffusionPipeline" else stock
    pipe = stock(**{name: parts.base.components[name] for name in names}, **NOT_SAFE)
    pipe.__class__ = cls
    pipe.set_progress_bar_config(disable=True)
    return pipe


def plugged_run(cls: type[Any], parts: Parts, guide: Guide, **changes: Any) -> np.ndarray:
    """What a plugged pipeline of this class makes."""
    pipe = of_class(cls, parts)
    plug(pipe, guide)
    try:
        return run(pipe, {**CALL, **changes})
    finally:
        unplug(pipe)


class Passing(StableDiffusionPipeline):
    """A user's subclass that hands everything on."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


Legacy: Any = class_named("StableDiffusionModelEditingPipeline")


class PassingLegacy(Legacy):
    """The same of a class that doubles its batch, and leaves the scale to its default."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


class DoublesByItself(StableDiffusionPipeline):
    """As many community pipelines do, whatever the property says."""

    def __call__(self, prompt: str, guidance_scale: float = 7.5, **kwargs: Any) -> Any:
        self._guidance_scale = guidance_scale
        c, n = self.encode_prompt(prompt, "cpu", 1, True, kwargs["negative_prompt"])
        self.scheduler.set_timesteps(2)
        for t in self.scheduler.timesteps:
            self.unet(torch.zeros(2, 4, 4, 4), t, torch.cat([n, c]))


class TwiceAStep(StableDiffusionPipeline):
    """With guidance of its own from a further forward."""

    def __call__(self, prompt: str, guidance_scale: float = 7.5, **kwargs: Any) -> Any:
        self._guidance_scale = guidance_scale
        c, _ = self.encode_prompt(prompt, "cpu", 1, self.do_classifier_free_guidance)
        self.scheduler.set_timesteps(4)
        for t in self.scheduler.timesteps[2:]:
            for blur in (0.0, 1.0):
                self.unet(torch.full((1, 4, 4, 4), blur), t, c)


class NeverEncodes(StableDiffusionPipeline):
    """Makes its text states in a way of its own."""

    def __call__(self, prompt: str, guidance_scale: float = 7.5, **kwargs: Any) -> Any:
        self._guidance_scale = guidance_scale
        self.unet(torch.zeros(1, 4, 4, 4), torch.tensor(5), torch.zeros(1, 16, 32))


class PassingEncoding(StableDiffusionPipeline):
    """Hands on what its methods are given."""

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        return super().encode_prompt(*args, **kwargs)

    def prepare_ip_adapter_image_embeds(self, *args: Any, **kwargs: Any) -> Any:
        return super().prepare_ip_adapter_image_embeds(*args, **kwargs)


class OneOfItsOwn(StableDiffusionPipeline):
    """Takes an argument of its own, and hands on the rest."""

    def encode_prompt(self, prompt: Any, *args: Any, suffix: str = "", **kwargs: Any) -> Any:
        return super().encode_prompt(prompt + suffix, *args, **kwargs)


class Ramp(StableDiffusionPipeline):
    """Has a guidance scale that is not what it was given."""

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale * 1.5


class OwnDefault(StableDiffusionPipeline):
    """Leaves the guidance scale to itself."""

    def __call__(self, *args: Any, guidance_scale: float | None = None, **kwargs: Any) -> Any:
        return super().__call__(*args, guidance_scale=guidance_scale or SCALE, **kwargs)


def each_alone(stock: type[Any]) -> type[Any]:
    """A subclass that runs its ancestor's call for each prompt, with its own negative prompt."""

    class EachAlone(stock):  # type: ignore[misc]
        def __call__(self, prompt: Any, negative_prompt: Any, **kwargs: Any) -> Any:
            found = [
                super(EachAlone, self).__call__(p, negative_prompt=n, **kwargs)
                for p, n in zip(prompt, negative_prompt, strict=True)
            ]
            found[0].images = torch.cat([each.images for each in found])
            return found[0]

    return EachAlone


class Between(StableDiffusionPipeline):
    """Encodes two prompts itself, and hands on what lies between them."""

    def __call__(self, prompt: Any, negative_prompt: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        c = self.encode_prompt(prompt[0], "cpu", 1, False)[0]
        d, n = self.encode_prompt(prompt[1], "cpu", 1, True, negative_prompt)
        kwargs |= {"prompt_embeds": (c + d) / 2, "negative_prompt_embeds": n}
        return super().__call__(**kwargs)


class Wanders(StableDiffusionPipeline):
    """Encodes another prompt before each of its steps, as guidance asks for it."""

    def __call__(self, prompt: Any, guidance_scale: float = 7.5, **kwargs: Any) -> Any:  # type: ignore[override]
        self._guidance_scale = guidance_scale
        self.scheduler.set_timesteps(len(prompt))
        latents = initial_noise((4, 4, 4), [3])
        negative, cfg = kwargs["negative_prompt"], self.do_classifier_free_guidance
        for number, t in enumerate(self.scheduler.timesteps):
            c, n = self.encode_prompt(prompt[number], "cpu", 1, cfg, negative[number])
            text, twice = (torch.cat([n, c]), 2) if cfg else (c, 1)
            with torch.no_grad():
                eps = self.unet(latents.repeat(twice, 1, 1, 1), t, text).sample
            if cfg:
                eps = torch.lerp(*eps.chunk(2), guidance_scale)
            latents = self.scheduler.step(eps, t, latents)[0]
        return StableDiffusionPipelineOutput(latents, None)


def outside(name: str, stock: type[Any], **changes: Any) -> type[Any]:
    """A class with this code that diffusers does not know of."""
    members = {k: v for k, v in vars(stock).items() if k not in ("__dict__", "__weakref__")}
    return type(name, stock.__bases__, {**members, "__module__": "elsewhere", **changes})


def test_a_users_subclass_goes_as_its_ancestor(parts: Parts, guide: Guide) -> None:
    expected = plugged_run(StableDiffusionPipeline, parts, guide)
    for cls in (Passing, PassingEncoding, OneOfItsOwn):
        assert np.array_equal(plugged_run(cls, parts, guide), expected)
    own = plugged_run(OwnDefault, parts, guide, guidance_scale=None)
    assert np.array_equal(own, expected)
    ramped = plugged_run(StableDiffusionPipeline, parts, guide, guidance_scale=6.0)
    assert np.array_equal(plugged_run(Ramp, parts, guide), ramped)


def test_an_sdxl_subclass_that_hands_on_its_methods_arguments_goes_as_its_ancestor(
    parts: Parts, caplog: pytest.LogCaptureFixture
) -> None:
    class PassingXL(diffusers.StableDiffusionXLPipeline):
        def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
            return super().encode_prompt(*args, **kwargs)

        def _get_add_time_ids(self, *args: Any, **kwargs: Any) -> Any:
            return super()._get_add_time_ids(*args, **kwargs)

    images = []
    for cls in (diffusers.StableDiffusionXLPipeline, PassingXL):
        pipe = made("StableDiffusionXLPipeline", parts)
        pipe.__class__ = cls
        plug(pipe, guide_for(pipe.unet))
        call = call_of(pipe, CASES["StableDiffusionXLPipeline"])
        sizes = dict.fromkeys(("negative_original_size", "negative_target_size"), (8, 8))
        images.append(run(pipe, {**call, **sizes}))
    assert np.array_equal(*images)
    said = [record for record in caplog.records if "negative_original_size" in record.message]
    assert len(said) == 2  # one a pipeline


def test_a_subclass_that_hands_on_the_scale_of_a_class_that_doubles_is_guided(
    parts: Parts, guide: Guide
) -> None:
    expected = plugged_run(Legacy, parts, guide, guidance_scale=7.5)
    assert np.array_equal(plugged_run(PassingLegacy, parts, guide, guidance_scale=7.5), expected)
    pipe = of_class(PassingLegacy, parts)
    plug(pipe, guide)
    call = {name: value for name, value in CALL.items() if name != "guidance_scale"}
    assert np.array_equal(run(pipe, call), expected)  # 7.5 is the ancestor's default
    unplug(pipe)


PAIRS: dict[str, Any] = {"prompt": ["a cat", "a cow"], "negative_prompt": ["a dog", "red"]}


@pytest.mark.parametrize("exact_steps", [0, 1])
@pytest.mark.parametrize(
    ("stock", "more"),
    [
        (StableDiffusionPipeline, {}),
        # half of the scheduler's steps leave room for a second run
        (diffusers.StableDiffusionImg2ImgPipeline, {"image": PHOTO, "strength": 0.5}),
    ],
)
def test_each_run_that_a_subclass_makes_in_its_call_is_as_a_call_of_its_own(
    stock: type[Any], more: dict[str, Any], exact_steps: int, parts: Parts, guide: Guide
) -> None:
    alone, together = of_class(stock, parts), of_class(each_alone(stock), parts)
    call = {**CALL, **more, "num_inference_steps": 4}
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    for pipe in (alone, together):
        plug(pipe, guide, exact_steps=exact_steps)
    expected = [
        alone(**{**call, "prompt": p, "negative_prompt": n}, generator=generators[0]).images
        for p, n in zip(*PAIRS.values(), strict=True)
    ]
    made = together(**{**call, **PAIRS}, generator=generators[1]).images
    assert torch.equal(made, torch.cat(expected))
    for pipe in (alone, together):
        unplug(pipe)


def test_what_a_subclass_encodes_itself_does_not_hide_the_negative_prompt_it_hands_on(
    parts: Parts, guide: Guide
) -> None:
    c, d = (parts.base.encode_prompt(p, "cpu", 1, False)[0] for p in PAIRS["prompt"])
    n = parts.base.encode_prompt("", "cpu", 1, True, "a dog")[1]
    handed_on = {"prompt": None, "negative_prompt": None}
    handed_on |= {"prompt_embeds": (c + d) / 2, "negative_prompt_embeds": n}
    expected = plugged_run(StableDiffusionPipeline, parts, guide, **handed_on)
    made = plugged_run(Between, parts, guide, prompt=PAIRS["prompt"])
    assert np.array_equal(made, expected)


def test_a_prompt_encoded_at_each_step_is_guided_from_its_own_negative_prompt(
    parts: Parts, guide: Guide
) -> None:
    pipe = of_class(Wanders, parts)
    unet = pipe.unet
    stand_in(pipe, Reference(unet, guide, 1, pipe.scheduler))
    expected = run(pipe, {**CALL, **PAIRS})
    stand_in(pipe, unet)
    np.testing.assert_allclose(plugged_run(Wanders, parts, guide, **PAIRS), expected, atol=2e-4)


def test_a_class_outside_diffusers_that_decides_as_theirs_is_served(
    parts: Parts, guide: Guide
) -> None:
    expected = plugged_run(StableDiffusionPipeline, parts, guide)
    mine = outside("Mine", StableDiffusionPipeline)
    assert known(mine) is None
    assert np.array_equal(plugged_run(mine, parts, guide), expected)


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (DoublesByItself, "runs its UNet on 2 rows for 1 prompts, where a guide needs 1"),
        (TwiceAStep, "runs its UNet more than once a step"),
        (NeverEncodes, "did not call its encode_prompt"),
    ],
)
def test_a_subclass_with_a_guidance_of_its_own_is_found_out_in_its_call(
    cls: type[Any], message: str, parts: Parts, guide: Guide
) -> None:
    with pytest.raises(ValueError, match=f"^{cls.__name__} {message}.*use it unplugged"):
        plugged_run(cls, parts, guide)


@pytest.mark.parametrize("without", ["do_classifier_free_guidance", "encode_prompt"])
def test_a_class_outside_diffusers_that_decides_in_another_way_is_refused(
    without: str, parts: Parts, guide: Guide
) -> None:
    cls = outside("StableDiffusionPipeline", StableDiffusionPipeline, **{without: None})
    pipe = of_class(cls, parts)
    with pytest.raises(ValueError, match="derives from no known pipeline"):
        plug(pipe, guide)
    assert type(pipe) is cls


# What some served classes ask for beside.


def test_diffedits_mask_and_inversion_are_those_of_the_stock_pipeline(parts: Parts) -> None:
    pipe = made("StableDiffusionDiffEditPipeline", parts)
    stock = call_of(pipe, CASES["StableDiffusionDiffEditPipeline"])
    plug(pipe, guide_for(pipe.unet))
    made_plugged = call_of(pipe, CASES["StableDiffusionDiffEditPipeline"])
    assert np.array_equal(made_plugged["mask_image"], stock["mask_image"])
    assert torch.equal(made_plugged["image_latents"], stock["image_latents"])


def test_a_panorama_of_two_images_is_refused_when_called(parts: Parts) -> None:
    pipe = made("StableDiffusionPanoramaPipeline", parts)
    plug(pipe, guide_for(pipe.unet))
    call = call_of(pipe, CASES["StableDiffusionPanoramaPipeline"])
    with pytest.raises(ValueError, match="confuses the rows of several prompts"):
        run(pipe, {**call, "num_images_per_prompt": 2})


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("StableDiffusionInpaintPipelineLegacy", {"add_predicted_noise": True}),
        ("StableDiffusionPanoramaPipeline", {"guidance_rescale": 0.5}),
        ("StableDiffusionXLAdapterPipeline", {"guidance_rescale": 0.5}),
    ],
)
def test_what_needs_the_unguided_prediction_is_refused_when_called(
    name: str, asked: dict[str, Any], parts: Parts
) -> None:
    pipe = made(name, parts)
    call = call_of(pipe, CASES[name])
    plug(pipe, guide_for(pipe.unet))
    (entry,) = asked
    with pytest.raises(ValueError, match=f"{entry} does not work with a guide"):
        run(pipe, {**call, **asked})
    run(pipe, {**call, **asked, "guidance_scale": 1.0} if entry == "guidance_rescale" else call)


def test_a_guide_of_the_base_serves_its_gligen(parts: Parts, guide: Guide) -> None:
    guide.check_fits(made("StableDiffusionGLIGENPipeline", parts).unet)


def test_a_modular_pipeline_over_a_plugged_unet_is_told_so(parts: Parts) -> None:
    modular = diffusers.StableDiffusionXLAutoBlocks().init_pipeline()
    own = {k: v for k, v in parts.xl.components.items() if k in modular.component_names and v}
    modular.update_components(**own)
    call = {"prompt": "a cat", "num_inference_steps": 1, "height": 32, "width": 32}
    before = modular(**call, output="latents", generator=torch.Generator().manual_seed(3))
    plug(parts.xl, guide_for(parts.xl.unet))
    with pytest.raises(ValueError, match="has not been plugged"):
        modular(**call, output="latents")
    unplug(parts.xl)
    again = modular(**call, output="latents", generator=torch.Generator().manual_seed(3))
    assert torch.equal(again, before)
