"""A guide saved by each released format still opens, and gives what it gave then.

tests/data/format-N was written by a version that saved format N: guides, and what they predicted;
the UNet and the inputs lie in format-1. A new format gets a folder of its own, and no old one is
changed. (Format 2 reads guides of format 1 as its own.)
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file

from pnp_core.bundle import GuideBundle, load_guide, nearest
from pnp_core.conditions import Conditions
from pnp_core.denoiser import GuidedDenoiser
from pnp_core.guide import FORMAT, FORMATS, Guide
from pnp_core.schedule import NoiseSchedule

DATA = Path(__file__).parent / "data"
BEST = '{"name": "DDIMScheduler", "timestep_spacing": "trailing"}'


@torch.no_grad()
@pytest.mark.parametrize(
    ("number", "kind"), [(1, "tiny"), (1, "tiny-halved"), (1, "full"), (3, "encoder")]
)
def test_a_guide_of_each_format_predicts_what_it_predicted_then(number: int, kind: str) -> None:
    folder, first = DATA / f"format-{number}", DATA / "format-1"
    unet = UNet2DConditionModel.from_pretrained(first / "unet").float().eval()
    # copies: tensors lie in the file as they come, and kernels round by how they are aligned
    saved = {name: x.clone() for name, x in load_file(first / "expected.safetensors").items()}
    guide = load_guide(folder / kind).float()
    denoiser = GuidedDenoiser(unet, guide, NoiseSchedule.from_scheduler(DDIMScheduler()))
    conditions = Conditions(c_BLD=saved["c"], n_BLD=saved["n"], w_B=saved["w"])
    made = denoiser(saved["z"], saved["t"], conditions)
    expected = load_file(folder / "expected.safetensors")[f"eps/{kind}"]
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-4)


def test_a_guide_that_is_read_and_saved_again_has_the_newest_format(tmp_path: Path) -> None:
    load_guide(DATA / "format-1" / "tiny").save_pretrained(tmp_path)
    assert load_guide(tmp_path).config.format_version == FORMATS["tiny"]


@pytest.mark.parametrize("opened_by", [load_guide, Guide.from_pretrained])
@pytest.mark.parametrize("kind", ["tiny", "of a later version"])
def test_a_guide_of_a_later_format_is_said_to_need_a_newer_version_whatever_its_kind(
    tmp_path: Path, kind: str, opened_by: Callable[[Path], Guide]
) -> None:
    load_guide(DATA / "format-1" / "tiny").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    later = {"format_version": 99, "kind": kind, "an entry": "of its own"}
    file.write_text(json.dumps(json.loads(file.read_text()) | later))
    with pytest.raises(ValueError, match=f"has format 99, and .* up to {FORMAT}: install a newer"):
        opened_by(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"kind": "ti', "config.json is damaged"),
        ("[]", "config.json lacks kind"),
        ("{}", "config.json lacks kind"),
        ('{"_class_name": "UNet2DConditionModel", "in_channels": 4}', "config.json lacks kind"),
        ({"kind": "small"}, "has the kind 'small', and there are tiny"),
        ({"num_steps": 0}, "has 0 for num_steps"),
        ({"num_steps": "4"}, "has '4' for num_steps"),
    ],
)
def test_a_guides_damaged_config_is_told_by_its_folder(
    tmp_path: Path, text: str | dict[str, Any], message: str
) -> None:
    load_guide(DATA / "format-1" / "tiny").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    whole = json.loads(file.read_text())
    file.write_text(text if isinstance(text, str) else json.dumps({**whole, **text}))
    with pytest.raises(ValueError, match=f"{tmp_path}.*{message}"):
        load_guide(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        '{"num_steps": 4}',
        '{"num_steps": [4], "schedulers": []}',
        '{"num_steps": [4], "schedulers": {"4": {"name": "DDIMScheduler"}}}',
        f'{{"num_steps": [4], "schedulers": {{"a": {BEST}}}}}',
        f'{{"num_steps": [4], "schedulers": {{"0": {BEST}}}}}',
        f'{{"num_steps": [4], "schedulers": {{"4": {BEST.replace("trailing", "sideways")}}}}}',
        f'{{"num_steps": [4], "schedulers": {{"4": {BEST.replace("DDIM", "No")}}}}}',
        '{"num_steps": []}',
        '{"num_steps": [4, 0]}',
        '{"num_steps": [true]}',
        '{"num_steps": ["../bundle/steps-4"]}',
        '{"num_steps": [1' + "0" * 400 + "]}",
    ],
)
def test_a_bundles_damaged_index_is_told_by_its_name(tmp_path: Path, text: str) -> None:
    GuideBundle({4: load_guide(DATA / "format-1" / "tiny")}).save(tmp_path / "bundle")
    (tmp_path / "bundle" / "bundle.json").write_text(text)
    with pytest.raises(ValueError, match="bundle.json is damaged"):
        GuideBundle.load(tmp_path / "bundle")


@pytest.mark.parametrize(("asked", "got"), [(1, 2), (3, 4), (5, 4), (8, 8), (10**400, 8)])
def test_any_number_of_steps_has_the_guide_whose_own_is_nearest(asked: int, got: int) -> None:
    assert nearest((2, 4, 8), asked) == got


def test_no_steps_at_all_have_no_guide() -> None:
    with pytest.raises(ValueError, match="A number of steps is 1 or more, and not 0"):
        nearest((2, 4, 8), 0)
