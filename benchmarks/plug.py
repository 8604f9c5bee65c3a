"""What a plugged step costs beside a plain one: operations, waits, compilations, time.

    python -m benchmarks.plug --json     # minutes on a CPU

A plain step is one UNet forward without guidance, and without a guide's hooks in the UNet. With
--json, the last line on stdout is one JSON object:

    kernel_ratio_sd15, kernel_ratio_sdxl
                           ATen operations that are no views, of a guided step over a plain one: the
                           mean over a run of 20 steps but the first; on meta tensors of the true
                           architectures, with a tiny guide of the size that benchmarks.cost has
    host_syncs_per_step    operations of a plugged UNet's forward, hooks included, that would make a
                           GPU's host wait; the most in a step after the first of a stock pipeline's
                           call; counted on a CPU, by name, see WAITS
    graph_breaks           of that forward under `pipe.unet.compile(fullgraph=True)`
    recompilations         after its first forward, over three calls of other prompts, negative
                           prompts, guidance scales and numbers of steps
    step_over_plain_1, step_over_plain_64
                           time of a plugged pipeline's step over that of a plain one's, with the
                           scheduler's and without a callback; by batch size, fp32, eager, on one
                           thread; the median of calls in turns

All but the first two are of the embedded base, zoo/models/base, with zoo/guide.
"""

import copy
import functools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.command import command_parser, count, errors_in_one_line
from benchmarks.cost import Steps, bare_twin
from benchmarks.record import as_line, digest, record
from components.environment import quiet
from pnp_core.bundle import GuideBundle
from pnp_core.metrics import one_thread
from pnp_core.models import load_pipeline
from pnp_core.plug import plug

BASE, GUIDE = Path("zoo/models/base"), Path("zoo/guide")
GUIDANCE_SCALE = 3.0
RUN = 20  # steps; what is computed ahead for some of them is computed twice
# Operations that only look at a tensor's memory in another way, whatever their schema says.
VIEWS = {
    "view", "_unsafe_view", "t", "transpose", "permute", "unsqueeze", "squeeze", "expand", "slice",
    "select", "split", "split_with_sizes", "chunk", "unbind", "alias", "detach", "unfold",
    "reshape", "as_strided", "_reshape_alias",
}  # fmt: skip
# Operations whose result, or the shape of it, the host has to know before it can go on; and those
# that bring data from the host, which waits until they have arrived.
WAITS = {
    "_local_scalar_dense",  # item(), bool(), float(), int() and indexing by a tensor
    "item",
    "is_nonzero",
    "equal",
    "nonzero",
    "nonzero_static",
    "masked_select",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "unique_dim_consecutive",
    "repeat_interleave",  # by a tensor
    "bincount",
    "histc",
    "_linalg_check_errors",
    "lift_fresh",  # torch.tensor(...)
}
CALLS = (
    {"prompt": "red apple", "guidance_scale": 3.0, "num_inference_steps": 4},
    {
        "prompt": "blue heart",
        "negative_prompt": "leaf",
        "guidance_scale": 7.5,
        "num_inference_steps": 16,
    },
    {"prompt": "green tree", "guidance_scale": 1.5, "num_inference_steps": 8},
)


class Operations(TorchDispatchMode):
    """Counts ATen operations by name, while it is entered."""

    def __init__(self, counts: Callable[[Any, Sequence[Any], Mapping[str, Any]], bool]) -> None:
        super().__init__()
        self.counts = counts
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if self.counts(func, args, kwargs or {}):
            self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def computes(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:  # noqa: ARG001, Operations calls it so
    """Whether an operation is no view: it would launch a kernel on a GPU."""
    aliases = (each.alias_info for each in func._schema.returns)
    is_view = any(alias is not None and not alias.is_write for alias in aliases)
    return not is_view and func.overloadpacket.__name__ not in VIEWS


def waits(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation would make a GPU's host wait."""
    name = func.overloadpacket.__name__
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):  # looks for the true ones
        return any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1])
    if name in ("_to_copy", "copy_"):  # from one device to another
        devices = {each.device.type for each in args if isinstance(each, Tensor)}
        devices |= {torch.device(kwargs["device"]).type} if kwargs.get("device") else set()
        return len(devices) > 1
    return name in WAITS


def kernels(step: Callable[[], object]) -> Counter[str]:
    """The operations of a step that are no views, by name."""
    with Operations(computes) as operations:
        step()
    return operations.found


def kernel_ratio(name: str) -> tuple[float, int]:
    """Operations of a guided step over a plain one on a true architecture, and of the plain one."""
    steps = Steps(name, "tiny", "meta", torch.float32)
    first, *rest = steps.run(RUN)
    first()
    guided = sum(kernels(step).total() for step in rest) / len(rest)
    plain = kernels(steps.plain).total()
    return guided / plain, plain


@contextmanager
def counted_forwards(unet: UNet2DConditionModel) -> Iterator[list[Counter[str]]]:
    """The operations that would wait in each forward of a UNet, its hooks included."""
    found: list[Counter[str]] = []
    forward = unet._call_impl

    def counting(*args: Any, **kwargs: Any) -> Any:
        with Operations(waits) as operations:
            output = forward(*args, **kwargs)
        found.append(operations.found)
        return output

    unet._call_impl = counting
    try:
        yield found
    finally:
        del unet._call_impl


