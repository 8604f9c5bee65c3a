"""A guide saved by each released format still opens, and gives what it gave then.

tests/data/format-N was written by the last version that saved format N: a UNet, guides of each
kind, and what they predicted. A new format gets a folder of its own, and no old one is changed.
"""

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file

from pnp_core.bundle import load_guide
from pnp_core.conditions import Conditions
from pnp_core.denoiser import GuidedDenoiser
from pnp_core.guide import FORMAT
from pnp_core.schedule import NoiseSchedule

DATA = Path(__file__).parent / "data"


@torch.no_grad()
@pytest.mark.parametrize("kind", ["tiny", "tiny-halved", "full"])
def test_a_guide_of_format_1_predicts_what_it_predicted_then(kind: str) -> None:
    folder = DATA / "format-1"
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").float().eval()
    # copies: tensors lie in the file as they come, and kernels round by how they are aligned
    saved = {name: x.clone() for name, x in load_file(folder / "expected.safetensors").items()}
    guide = load_guide(folder / kind).float()
    denoiser = GuidedDenoiser(unet, guide, NoiseSchedule.from_scheduler(DDIMScheduler()))
    conditions = Conditions(c_BLD=saved["c"], n_BLD=saved["n"], w_B=saved["w"])
    made = denoiser(saved["z"], saved["t"], conditions)
    torch.testing.assert_close(made, saved[f"eps/{kind}"], atol=1e-5, rtol=1e-4)


def test_a_guide_that_is_read_and_saved_again_has_the_newest_format(tmp_path: Path) -> None:
    load_guide(DATA / "format-1" / "tiny").save_pretrained(tmp_path)
    assert load_guide(tmp_path).config.format_version == FORMAT
    (tmp_path / "config.json").write_text(
        (tmp_path / "config.json")
        .read_text()
        .replace(f'"format_version": {FORMAT}', '"format_version": 99')
    )
    with pytest.raises(ValueError, match=f"has format 99, and .* up to {FORMAT}: install a newer"):
        load_guide(tmp_path)
