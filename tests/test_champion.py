"""The champion on a guide's page: who it is, what it was measured to be, its pictures."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components import champion
from components import register as stage
from components.evaluation import FORMAT, Evaluation
from components.images import Task
from components.params import load_params
from components.report import gallery
from components.report.gallery import FILE, GuidedPictures
from components.tracking import Registry, Run, TrackingError
from tests.evaluations import evaluation
from tests.stores import NAME, TOY, register
from tests.toy import ROOT

pytest_plugins = ["tests.stores"]

MINE = {"base": evaluation("base"), "tuned": evaluation("tuned")}
PICTURES = GuidedPictures(
    images={(model, 8, "a red apple", "", 3): model.encode() for model in ("base", "tuned")}
)


class Stub:
    """A registry in which version 2 is champion."""

    def __init__(self, theirs: Any, pictures: GuidedPictures | None = PICTURES) -> None:
        self.theirs, self.pictures = theirs, pictures

    def champion(self) -> str | None:
        return None if self.theirs is None else "2"

    def summary(self, version: str) -> dict[str, Any]:
        models = {
            name: {"format": FORMAT, **asdict(e)} if isinstance(e, Evaluation) else e
            for name, e in self.theirs.items()
        }
        return {"models": models}

    def run_file(self, version: str, path: str, folder: Path) -> Path | None:
        assert path == f"report/{FILE}"
        if self.pictures is None:
            return None
        self.pictures.save(folder / FILE)
        return folder / FILE


def ask(stub: Stub, own: str | None = "3") -> champion.Champion:
    return champion.ask(stub, own, MINE)  # type: ignore[arg-type]


def test_a_champion_is_compared_with_and_its_pictures_are_shown() -> None:
    found = ask(Stub(MINE))
    assert found.said == "Compared with the champion, version 2."
    assert found.evaluations == MINE and found.pictures == PICTURES and not found.no_pictures


def test_without_a_champion_the_page_says_so() -> None:
    found = ask(Stub(None))
    assert "no champion yet" in found.said and found.evaluations is None


def test_a_guide_is_not_compared_with_itself() -> None:
    found = ask(Stub(MINE), own="2")
    assert found.said == "It is the champion itself." and found.evaluations is None


def test_a_champion_of_another_format_is_named_and_not_compared_with() -> None:
    found = ask(Stub({"base": {"guidance_fvu": 0.5}}))
    assert "version 2, can’t be compared with" in found.said and "format 1" in found.said
    assert found.version == "2" and found.evaluations is None and found.pictures is None


@pytest.mark.parametrize(
    "what", ["base_hash", "trigger", "clip_skip", "timestep_spacing", "strength"]
)
def test_pictures_that_were_made_otherwise_are_left_out_with_a_word(what: str) -> None:
    other = {"base": evaluation("base", **{what: "another"}), "tuned": MINE["tuned"]}
    found = ask(Stub(other))
    assert found.pictures and {key[0] for key in found.pictures.images} == {"tuned"}
    found = ask(Stub({"base": other["base"]}))
    assert found.pictures is None and "of other models or settings" in found.no_pictures


def test_pictures_of_another_negative_prompt_are_not_those_of_a_task() -> None:
    task = Task("a red apple", 3, False)
    assert PICTURES.of("base", 8, task) == b"base"
    assert PICTURES.of("base", 8, task._replace(negative="blurry")) is None


def test_pictures_that_do_not_say_their_negative_prompt_are_refused(tmp_path: Path) -> None:
    rows = [{"model": "base", "num_steps": 8, "prompt": "a", "seed": 3, "image": b"base"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / FILE)
    with pytest.raises(ValueError, match="does not say 'negative', as one of another version"):
        GuidedPictures.load(tmp_path / FILE)


def test_pictures_that_were_not_kept_are_left_out_with_a_word() -> None:
    assert "were not kept with its run" in ask(Stub(MINE, None)).no_pictures


def test_pictures_that_cannot_be_read_are_left_out_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*args: Any) -> Any:
        raise TrackingError("503: try later")

    stub = Stub(MINE)
    monkeypatch.setattr(stub, "run_file", fails)
    found = ask(stub)
    assert found.evaluations == MINE and "503: try later" in found.no_pictures


def test_a_registry_that_cannot_tell_who_is_champion_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails() -> Any:
        raise TrackingError("503: try later")

    stub = Stub(MINE)
    monkeypatch.setattr(stub, "champion", fails)
    with pytest.raises(TrackingError):
        ask(stub)
    assert "503" in champion.unknown(TrackingError("503")).said


def test_a_page_names_the_steps_at_which_the_champion_was_not_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gallery, "gather", lambda *_, **__: ([], GuidedPictures()))
    params = load_params(ROOT / "params.yaml")
    for num_steps, more in (((16, 8), ""), ((16,), " Not compared on base at 8 steps: ")):
        compared = ask(Stub({"base": evaluation(num_steps=num_steps)}))
        mine = {"base": MINE["base"]}
        report = stage.gather(params, mine, {"git_commit": "c0ffee"}, compared).report
        assert report.champion.startswith(f"Compared with the champion, version 2.{more}")
        assert ("Not compared" in report.champion) == bool(more)


def test_a_file_of_a_versions_run_is_found_and_one_that_it_lacks_is_none(
    place: Path, tmp_path: Path
) -> None:
    registry = Registry(TOY, NAME)
    folder = Path("guide")
    folder.mkdir()
    (folder / "summary.json").write_text("{}")
    PICTURES.save(folder / FILE)
    with Run(registry.store, TOY, "register", params={}) as run:
        run.file(folder / FILE, "report")
        version = registry.register(run, folder, key="k", metrics={}, tags={}, description="")
    into = tmp_path / "into"
    into.mkdir()
    found = registry.run_file(version, f"report/{FILE}", into)
    assert found is not None and GuidedPictures.load(found) == PICTURES
    assert registry.run_file(version, "report/other", into) is None
    assert registry.run_file(register(0.5), f"report/{FILE}", into) is None
    shutil.rmtree(into)
