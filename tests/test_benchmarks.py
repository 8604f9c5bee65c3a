"""The benchmarks measure what they say."""

import importlib
import importlib.machinery
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import nn

from benchmarks import cache_cost, cost, demo, plan, plug, record, train_cost
from benchmarks.cost import ARCHITECTURES, Steps, bare_twin
from components.environment import quiet
from components.params import load_params
from pnp_core import memory
from pnp_core.bundle import GuideBundle
from pnp_core.cache import Example
from pnp_core.guide import Guide, GuideConfig
from pnp_core.metrics import count_flops
from pnp_core.plug import plug as plug_in
from pnp_core.schedule import NoiseSchedule
from tests import toy
from tests.cases import few_of
from tests.conftest import roused

quiet()
BASE = Path(__file__).parent.parent / "zoo/models/base"
DOCUMENT = Path(__file__).parent.parent / "docs/own-models.md"
SOURCES = Path(__file__).parent.parent / "benchmarks"
COMMANDS = sorted(
    path.relative_to(SOURCES).with_suffix("").as_posix().removesuffix("/__main__")
    for path in (*SOURCES.glob("*.py"), *SOURCES.glob("*/__main__.py"))
    if "def main()" in path.read_text()
)


def forward_flops_by_layer(unet: UNet2DConditionModel, length: int) -> dict[str, int]:
    """FLOPs of one forward of one sample by the name of the layer, from the layers' shapes."""
    flops: dict[str, int] = {}

    def count(name: str):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> None:  # type: ignore[type-arg]
            if isinstance(module, nn.Conv2d):
                flops[name] = 2 * output.numel() * math.prod(module.weight.shape[1:])
            elif isinstance(module, nn.Linear):
                flops[name] = 2 * output.numel() * module.in_features
            else:  # every query against every key, and the values likewise
                context = kwargs.get("encoder_hidden_states")
                context = args[0] if context is None else context
                flops[name] = 4 * args[0].numel() * context.shape[1]

        return hook

    for name, module in unet.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear | Attention):
            module.register_forward_hook(count(name), with_kwargs=True)
    size = unet.config.sample_size
    z = torch.empty(1, unet.config.in_channels, size, size, device="meta")
    text = torch.empty(1, length, unet.config.cross_attention_dim, device="meta")
    unet(z, torch.empty(1, device="meta"), text)
    return flops


def test_the_ratio_of_training_flops_is_that_of_a_count_by_layer(
    pipe: StableDiffusionPipeline,
) -> None:
    config = UNet2DConditionModel.load_config(BASE / "unet")
    with torch.device("meta"):
        unet, counted = (UNet2DConditionModel.from_config(config) for _ in range(2))
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    ratio = train_cost.flops_ratio(unet, schedule, GuideConfig(), length=24)
    layers = forward_flops_by_layer(counted, 24)
    forward = sum(layers.values())
    # A frozen layer costs as much again for the gradient of its input; attention twice as much.
    backward = {
        name: flops * (2 if name.endswith(("attn1", "attn2")) else 1)
        for name, flops in layers.items()
    }
    first = "down_blocks.0.attentions.0"  # what comes before it reads the text needs no gradient
    block = f"{first}.transformer_blocks.0"
    without = ("conv_in", "time_embedding", "down_blocks.0.resnets.0", f"{first}.proj_in")
    without += (f"{block}.attn1", f"{block}.attn2.to_q")
    ours = sum(v for k, v in backward.items() if not k.startswith(without))
    naive = 2 * forward + forward + sum(backward.values())
    assert ratio == pytest.approx((forward + ours) / naive, rel=0.03)  # the rest is the guide
    assert ratio < 0.5


