"""The teacher cache holds what the teacher says, and notices when it does not."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pnp_core.cache import (
    CacheBuilder,
    Example,
    Pairs,
    TeacherCache,
    build,
    build_cache,
    plan_cache,
)
from pnp_core.cache.identity import CacheIdentity
from pnp_core.models import encode_prompts
from pnp_core.settings import GuiderConfig
from tests.cases import few_of
from tests.conftest import BASE, CACHE_CONFIG, changed


def builder(
    pipe: StableDiffusionPipeline,
    examples: list[Example],
    folder: Path,
    companions: Mapping[str, UNet2DConditionModel] | None = None,
    further_prompts: Sequence[str] = (),
    **changes: object,
) -> CacheBuilder:
    return CacheBuilder(
        pipe,
        examples,
        replace(CACHE_CONFIG, **changes),
        folder,
        base=BASE,
        data_hash="data",
        companions=companions,
        further_prompts=further_prompts,
    )


@torch.no_grad()
def test_cached_pairs_equal_two_explicit_passes(
    pipe: StableDiffusionPipeline, cache: TeacherCache
) -> None:
    pairs = cache.pairs(torch.arange(cache.num_pairs), torch.device("cpu"))
    for text, eps in ((pairs.text, pairs.eps_c), (pairs.negative_text, pairs.eps_n)):
        expected = pipe.unet(pairs.z_t, pairs.timestep, text).sample
        torch.testing.assert_close(eps, expected, atol=2e-3, rtol=2e-3)  # stored in half precision
    assert not torch.equal(pairs.text, pairs.negative_text)


def test_text_states_and_moments_are_those_of_the_pipeline(
    pipe: StableDiffusionPipeline, cache: TeacherCache, examples: list[Example]
) -> None:
    null = pipe.encode_prompt("", "cpu", 1, False)[0][0]
    torch.testing.assert_close(cache.text_N[0].float(), null, atol=2e-3, rtol=2e-3)
    assert cache.num_latents == len(examples)
    assert set(cache.prompts) == {"", *(e.prompt for e in examples)}
    generator = torch.Generator().manual_seed(0)
    draws = cache.draws(torch.arange(3), generator)
    latents = cache.latents(torch.arange(3), draws, slice(0, 3))
    row = cache.prompts.index(examples[1].prompt)
    assert torch.equal(latents.text[1], cache.text_N[row])


def test_a_row_of_latents_does_not_depend_on_the_part_asked_for(cache: TeacherCache) -> None:
    indices = torch.arange(8)

    def latents(part: slice) -> list[torch.Tensor]:
        draws = cache.draws(indices, torch.Generator().manual_seed(1))
        latents = cache.latents(indices, draws, part)
        return [value for value in latents if value is not None]

    whole = latents(slice(0, 8))
    for all_rows, half in zip(whole, latents(slice(4, 8)), strict=True):
        assert torch.equal(all_rows[4:], half)


class Made(TorchDispatchMode):
    """What tensors are computed while it is open, by dtype and shape."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: set[tuple[torch.dtype, tuple[int, ...]]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, torch.Tensor):
                self.tensors.add((x.dtype, tuple(x.shape)))
        return made


def test_of_all_prompts_only_what_is_stored_is_held(
    pipe: StableDiffusionPipeline,
    examples: list[Example],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build, "ROWS_CHECKED", 64)
    more = [f"further {number}" for number in range(193)]
    made = builder(pipe, examples, tmp_path, None, more)
    with Made() as while_building:
        made.build("text")
    stored = load_file(made.path("text"))["states"]
    held = {dtype for dtype, shape in while_building.tensors if shape == stored.shape}
    assert len(stored) == 200 and held == {torch.half}
    assert torch.equal(stored, encode_prompts(pipe, made.prompts).states_NLD.half())


def test_text_that_half_precision_can_not_hold_is_refused_wherever_it_is(
    pipe: StableDiffusionPipeline,
    examples: list[Example],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build, "ROWS_CHECKED", 3)
    encode = pipe.encode_prompt

    def encoded(prompts: list[str], **options: Any) -> list[torch.Tensor]:
        states, *others = encode(prompts, **options)
        states[-1, 0, 0] = 1e5
        return [states, *others]

    pipe.encode_prompt = encoded
    with pytest.raises(ValueError, match="Shard text: states has values that half precision can't"):
        builder(pipe, examples, tmp_path).build("text")


