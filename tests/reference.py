"""What a plugged pipeline is compared with: the stock one, with our own denoiser for its UNet."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from pnp_core.calls import entered
from pnp_core.conditions import AddedConditions, Conditions
from pnp_core.denoiser import DenoiserCall, GuidedDenoiser
from pnp_core.guide import Guide, GuideConfig
from pnp_core.plug import plug, unplug
from pnp_core.schedule import NoiseSchedule
from tests.conftest import roused
from tests.pipeline_zoo import Parts
from tests.toy import make_pipeline, make_xl_pipeline

SCALE = 4.0
CALL: dict[str, Any] = {
    "prompt": "a cat",
    "negative_prompt": "a dog",
    "num_inference_steps": 2,
    "guidance_scale": SCALE,
    "output_type": "latent",
}


def random_parts(folder: Path) -> Parts:
    """Of a base and of one in the SDXL architecture; its tokenizer lies in this folder."""
    torch.manual_seed(0)
    base = make_pipeline(folder / "tokenizer")
    return Parts(base, make_xl_pipeline(base))


def with_unet(parts: Parts, unet: Any) -> StableDiffusionPipeline:
    """A pipeline of its own with this UNet."""
    mine = {
        k: v if k == "tokenizer" else copy.deepcopy(v) for k, v in parts.base.components.items()
    }
    pipe = StableDiffusionPipeline(**mine | {"unet": unet}, requires_safety_checker=False)
    pipe.image_encoder, pipe.feature_extractor = parts.image_encoder(), parts.image_processor()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def guide_for(unet: Any, kind: str = "tiny") -> Guide:
    """A random guide."""
    torch.manual_seed(1)
    return roused(Guide.from_unet(unet, GuideConfig(kind=kind, max_parameters_ratio=0.2)))


def run(pipe: Any, call: dict[str, Any]) -> np.ndarray:
    """What a call gives, as an array."""
    output = pipe(**call, generator=torch.Generator().manual_seed(3))
    return np.asarray(output.rgb if hasattr(output, "rgb") else output.images)


def rows_run(unet: nn.Module) -> list[int]:
    """How many rows each forward of the UNet has from now on."""
    rows: list[int] = []
    unet.conv_in.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    return rows


class Reference(nn.Module):
    """In place of a UNet: of a batch doubled for CFG, gives the guided prediction for both halves.

    Made by our own denoiser's call, so that a stock pipeline with CFG gives what one with a guide
    should: ``u + w (c - u)`` is the guided prediction where u and c are.
    """

    def __init__(self, unet: Any, guide: Guide, num_prompts: int, scheduler: Any) -> None:
        super().__init__()
        self.unet = unet
        self.guide = guide
        self.num_prompts = num_prompts
        self.denoiser = GuidedDenoiser(unet, guide, NoiseSchedule.from_scheduler(scheduler))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.unet, name)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        return_dict: bool = True,
        **more: Any,
    ) -> Any:
        num_rows = len(sample)
        blocks = torch.arange(num_rows).view(-1, 2, self.num_prompts)
        n, c = blocks[:, 0].flatten(), blocks[:, 1].flatten()

        def rows(value: Any, which: Tensor) -> Any:
            if isinstance(value, Tensor) and value.ndim and len(value) == num_rows:
                return value[which]
            if isinstance(value, dict):
                return {key: rows(each, which) for key, each in value.items()}
            if isinstance(value, list | tuple):
                return [rows(each, which) for each in value]
            return value

        torch.testing.assert_close(sample[n], sample[c], rtol=0, atol=0)
        added = None
        if "text_embeds" in (told := more.get("added_cond_kwargs") or {}):
            pooled = told["text_embeds"]
            added = AddedConditions(pooled[c], pooled[n], told["time_ids"][c])
        text = encoder_hidden_states
        conditions = Conditions.at_scale(SCALE, c_BLD=text[c], n_BLD=text[n], added=added)
        timestep = rows(timestep.reshape(-1), c)
        with entered(DenoiserCall(self.unet, self.guide, conditions)):
            guided = self.unet(sample[c], timestep, text[c], return_dict=False, **rows(more, c))[0]
        both = guided.new_empty(num_rows, *guided.shape[1:])
        both[n], both[c] = guided, guided
        return UNet2DConditionOutput(sample=both) if return_dict else (both,)


def stand_in(pipe: Any, unet: Any) -> None:
    """Have the pipeline run this for its UNet."""
    pipe.unet = unet
    if "wrapped_unet" in vars(pipe):  # of ParaDiGMS
        pipe.wrapped_unet = unet


def guided(pipe: Any, guide: Guide, call: dict[str, Any], atol: float = 2e-4) -> np.ndarray:
    """What a plugged call gives: compared with our denoiser; the pipeline is as before after it."""
    stock = run(pipe, call)
    unet = pipe.unet
    stand_in(pipe, Reference(unet, guide, 1, pipe.scheduler))
    expected = run(pipe, call)
    stand_in(pipe, unet)
    plug(pipe, guide)
    made = run(pipe, call)
    np.testing.assert_allclose(made, expected, atol=atol)
    assert not np.allclose(made, stock, atol=1e-3)
    unplug(pipe)
    assert np.array_equal(run(pipe, call), stock)
    return made
