"""What a guide promises about the base it is plugged into."""

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pnp_core.bundle import GuideBundle, load_guide
from pnp_core.conditions import Conditions
from pnp_core.denoiser import CFGDenoiser, GuidedDenoiser, PlainDenoiser
from pnp_core.guide import Guide, GuideConfig
from pnp_core.guide.adapters import (
    GAIN_RANK,
    PROJECTION_RANK,
    EntranceAdapter,
    Told,
    groups_of,
)
from pnp_core.guide.tiny import TinyEffect, TinyGuide
from pnp_core.guide.unet import (
    MODULATED,
    EntranceChannels,
    describe,
    modulated_channels,
    modulated_layers,
    text_attentions,
)
from pnp_core.schedule import NoiseSchedule
from tests.conftest import roused


class Inputs:
    def __init__(self, batch: int = 4) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        self.z, self.c, self.n = (
            normal(batch, 4, 4, 4),
            normal(batch, 16, 32),
            normal(batch, 16, 32),
        )
        self.t = torch.tensor([1, 250, 500, 999])[:batch]
        self.w = torch.tensor([1.5, 3.0, 5.0, 8.0])[:batch]

    @property
    def all(self) -> tuple[torch.Tensor, torch.Tensor, Conditions]:
        """What a denoiser takes."""
        return self.z, self.t, Conditions(c_BLD=self.c, n_BLD=self.n, w_B=self.w)

    def row(self, i: int) -> "Inputs":
        """One sample alone."""
        one = copy.copy(self)
        for name in ("z", "t", "c", "w", "n"):
            setattr(one, name, getattr(self, name)[i : i + 1])
        return one


def schedule(pipe: StableDiffusionPipeline) -> NoiseSchedule:
    return NoiseSchedule.from_scheduler(pipe.scheduler)


@torch.no_grad()
def test_a_fresh_guide_leaves_the_base_bitwise_unchanged(
    pipe: StableDiffusionPipeline, guide: Guide
) -> None:
    inputs = Inputs()
    plain = PlainDenoiser(pipe.unet, schedule(pipe))(*inputs.all)
    assert torch.equal(GuidedDenoiser(pipe.unet, guide, schedule(pipe))(*inputs.all), plain)


@torch.no_grad()
def test_any_guide_at_guidance_scale_1_leaves_the_base_bitwise_unchanged(
    pipe: StableDiffusionPipeline, guide: Guide
) -> None:
    inputs = Inputs()
    inputs.w = torch.ones(4)
    plain = PlainDenoiser(pipe.unet, schedule(pipe))(*inputs.all)
    guided = GuidedDenoiser(pipe.unet, roused(guide), schedule(pipe))
    assert torch.equal(guided(*inputs.all), plain)


@torch.no_grad()
def test_gains_of_minus_one_have_every_cross_attention_read_the_negative_prompt(
    pipe: StableDiffusionPipeline,
) -> None:
    guide = Guide.from_unet(pipe.unet, GuideConfig(max_parameters_ratio=0.2))
    assert isinstance(guide.net, TinyGuide)
    for adapter in guide.net.attentions:  # at w = 2, where nothing else is left
        torch.nn.init.zeros_(adapter.gains.down.weight)
        torch.nn.init.constant_(adapter.gains.down.bias, -1 / GAIN_RANK)
        torch.nn.init.ones_(adapter.gains.up.weight)
    inputs = Inputs()
    inputs.w = torch.full((4,), 2.0)
    guided = GuidedDenoiser(pipe.unet, guide, schedule(pipe))(*inputs.all)
    under_negative = pipe.unet(inputs.z, inputs.t, inputs.n).sample
    torch.testing.assert_close(guided, under_negative)