def test_of_images_in_several_shards_pairs_read_the_rows_of_theirs(
    pipe: StableDiffusionPipeline, examples: list[Example], cache_folder: Path
) -> None:
    made = builder(pipe, examples, cache_folder)
    names = [name for name in made.plan.phases[0] if name != "text"]
    shards = [load_file(made.path(name)) for name in names]
    image_B = torch.tensor([23, 0, 16, 15, 0])
    for key in ("mean", "std", "prompt"):
        whole = torch.cat([shard[key] for shard in shards])
        assert len(shards) == 2 and torch.equal(made.moment_rows(key, image_B), whole[image_B])


def test_pairs_are_made_without_the_latents_of_all_images_in_memory(
    pipe: StableDiffusionPipeline, examples: list[Example], own_cache: Path
) -> None:
    made = builder(pipe, examples, own_cache)
    for name in made.plan.phases[1]:
        made.path(name).unlink()
        with Made() as while_building:
            made.build(name)
        sizes = {shape[0] for _, shape in while_building.tensors if len(shape) == 4}
        assert sizes and len(examples) not in sizes


Trajectories = Callable[..., Pairs]


@pytest.fixture
def trajectories(
    pipe: StableDiffusionPipeline, examples: list[Example], tmp_path: Path
) -> Trajectories:
    """Builds a cache of one shard of pairs along trajectories of five states, and reads them."""

    def build(num_pairs: int, **more: Any) -> Pairs:
        config = {"num_forward": 0, "num_trajectory": num_pairs, "shard_size": num_pairs, **more}
        build_cache(builder(pipe, examples, tmp_path, **config))
        return TeacherCache.open(tmp_path).pairs(torch.arange(num_pairs), torch.device("cpu"))

    return build


def test_trajectories_go_down_from_pure_noise(trajectories: Trajectories) -> None:
    pairs = trajectories(20)
    timesteps = pairs.timestep.reshape(5, 4)
    assert (timesteps.diff(dim=0) < 0).all()
    assert (timesteps[0] == 999).all()
    spread = pairs.z_t.reshape(5, -1).std(dim=1)
    assert spread[0] == pytest.approx(1.0, abs=0.15)


def test_trajectories_leave_no_stretch_of_timesteps_out(trajectories: Trajectories) -> None:
    timestep = trajectories(400).timestep
    counts = torch.histc(timestep[timestep < 999].float(), 20, 0, 999)
    assert counts.sum() == 320
    assert counts.min() >= 4  # of 16 on average


@torch.no_grad()
def test_each_state_of_a_trajectory_follows_from_the_one_before_by_a_guided_ddim_step(
    pipe: StableDiffusionPipeline, trajectories: Trajectories
) -> None:
    pairs = trajectories(5, guidance_scale=(3.0, 3.0001))
    reference = DDIMScheduler.from_config(pipe.scheduler.config)
    for i in range(4):
        eps = pairs.eps_n[i] + 3 * (pairs.eps_c[i] - pairs.eps_n[i])
        t, s = int(pairs.timestep[i]), int(pairs.timestep[i + 1])
        alpha_t, alpha_s = reference.alphas_cumprod[t].sqrt(), reference.alphas_cumprod[s].sqrt()
        x = (pairs.z_t[i] - (1 - alpha_t**2).sqrt() * eps) / alpha_t
        expected = alpha_s * x + (1 - alpha_s**2).sqrt() * eps
        torch.testing.assert_close(pairs.z_t[i + 1], expected, atol=0.02, rtol=0.02)


def test_the_plan_tells_size_and_work_before_it_starts(
    pipe: StableDiffusionPipeline, examples: list[Example], cache_folder: Path
) -> None:
    plan = plan_cache(pipe, num_images=24, num_prompts=6, config=CACHE_CONFIG)
    for name, num_bytes in plan.num_bytes.items():
        content = (cache_folder / f"{name}.safetensors").read_bytes()
        header = 8 + int.from_bytes(content[:8], "little")  # as safetensors defines it
        assert num_bytes == len(content) - header
    assert len(plan.num_bytes) == len(list(cache_folder.glob("*.safetensors")))
    assert (plan.num_pairs, plan.num_forwards) == (60, 2 * 60)


@pytest.fixture
def own_cache(cache_folder: Path, tmp_path: Path) -> Path:
    """The complete cache, to be changed at will."""
    return Path(shutil.copytree(cache_folder, tmp_path / "cache"))


