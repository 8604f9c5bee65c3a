"""What one call of a plugged pipeline knows, and what the guide does in its forwards."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from pnp_core.ahead import StepsAhead
from pnp_core.arguments import (
    NO_NEGATIVE_SIZES,
    SIZES,
    Arguments,
    Place,
    has_negative_sizes,
    signature_with,
)
from pnp_core.callbacks import (
    CONDITIONS,
    CONTROL_IMAGES,
    IMAGES,
    Halves,
    OfficialCallback,
    guesses,
)
from pnp_core.calls import Call, Negatives, now, suspended
from pnp_core.conditions import AddedConditions, Conditions
from pnp_core.encoded import BEFORE, Encoded, Encodings, why_unknown
from pnp_core.exact import ExactSteps, spread
from pnp_core.fit import bare_unet, check_face_embeddings
from pnp_core.forwards import (
    NEGATIVE,
    Forwards,
    check_both,
    check_text,
    doubled,
    forwards_left,
    half,
    key_of,
    shared,
    steps_of,
    take_apart,
    timestep_of,
)
from pnp_core.guide import Guide
from pnp_core.guide.kind import Effect, Prepared
from pnp_core.pipelines import ASKS, CFG, check_arguments, is_guided, way_in
from pnp_core.placing import on_device
from pnp_core.plug_state import Plug
from pnp_core.precision import is_mixed
from pnp_core.scheduling import of_scheduler

NOT_NAMED = (
    "The __call__ of {} does not name its guidance_scale, as where it is wrapped without "
    "functools.wraps: wrap it with that, or use the pipeline unplugged."
)


class PipelineCall(Call):
    """One call of a plugged pipeline, whose class may hand it on to another one's."""

    def __init__(
        self, pipe: Any, plug: Plug, arguments: Mapping[str, Any], hands_on_to: Any = None
    ) -> None:
        self.pipe = pipe
        self.hands_on_to = hands_on_to
        self.name = type(pipe).__name__
        self.plug = plug
        self.way = way_in(plug.stock_class)
        self.asks = self.way == ASKS
        if not self.asks and "guidance_scale" not in arguments:
            raise ValueError(NOT_NAMED.format(self.name))
        self.asked_scale = float(arguments.get("guidance_scale") or 1.0)
        self.unet = bare_unet(pipe)
        self.denoising_end = arguments.get("denoising_end")
        # With exact steps it runs as the stock one with CFG, which guided steps see half of.
        self.doubles = not self.asks or plug.exact_steps > 0
        # a run; text that was let pass before it; the class, whether there is guidance
        self.has_begun = self.has_passed = self.has_asked = self.is_encoding = False
        self.images = IMAGES if guesses(pipe, arguments) else IMAGES + CONTROL_IMAGES
        self.begin_run()

    def begin_run(self) -> None:
        """Know nothing of a run yet: a subclass's call may be several of its ancestor's."""
        self.guide: Guide | None = None  # for the number of steps
        self.negative: Tensor | None = None  # text states; one row if all samples share it
        self.negative_pooled: Tensor | None = None  # of an SDXL pipeline
        self.encoded_at: Place | None = None  # its prompts
        self.encodings = Encodings()
        self.has_forwards = False
        self.time_ids_of: Any = None  # the sizes that were first asked for
        self.began_unguided = False
        self.num_prompts: int | None = None  # as encoded, before the batch is doubled
        self.num_samples = 0
        self.forwards = Forwards(self.name, self.way, doubles=self.doubles)
        self.exact: ExactSteps | None = None
        self.is_exact = False  # the forward under way
        self.has_halved = False  # a callback, what CFG has in two halves
        self.keeps_both = False  # guidance has ended, the batch is doubled still
        self.prepared: Prepared | None = None
        self.ahead = StepsAhead()
        self.prepared_for: tuple[Any, ...] = ()
        self.halved: tuple[Any, ...] | None = None  # the text states of both that were last seen

    @property
    def guidance_scale(self) -> float:
        """As it is now: a callback may change it, where the pipeline looks at it again."""
        scale = self.asked_scale
        if self.asks:
            own = getattr(self.pipe, "_guidance_scale", scale)
            scale = float(getattr(self.pipe, "guidance_scale", own))
            if not is_guided(self.pipe, self.plug.stock_class):
                return 1.0
        return scale if scale > 1 else 1.0  # NaN is no guidance, as in diffusers

    # What the pipeline's own methods are made to do.

    def encode_prompt(
        self, place: Place | None, method: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """At a place in ``__call__``: encode the negative prompt too, as with CFG."""
        begins, is_guided = self.begins_run(place), self.guidance_scale > 1
        signature = None
        if is_guided and (begins or not self.has_forwards):
            signature = signature_with(self.plug.stock_class, "encode_prompt", CFG)
        if signature is not None:
            given = Arguments(signature, args, kwargs)
            if self.asks and not self.has_asked and given.get(CFG) is False:
                self.has_passed = True  # for something else
                return method(*args, **kwargs)
            given.put(CFG, True)
            args, kwargs = given.args, given.kwargs
        result = method(*args, **kwargs)
        if begins:
            self.has_begun = True
            self.begin_run()
            self.encoded_at, self.began_unguided = place, not is_guided
        if signature is not None:
            self.encodings.add(encoded := Encoded.of(result, given))
            if begins:
                self.take(encoded)
        return result

    def take(self, encoded: Encoded) -> None:
        """Run under these prompts."""
        self.num_prompts = len(encoded.positive)
        self.negative, self.negative_pooled = encoded.negative, encoded.negative_pooled

    def begins_run(self, place: Place | None) -> bool:
        """Whether a run begins with the prompts that are encoded at this place.

        Those that one ``__call__`` encodes first are its run's. One that it hands on to, or comes
        back from, has its own, and so has each further run of it.
        """
        if self.num_prompts is None or place is None:
            return self.num_prompts is None
        if self.encoded_at is None or place[0] is not self.encoded_at[0]:
            return True
        return self.has_forwards and place == self.encoded_at

    def prepare_ip_adapter_image_embeds(
        self, method: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Of embeddings kept for CFG, which come in two halves, the image's own."""
        name = "ip_adapter_image_embeds"
        signature = signature_with(self.plug.stock_class, "prepare_ip_adapter_image_embeds", name)
        if self.doubles or self.guidance_scale <= 1 or signature is None:
            return method(*args, **kwargs)
        given = Arguments(signature, args, kwargs)
        if (kept := given.get(name)) is not None:
            given.put(name, [each if len(each) % 2 else each.chunk(2)[1] for each in kept])
        return method(*given.args, **given.kwargs)

    def _get_add_time_ids(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Say what has no effect.

        Text-to-image pipelines call it again for a negative size that is given; image-to-image and
        inpainting pass both sizes in one call.
        """
        signature = signature_with(self.plug.stock_class, "_get_add_time_ids", SIZES[0])
        if signature is None:
            return method(*args, **kwargs)
        is_refiner = bool(self.pipe.config.get("requires_aesthetics_score"))
        differs = has_negative_sizes(Arguments(signature, args, kwargs), is_refiner=is_refiner)
        if self.guidance_scale > 1 and (differs or self.time_ids_of not in (None, (args, kwargs))):
            self.plug.warn_once(NO_NEGATIVE_SIZES)
        self.time_ids_of = self.time_ids_of or (args, kwargs)
        return method(*args, **kwargs)

    # What the UNet's hook asks.

    def begin(self, arguments: dict[str, Any]) -> Effect | None:
        """What the guide does in this forward, if anything; changes ``arguments`` accordingly.

        Raises:
            ValueError: the pipeline called the UNet in a way that a guide can't follow.
        """
        scale = self.guidance_scale
        self.plug.num_forwards += 1
        self.has_forwards = True
        if self.is_before_its_run() and scale > 1:
            self.plug.warn_once(BEFORE.format(self.name))
            return None
        self.is_exact = self.begins_exact(arguments)
        if self.keeps_both:
            self.halve(arguments)
            self.num_samples = len(arguments["sample"])
            return None
        if scale > 1:
            if self.num_prompts is None and self.asks:
                raise ValueError(why_unknown(self.name, began_unguided=self.began_unguided))
            if self.asks:
                check_arguments({"guidance_rescale": getattr(self.pipe, "_guidance_rescale", None)})
            text = arguments["encoder_hidden_states"]
            found = self.encodings.run_under(self.name, text, must=not self.doubles)
            if found is not None:
                self.take(found)
            timesteps = getattr(self.pipe.scheduler, "timesteps", None)
            num_steps = None if timesteps is None else len(timesteps)
            self.forwards.check(arguments, self.num_prompts, num_steps)
            if self.doubles:
                check_both(self.name, arguments, asks=self.asks)
                if self.forwards.number == 1:  # later ones are a callback's, who may swap them
                    self.encodings.check_order(self.name, text)
            if self.is_exact:
                return None
            if self.doubles:
                self.halve(arguments)
        sample = arguments["sample"]
        self.num_samples = num_samples = len(sample)
        negative, pooled = take_apart(arguments, num_samples)
        self.negative = self.negative if negative is None else negative
        self.negative_pooled = self.negative_pooled if pooled is None else pooled
        if scale <= 1 or self.plug.strength == 0:
            return None
        text = arguments["encoder_hidden_states"]
        added = arguments.get("added_cond_kwargs") or {}
        self.prepare(sample, text, added, scale)
        assert self.prepared is not None
        effect = self.ahead.effect(self.prepared, sample, timestep_of(arguments))
        arguments["encoder_hidden_states"] = effect.steer(text)
        return effect

    def is_before_its_run(self) -> bool:
        """Whether a subclass runs the UNet for itself, before it hands its call on."""
        return bool(self.has_passed and self.hands_on_to) and not (self.has_begun or self.has_asked)

    def end(self, output: Any) -> Any:
        """The UNet's output for a pipeline that awaits a doubled batch; None: leave it as it is."""
        is_unguided = self.guidance_scale <= 1 or self.is_before_its_run()
        if not self.keeps_both and (not self.doubles or is_unguided or self.is_exact):
            return None
        return doubled(output, self.num_prompts or self.num_samples)

    def begins_exact(self, arguments: Mapping[str, Any]) -> bool:
        """Whether this forward is to be CFG's own; counts all of the call's."""
        if self.plug.exact_steps == 0 or (self.exact is None and self.guidance_scale <= 1):
            return False
        if self.exact is None:
            num_forwards = forwards_left(self.pipe, timestep_of(arguments)[:1], self.denoising_end)
            if self.plug.exact_steps < num_forwards:
                check_face_embeddings(self.unet, len(arguments["sample"]), with_exact_steps=True)
            self.exact = ExactSteps(spread(self.plug.exact_steps, num_forwards))
        return self.exact.begin()

    def halve(self, arguments: dict[str, Any]) -> None:
        """Leave of a doubled batch the rows under the prompts, and keep the negative prompts."""
        num_rows = len(arguments["sample"])
        num_samples = self.num_prompts or num_rows // 2
        text, added = arguments["encoder_hidden_states"], arguments.get("added_cond_kwargs") or {}
        if not self.asks:
            negative = half(text, num_rows, num_samples, NEGATIVE)
            self.negative = negative[:1] if num_samples == 1 else negative
        elif key_of(text) != self.halved:
            self.negative = shared(half(text, num_rows, num_samples, NEGATIVE))
            self.halved, self.held_text = key_of(text), text
        if self.asks and "text_embeds" in added:
            self.negative_pooled = half(added["text_embeds"], num_rows, num_samples, NEGATIVE)
        for name, value in arguments.items():
            arguments[name] = half(value, num_rows, num_samples)

    def prepare(
        self, sample: Tensor, text: Tensor, added: Mapping[str, Tensor], scale: float
    ) -> None:
        """Have the guide read the conditions, where they are not those of the step before."""
        negative, pooled = self.negative, added.get("text_embeds")
        mixed = is_mixed(sample.device.type)
        time_ids = added.get("time_ids")
        tensors = (text, negative, pooled, time_ids)
        now_for = (*map(key_of, tensors), scale, sample.device, mixed)
        if now_for == self.prepared_for:
            return
        assert negative is not None
        check_text(self.name, sample, text, negative)
        if scale > torch.finfo(torch.float32).max:
            raise ValueError(f"guidance_scale {scale:g} is more than a guide can compute with.")
        check_face_embeddings(self.unet, len(sample), with_exact_steps=False)
        guide = self.guide_in_use(sample.device, scale)
        conditions = Conditions.at_scale(scale, c_BLD=text, n_BLD=negative.to(text))
        if pooled is not None and self.negative_pooled is not None:
            negative_pooled = self.negative_pooled.to(pooled)
            conditions = replace(
                conditions, added=AddedConditions(pooled, negative_pooled, added["time_ids"])
            )
        self.prepared = guide.prepare(conditions, self.plug.strength)
        self.prepared_for = now_for
        self.held = tensors  # so that no other tensor gets their addresses
        self.negatives = Negatives(conditions.n_BLD)

    def guide_in_use(self, device: torch.device, scale: float) -> Guide:
        """The guide for the call's number of steps, on this device."""
        bundle = self.plug.bundle
        if self.guide is None:
            num_steps = steps_of(self.pipe.scheduler) or max(bundle.num_steps)
            self.guide = bundle.for_steps(num_steps)
            best = bundle.scheduler_for(num_steps)  # chosen without exact steps
            if best and not self.plug.exact_steps and not best.is_of(self.pipe.scheduler):
                self.plug.warn_once(
                    f"This guide is best at {num_steps} steps with {best}, and the pipeline has "
                    f"{of_scheduler(self.pipe.scheduler) or type(self.pipe.scheduler).__name__}: "
                    f"bundle.scheduler_for({num_steps}).set(pipe) changes it."
                )
        low, high = self.guide.config.guidance_scale_range
        if not low <= scale <= high:
            self.plug.warn_once(
                f"guidance_scale {scale:g} is outside [{low:g}, {high:g}], the range "
                "this guide was trained for."
            )
        return on_device(self.guide, device)

    # What a user's callback sees: what it would see of the stock pipeline.

    def wrapped(self, callback: Any) -> Any:
        """A callback that sees the states of both prompts, as CFG has them, and may change them."""

        def called(*args: Any, **kwargs: Any) -> Any:
            if now.calls[-1:] != (self,):
                return callback(*args, **kwargs)  # of a call within this one, which shows both
            halves = Halves()
            if not (self.doubles or self.guidance_scale <= 1 or self.negative is None):
                for given in (*args, *kwargs.values()):
                    if isinstance(given, dict):
                        halves.show(given, self.first_halves(), self.num_samples)
            with suspended():
                returned = callback(*args, **kwargs)
            if self.prepared is not None:
                self.negatives.doubt()
            if self.prepared is not None and self.held[0].is_inference():
                self.halved, self.prepared_for = None, ()  # writing into them leaves no trace
            if bare_unet(self.pipe) is not self.unet and self.guidance_scale > 1:
                raise ValueError(
                    f"A callback has given {self.name} another UNet in the middle of a call, where "
                    "a guide can't follow: do that between calls."
                )
            self.follow_samples(returned)
            self.keeps_both = self.still_doubles(returned)
            if not self.doubles:
                changed = halves.take_back(returned, (*CONDITIONS, *self.images), self.num_samples)
                if "prompt_embeds" in changed:
                    self.encodings.forget()
                    self.negative = shared(changed["prompt_embeds"])
                self.negative_pooled = changed.get("add_text_embeds", self.negative_pooled)
            return returned

        if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
            return OfficialCallback(callback, called)
        return called

    def follow_samples(self, returned: Any) -> None:
        """A callback may drop samples or make several of one, as in the stock pipeline."""
        latents = returned.get("latents") if isinstance(returned, dict) else None
        before = self.num_prompts or self.num_samples
        if not isinstance(latents, Tensor) or len(latents) == before:
            return
        self.num_samples = len(latents)
        if self.num_prompts is not None:
            self.num_prompts = len(latents)

    def still_doubles(self, returned: Any) -> bool:
        """Whether a callback ended guidance by the scale alone: masks and all are doubled still."""
        if not (self.asks and self.doubles and self.has_forwards) or self.began_unguided:
            return False
        text = returned.get("prompt_embeds") if isinstance(returned, dict) else None
        if isinstance(text, Tensor) and len(text) < 2 * (self.num_prompts or self.num_samples):
            self.has_halved = True
        scale = float(getattr(self.pipe, "_guidance_scale", self.asked_scale))
        return not self.has_halved and scale <= 1  # NaN: ended as in the stock pipeline

    def first_halves(self) -> dict[str, Tensor | None]:
        """Of all that CFG has in two halves; None: the same as the second."""
        of_text = {"prompt_embeds": self.negative, "add_text_embeds": self.negative_pooled}
        known = {name: half for name, half in of_text.items() if half is not None}
        return {**known, **dict.fromkeys(("add_time_ids", *self.images))}