@torch.no_grad()
def test_projecting_onto_single_channels_does_what_gains_on_them_do(
    pipe: StableDiffusionPipeline,
) -> None:
    inputs, guided = Inputs(), []
    inputs.w = torch.full((4,), 2.0)
    for projected in (False, True):
        guide = Guide.from_unet(pipe.unet, GuideConfig(max_parameters_ratio=0.2))
        assert isinstance(guide.net, TinyGuide)
        for adapter in guide.net.attentions:
            if projected:
                channels = adapter.up.out_features
                basis = torch.eye(channels)[:PROJECTION_RANK]
                adapter.down.weight.copy_(basis)
                adapter.up.weight.copy_(basis.T)
                torch.nn.init.zeros_(adapter.code.weight)
                torch.nn.init.constant_(adapter.code.bias, 0.5)
            else:
                torch.nn.init.zeros_(adapter.gains.down.weight)
                torch.nn.init.constant_(adapter.gains.down.bias, 0.5 / GAIN_RANK)
                torch.nn.init.zeros_(adapter.gains.up.weight)
                adapter.gains.up.weight[:PROJECTION_RANK] = 1
        guided.append(GuidedDenoiser(pipe.unet, guide, schedule(pipe))(*inputs.all))
    torch.testing.assert_close(guided[0], guided[1])
    assert not torch.equal(guided[0], pipe.unet(inputs.z, inputs.t, inputs.c).sample)