@pytest.mark.services
def test_the_training_benchmark_measures_every_ratio(
    pipe: StableDiffusionPipeline,
    examples: list[Example],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "DEFAULT_REGION", "ENDPOINT_URL"):
        monkeypatch.setenv(f"AWS_{name}", "changed by the benchmark")
    values = toy.toy_params()
    values["cache"]["batch_size"] = 8
    toy.write_params(tmp_path, values)
    params = load_params(tmp_path / "params.yaml")
    result = train_cost.measure(pipe, examples, params, num_pairs=64, num_images=12, rounds=1)
    assert result.keys() == {
        "train_flops_ratio",
        "train_time_ratio",
        "cache_efficiency",
        "cache_efficiency_all",
        "s3_efficiency",
    }
    assert all(0 < value < 10 for value in result.values())
    assert result["cache_efficiency_all"] < result["cache_efficiency"]


@pytest.mark.parametrize("name", few_of(ARCHITECTURES, "sd15"))
def test_the_documented_cost_of_a_cache_is_what_the_command_prints(name: str) -> None:
    assert cache_cost.row(name, tflops=100) in DOCUMENT.read_text()


def test_a_pair_is_three_latents_in_half_precision_and_three_numbers() -> None:
    assert cache_cost.architecture_bytes("sd15").pair == 3 * 64 * 64 * 4 * 2 + 3 * 8
    assert cache_cost.architecture_bytes("sdxl").pair == 3 * 128 * 128 * 4 * 2 + 3 * 8
    assert cache_cost.architecture_bytes("sdxl").prompt == (77 * 2048 + 1280) * 2


@pytest.mark.parametrize("name", few_of(plan.NAMES))
def test_a_preset_is_valid_and_its_plan_follows_from_its_numbers(name: str) -> None:
    params = load_params(plan.PRESETS / f"{name}.yaml")
    one = plan.plan(name, params, gpus=1, tflops=100)
    assert one["hours"] == one["cache_hours"] + one["distill_hours"] + one["halve_hours"]
    pairs = params.cache.num_forward + params.cache.num_trajectory
    row = cache_cost.architecture_bytes(name)
    assert one["pairs_gb"] == pytest.approx(pairs * row.pair / 1e9)
    assert one["moments_gb"] == pytest.approx(plan.IMAGES * row.image / 1e9)
    assert one["text_gb"] == pytest.approx((plan.IMAGES + 1) * row.prompt / 1e9)
    assert one["cache_gb"] == pytest.approx(one["pairs_gb"] + one["moments_gb"] + one["text_gb"])
    assert one["params_ratio"] <= params.distill.guide.max_parameters_ratio
    num_base = one["guide_parameters"] / one["params_ratio"]
    assert one["companion_gb"] == pytest.approx(2 * num_base / 1e9, rel=0.01)  # bf16, norms fp32
    assert one["peak_gb"] < 24 - memory.RESERVED_GB


def test_a_dry_run_takes_a_real_step(monkeypatch: pytest.MonkeyPatch) -> None:
    small = dict(UNet2DConditionModel.load_config(BASE / "unet"))
    monkeypatch.setattr(plan, "unet_config", lambda name: small)
    found = plan.dry_run("sd15", load_params(plan.PRESETS / "sd15.yaml"))
    assert found["peak_memory_gb"] > 0


def test_the_demos_time_is_that_of_its_stages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        "preparing",
        "10:00 | prepare | a",
        "10:00 | evaluate-base | b",
        "10:01 | register | c",
    ]
    waits = [f"@echo '{line}'; sleep 0.2" for line in lines]
    (tmp_path / "Makefile").write_text("demo:\n" + "".join(f"\t{wait}\n" for wait in waits))
    found = demo.stages(tmp_path, dict(os.environ))
    assert list(found) == ["start", "prepare", "evaluate-base", "register"]
    assert all(0.15 < seconds < 5 for seconds in found.values())
    assert lines[1] in capsys.readouterr().out
    (tmp_path / "Makefile").write_text("demo:\n\tfalse\n")
    with pytest.raises(subprocess.CalledProcessError):
        demo.stages(tmp_path, dict(os.environ))


# Command lines


