"""The other methods that the guide is compared with."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LCMScheduler, UNet2DConditionModel
from diffusers import StableDiffusionPipeline as Pipe
from torch import nn

from benchmarks import quality_table
from benchmarks.peers import TRAINED, Ours
from benchmarks.peers.agd import attention_layers
from benchmarks.peers.lcm import ConsistencyLoRA, consistency, sample_consistent
from benchmarks.peers.lora import LargeLoRA, SmallLoRA, targets
from pnp_core.cache import TeacherCache
from pnp_core.conditions import Conditions
from pnp_core.denoiser import PlainDenoiser
from pnp_core.distill import DistillConfig
from pnp_core.guide import Guide, GuideConfig
from pnp_core.metrics import count_flops
from pnp_core.models import encode_prompts
from pnp_core.sample import initial_noise
from pnp_core.schedule import NoiseSchedule
from pnp_core.train import TrainConfig, train
from tests.cases import few_of

BASE = Path(__file__).parent.parent / "zoo/models/base"


def inputs(unet: nn.Module) -> tuple[torch.Tensor, torch.Tensor, Conditions]:
    generator = torch.Generator().manual_seed(0)
    size, width = unet.config.sample_size, unet.config.cross_attention_dim
    z = torch.randn(2, unet.config.in_channels, size, size, generator=generator)
    c, n = torch.randn(2, 2, 7, width, generator=generator)
    conditions = Conditions(c_BLD=c, n_BLD=n, w_B=torch.tensor([2.0, 7.0]))
    return z, torch.tensor([900, 100]), conditions


@pytest.mark.parametrize("name", TRAINED)
@torch.no_grad()
def test_an_untrained_peer_is_the_model_it_sits_in(name: str, pipe: Pipe) -> None:
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    tuned = copy.deepcopy(pipe.unet)
    for parameter in tuned.parameters():
        parameter.mul_(1.1)
    peer = TRAINED[name](pipe.unet)
    for unet in (pipe.unet, tuned):
        plain = PlainDenoiser(unet, schedule)(*inputs(unet))
        torch.testing.assert_close(peer.denoiser(unet, schedule)(*inputs(unet)), plain)


@pytest.mark.parametrize("name", few_of(TRAINED, "agd", "lora-1"))
def test_training_a_peer_explains_guidance_and_leaves_the_base_alone(
    name: str, pipe: Pipe, cache: TeacherCache
) -> None:
    before = copy.deepcopy(pipe.unet.state_dict())
    torch.manual_seed(0)
    peer = TRAINED[name](pipe.unet)
    rate = {"meng": 2e-5, "paper-full": 1e-3, "lora-8": 1e-3}.get(name, 3e-3)
    training = DistillConfig(
        train=TrainConfig(num_images=192, batch_size=16, learning_rate=rate, precision="fp32"),
        guide=GuideConfig(),
    )
    student: Any = peer.denoiser(pipe.unet, cache.schedule)
    objective = peer.objective([student], cache, training, torch.device("cpu"))

    @torch.no_grad()
    def loss() -> float:  # of the same states before and after
        return sum(float(objective(1000 + step, slice(None)).mean()) for step in range(6))

    untrained = loss()
    train(objective, peer, training.train, run_hash="r")
    assert loss() < 0.98 * untrained
    for key, value in pipe.unet.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("name", few_of([*TRAINED, "ours"], "agd", "dice", "paper-tiny", "ours"))
def test_what_a_method_costs_is_counted_and_changes_nothing(name: str, pipe: Pipe) -> None:
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    unet = pipe.unet.requires_grad_(False)
    guide = Guide.from_unet(unet, GuideConfig(max_parameters_ratio=0.2))
    peer = Ours(unet, guide) if name == "ours" else TRAINED[name](unet)
    before = copy.deepcopy(peer.state_dict())
    z, t_B, conditions = inputs(unet)
    cost = peer.cost(unet, schedule, z_BCHW=z, t_B=t_B, conditions=conditions)
    own, base = (sum(p.numel() for p in module.parameters()) for module in (peer, unet))
    assert cost["params_ratio"] == own / base
    assert 0.5 <= cost["flops_ratio"] < 0.7  # one forward, where CFG runs two
    # forward, backward, and where weights are trained their gradients
    most = {"meng": 3.1, "paper-full": 3.1}.get(name, 2.6)
    assert most - 1 < cost["train_flops_ratio"] < most
    assert all(parameter.grad is None for parameter in peer.parameters())
    assert all(torch.equal(value, before[key]) for key, value in peer.state_dict().items())


# What is particular to one of them


def moved(peer: nn.Module, scale: float = 0.05) -> Any:
    """As if it had been trained."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return peer