@torch.no_grad()
def test_an_entrance_reads_features_at_one_root_mean_square() -> None:
    torch.manual_seed(0)
    adapter = EntranceAdapter(EntranceChannels(hidden=6, skips=(4, 8)), rank=5, embedding_dim=16)
    nn.init.normal_(adapter.up.weight)
    batch, size = 3, (4, 2)
    features = [
        scale * torch.randn(batch, c, *size)
        for c, scale in zip((6, 4, 8), (0.1, 1, 30), strict=True)
    ]
    told = Told(*(torch.randn(batch, 5, 1) for _ in range(3)))
    residuals = adapter.residuals(features, told, adapter.matrices())
    scale, shift, gain = (x[..., None] for x in told)
    normed = [x / x.square().mean(dim=(1, 2, 3), keepdim=True).sqrt() for x in features]
    h = F.silu(adapter.down(torch.cat(normed, dim=1)) * scale + shift)
    h = h + adapter.mix(F.silu(h))
    expected = adapter.up(gain * F.silu(h)).split((6, 4, 8), dim=1)
    torch.testing.assert_close(residuals, list(expected), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_an_entrance_bears_features_of_nothing_in_half_precision() -> None:
    channels = EntranceChannels(hidden=640, skips=(640, 320))
    adapter = EntranceAdapter(channels, rank=8, embedding_dim=16).half()
    features = [torch.zeros(1, c, 64, 64, dtype=torch.half) for c in (640, 640, 320)]
    told = Told(*(torch.ones(1, 8, 1, dtype=torch.half) for _ in range(3)))
    for residual in adapter.residuals(features, told, adapter.matrices()):
        assert residual.isfinite().all()


@torch.no_grad()
def test_the_prompt_modulates_layers_as_far_as_it_differs_from_the_negative_one(
    pipe: StableDiffusionPipeline,
) -> None:
    inputs = Inputs()
    guide = roused(Guide.from_unet(pipe.unet, GuideConfig(max_parameters_ratio=0.2)))

    def modulations(c: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        conditions = Conditions(c_BLD=c, n_BLD=n, w_B=inputs.w)
        effect = guide.prepare(conditions).at(inputs.z, inputs.t)
        assert isinstance(effect, TinyEffect)
        pairs = [pair for pair in effect.modulations[3] if pair is not None]
        return torch.cat([x for pair in pairs for x in pair], dim=2)[:, 0]

    assert modulations(inputs.n, inputs.n).unique().tolist() == [0, 1]  # shifts and factors
    differs = modulations(inputs.c, inputs.n)
    assert (differs != modulations(inputs.c, inputs.n.flip(0))).any(dim=1).all()
    reordered = modulations(inputs.c.flip(1), inputs.n)
    torch.testing.assert_close(reordered, differs)  # the prompt as a whole has no order


@torch.no_grad()
def test_layers_are_modulated_in_the_order_in_which_they_give_their_outputs(
    pipe: StableDiffusionPipeline, xl_pipe: StableDiffusionXLPipeline
) -> None:
    for unet in (pipe.unet, xl_pipe.unet):
        ended: list[nn.Module] = []
        dims: dict[nn.Module, int] = {}

        def end(
            layer: nn.Module, args: object, output: Any, ended: Any = ended, dims: Any = dims
        ) -> None:
            ended.append(layer)
            dims[layer] = (output if isinstance(output, torch.Tensor) else output[0]).ndim

        for layer in unet.modules():
            if isinstance(layer, MODULATED):
                layer.register_forward_hook(end)
        added = None
        if unet is xl_pipe.unet:
            pooled = unet.add_embedding.linear_1.in_features - 6 * unet.add_time_proj.num_channels
            added = {"text_embeds": torch.zeros(1, pooled), "time_ids": torch.zeros(1, 6)}
        text = torch.zeros(1, 16, unet.config.cross_attention_dim)
        unet(torch.zeros(1, 4, 4, 4), 500, text, added_cond_kwargs=added)
        reads = next(i for i, layer in enumerate(ended) if layer is text_attentions(unet)[0])
        assert modulated_layers(unet) == ended[reads:]
        assert describe(unet)["modulated_dims"] == [dims[layer] for layer in ended[reads:]]


@torch.no_grad()
def test_modulating_a_normalisation_changes_its_weights(pipe: StableDiffusionPipeline) -> None:
    guide = Guide.from_unet(pipe.unet, GuideConfig(max_parameters_ratio=0.2))
    assert isinstance(guide.net, TinyGuide)
    changed = copy.deepcopy(pipe.unet)
    torch.manual_seed(0)
    modulations = guide.net.modulations
    assert modulations is not None
    torch.nn.init.zeros_(modulations.down)  # at w = 2, `factor` and `shift` are then what is left
    torch.nn.init.ones_(modulations.bias)
    layers, others = modulated_layers(pipe.unet), modulated_layers(changed)
    start = 0
    for width, indices in groups_of([modulated_channels(layer) for layer in layers]):
        for index in indices:
            part = slice(start, start := start + width)
            if isinstance(layers[index], nn.GroupNorm | nn.LayerNorm):
                factor, shift = 0.3 * torch.randn(2, width)
                modulations.factor[part], modulations.shift[part] = factor, shift
                others[index].weight.mul_(1 + factor)
                others[index].bias.mul_(1 + factor).add_(shift)
    inputs = Inputs()
    inputs.w = torch.full((4,), 2.0)
    guided = GuidedDenoiser(pipe.unet, guide, schedule(pipe))(*inputs.all)
    expected = PlainDenoiser(changed, schedule(pipe))(*inputs.all)
    torch.testing.assert_close(guided, expected)


@torch.no_grad()
def test_each_sample_gets_its_own_guidance_scale_timestep_and_negative(
    pipe: StableDiffusionPipeline, guide: Guide
) -> None:
    inputs = Inputs()
    guided = GuidedDenoiser(pipe.unet, roused(guide), schedule(pipe))
    together = guided(*inputs.all)
    alone = torch.cat([guided(*inputs.row(i).all) for i in range(4)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    for changed in ("w", "n"):
        other = Inputs()
        setattr(other, changed, getattr(other, changed) + 1)
        assert not torch.equal(guided(*other.all), together)


@torch.no_grad()
def test_a_negative_prompt_that_all_samples_share_may_be_one_row(
    pipe: StableDiffusionPipeline, guide: Guide
) -> None:
    inputs = Inputs()
    guided = GuidedDenoiser(pipe.unet, roused(guide), schedule(pipe))
    inputs.n = inputs.n[:1]
    shared = guided(*inputs.all)
    inputs.n = inputs.n.repeat(4, 1, 1)
    torch.testing.assert_close(shared, guided(*inputs.all), atol=1e-5, rtol=1e-4)


def test_only_the_guide_gets_gradients_and_nothing_before_it_acts_keeps_a_graph(
    pipe: StableDiffusionPipeline, guide: Guide
) -> None:
    pipe.unet.requires_grad_(False)
    reads_text = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0]
    before_it_acts = [pipe.unet.conv_in, pipe.unet.down_blocks[0].resnets[0], reads_text.attn1]
    if guide.config.kind == "full":  # in the decoder alone
        before_it_acts += [*pipe.unet.down_blocks, pipe.unet.mid_block]
    needs_grad = []
    for block in before_it_acts:
        block.register_forward_hook(
            lambda module, args, out: needs_grad.append(
                (out[0] if isinstance(out, tuple) else out).requires_grad
            )
        )
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    GuidedDenoiser(pipe.unet, roused(guide), schedule(pipe))(
        *Inputs().all
    ).square().mean().backward()
    num_runs = 2 if guide.config.kind == "encoder" else 1
    assert len(needs_grad) == num_runs * len(before_it_acts) and not any(needs_grad)
    assert all(p.grad is None for p in pipe.unet.parameters())
    trained = {name: p for name, p in guide.named_parameters() if not name.endswith("offset")}
    silent = [name for name, p in trained.items() if p.grad is None]
    assert not silent
    assert all(torch.equal(v, before[k]) for k, v in pipe.unet.state_dict().items())


@torch.no_grad()
def test_a_guide_read_from_disk_gives_the_same_output(
    pipe: StableDiffusionPipeline, guide: Guide, tmp_path: Path
) -> None:
    roused(guide).save_pretrained(tmp_path)
    torch.manual_seed(99)
    loaded = load_guide(tmp_path)
    inputs = Inputs()
    outputs = [GuidedDenoiser(pipe.unet, g, schedule(pipe))(*inputs.all) for g in (guide, loaded)]
    assert torch.equal(*outputs)
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


@torch.no_grad()
def test_the_same_guide_works_on_a_second_unet_of_the_architecture(
    pipe: StableDiffusionPipeline, guide: Guide
) -> None:
    torch.manual_seed(5)
    other = UNet2DConditionModel.from_config(pipe.unet.config)
    roused(guide)
    ours = GuidedDenoiser(pipe.unet, guide, schedule(pipe))(*Inputs().all)
    theirs = GuidedDenoiser(other, guide, schedule(pipe))(*Inputs().all)
    assert not torch.equal(ours, theirs)


def test_a_guide_for_another_architecture_is_refused_naming_both(
    pipe: StableDiffusionPipeline, guide: Guide
) -> None:
    other = UNet2DConditionModel.from_config({**pipe.unet.config, "cross_attention_dim": 48})
    with pytest.raises(ValueError, match="text_dim = 32, but this UNet has text_dim = 48"):
        GuidedDenoiser(other, guide, schedule(pipe))


def test_a_tiny_guide_keeps_to_its_share_of_parameters(pipe: StableDiffusionPipeline) -> None:
    base = sum(p.numel() for p in pipe.unet.parameters())
    for ratio in (0.1, 0.2):
        guide = Guide.from_unet(pipe.unet, GuideConfig(max_parameters_ratio=ratio))
        assert sum(p.numel() for p in guide.parameters()) <= ratio * base


@pytest.mark.parametrize("kind", ["tiny", "encoder"])
def test_where_no_guide_is_small_enough_the_least_share_is_told(
    pipe: StableDiffusionPipeline, kind: str
) -> None:
    def made(ratio: float) -> Guide:
        return Guide.from_unet(pipe.unet, GuideConfig(kind=kind, max_parameters_ratio=ratio))

    with pytest.raises(ValueError) as refused:
        made(1e-4)
    told = re.search(r"smallest .* set it to (0\.\d+) or more\.$", str(refused.value))
    assert told
    least = float(told[1])
    base = sum(p.numel() for p in pipe.unet.parameters())
    assert sum(p.numel() for p in made(least).parameters()) == pytest.approx(least * base, abs=10)
    with pytest.raises(ValueError):
        made(least - 2e-5)


@pytest.mark.parametrize("kind", ["tiny", "full"])
def test_no_guide_is_made_for_a_unet_that_is_guidance_distilled_itself(
    pipe: StableDiffusionPipeline, kind: str
) -> None:
    lcm = UNet2DConditionModel.from_config({**pipe.unet.config, "time_cond_proj_dim": 8})
    with pytest.raises(ValueError, match="guidance-distilled itself"):
        Guide.from_unet(lcm, GuideConfig(kind=kind, max_parameters_ratio=0.2))


def test_an_unknown_kind_of_guide_is_refused() -> None:
    with pytest.raises(ValueError, match="kind is 'huge'; it must be one of tiny, "):
        GuideConfig(kind="huge")


@torch.no_grad()
def test_cfg_equals_two_explicit_passes(pipe: StableDiffusionPipeline) -> None:
    inputs = Inputs()
    eps_c = pipe.unet(inputs.z, inputs.t, inputs.c).sample
    eps_n = pipe.unet(inputs.z, inputs.t, inputs.n).sample
    expected = eps_n + inputs.w.reshape(-1, 1, 1, 1) * (eps_c - eps_n)
    guided = CFGDenoiser(pipe.unet, schedule(pipe))(*inputs.all)
    torch.testing.assert_close(guided, expected, atol=1e-5, rtol=1e-4)


def test_a_full_guide_starts_as_the_bases_encoder(pipe: StableDiffusionPipeline) -> None:
    guide = Guide.from_unet(pipe.unet, GuideConfig(kind="full"))
    own = guide.net.encoder.state_dict()
    base = pipe.unet.state_dict()
    copied = [k for k in own if k in base]
    assert all(torch.equal(own[k], base[k]) for k in copied)
    assert {k.split(".")[0] for k in copied} == {
        "conv_in",
        "time_embedding",
        "down_blocks",
        "mid_block",
    }


def test_a_bundle_on_disk_gives_back_each_guide(
    pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    guides = {}
    for num_steps in (16, 8):
        guide = Guide.from_unet(
            pipe.unet, GuideConfig(max_parameters_ratio=0.2), num_steps=num_steps
        )
        guides[num_steps] = roused(guide, scale=num_steps / 100)
    GuideBundle(guides).save(tmp_path / "bundle")
    # As where a process is killed while the bundle is replaced.
    (tmp_path / "bundle").rename(tmp_path / ".bundle.old")
    bundle = GuideBundle.load(tmp_path / "bundle")
    assert bundle.num_steps == (8, 16)
    for num_steps, guide in guides.items():
        assert bundle.guides[num_steps].weights_digest() == guide.weights_digest()
        assert bundle.guides[num_steps].config.num_steps == num_steps
    assert [bundle.for_steps(n).config.num_steps for n in (4, 8, 11, 12, 50)] == [8, 8, 8, 16, 16]


@pytest.mark.parametrize(
    ("counts", "taken"), [((8, 16), 8), ((2, 4, 8), 4), ((2,), 2), ((1, 2), 2), ((3, 6), 6)]
)
def test_without_a_number_of_steps_the_fewest_from_four_on_are_taken(
    pipe: StableDiffusionPipeline, counts: tuple[int, ...], taken: int
) -> None:
    guide = Guide.from_unet(pipe.unet, GuideConfig(max_parameters_ratio=0.2))
    assert GuideBundle(dict.fromkeys(counts, guide)).default_num_steps == taken


def test_a_damaged_or_missing_guide_is_refused(
    pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="is not a guide"):
        GuideBundle.load(tmp_path)
    Guide.from_unet(pipe.unet, GuideConfig(max_parameters_ratio=0.2)).save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged or only partly downloaded"):
        load_guide(tmp_path)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        *(("kind", "full"), ("kind", ["tiny"]), ("in_channels", "4"), ("text_dim", "x")),
        *(("channels", 5), ("channels", [5]), ("attention_channels", []), ("ranks", None)),
        *(("ranks", "abc"), ("ranks", [1]), ("text_rank", 0), ("embedding_dim", -1)),
        *(("embedding_dim", 10**12), ("modulated_dims", [3]), ("base_hash", 5)),
        *(
            ("guidance_scale_range", value)
            for value in (None, ["a", "b"], [1], [8, 1], [1, math.nan])
        ),
        *(("num_steps", "8"), ("timestep_spacing", 3), ("format_version", "2")),
    ],
)
def test_a_config_that_no_guide_has_is_told_with_its_entry_before_weights_are_read(
    pipe: StableDiffusionPipeline, tmp_path: Path, entry: str, value: Any
) -> None:
    Guide.from_unet(pipe.unet, GuideConfig(max_parameters_ratio=0.2)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, entry: value}))
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    named = "unet_config" if value == "full" else entry
    with pytest.raises(ValueError, match=rf"in {tmp_path} is damaged: its config.* {named}\b"):
        load_guide(tmp_path)