def test_shards_that_are_there_are_not_built_again(
    pipe: StableDiffusionPipeline,
    examples: list[Example],
    own_cache: Path,
) -> None:
    (own_cache / "index.json").unlink()
    lost = own_cache / "pairs-forward-00001.safetensors"
    before = lost.read_bytes()
    lost.unlink()
    times = {f.name: f.stat().st_mtime_ns for f in own_cache.glob("*.safetensors")}
    build_cache(builder(pipe, examples, own_cache))
    assert lost.read_bytes() == before
    assert all((own_cache / name).stat().st_mtime_ns == t for name, t in times.items())


def test_another_configuration_is_built_anew(
    pipe: StableDiffusionPipeline, examples: list[Example], own_cache: Path
) -> None:
    assert builder(pipe, examples, own_cache).is_built("pairs-forward-00000")
    assert not builder(pipe, examples, own_cache, seed=1).is_built("pairs-forward-00000")


def test_a_cache_in_bf16_agrees_with_one_in_full_precision(
    monkeypatch: pytest.MonkeyPatch,
    pipe: StableDiffusionPipeline,
    examples: list[Example],
    cache: TeacherCache,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("pnp_core.precision.has_bf16", lambda device_type: True)
    build_cache(builder(pipe, examples, tmp_path, precision="bf16"))
    rows, device = torch.arange(cache.num_pairs), torch.device("cpu")
    half, full = TeacherCache.open(tmp_path).pairs(rows, device), cache.pairs(rows, device)
    assert torch.equal(half.timestep, full.timestep)
    forward = slice(0, 40)  # along trajectories the differences add up
    torch.testing.assert_close(half.eps_c[forward], full.eps_c[forward], atol=0.1, rtol=0.1)


def test_an_incomplete_cache_is_refused(
    pipe: StableDiffusionPipeline, examples: list[Example], tmp_path: Path
) -> None:
    unfinished = builder(pipe, examples, tmp_path)
    unfinished.build("text")
    with pytest.raises(ValueError, match="lacks moments-00000"):
        unfinished.finish()
    with pytest.raises(ValueError, match="no complete cache"):
        TeacherCache.open(tmp_path)


@torch.no_grad()
def test_each_companion_teaches_along_trajectories_of_its_own(
    pipe: StableDiffusionPipeline, examples: list[Example], tmp_path: Path
) -> None:
    unets = [pipe.unet, changed(pipe.unet)]
    build_cache(builder(pipe, examples, tmp_path, {"other": unets[1]}))
    cache, device = TeacherCache.open(tmp_path), torch.device("cpu")
    assert cache.companions == ["other"]
    assert cache.num_pairs == 60
    for teacher, num_pairs in ((0, 50), (1, 10)):  # noised data are the base's
        drawn = cache.pair_indices(batch_size=num_pairs, seed=0, step=0, teacher=teacher)
        assert len(drawn.unique()) == num_pairs
        pairs = cache.pairs(drawn, device)
        eps = [unet(pairs.z_t, pairs.timestep, pairs.text).sample for unet in unets]
        torch.testing.assert_close(pairs.eps_c, eps[teacher], atol=2e-3, rtol=2e-3)
        assert not torch.allclose(pairs.eps_c, eps[1 - teacher], atol=2e-3, rtol=2e-3)
    everything = torch.arange(60).flip(0)
    assert torch.equal(
        cache.pairs(everything, device).z_t.flip(0), cache.pairs(everything.flip(0), device).z_t
    )
    assert cache.name_pair(55).startswith("row 5 of shard pairs-")


def test_half_of_the_pairs_along_trajectories_are_the_bases(pipe: StableDiffusionPipeline) -> None:
    config = replace(CACHE_CONFIG, num_trajectory=1600)
    for num_companions, base, companion in ((0, 1600, 0), (1, 800, 800), (4, 800, 200)):
        plan = plan_cache(
            pipe,
            num_images=24,
            num_prompts=6,
            config=config,
            companions=[f"companion {number}" for number in range(num_companions)],
        )
        had = [0] * (1 + num_companions)
        for name, teacher in plan.teachers.items():
            had[teacher] += plan.num_rows[name]
        assert had == [CACHE_CONFIG.num_forward + base, *[companion] * num_companions]


def test_half_of_the_trajectories_follow_further_prompts(
    pipe: StableDiffusionPipeline, examples: list[Example], tmp_path: Path
) -> None:
    further = ["two rings", "a bar"]
    build_cache(
        builder(pipe, examples, tmp_path, None, further, num_trajectory=400, negative_fraction=0.0)
    )
    cache = TeacherCache.open(tmp_path)
    pairs = cache.pairs(torch.arange(cache.num_pairs), torch.device("cpu"))
    states = encode_prompts(pipe, further).states_NLD
    follows = [(pairs.text - s).abs().amax(dim=(1, 2)) < 2e-3 for s in states]
    num_noised = CACHE_CONFIG.num_forward
    follows_one = follows[0] | follows[1]
    assert not follows_one[:num_noised].any()
    share = follows_one[num_noised:].float().mean()
    assert 0.3 < share < 0.7
    assert all(one.any() for one in follows)


def test_companions_without_trajectories_are_refused(
    pipe: StableDiffusionPipeline, examples: list[Example], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="num_trajectory is 0"):
        builder(pipe, examples, tmp_path, {"other": pipe.unet}, num_trajectory=0)


@pytest.mark.parametrize("damage", ["truncate", "alter", "delete"])
def test_a_damaged_shard_is_named(own_cache: Path, damage: str) -> None:
    shard = own_cache / "pairs-forward-00002.safetensors"
    data = bytearray(shard.read_bytes())
    if damage == "delete":
        shard.unlink()
    else:
        data[-1] ^= 1
        shard.write_bytes(data[:-10] if damage == "truncate" else data)
    cache = TeacherCache.open(own_cache)
    with pytest.raises(ValueError, match="pairs-forward-00002"):
        cache.pairs(torch.arange(cache.num_pairs), torch.device("cpu"))


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"data_hash": "other"}, "with data data, but the data given is other"),
        ({"base": replace(BASE, unet="x")}, "with another UNet than the base's"),
        ({"base": replace(BASE, text="x")}, "with another text encoder or tokenizer than"),
        ({"base": replace(BASE, vae="x", unet="x")}, "another UNet than .*, with another VAE than"),
        ({"base": replace(BASE, base_hash="x")}, "with another file of its UNet or scheduler"),
        ({"config": replace(CACHE_CONFIG, seed=3)}, "with seed 0, not 3"),
    ],
)
def test_a_cache_of_something_else_is_refused_naming_the_difference(
    cache_folder: Path, given: dict[str, Any], named: str
) -> None:
    TeacherCache.open(cache_folder, base=BASE, data_hash="data", config=CACHE_CONFIG)
    with pytest.raises(ValueError, match=f"was made .*{named}.*: build the cache again"):
        TeacherCache.open(cache_folder, **given)