def run_as_typed(monkeypatch: pytest.MonkeyPatch, typed: str) -> None:
    """Run a benchmark in this process, as `python -m benchmarks.<typed>` does."""
    name, *arguments = typed.split()
    module = f"benchmarks.{name}" + (".__main__" if (SOURCES / name).is_dir() else "")
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.delenv("PNP_TRACEBACK", raising=False)
    importlib.import_module(module).main()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_help_begins_with_what_is_typed_and_one_paragraph_about_it(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit, match="^0$"):
        run_as_typed(monkeypatch, f"{name} --help")
    said = capsys.readouterr().out
    file = SOURCES / name / "__main__.py" if (SOURCES / name).is_dir() else SOURCES / f"{name}.py"
    first = file.read_text().split('"""')[1].partition("\n")[0]
    usage, about, options = said.split("\n\n")[:3]
    assert usage.startswith(f"usage: python -m benchmarks.{name} [-h]")
    assert about == first
    assert options.startswith("options:")


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        *((f"plan --gpus {given}", "a whole number from 1 to") for given in ("0", "-3", "9" * 400)),
        *((f"plan --tflops {given}", "a finite number above 0") for given in ("0", "nan", "-5")),
        ("plan --images 0", "a whole number from 1 to"),
        ("plan --images 1.5", "a whole number from 1 to"),
        ("plan --prompts -1", "a whole number from 0 to"),
        ("plan --memory -1", "a finite number above 0"),
        ("cache_cost --tflops 0", "a finite number above 0"),
        ("cache_cost --tflops inf", "a finite number above 0"),
        ("cost --repeats 0", "a whole number from 1 to"),
        ("plug --rounds 0", "a whole number from 1 to"),
        ("train_cost --rounds x", "a whole number from 1 to"),
        ("gpu --minutes 0", "a finite number above 0"),
    ],
)
def test_a_number_that_is_none_or_too_small_or_endless_is_refused_by_its_option(
    typed: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name, option, given = typed.split()
    with pytest.raises(SystemExit, match="^2$"):
        run_as_typed(monkeypatch, typed)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"python -m benchmarks.{name}: error: argument {option}: {said}")
    assert last.endswith(f"is needed, not {given}")


def test_real_forwards_are_of_named_architectures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="^2$"):
        run_as_typed(monkeypatch, "cost --run")
    said = capsys.readouterr().err
    assert "--run NAME [NAME ...]" in said
    assert "argument --run: expected at least one argument" in said


def test_a_plan_is_json_where_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan, "plan", lambda name, params, **options: {"peak_gb": 3.0, **options})
    monkeypatch.setattr(plan, "show", lambda name, result, **options: print(name))
    monkeypatch.setattr(plan, "checks", lambda: {"disk_ratio": 1.0})
    run_as_typed(monkeypatch, "plan --preset sdxl")
    assert capsys.readouterr().out == "sdxl\n"
    run_as_typed(monkeypatch, "plan --preset sdxl --json --gpus 8 --images 5 --prompts 0")
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    options = {"gpus": 8, "tflops": 100, "memory": None, "num_images": 5, "num_prompts": 0}
    assert found == {"peak_gb": 3.0, **options}
    run_as_typed(monkeypatch, "plan --json")
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found.keys() == {"sd15", "sdxl", "sd15_24gb", "sdxl_24gb", "disk_ratio"}


def test_a_gpu_that_is_too_small_for_a_preset_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: Any, memory: float, **options: Any) -> None:
        raise ValueError(f"a GPU of {memory:g} GB\nis too small")

    monkeypatch.setattr(plan, "plan", refuse)
    with pytest.raises(SystemExit, match="^1$"):
        run_as_typed(monkeypatch, "plan --preset sd15 --memory 9")
    assert capsys.readouterr().err == "error: a GPU of 9 GB is too small\n"


