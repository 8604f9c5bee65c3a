"""The other methods that the guide is compared with."""

import copy
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline as Pipe
from torch import nn

from benchmarks import quality_table
from benchmarks.peers import PEERS, Ours
from pnp_core.cache import TeacherCache
from pnp_core.conditions import Conditions
from pnp_core.denoiser import PlainDenoiser
from pnp_core.distill import DistillConfig, distillation_objective
from pnp_core.guide import Guide, GuideConfig
from pnp_core.schedule import NoiseSchedule
from pnp_core.train import TrainConfig, train


def inputs(unet: nn.Module) -> tuple[torch.Tensor, torch.Tensor, Conditions]:
    generator = torch.Generator().manual_seed(0)
    size, width = unet.config.sample_size, unet.config.cross_attention_dim
    z = torch.randn(2, unet.config.in_channels, size, size, generator=generator)
    c, n = torch.randn(2, 2, 7, width, generator=generator)
    conditions = Conditions(c_BLD=c, n_BLD=n, w_B=torch.tensor([2.0, 7.0]))
    return z, torch.tensor([900, 100]), conditions


@pytest.mark.parametrize("name", PEERS)
@torch.no_grad()
def test_an_untrained_peer_is_the_model_it_sits_in(name: str, pipe: Pipe) -> None:
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    tuned = copy.deepcopy(pipe.unet)
    for parameter in tuned.parameters():
        parameter.mul_(1.1)
    peer = PEERS[name](pipe.unet)
    for unet in (pipe.unet, tuned):
        plain = PlainDenoiser(unet, schedule)(*inputs(unet))
        torch.testing.assert_close(peer.denoiser(unet, schedule)(*inputs(unet)), plain)


@pytest.mark.parametrize("name", PEERS)
def test_training_a_peer_explains_guidance_and_leaves_the_base_alone(
    name: str, pipe: Pipe, cache: TeacherCache
) -> None:
    before = copy.deepcopy(pipe.unet.state_dict())
    torch.manual_seed(0)
    peer = PEERS[name](pipe.unet)
    rate = {"meng": 2e-5}.get(name, 1e-2)
    training = DistillConfig(
        train=TrainConfig(
            num_images=192, batch_size=16, learning_rate=rate, precision="fp32",
            report_every_images=16,
        ),
        guide=GuideConfig(),
    )  # fmt: skip
    student: Any = peer.denoiser(pipe.unet, cache.schedule)
    losses: list[float] = []
    train(
        distillation_objective([student], cache, training, torch.device("cpu")),
        peer,
        training.train,
        run_hash="r",
        report=lambda done, metrics: losses.append(metrics["loss"]),
    )
    assert sum(losses[-3:]) < 0.97 * sum(losses[:3])
    for key, value in pipe.unet.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("name", [*PEERS, "ours"])
def test_what_a_method_costs_is_counted_and_changes_nothing(name: str, pipe: Pipe) -> None:
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    unet = pipe.unet.requires_grad_(False)
    guide = Guide.from_unet(unet, GuideConfig(max_parameters_ratio=0.2))
    peer = Ours(unet, guide) if name == "ours" else PEERS[name](unet)
    before = copy.deepcopy(peer.state_dict())
    z, t_B, conditions = inputs(unet)
    cost = peer.cost(unet, schedule, z_BCHW=z, t_B=t_B, conditions=conditions)
    own, base = (sum(p.numel() for p in module.parameters()) for module in (peer, unet))
    assert cost["params_ratio"] == own / base
    assert 0.5 <= cost["flops_ratio"] < 0.7  # one forward, where CFG runs two
    # forward, backward, and where weights are trained their gradients
    most = 3.1 if name == "meng" else 2.6
    assert most - 1 < cost["train_flops_ratio"] < most
    assert all(parameter.grad is None for parameter in peer.parameters())
    assert all(torch.equal(value, before[key]) for key, value in peer.state_dict().items())


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
    return {"setting": setting, "models": models, "costs": {"guided": cost}}


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