def test_agds_adapters_stand_beside_cross_attentions_but_an_up_blocks_last(pipe: Pipe) -> None:
    names = {id(module): name for name, module in pipe.unet.named_modules()}
    found = [names[id(layer)] for layer in attention_layers(pipe.unet)]
    assert found and all(name.endswith(".attn2") for name in found)
    crossed = [name for name in names.values() if name.endswith("attn2")]
    num_last = sum(hasattr(block, "attentions") for block in pipe.unet.up_blocks)
    assert len(found) == len(crossed) - num_last
    assert not any(name.startswith("up_blocks.1.attentions.1") for name in found)


@torch.no_grad()
def test_dice_keeps_the_first_token(pipe: Pipe) -> None:
    _, _, conditions = inputs(pipe.unet)
    sharp = moved(TRAINED["dice"](pipe.unet))(conditions.c_BLD, conditions.n_BLD, conditions.w_B)
    changed = (sharp - conditions.c_BLD).abs().amax(dim=(0, 2))
    assert changed[0] == 0 and (changed[1:] > 0).all()


@torch.no_grad()
def test_a_merged_lora_is_the_one_beside_the_weights(pipe: Pipe) -> None:
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    denoiser = moved(LargeLoRA(pipe.unet)).denoiser(pipe.unet, schedule)
    z, t_B, conditions = inputs(pipe.unet)
    beside = denoiser(z, t_B, conditions)  # two scales in one batch: nothing can be merged
    for row, w in enumerate(conditions.w_B):
        alone = denoiser(z, t_B, conditions.with_scale(w.expand(2)))
        torch.testing.assert_close(alone[row], beside[row], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_lora_does_nothing_without_guidance_and_costs_nothing_when_merged(pipe: Pipe) -> None:
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    z, t_B, conditions = inputs(pipe.unet)
    peer, plain = moved(LargeLoRA(pipe.unet)), PlainDenoiser(pipe.unet, schedule)
    denoiser = peer.denoiser(pipe.unet, schedule)
    one, three = (conditions.with_scale(torch.full((2,), w)) for w in (1.0, 3.0))
    torch.testing.assert_close(denoiser(z, t_B, one), plain(z, t_B, one))
    assert not torch.allclose(denoiser(z, t_B, three), plain(z, t_B, three), atol=1e-3)
    forward = count_flops(lambda: plain(z, t_B, three))
    merging = sum(2 * change.b.numel() * change.a[0].numel() for change in peer.changes.values())
    assert count_flops(lambda: denoiser(z, t_B, three)) == forward + merging


@pytest.mark.parametrize("share", [0.01, 0.08])
def test_a_loras_rank_follows_from_its_share_of_the_parameters(share: float) -> None:
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(BASE / "unet"))
    kind = {one.share: one for one in (SmallLoRA, LargeLoRA)}[share]
    own, all_of_it = (sum(p.numel() for p in m.parameters()) for m in (kind(unet), unet))
    assert 0.7 * share < own / all_of_it <= share
    assert {name.split(".")[-1] for name in targets(unet)} >= {"to_q", "conv1", "proj_in"}