def test_a_cache_filled_by_another_version_of_the_code_is_refused_and_built_anew(
    monkeypatch: pytest.MonkeyPatch,
    pipe: StableDiffusionPipeline,
    examples: list[Example],
    own_cache: Path,
) -> None:
    assert all(map(builder(pipe, examples, own_cache).is_built, ("text", "moments-00000")))
    monkeypatch.setattr("pnp_core.cache.identity.VERSION", 99)
    with pytest.raises(ValueError, match=r"by version \d of the code that fills it, not 99"):
        TeacherCache.open(own_cache)
    ours = builder(pipe, examples, own_cache)
    assert not any(ours.is_built(name) for name in ours.plan.num_rows)


OTHER_GUIDER = GuiderConfig(name="TangentialClassifierFreeGuidance")
IDENTITY = CacheIdentity(
    base=BASE,
    data_hash="data",
    companions=("one", "two"),
    prompts=("", "a"),
    size=32,
    dtypes=("float32",) * 3,
    config=CACHE_CONFIG,
)
# Each shard's rows and teacher; "" is the whole cache.
SHARDS = {
    "text": {},
    "moments-00000": {},
    "pairs-forward-00000": {"num_rows": 16},
    "pairs-base-00000": {"num_rows": 15},
    "pairs-one-00000": {"num_rows": 15, "teacher": 1},
    "": {},
}
ALL = set(SHARDS)
PAIRS = {name for name in ALL if name.startswith("pairs")}
TRAJECTORIES = PAIRS - {"pairs-forward-00000"}


def keys(identity: CacheIdentity) -> dict[str, str]:
    return {name: identity.key(name, **about) for name, about in SHARDS.items()}


