"""The fake score of matching: how a guide's own states are distributed."""

import copy
from collections.abc import Sequence

from diffusers import UNet2DConditionModel
from torch import nn

from pnp_core.guide import Guide

RANK = 32  # of the fake scores' low-rank changes
# Of attention, transformer and residual blocks, as diffusers' LCM-LoRA script has them.
CHANGED = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv"),
)


class FakeScore(nn.Module):
    """Tells how a guide's own states are distributed: a changed copy of a UNet, under a guide.

    Attributes:
        unet: the copy, whose low-rank changes are trained.
        guide: of the copy; it is told the guidance scale and the negative prompt.
    """

    def __init__(self, unet: UNet2DConditionModel, guide: Guide) -> None:
        from peft import LoraConfig

        super().__init__()
        self.unet = copy.deepcopy(unet).requires_grad_(False)
        self.unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(CHANGED)))
        self.guide = copy.deepcopy(guide).requires_grad_(True)
        for p in self.unet.parameters():
            if p.requires_grad:
                p.data = p.data.float()

    def train(self, mode: bool = True) -> "FakeScore":
        """As any module, but for the UNet, in which nothing is random."""
        super().train(mode)
        self.unet.eval()
        return self


class Matched(nn.Module):
    """What is trained: the guide, and the fake scores of its states on each teacher."""

    def __init__(self, guide: Guide, fakes: Sequence[FakeScore]) -> None:
        super().__init__()
        self.guide = guide
        self.scores = nn.ModuleList(fakes)