@pytest.mark.parametrize(
    "typed",
    ["quality --run", "halving --run", "ablations --run", "train_cost", "frontier --json"],
)
def test_a_mistake_in_params_is_told_in_one_line(
    typed: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    values = toy.toy_params()
    values["distill"]["num_imges"] = 1
    toy.write_params(tmp_path, values)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="^1$"):
        run_as_typed(monkeypatch, typed)
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: params.yaml: unknown key 'distill.num_imges'")


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("ablations --run", "data/cache holds no complete cache"),
        ("halving --run", "guides/bundle is not a guide"),
        ("review --run --only page", "there is no results/report/index.html: dvc repro makes it"),
        ("review_report", "there is no results/report/index.html: dvc repro makes it"),
    ],
)
def test_a_stage_that_did_not_run_is_told_in_one_line(
    typed: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    toy.write_params(tmp_path, {**toy.toy_params(), "base": str(BASE)})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="^1$"):
        run_as_typed(monkeypatch, typed)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {said}")


# Records


def test_a_record_names_the_guide_the_commit_and_the_command(
    pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "git_commit", lambda: "abc-dirty")
    monkeypatch.setattr(sys, "argv", ["quality.py", "--run", "--anew", "guided one"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", cost.__spec__)
    config = GuideConfig(max_parameters_ratio=0.2)
    one, other = (GuideBundle({4: Guide.from_unet(pipe.unet, config)}) for _ in range(2))
    found = record.record(guide=record.digest(one), precision="fp32")
    assert found["command"] == "python -m benchmarks.cost --run --anew 'guided one'"
    assert found["commit"] == "abc-dirty"
    package = importlib.machinery.ModuleSpec("benchmarks.frontier.__main__", None)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", package)
    assert record.command() == "python -m benchmarks.frontier --run --anew 'guided one'"
    assert record.digest(one) != record.digest(other)
    other.guides[4].load_state_dict(one.guides[4].state_dict())
    assert record.digest(one) == record.digest(other)
    assert record.digest(GuideBundle({8: one.guides[4]})) != record.digest(one)


def test_a_table_says_which_run_made_which_rows() -> None:
    first, second = (
        {"guide": guide, "precision": "bf16", "commit": "c", "command": f"make {guide}"}
        for guide in ("g1", "g2")
    )
    results: dict[str, Any] = {}
    record.note(results, "a", first)
    record.note(results, "b", first)
    record.note(results, "b", first)
    assert record.header(results, ["a", "b"]) == "Guide g1, bf16, commit c, `make g1`."
    record.note(results, "b", second)
    header = record.header(results, ["a", "b"])
    assert header.splitlines() == [
        f"- a: {record.as_line(first)}",
        f"- b: {record.as_line(first)} {record.as_line(second)}",
    ]
    record.forget(results, "b")
    record.note(results, "b", second)
    assert f"- b: {record.as_line(second)}" in record.header(results, ["a", "b"])


# A plugged step beside a plain one


def test_operations_are_counted_but_for_views() -> None:
    a, b = torch.randn(2, 3, 3).unbind()
    found = plug.kernels(lambda: (a @ b).mT.reshape(9).view(3, 3)[1:].unsqueeze(0).add(1).relu_())
    assert found == {"mm": 1, "clone": 1, "add": 1, "relu_": 1}  # reshape has to copy


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x[0].item(),
        lambda x: bool(x[0] > 0),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x),
        lambda x: x.masked_select(x > 0),
        lambda x: x + torch.tensor([1.0, 2.0]),
        lambda x: x.to("meta"),
        lambda x: x.repeat_interleave(torch.ones(2, dtype=torch.long, device=x.device)),
    ],
)
def test_what_makes_a_host_wait_is_counted(wait: Any) -> None:
    with plug.Operations(plug.waits) as operations:
        wait(torch.randn(2))
    assert operations.found.total() > 0