@pytest.mark.parametrize(
    ("change", "anew"),
    [
        ({"base": replace(BASE, unet="x")}, PAIRS | {""}),
        ({"base": replace(BASE, scheduler="x")}, PAIRS | {""}),
        ({"base": replace(BASE, text="x")}, ALL - {"moments-00000"}),
        ({"base": replace(BASE, vae="x")}, ALL - {"text"}),
        ({"data_hash": "x"}, ALL - {"text"}),
        ({"companions": ("one", "another")}, {""}),
        ({"companions": ("another",)}, {"pairs-one-00000", ""}),
        ({"prompts": ("", "b")}, ALL),
        ({"size": 64}, ALL),
        ({"dtypes": ("float16",) * 3}, ALL),
        ({"config": replace(CACHE_CONFIG, seed=1)}, PAIRS | {""}),
        ({"config": replace(CACHE_CONFIG, precision="bf16")}, ALL),
        ({"config": replace(CACHE_CONFIG, shard_size=8)}, ALL - {"text"}),
        ({"config": replace(CACHE_CONFIG, negative_fraction=0.0)}, PAIRS | {""}),
        ({"config": replace(CACHE_CONFIG, guidance_scale=(1.0, 2.0))}, TRAJECTORIES | {""}),
        ({"config": replace(CACHE_CONFIG, trajectory_steps=6)}, TRAJECTORIES | {""}),
        ({"config": replace(CACHE_CONFIG, guider=OTHER_GUIDER)}, TRAJECTORIES | {""}),
        ({"config": replace(CACHE_CONFIG, num_trajectory=21)}, {""}),
        ({"config": replace(CACHE_CONFIG, num_forward=41)}, {""}),
        ({"config": replace(CACHE_CONFIG, batch_size=3)}, set()),
    ],
)
def test_a_change_builds_anew_the_shards_that_depend_on_it_and_no_others(
    change: dict[str, Any], anew: set[str]
) -> None:
    before, after = keys(IDENTITY), keys(replace(IDENTITY, **change))
    assert {name for name in ALL if before[name] != after[name]} == anew
    assert len(set(before.values())) == len(ALL)
    assert IDENTITY.key("pairs-base-00000", num_rows=5) != before["pairs-base-00000"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in folder.iterdir()}


LARGE = {"num_trajectory": 120}


GROWN = [
    (({}, {}), ({}, {}), 0),
    (({}, {}), ({}, {"num_trajectory": 60}), 3),  # of 4 shards, the first was full
    (({}, {}), ({}, {"num_forward": 70}), 3),  # of 5 shards, 2 were full
    (({}, {}), ({}, {"guidance_scale": (1.0, 3.0)}), 2),  # which noised data do not follow
    (({}, LARGE), ({"a": 1}, LARGE), 4),  # all are the companion's
    (({"a": 1}, LARGE), ({"b": 2, "a": 1}, LARGE), 2),  # those of the other one, which is first
    (({"b": 2, "a": 1}, LARGE), ({"a": 1}, {}), 2),  # both last shards: of fewer trajectories
]


@pytest.mark.parametrize(("before", "after", "num_anew"), few_of(GROWN, GROWN[1], GROWN[5]))
def test_a_cache_that_was_changed_is_the_one_that_is_made_at_once(  # noqa: PLR0913, cases and fixtures
    pipe: StableDiffusionPipeline,
    examples: list[Example],
    tmp_path: Path,
    before: tuple[dict[str, int], dict[str, Any]],
    after: tuple[dict[str, int], dict[str, Any]],
    num_anew: int,
) -> None:
    """Companions by identity, and how far their weights are from the base's."""

    def made(folder: str, companions: dict[str, int], changes: dict[str, Any]) -> CacheBuilder:
        unets = {name: changed(pipe.unet, far / 100) for name, far in companions.items()}
        return builder(pipe, examples, tmp_path / folder, unets, **changes)

    build_cache(made("grown", *before))
    old = contents(tmp_path / "grown")
    grown = made("grown", *after)
    kept = {name for name in grown.plan.num_rows if grown.is_built(name)}
    assert len(grown.plan.num_rows) - len(kept) == num_anew
    build_cache(grown)
    build_cache(made("at once", *after))
    new, at_once = contents(tmp_path / "grown"), contents(tmp_path / "at once")
    assert {name: new[name] for name in at_once} == at_once
    assert all(old[name] == new[name] for name in kept)
    cache = TeacherCache.open(tmp_path / "grown", config=grown.config)
    assert cache.companions == list(after[0])
    for teacher, reader in enumerate(cache.pair_shards):
        unet = (pipe.unet, *grown.companions.values())[teacher]
        drawn = cache.pair_indices(batch_size=reader.num_rows, seed=0, step=0, teacher=teacher)
        pairs = cache.pairs(drawn, torch.device("cpu"))
        with torch.no_grad():
            eps = unet(pairs.z_t, pairs.timestep, pairs.text).sample
        torch.testing.assert_close(pairs.eps_c, eps, atol=2e-3, rtol=2e-3)


