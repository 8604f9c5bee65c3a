"""Plugging a guide into a stock diffusers pipeline.

A plugged pipeline says to its own code that there is no classifier-free guidance, so that it runs
one UNet forward a step, and lets the guide act in that forward. With exact steps there is, and the
guided ones run half of the batch. The guidance scale and the negative prompt come from the pipeline
itself. See :mod:`pnp_core.plugged` for what it does otherwise.
"""

import weakref
from numbers import Integral, Real
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from pnp_core.bundle import GuideBundle
from pnp_core.compiled import optimized
from pnp_core.fit import bare_unet, check_prediction_type, check_unet
from pnp_core.guide import Guide
from pnp_core.inject import unuse, use
from pnp_core.pipelines import check_class, check_exact_steps
from pnp_core.plug_state import STATE, Plug, state_of_plug
from pnp_core.plugged import plugged_class


def plug(
    pipe: DiffusionPipeline,
    guide: Guide | GuideBundle,
    *,
    strength: float = 1.0,
    exact_steps: int = 0,
) -> DiffusionPipeline:
    """Let ``guide`` replace classifier-free guidance in a stock pipeline, in place.

    ``guidance_scale`` and ``negative_prompt`` keep their meaning; a step costs one UNet forward.
    Of a bundle, the guide for the call's ``num_inference_steps`` is used. A pipeline made with
    ``from_pipe`` shares the UNet but is another pipeline: plug it too.

    Args:
        pipe: a pipeline of the guide's base, or of a fine-tune of it.
        guide: a guide, or one for each of several step counts.
        strength: multiplies what the guide does; at least 0.
        exact_steps: how many of a call's steps are CFG's own, of two forwards; at least 0. They are
            spread evenly from the first step on. A step that has several forwards counts as
            several.

    Returns:
        ``pipe``.

    Raises:
        ValueError: a pipeline of a class that can't have a guide; no UNet of a supported kind (a
            quantised or sharded one is not), or one of another architecture or prediction type
            than the guide's; a pipeline that is plugged already; a strength or a number of exact
            steps that can't be. The pipeline is unchanged.
        TypeError: no pipeline, no guide, or a strength that is no number.
    """
    bundle = checked(pipe, guide, strength, exact_steps)
    stock: Any = type(pipe)
    unet, with_guide = bare_unet(pipe), plugged_class(stock)
    if pipe.unet is not unet:
        optimized.add(unet)
    use(unet, pipe)
    state = Plug(
        bundle=bundle,
        strength=strength,
        exact_steps=exact_steps,
        stock_class=stock,
        unet=weakref.ref(unet),
    )
    vars(pipe)[STATE] = state
    pipe.__class__ = with_guide
    return pipe


def checked(
    pipe: DiffusionPipeline, guide: Guide | GuideBundle, strength: float, exact_steps: int
) -> GuideBundle:
    """The guide as a bundle; raises what :func:`plug` says."""
    check_class(type(pipe))
    if not (isinstance(pipe, DiffusionPipeline) or hasattr(pipe, "unet")):
        raise TypeError(
            f"A pipeline of diffusers is needed, not a {type(pipe).__name__}: "
            "DiffusionPipeline.from_pretrained(model) opens one."
        )
    if not isinstance(guide, Guide | GuideBundle):
        raise TypeError(
            f"A guide or a bundle of guides is needed, not a {type(guide).__name__}: "
            "GuideBundle.load(folder) or load_guide(folder) opens one."
        )
    check_numbers(strength, exact_steps)
    bundle = guide if isinstance(guide, GuideBundle) else as_bundle(guide)
    plugged = state_of_plug(pipe)
    if plugged is not None:
        if list(plugged.bundle.guides.values()) != list(bundle.guides.values()):
            raise ValueError("This pipeline has another guide plugged in: unplug(pipe) first.")
        raise ValueError("This pipeline is plugged already: unplug(pipe) first.")
    check_unet(pipe, bundle)
    check_prediction_type(pipe, bundle)
    if exact_steps:
        check_exact_steps(type(pipe))
    return bundle


def check_numbers(strength: Any, exact_steps: Any) -> None:
    """Raise what :func:`plug` says if they can't be. A tensor of one number is one."""
    is_one = isinstance(strength, Tensor) and strength.ndim == 0
    if not (is_one or isinstance(strength, Real)):
        raise TypeError(f"strength is a number from 0 on, and not a {type(strength).__name__}.")
    most = torch.finfo(torch.float32).max
    if not 0 <= strength <= most:
        raise ValueError(f"strength is a number from 0 to {most:.2g}, and not {strength!r}.")
    if isinstance(exact_steps, bool) or not isinstance(exact_steps, Integral) or exact_steps < 0:
        is_short = isinstance(exact_steps, Real | str | None)
        given = repr(exact_steps) if is_short else f"a {type(exact_steps).__name__}"
        raise ValueError(f"exact_steps is a whole number from 0 on, and not {given}.")


def unplug(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Take the guide out again; the pipeline is as it was, bit for bit.

    Raises:
        ValueError: nothing is plugged in, or a call of the pipeline is under way, in any thread.
    """
    state = state_of_plug(pipe)
    if state is None:
        raise ValueError("This pipeline has no guide plugged in.")
    if state.num_calls:
        raise ValueError(
            "This pipeline is in the middle of a call, which can't go on without its guide: unplug "
            "it after that, or set guidance_scale to 1 in the callback."
        )
    del vars(pipe)[STATE]
    pipe.__class__ = state.stock_class
    for unet in (state.unet() if state.unet is not None else None, bare_unet(pipe)):
        if unet is not None:
            unuse(unet, pipe)
    return pipe


def as_bundle(guide: Guide) -> GuideBundle:
    """A bundle of one."""
    return GuideBundle({guide.config.num_steps or 50: guide})
