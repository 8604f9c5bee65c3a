"""The model card: what the hub reads of it, and what a person does."""

from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from components.model_card import write_card
from components.params import load_params
from components.publishing import complete
from components.tracking import serving
from components.verdict import checks
from tests.evaluations import evaluation
from tests.toy import ROOT

LINEAGE = {
    "git_commit": "c0ffee",
    "data_hash": "d47a",
    "base": "zoo/models/base",
    "num_steps": "8, 16",
    "guidance_scale": "1 to 8",
}


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """The folder of a version whose guide is too weak on one of two models."""
    picture = tmp_path / "picture.png"
    Image.new("RGB", (8, 8)).save(picture)
    evaluations = {"base": evaluation(), "tuned": evaluation("tuned", clip_gain=0.2)}
    at = [replace(cell, guidance_scale=7.5) for cell in evaluations["tuned"].cells]
    tuned = replace(evaluations["tuned"], guidance_scale=7.5, cells=tuple(at))
    evaluations["tuned"] = replace(tuned, fvu_prompts={"heldout": 0, "trained": 3})
    rules = load_params(ROOT / "params.yaml").promote
    folder = tmp_path / "guide"
    folder.mkdir()
    write_card(
        folder,
        name="pnp-guide",
        lineage=LINEAGE,
        evaluations=evaluations,
        checks=checks(evaluations, None, rules),
        champion="There is no champion yet.",
        picture=picture,
        dataset=ROOT / "zoo/data",
    )
    return folder


def test_the_hub_can_read_its_header(made: Path) -> None:
    data = ModelCard.load(made / "README.md").data
    assert data.base_model == "zoo/models/base" and data.pipeline_tag == "text-to-image"
    assert data.license == "other" and (made / data.license_link).exists()


def test_a_versions_card_gives_the_verdict_of_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "make_servable", lambda *_, **__: None)
    params = load_params(ROOT / "params.yaml")
    mine, champion = {"base": evaluation(guidance_fvu=0.8)}, {"base": evaluation(guidance_fvu=0.5)}
    found = checks(mine, champion, params.promote, models=["base", "lacking"])
    failed = {(check.model, check.rule) for check in found if not check.passed}
    assert failed == {("lacking", "complete"), ("base", "guidance_fvu.max_loss")}
    picture = tmp_path / "picture.png"
    Image.new("RGB", (8, 8)).save(picture)
    complete(
        tmp_path,
        params,
        lineage=LINEAGE,
        evaluations=mine,
        checks=found,
        champion="Compared with the champion, version 2.",
        picture=picture,
    )
    text = (tmp_path / "README.md").read_text()
    assert f"{len(found) - 2} of {len(found)} rules" in text
    assert "Compared with the champion, version 2." in text
    assert all(f"- not held: {check}" in text for check in found if not check.passed)


def test_it_tells_a_person_what_there_is_to_know(made: Path) -> None:
    text = (made / "README.md").read_text()
    for heading in ("Use", "Base and training", "Results", "Verdict", "Limits", "Licence"):
        assert f"\n## {heading}\n" in text
    assert "| base | 16 | 10 / 5 / 5 | 100% | 40 / 48 / 47.2 | 90% |" in text
    assert "- not held: tuned, 16 steps: clip_score.min_gain: 0.200 [" in text
    assert "| git commit | `c0ffee` |" in text and "judged by judge" in text
    assert "192 images each at guidance\nscale 3 (base), 7.5 (tuned), judged" in text
    assert "guidance_scale=3, num_inference_steps" in text
    assert "0.50 to 0.50 of the guidance unexplained" in text
    assert "(`guidance_fvu`). On tuned of prompts that it was trained on.\n" in text
    assert (made / "grid.png").exists() and "](grid.png)" in text
    assert "OpenMoji" in (made / "DATA_LICENCE.md").read_text()