def test_how_many_are_computed_at_once_changes_roundings_alone(  # noqa: PLR0913, fixtures
    pipe: StableDiffusionPipeline,
    examples: list[Example],
    cache: TeacherCache,
    cache_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few = builder(pipe, examples, tmp_path, batch_size=3)
    computed, predict = set(), few.predict_at_once

    def counted(unet: UNet2DConditionModel, z_t: Tensor, *rest: Tensor) -> dict[str, Tensor]:
        computed.add(len(z_t))
        return predict(unet, z_t, *rest)

    monkeypatch.setattr(few, "predict_at_once", counted)
    build_cache(few)
    assert max(computed) == 3
    rows = torch.arange(cache.num_pairs)
    made = TeacherCache.open(tmp_path, config=CACHE_CONFIG).pairs(rows, torch.device("cpu"))
    for name, value in cache.pairs(rows, torch.device("cpu"))._asdict().items():
        if value is not None:
            torch.testing.assert_close(getattr(made, name), value, atol=5e-3, rtol=5e-3)
    index, other = (json.loads((f / "index.json").read_text()) for f in (cache_folder, tmp_path))
    assert index | {"files": 0} == other | {"files": 0}


def test_a_cache_made_with_another_scheduler_is_refused_naming_the_difference(
    cache_folder: Path, pipe: StableDiffusionPipeline
) -> None:
    TeacherCache.open(cache_folder, scheduler=pipe.scheduler)
    for change, named in (
        ({"prediction_type": "v_prediction"}, "prediction_type epsilon, not v_prediction"),
        ({"beta_end": 0.02}, r"alphas_cumprod\[\d+\] 0\.\d+, not 0\.\d+"),
        ({"num_train_timesteps": 500}, "num_train_timesteps 1000, not 500"),
    ):
        other = DDIMScheduler.from_config(pipe.scheduler.config, **change)
        with pytest.raises(ValueError, match=f"another scheduler than the base's: .*{named}"):
            TeacherCache.open(cache_folder, scheduler=other)


def test_no_examples_is_refused(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data set is empty"):
        builder(pipe, [], tmp_path)


def test_a_key_is_the_hash_of_all_that_its_shard_depends_on_as_json() -> None:
    """Written out for each name by itself: caches that there are keep their keys."""
    prompts = ("", '"name": "text", ', "naïve\n")
    nasty = replace(IDENTITY, prompts=prompts, size=7)
    common = {
        "version": 2,
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        "size": 7,
        "dtypes": nasty.dtypes,
        "precision": "fp32",
    }
    config = asdict(CACHE_CONFIG)
    del config["batch_size"]
    of_base = {"base": asdict(BASE), "data": "data"}
    of_pairs = of_base | {
        name: config[name] for name in ("seed", "negative_fraction", "shard_size")
    }
    read = ("trajectory_steps", "guidance_scale", "guider")
    of_trajectories = of_pairs | {name: config[name] for name in read}
    depends = {
        "text": {"text": "text"},
        "moments-00000": {"vae": "vae", "data": "data", "shard_size": 16},
        "pairs-forward-00000": {**of_pairs, "num_rows": 16, "teacher": "base"},
        "pairs-base-00000": {**of_trajectories, "num_rows": 15, "teacher": "base"},
        "pairs-one-00000": {**of_trajectories, "num_rows": 15, "teacher": "one"},
        "": {**of_base, "companions": ("one", "two"), "config": config},
    }
    for name, key in keys(nasty).items():
        text = json.dumps({**common, "name": name, **depends[name]}, sort_keys=True, default=str)
        assert key == hashlib.sha256(text.encode()).hexdigest()[:32]


def test_prompts_are_written_out_once_for_all_shards_of_a_kind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dumps, written = json.dumps, []

    def counted(value: Any, **options: Any) -> str:
        text: str = dumps(value, **options)
        written.append("a long prompt" in text)
        return text

    monkeypatch.setattr(json, "dumps", counted)
    identity = replace(IDENTITY, prompts=("", "a long prompt"))
    for number in range(50):
        for kind in ("moments", "pairs"):
            identity.key(f"{kind}-base-{number:05d}")
    assert sum(written) == 1