def without_floats(weights: dict[str, Tensor]) -> None:
    weights["net.modulations.factor"] = weights["net.modulations.factor"].int()


def with_nan(weights: dict[str, Tensor]) -> None:
    weights["net.modulations.factor"][-1] = math.nan


def with_infinity(weights: dict[str, Tensor]) -> None:
    weights["net.modulations.factor"][0] = math.inf


def with_another_shape(weights: dict[str, Tensor]) -> None:
    weights["net.modulations.factor"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_floats, "can't be used: its net.modulations.factor is stored as I32, and a guide"),
        (with_nan, "can't be used: its net.modulations.factor holds NaN or infinity"),
        (with_infinity, "can't be used: its net.modulations.factor holds NaN or infinity"),
        (with_another_shape, r"is damaged \(net.modulations.factor expected .*\): get it again.$"),
    ],
)
def test_weights_that_no_guide_has_are_told_with_their_guide_and_name(
    pipe: StableDiffusionPipeline,
    tmp_path: Path,
    damage: Callable[[dict[str, Tensor]], None],
    message: str,
) -> None:
    Guide.from_unet(pipe.unet, GuideConfig(max_parameters_ratio=0.2)).save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    damage(weights)
    save_file(weights, file, {"format": "pt"})
    for opened_by in (load_guide, Guide.from_pretrained):
        with pytest.raises(ValueError, match=f"^The guide in {tmp_path} {message}"):
            opened_by(tmp_path)