def test_what_lets_a_host_go_on_is_not_counted() -> None:
    x, index = torch.randn(4), torch.tensor([0, 2])
    with plug.Operations(plug.waits) as operations:
        torch.where(x > 0, x, 0.0)[index].to(torch.bfloat16).sum() + torch.full((1,), 3.0)
    assert not operations.found


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    small = dict(UNet2DConditionModel.load_config(BASE / "unet"))
    monkeypatch.setattr(cost, "unet_config", lambda name: small)
    return Steps("sd15", "tiny", "meta", torch.float32)


def test_a_run_does_once_what_its_conditions_fix_and_for_16_steps_what_timesteps_fix(
    small_steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    kernels = plug.kernels

    def counted(step: Any) -> Any:
        found = kernels(step)
        counts.append(found.total())
        return found

    monkeypatch.setattr(plug, "RUN", 18)
    monkeypatch.setattr(plug, "kernels", counted)
    ratio, num_plain = plug.kernel_ratio("sd15")
    first, *_ = small_steps.run(18)
    *later, plain = counts
    ahead = later.pop(15)  # the 17th step
    assert plain < later[0] < ahead < kernels(first).total()
    assert len(later) == 16 and len(set(later)) == 1
    flops = [count_flops(step) for step in (small_steps.guided, small_steps.cfg)]
    assert flops[0] < 0.6 * flops[1]
    assert num_plain == plain
    assert ratio == pytest.approx((16 * later[0] + ahead) / 17 / plain)


@torch.no_grad()
def test_a_bare_twin_shares_the_weights_and_has_no_hooks(pipe: StableDiffusionPipeline) -> None:
    plug_in(pipe, roused(Guide.from_unet(pipe.unet, GuideConfig(max_parameters_ratio=0.2))))
    twin = bare_twin(pipe.unet)
    own, theirs = twin.state_dict(), pipe.unet.state_dict()
    assert own.keys() == theirs.keys()
    assert all(own[k].data_ptr() == theirs[k].data_ptr() for k in own)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in twin.modules())


@pytest.fixture
def plugged(pipe: StableDiffusionPipeline) -> StableDiffusionPipeline:
    config = GuideConfig(max_parameters_ratio=0.2)
    guides = {n: roused(Guide.from_unet(pipe.unet, config)) for n in (4, 8, 16)}
    return plug_in(pipe, GuideBundle(guides))


def test_waits_of_a_plugged_step_are_counted(plugged: StableDiffusionPipeline) -> None:
    assert plug.host_syncs_per_step(plugged) == 0
    plugged.unet.mid_block.register_forward_hook(lambda *_: torch.ones(2).sum().item() and None)
    assert plug.host_syncs_per_step(plugged) == 1


@pytest.mark.services  # tests/test_plug_rules.py has a quick form
def test_a_plugged_step_is_compiled_once_and_whole(plugged: StableDiffusionPipeline) -> None:
    assert plug.compiled(plugged) == plug.Compiled(graph_breaks=0, recompilations=0)


class Broken(nn.Module):
    """Can't be compiled whole, and not once for all scales."""

    def forward(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        x = x * scale
        torch._dynamo.graph_break()
        return x + 1


class BrokenPipe:
    """Runs it as a pipeline runs its UNet."""

    def __init__(self) -> None:
        self.unet = Broken()

    def __call__(self, *, callback_on_step_end: Any, **call: Any) -> None:
        for step in range(call["num_inference_steps"]):
            self.unet(torch.ones(1), call["guidance_scale"])
            callback_on_step_end(self, step, None, {})


def test_graph_breaks_and_recompilations_are_counted() -> None:
    found = plug.compiled(BrokenPipe())  # type: ignore[arg-type]
    assert found.graph_breaks > 0 and found.recompilations > 0


def test_times_of_steps_are_compared(plugged: StableDiffusionPipeline, toy_folder: Path) -> None:
    plain = StableDiffusionPipeline.from_pretrained(toy_folder, safety_checker=None)
    assert 0.1 < plug.step_over_plain(plugged, plain, ["a", "b"], rounds=2) < 10