@torch.no_grad()
def test_consistency_sampling_is_that_of_the_stock_pipeline_with_its_scheduler(
    pipe: Pipe,
) -> None:
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    prompts, z_T = ["red disc", "blue ring"], initial_noise((4, 4, 4), [3, 4])
    conditions = Conditions.at_scale(
        3.0,
        c_BLD=encode_prompts(pipe, prompts).states_NLD,
        n_BLD=encode_prompts(pipe, [""]).states_NLD,
    )
    made = sample_consistent(
        ConsistencyLoRA(pipe.unet).denoiser(pipe.unet, schedule),
        pipe.scheduler,
        z_T=z_T,
        conditions=conditions,
        num_steps=4,
        generators=[torch.Generator().manual_seed(seed) for seed in (7, 8)],
    )
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    expected = pipe(
        prompts,
        num_inference_steps=4,
        guidance_scale=1.0,
        latents=z_T,
        generator=[torch.Generator().manual_seed(seed) for seed in (7, 8)],
        output_type="latent",
    ).images
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-4)


def test_the_consistency_function_gives_back_what_has_no_noise(pipe: Pipe) -> None:
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    z, eps = torch.randn(2, 3, 4, 4, 4)
    found = consistency(schedule, eps, z, torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(found, z)


@torch.no_grad()
def test_of_the_papers_guides_the_full_one_reads_the_prompt_and_the_tiny_one_does_not(
    pipe: Pipe,
) -> None:
    z, t_B, conditions = inputs(pipe.unet)
    other = replace(conditions, c_BLD=conditions.c_BLD.flip(1))
    for name, reads in (("paper-full", True), ("paper-tiny", False)):
        peer = moved(TRAINED[name](pipe.unet))
        before, _ = peer.residuals(z, t_B, conditions)
        after, _ = peer.residuals(z, t_B, other)
        same = all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
        assert same is not reads
        stronger, _ = peer.residuals(z, t_B, conditions.with_scale(conditions.w_B + 1))
        assert not torch.equal(stronger[-1], before[-1])


def results(**fvu: float) -> dict[str, Any]:
    def row(method: str) -> dict[str, Any]:
        steps = {
            str(n): {"num_images": n, "fid": 10 * fvu.get(method, 1.0) + 1, "cfg_psnr": 20.0}
            for n in (50, 16, 8, 4)
        }
        return {"guidance_fvu": fvu.get(method, 1.0), **steps}

    models = {
        m: {method: row(method) for method in quality_table.LABELS} for m in ("base", "a", "b")
    }
    setting = {
        "judge": "j",
        "guidance_scale": 4.0,
        "images_seen": 10,
        "images_seen_in_a_round": 5,
    }
    ratios = {"params_ratio": 0.01, "flops_ratio": 0.5, "train_flops_ratio": 1.9}
    cost = {**ratios, "pairs": 7, "companions": 2}
    made_by = {"guide": "g", "precision": "fp32", "commit": "c", "command": "make it"}
    return {
        "setting": setting,
        "models": models,
        "costs": {"guided": cost},
        "records": dict.fromkeys(quality_table.LABELS, [made_by]),
    }


def test_the_summary_names_a_winner_only_where_it_leads_everywhere() -> None:
    ahead = results(guided=0.3, agd=0.4, dice=0.5, meng=0.2, cfg=0.1)
    found = quality_table.summary(ahead)
    assert found["beats_all_peers"] and found["fvu_base"] == 0.3
    assert found["fid_ratio_worst"] == pytest.approx(4 / 2)
    assert found["fid_behind_whole_unet"] == pytest.approx(4 / 3 - 1)
    ahead["models"]["b"]["guided"]["8"]["fid"] = 10.0
    assert quality_table.summary(ahead)["fid_ratio_worst"] == pytest.approx(10 / 2)  # of any model
    ahead["models"]["b"]["agd"]["guidance_fvu"] = 0.0
    assert quality_table.summary(ahead)["beats_all_peers"] is False
    assert "| this guide |" in quality_table.as_markdown(ahead)
    assert "this guide 7 of the base and 2 companions" in quality_table.as_markdown(ahead)


def test_rows_that_are_not_made_yet_decide_nothing() -> None:
    part = results(guided=0.3)
    for rows in part["models"].values():
        del rows["meng"]
    found = quality_table.summary(part)
    assert found["beats_all_peers"] is None and found["fid_behind_whole_unet"] is None
    assert found["fvu_base"] == 0.3
    assert quality_table.LABELS["meng"] not in quality_table.as_markdown(part)