def test_a_full_guide_of_a_unet_that_can_not_be_is_told_as_damaged(
    pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    Guide.from_unet(pipe.unet, GuideConfig(kind="full")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["unet_config"]["down_block_types"] = 5
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"The guide in {tmp_path} is damaged \("):
        load_guide(tmp_path)


def test_weights_of_another_version_are_refused_not_filled_in(
    pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    Guide.from_unet(pipe.unet, GuideConfig(max_parameters_ratio=0.2)).save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["net.gates"] = tensors.pop("net.modulations.factor")
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(ValueError, match="another version of pnp-guide: 2 of its parameters"):
        load_guide(tmp_path)


def test_a_pickled_guide_is_refused(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    guide = Guide.from_unet(pipe.unet, GuideConfig(max_parameters_ratio=0.2))
    guide.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "diffusion_pytorch_model.bin").exists()
    with pytest.raises(ValueError, match="it needs config.json and .*safetensors"):
        load_guide(tmp_path)
    with pytest.raises(OSError, match="safetensors"):
        Guide.from_pretrained(tmp_path)


def test_the_config_file_says_what_the_guide_was_trained_for(
    pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    trained_for = {
        "base_hash": "abc",
        "prediction_type": "epsilon",
        "guidance_scale_range": [1.0, 6.0],
        "num_steps": 8,
        "timestep_spacing": "trailing",
    }
    guide = Guide.from_unet(pipe.unet, GuideConfig(max_parameters_ratio=0.2), **trained_for)
    guide.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert {key: saved[key] for key in trained_for} == trained_for


@torch.no_grad()
def test_a_guide_that_has_changed_is_read_anew(pipe: StableDiffusionPipeline, guide: Guide) -> None:
    guided = GuidedDenoiser(pipe.unet, guide, schedule(pipe))
    inputs = Inputs().all
    fresh = guided(*inputs)
    roused(guide)
    changed = guided(*inputs)
    assert not torch.equal(changed, fresh)
    assert torch.equal(changed, GuidedDenoiser(pipe.unet, guide, schedule(pipe))(*inputs))
