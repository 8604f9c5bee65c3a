"""The ablations compare what they say they compare."""

import copy
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline as Pipe

from benchmarks import ablations, halving, quality, quality_table
from benchmarks.ablations import VARIANTS, Student, Variant
from benchmarks.guides import External, Parts, shaped_guide, without
from benchmarks.record import digest
from components import cache as cache_stage
from components import distill, halve, prepare
from components.params import load_params
from components.paths import BUNDLE
from pnp_core.bundle import GuideBundle
from pnp_core.cache import TeacherCache
from pnp_core.denoiser import GuidedDenoiser, PlainDenoiser
from pnp_core.files import read_json, write_json
from pnp_core.guide import Guide, GuideConfig
from pnp_core.train import TrainConfig
from tests.cases import few_of
from tests.conftest import CACHE_CONFIG, roused

pytest_plugins = ["tests.toy"]

ALL = {label: variant for group in VARIANTS.values() for label, variant in group.items()}
TRAIN = TrainConfig(num_images=32, batch_size=8, precision="fp32")
SHAPED = {label: variant for label, variant in ALL.items() if variant.shape}
FEW_SHAPED = few_of(SHAPED, "external: reads the latent", "without gains on attention")
TEXT_ALONE = without(attentions=False, modulations=False, entrances=False)


def shaped(pipe: Pipe, label: str) -> Guide:
    default = Guide.from_unet(pipe.unet, GuideConfig(max_parameters_ratio=0.2))
    shape = SHAPED[label].shape
    assert shape
    return shaped_guide(shape, pipe.unet, default)


@pytest.mark.parametrize("label", FEW_SHAPED)
@torch.no_grad()
def test_a_shape_has_no_more_parameters_and_changes_nothing_before_training(
    label: str, pipe: Pipe, cache: TeacherCache
) -> None:
    default = Guide.from_unet(pipe.unet, GuideConfig(max_parameters_ratio=0.2))
    num_parameters = sum(p.numel() for p in default.parameters())
    guide = shaped(pipe, label)
    own = sum(p.numel() for p in guide.parameters())
    assert 0.8 * num_parameters < own <= num_parameters
    p = cache.pairs(torch.arange(4), torch.device("cpu"))
    inputs = (p.z_t, p.timestep, p.conditions(torch.tensor([2.0, 3.0, 5.0, 8.0])))
    plain = PlainDenoiser(pipe.unet, cache.schedule)(*inputs)
    student = Student(pipe.unet, guide, SHAPED[label])
    assert torch.equal(student.denoiser(pipe.unet, cache.schedule)(*inputs), plain)
    roused(guide)
    assert not torch.allclose(student.denoiser(pipe.unet, cache.schedule)(*inputs), plain)


@pytest.mark.parametrize("label", FEW_SHAPED)
@torch.no_grad()
def test_a_shape_does_nothing_at_guidance_scale_1_and_between_equal_prompts(
    label: str, pipe: Pipe, cache: TeacherCache
) -> None:
    guided = GuidedDenoiser(pipe.unet, roused(shaped(pipe, label)), cache.schedule)
    plain = PlainDenoiser(pipe.unet, cache.schedule)
    p = cache.pairs(torch.arange(4), torch.device("cpu"))
    unguided = p.conditions(torch.ones(4))
    equal = dataclasses.replace(p.conditions(torch.full((4,), 5.0)), n_BLD=p.text)
    for conditions in (unguided, equal):
        inputs = (p.z_t, p.timestep, conditions)
        torch.testing.assert_close(guided(*inputs), plain(*inputs))