def host_syncs_per_step(pipe: DiffusionPipeline) -> int:
    """The most operations that would wait in a step after the first of a call."""
    with counted_forwards(pipe.unet) as found:
        pipe(**CALLS[1], output_type="latent")
    return max(each.total() for each in found[1:])


class Compiled(NamedTuple):
    """What compiling a UNet's forward took."""

    graph_breaks: int
    recompilations: int


def compiled(pipe: DiffusionPipeline) -> Compiled:
    """Graph breaks and recompilations over the three calls. The UNet is left compiled."""
    try:
        return compiled_as(pipe, fullgraph=True)
    except Unsupported:
        return compiled_as(pipe, fullgraph=False)  # how many there are


def compiled_as(pipe: DiffusionPipeline, *, fullgraph: bool) -> Compiled:
    """As :func:`compiled`; ``fullgraph`` raises at the first graph break."""
    torch._dynamo.reset()
    counters.clear()
    backend = CompileCounter()  # runs eagerly what it was given
    pipe.unet.compile(backend=backend, fullgraph=fullgraph)
    num_graphs: list[int] = []

    def after_step(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG001, diffusers' callback
        num_graphs.append(backend.frame_count)
        return given

    for call in CALLS:
        pipe(**call, output_type="latent", callback_on_step_end=after_step)
    return Compiled(sum(counters["graph_break"].values()), num_graphs[-1] - num_graphs[0])


def step_over_plain(
    pipe: DiffusionPipeline, plain: DiffusionPipeline, prompts: list[str], *, rounds: int
) -> float:
    """Median over calls in turns: mean time of a plugged pipeline's step over a plain one's.

    The first step of a call, which reads its prompts, is not among them.
    """
    num_steps = RUN if len(prompts) == 1 else 4  # of many samples no steps are computed ahead
    ratios = []
    text, null = (
        plain.encode_prompt(p, "cpu", 1, False)[0] for p in (prompts, [""] * len(prompts))
    )
    calls: dict[bool, dict[str, Any]] = {
        True: {"negative_prompt_embeds": null, "guidance_scale": GUIDANCE_SCALE},
        False: {"guidance_scale": 1.0},
    }
    with one_thread():
        for number in range(rounds + 1):
            seconds = {}
            for is_plugged in (number % 2 == 0, number % 2 == 1):
                call = {"prompt_embeds": text, **calls[is_plugged]}
                taken = step_seconds(pipe if is_plugged else plain, call, num_steps)
                seconds[is_plugged] = sum(taken)
            if number:  # the first round warms up
                ratios.append(seconds[True] / seconds[False])
    return median(ratios)


def step_seconds(pipe: DiffusionPipeline, call: dict[str, Any], num_steps: int) -> list[float]:
    """The time of each step after the first of a call, from one step of the scheduler to the next.

    Without a callback: after one a guide reads again what the callback may have changed.
    """
    ended: list[float] = []
    step = pipe.scheduler.step

    @functools.wraps(step)
    def timed(*args: Any, **kwargs: Any) -> Any:
        output = step(*args, **kwargs)
        ended.append(time.perf_counter())
        return output

    pipe.scheduler.step = timed
    try:
        pipe(
            **call,
            num_inference_steps=num_steps,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        )
    finally:
        del pipe.scheduler.step
    return [after - before for before, after in pairwise(ended)]


def pipelines() -> tuple[DiffusionPipeline, DiffusionPipeline, GuideBundle]:
    """The embedded base plugged, and plain; they share their weights."""
    pipe = load_pipeline(BASE)
    plain = type(pipe)(
        **{
            **pipe.components,
            "unet": bare_twin(pipe.unet),
            "scheduler": copy.deepcopy(pipe.scheduler),
        },
        requires_safety_checker=False,
    )
    plain.set_progress_bar_config(disable=True)
    bundle = GuideBundle.load(GUIDE)
    return plug(pipe, bundle), plain, bundle


def measure(rounds: int) -> dict[str, Any]:
    """All of it, see the module's docstring."""
    result: dict[str, Any] = {}
    for name in ("sd15", "sdxl"):
        ratio, num_plain = kernel_ratio(name)
        result[f"kernel_ratio_{name}"] = ratio
        print(f"{name}: {ratio:.4f} times a plain step's {num_plain} operations", flush=True)
    pipe, plain, bundle = pipelines()
    made_by = record(guide=digest(bundle), precision="fp32")
    print(as_line(made_by), flush=True)
    prompts = [str(call["prompt"]) for call in CALLS]
    for batch_size, num_rounds in ((1, 3 * rounds), (64, rounds)):
        batch = [prompts[i % len(prompts)] for i in range(batch_size)]
        ratio = step_over_plain(pipe, plain, batch, rounds=num_rounds)
        result[f"step_over_plain_{batch_size}"] = ratio
        print(f"time of a step, batch {batch_size}: {ratio:.4f} of a plain one's", flush=True)
    result["host_syncs_per_step"] = host_syncs_per_step(pipe)
    result |= compiled(pipe)._asdict()
    for name in ("host_syncs_per_step", "graph_breaks", "recompilations"):
        print(f"{name}: {result[name]}", flush=True)
    return {**result, "record": made_by}


@errors_in_one_line()
def main() -> None:
    """The command."""
    parser = command_parser("plug", __doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--rounds", type=count, default=8, help="of timing at batch 64")
    arguments = parser.parse_args()
    quiet()
    result = measure(arguments.rounds)
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