@pytest.mark.parametrize("left_out", Parts._fields)
@torch.no_grad()
def test_a_shape_without_a_part_is_one_in_which_that_part_does_nothing(
    left_out: str, pipe: Pipe, cache: TeacherCache
) -> None:
    whole, fewer = (
        Guide.from_unet(pipe.unet, GuideConfig(max_parameters_ratio=0.2)) for _ in range(2)
    )
    whole.net, fewer.net = without()(pipe.unet, 6), without(**{left_out: False})(pipe.unet, 6)
    roused(whole)
    of_part = f"net.{left_out}"
    kept = {k: v for k, v in whole.net.state_dict().items() if not k.startswith(of_part)}
    fewer.net.load_state_dict({**fewer.net.state_dict(), **kept})
    for name, parameter in whole.net.named_parameters():
        if name.startswith(of_part) and name.endswith(("up.weight", "factor", "shift")):
            parameter.zero_()
    p = cache.pairs(torch.arange(4), torch.device("cpu"))
    inputs = (p.z_t, p.timestep, p.conditions(torch.tensor([2.0, 3.0, 5.0, 8.0])))
    found, expected = (
        GuidedDenoiser(pipe.unet, guide, cache.schedule)(*inputs) for guide in (fewer, whole)
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_text_residual_is_another_prompt_everywhere_or_in_the_decoder(
    pipe: Pipe, cache: TeacherCache
) -> None:
    default = Guide.from_unet(pipe.unet, GuideConfig(max_parameters_ratio=0.2))
    guide = roused(shaped_guide(TEXT_ALONE, pipe.unet, default))
    p = cache.pairs(torch.arange(2), torch.device("cpu"))
    inputs = (p.z_t, p.timestep, p.conditions(torch.tensor([2.0, 5.0])))
    steered = guide.prepare(inputs[2]).at(p.z_t, p.timestep).steer(p.text)
    assert not torch.allclose(steered, p.text)
    student = Student(pipe.unet, guide, Variant()).denoiser(pipe.unet, cache.schedule)
    expected = pipe.unet(p.z_t, p.timestep, steered).sample
    torch.testing.assert_close(student(*inputs), expected)

    def with_residual(module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "encoder_hidden_states": steered}

    in_decoder = Student(pipe.unet, guide, Variant(in_decoder=True))
    eps = in_decoder.denoiser(pipe.unet, cache.schedule)(*inputs)
    for up_block in pipe.unet.up_blocks[1:]:  # the first has no attention
        up_block.register_forward_pre_hook(with_residual, with_kwargs=True)
    torch.testing.assert_close(eps, pipe.unet(p.z_t, p.timestep, p.text).sample)


def test_in_the_decoder_alone_nothing_before_it_is_changed(pipe: Pipe, cache: TeacherCache) -> None:
    guide = roused(Guide.from_unet(pipe.unet, GuideConfig(max_parameters_ratio=0.2)))
    p = cache.pairs(torch.arange(2), torch.device("cpu"))
    inputs = (p.z_t, p.timestep, p.conditions(torch.tensor([2.0, 5.0])))
    seen: dict[str, list[torch.Tensor]] = {}

    def keep(name: str) -> Any:
        return lambda module, args, output: seen.setdefault(name, []).append(output)

    pipe.unet.mid_block.register_forward_hook(keep("mid"))
    pipe.unet.conv_out.register_forward_hook(keep("out"))
    pipe.unet.requires_grad_(False)
    student = Student(pipe.unet, guide, Variant(in_decoder=True))
    PlainDenoiser(pipe.unet, cache.schedule)(*inputs)
    student.denoiser(pipe.unet, cache.schedule)(*inputs)
    assert torch.equal(*seen["mid"]) and not seen["mid"][1].requires_grad
    assert not torch.allclose(*seen["out"]) and seen["out"][1].requires_grad


def test_states_are_told_apart(
    pipe: Pipe, cache: TeacherCache, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablations, "CACHE", cache_folder)
    (forward,) = ablations.pairs_of(cache, pipe.unet, Variant(states="forward"))
    (trajectory,) = ablations.pairs_of(cache, pipe.unet, Variant(states="trajectory"))
    assert forward.num_rows == CACHE_CONFIG.num_forward
    assert trajectory.num_rows == CACHE_CONFIG.num_trajectory
    starts = trajectory.rows(torch.arange(trajectory.num_rows)).timestep == 999
    assert starts.sum() == CACHE_CONFIG.num_trajectory // CACHE_CONFIG.trajectory_steps


@torch.no_grad()
def test_pairs_of_a_perturbed_base_are_its_own(
    pipe: Pipe, cache: TeacherCache, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablations, "CACHE", cache_folder)
    monkeypatch.setattr(ablations, "PAIRS_PERTURBED", 6)
    variant = Variant(companions=False, perturbed=True)
    own, *perturbed = ablations.pairs_of(cache, pipe.unet, variant)
    assert own.unet is pipe.unet and len(perturbed) == ablations.NUM_PERTURBED
    for other in perturbed:
        p = other.rows(torch.arange(other.num_rows))
        expected = other.unet(p.z_t, p.timestep, p.text).sample
        torch.testing.assert_close(p.eps_c, expected, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(pipe.unet(p.z_t, p.timestep, p.text).sample, expected)


@pytest.mark.parametrize("label", ALL)
def test_without_a_guide_the_loss_is_the_guidance_that_is_missing(
    label: str,
    pipe: Pipe,
    cache: TeacherCache,
    cache_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ablations, "CACHE", cache_folder)
    variant = dataclasses.replace(ALL[label], perturbed=False)
    pairs = ablations.pairs_of(cache, pipe.unet, variant)
    plain = PlainDenoiser(pipe.unet, cache.schedule)
    loss_fn = ablations.objective(variant, pairs, [plain], cache.schedule, TRAIN, power=1.0)
    generator = ablations.step_generator(TRAIN.seed, 3)
    rows = torch.randint(pairs[0].num_rows, (8,), generator=generator)
    low, high = variant.guidance_scale
    w_B = low + (high - low) * torch.rand(8, generator=generator) ** variant.power
    p = pairs[0].rows(rows)
    guidance = (p.eps_c - p.eps_n).square().mean(dim=(1, 2, 3))
    expected = (w_B - 1).square() * guidance
    if variant.relative:
        expected = expected / (guidance + 0.1)
    expected = expected / ((w_B - 1).clamp(min=1).square() if variant.w_weighted else 16)
    alpha2 = cache.schedule.alphas_cumprod.float()
    snr = alpha2 / (1 - alpha2)
    of_eps = {
        "eps": torch.ones_like(snr),
        "v": 1 + 1 / snr,  # v = (eps - sigma z) / alpha
        "x": 1 / snr,
        "min_snr": snr.clamp(max=5) / snr,
    }[variant.weight]
    expected = expected * (of_eps / of_eps.mean())[p.timestep]
    with torch.no_grad():
        found = loss_fn(3, slice(0, 8))
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-2)  # pairs are stored in half


def test_ablations_refuse_a_cache_without_noised_images(world: Path) -> None:
    params = load_params(world / "params.yaml")
    section = params.cache.model_copy(update={"num_forward": 0})
    params = params.model_copy(update={"cache": section})
    for stage in (prepare, cache_stage):
        stage.run(params)
    with pytest.raises(ValueError, match="0 pairs at noised images and 16 along trajectories"):
        ablations.run(params)


@pytest.mark.services
def test_both_tables_are_made_resumed_and_read(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = load_params(world / "params.yaml")
    for stage in (prepare, cache_stage):
        stage.run(params)
    chosen = {
        "shape": {
            "as it is": Variant(),
            "external": Variant(shape=External),
            "in the decoder": Variant(in_decoder=True),
        },
        "bases": {"the base alone": Variant(companions=False)},
    }
    monkeypatch.setattr(ablations, "VARIANTS", chosen)
    monkeypatch.setattr(ablations, "NUM_IMAGES", 64)
    monkeypatch.setattr(ablations, "models_of", lambda params: params.models)
    ablations.run(params)
    results = read_json(ablations.RESULTS)
    monkeypatch.setattr(ablations, "train_variant", None)  # nothing is trained twice
    ablations.run(params)
    assert read_json(ablations.RESULTS) == results
    assert ablations.summary(results)["shape"]["external"]["fvu_base"] > 0
    assert "| external |" in ablations.as_markdown(results)
    digests = {row["guide"] for row in results["rows"]["shape"].values()}
    assert len(digests) == 3
    assert ablations.as_markdown(results).startswith("Guide of each row in the JSON file, fp32, ")

    for stage in (distill, halve):
        stage.run(params)
    for module in (quality, quality_table):
        monkeypatch.setattr(module, "STEPS", (8, 4))
        monkeypatch.setattr(module, "PEER_STEPS", (4,))
    monkeypatch.setattr(quality, "models_of", lambda params: params.models)
    quality.run(params)
    results = read_json(quality.RESULTS)
    stale = copy.deepcopy(results)
    for rows in stale["models"].values():
        rows["guided"]["4"]["fid"] = -1.0
    write_json(quality.RESULTS, stale)
    quality.run(params, anew="guided")
    assert read_json(quality.RESULTS) == results
    fewer = copy.deepcopy(results)
    fewer["models"]["base"]["cfg"]["8"] |= {"num_images": 1, "fid": -1.0}
    write_json(quality.RESULTS, fewer)
    quality.run(params)
    assert read_json(quality.RESULTS) == results
    monkeypatch.setattr(quality, "images", None)  # nothing is sampled twice
    quality.run(params)
    assert read_json(quality.RESULTS) == results
    for rows in results["models"].values():
        assert rows.keys() == quality_table.LABELS.keys()
        assert rows["guided"]["4"]["cfg_psnr"] > rows["unguided"]["4"]["cfg_psnr"]
    guided, agd, meng = (results["costs"][name] for name in ("guided", "agd", "meng"))
    assert agd["pairs"] == guided["pairs"] > meng["pairs"]
    assert agd["companions"] == guided["companions"] > meng["companions"] == 0
    # a forward and a backward through what is frozen; gradients of all weights cost one more
    assert 1 < guided["train_flops_ratio"] < meng["train_flops_ratio"] < 3.1
    found = quality_table.summary(results)
    assert found["fvu_base"] > 0 and found["fid_ratio_worst"] > 0
    other = {**results["setting"], "base_hash": "another"}
    assert quality.results_so_far(quality.RESULTS, other) == {"setting": other}

    monkeypatch.setattr(halving, "models_of", lambda params: params.models)
    halving.run(params)
    results = read_json(halving.RESULTS)
    for rows in results["models"].values():
        assert rows.keys() == halving.LABELS.keys()
        assert rows["cfg"]["4"] < rows["unhalved"]["4"]
    assert "one guide, told the count" in halving.as_markdown(results)
    assert digest(GuideBundle.load(BUNDLE)) in halving.as_markdown(results)


@torch.no_grad()
def test_one_guide_for_all_counts_starts_as_the_distilled_one(
    pipe: Pipe, cache: TeacherCache
) -> None:
    distilled = roused(Guide.from_unet(pipe.unet, GuideConfig(max_parameters_ratio=0.2)))
    p = cache.pairs(torch.arange(4), torch.device("cpu"))
    inputs = (p.z_t, p.timestep, p.conditions(torch.tensor([2.0, 3.0, 5.0, 8.0])))
    expected = GuidedDenoiser(pipe.unet, distilled, cache.schedule)(*inputs)
    guide = halving.one_guide(distilled)
    guided = GuidedDenoiser(pipe.unet, guide, cache.schedule)
    assert torch.equal(halving.OneGuide(guided, 32)(*inputs), expected)
    assert isinstance(guide.net, halving.ToldSteps)
    torch.nn.init.normal_(guide.net.steps.weight)
    found = {n: halving.OneGuide(guided, n)(*inputs) for n in (32, 16, 4)}
    for a, b in itertools.combinations([expected, *found.values()], 2):  # each count is another
        assert not torch.allclose(a, b)
    assert torch.equal(halving.OneGuide(guided, 16)(*inputs), found[16])
