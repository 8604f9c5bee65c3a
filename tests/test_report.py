"""The page of a run: what it says, what it shows, and what it does in a browser."""

import base64
import dataclasses
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from components.evaluation import Evaluation
from components.images import Gallery, KeptImages, Setting, Task
from components.paths import EVALUATED
from components.report import gallery, page
from components.report.content import (
    NEGATIVE,
    Report,
    costs,
    headlines,
    matrices,
    number,
    shares,
)
from components.verdict import Check
from pnp_core.files import read_json, write_json
from tests import chromium
from tests.evaluations import evaluation

EDGE, NUM_TASKS = 16, 40
NASTY = "</script><b>bold</b> & 'quoted' \""
PASSED = Check(
    rule="fid.min_gain",
    model="base",
    num_steps=16,
    limit=0.75,
    is_least=True,
    value=0.93,
    interval=(0.9, 0.97),
    champion=0.912,
    passed=True,
)
FAILED = Check(rule="complete", model="tuned", passed=False, note="no kid at 8 steps")
has_browser = pytest.mark.skipif(
    chromium.find() is None, reason="no Chromium is installed (apt-get install chromium)"
)


def image_of(setting: Setting, seed: int) -> np.ndarray:
    """Noise, which guided sampling makes lighter, more or less so."""
    pixels = np.random.default_rng(seed).integers(60, 190, (EDGE, EDGE, 3))
    if setting.method == "guided":
        pixels = pixels + np.random.default_rng([seed, setting.num_steps]).integers(1, 50)
    if setting.method == "unguided" or setting.solver != "ddim":
        pixels = 255 - pixels - setting.num_steps
    return pixels.astype(np.uint8)


SETTINGS = [
    *(Setting(m, n, "ddim", 3.0) for m in ("unguided", "cfg", "guided") for n in (16, 8)),
    *(Setting("cfg", n, "dpmsolver++", 3.0) for n in (8, 4)),
]


def write_images(model: str, settings: Sequence[Setting] = SETTINGS) -> None:
    tasks = [
        Task(NASTY if seed == 0 else f"thing {seed}", seed, seed % 3 == 0)
        for seed in range(NUM_TASKS)
    ]
    recipes = {setting: {"model": model, **setting._asdict()} for setting in settings}
    for setting, recipe in recipes.items():
        images = np.stack([image_of(setting, task.seed) for task in tasks])
        KeptImages(model).write(recipe, setting, tasks, images)
    folder = EVALUATED / model
    folder.mkdir(parents=True)
    Gallery(model, tasks, recipes).save(folder)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory, with the images of two models."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for model in ("base", "tuned"):
            write_images(model)
        yield folder


@pytest.fixture(scope="module")
def evaluations() -> dict[str, Evaluation]:
    return {"base": evaluation("base"), "tuned": evaluation("tuned", clip_gain=0.6)}


@pytest.fixture(scope="module")
def shown(
    results: Path, evaluations: Mapping[str, Evaluation]
) -> tuple[list[gallery.PictureSet], gallery.GuidedPictures]:
    return gallery.gather(evaluations)


def report(evaluations: Mapping[str, Evaluation], **changes: Any) -> Report:
    made = Report(
        name="pnp-guide",
        version="3",
        made="27 November 2026, 11:05",
        evaluations=evaluations,
        checks=[PASSED, FAILED],
        champion="Compared with the champion, version 2.",
        lineage={"git_commit": "c0ffee"},
    )
    return dataclasses.replace(made, **changes)


# What it says


def test_what_failed_stands_first_with_its_numbers(evaluations: Any, shown: Any) -> None:
    html = page.render(report(evaluations), shown[0])
    assert "Would be refused." in html and "1 of 2 checks failed" in html
    assert html.index("no kid at 8 steps") < html.index("≥ 0.75")
    assert "0.930" in html and "0.900 to 0.970" in html and "0.912" in html
    assert "Passes." in page.render(report(evaluations, checks=[PASSED]), [])


def test_the_model_on_which_the_guide_is_worst_is_named(evaluations: Any) -> None:
    html = page.render(report(evaluations), [])
    assert "60 %</b> of CFG&#39;s gain in CLIP score <small>at worst, on tuned at 16" in html


def test_a_gain_inside_its_interval_gives_way_to_the_ratio_to_cfg() -> None:
    noisy = {"base": evaluation("base", fid=1.1, spread=0.3)}
    assert "1.10 × CFG" in page.render(report(noisy), [])


def test_scores_that_each_model_has_of_its_own_references_are_not_said_to_compare(
    evaluations: Any,
) -> None:
    found = matrices(evaluations)
    assert all(list(matrix.rows) == list(evaluations) for matrix in found), "models are rows"
    notes = {matrix.title: matrix.note for matrix in found}
    for score in ("FID", "KID", "CLIP score"):
        assert "compare with CFG and along a row, not between models" in notes[score]
    assert not any("column" in note for note in notes.values())


def test_a_model_of_a_scale_of_its_own_is_named_with_it(evaluations: Any) -> None:
    assert "images of each setting · guidance scale 3 · " in page.render(report(evaluations), [])
    cells = tuple(dataclasses.replace(c, guidance_scale=7.5) for c in evaluations["tuned"].cells)
    own = dataclasses.replace(evaluations["tuned"], guidance_scale=7.5, cells=cells, num_images=64)
    html = page.render(report({"base": evaluations["base"], "tuned": own}), [])
    assert "192 (base), 64 (tuned) images of each setting" in html
    assert "guidance scale 3 (base), 7.5 (tuned) · " in html


def test_a_share_that_was_not_measured_says_why() -> None:
    whole = evaluation()
    picture = {"picture": whole.negative["picture"]}
    blind = [dataclasses.replace(cell, scores={"fid": cell.scores["fid"]}) for cell in whole.cells]
    found = shares(
        {
            "whole": whole,
            "noise": dataclasses.replace(whole, negative=picture),
            "blind": dataclasses.replace(whole, negative=picture, cells=tuple(blind)),
            "none": dataclasses.replace(whole, negative={}),
        }
    )[NEGATIVE["avoided"]]
    assert found["whole"].text == "70 %"
    assert "inside its interval" in found["noise"].below
    assert (found["blind"].below, found["none"].below) == (
        "the judge reads no text",
        "not measured",
    )


def test_where_times_were_taken_is_told_and_an_evaluation_that_does_not_say_it_is_read(
    tmp_path: Path,
) -> None:
    old = evaluation()
    new = dataclasses.replace(old, machine={"device": "A Fast One", "torch": "2.9.0"})
    assert costs({"old": old, "new": new})[-1] == (
        "times were taken on",
        {"new": "A Fast One, torch 2.9.0"},
    )
    new.save(tmp_path)
    assert Evaluation.load(tmp_path).timed_on == new.timed_on
    written = read_json(tmp_path / "evaluation.json")
    del written["machine"]
    write_json(tmp_path / "evaluation.json", written)
    assert Evaluation.load(tmp_path).timed_on == ""


def test_whose_prompts_guidance_fvu_is_of_is_told_where_it_is_known() -> None:
    old = evaluation(guidance_fvu=0.5)
    heldout = dataclasses.replace(old, fvu_prompts={"heldout": 21, "trained": 0})
    trained = dataclasses.replace(
        evaluation(guidance_fvu=0.6), fvu_prompts={"heldout": 0, "trained": 3}
    )
    of = {"old": old, "heldout": heldout, "trained": trained}
    below = {
        model: entry.below.partition("; ")[2]
        for model, entry in shares(of)["guidance left unexplained"].items()
    }
    said = "prompts that the guide was trained on: 3 of 3"
    assert below == {"old": "", "heldout": "held-out prompts: 21", "trained": said}
    assert headlines(of)[-1].where == f"at worst, on trained, along {said}"


def test_curves_over_scales_are_drawn_where_there_are_scales(evaluations: Any) -> None:
    title = "FID against CLIP score over guidance scales, 16 steps"
    assert title not in page.render(report(evaluations), [])
    base = evaluations["base"]
    cells = [dataclasses.replace(c, guidance_scale=5.0) for c in base.cells if c.num_steps == 16]
    more = {"base": dataclasses.replace(base, cells=(*base.cells, *cells))}
    assert title in page.render(report(more), [])


def test_the_same_results_give_the_same_bytes(evaluations: Any, shown: Any) -> None:
    first, second = (page.render(report(evaluations), shown[0]) for _ in range(2))
    assert first == second


def test_ids_are_those_of_one_element(evaluations: Any, shown: Any) -> None:
    from html.parser import HTMLParser

    found: list[str] = []

    class Ids(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.extend(value or "" for name, value in attrs if name == "id")

    Ids().feed(page.render(report(evaluations), shown[0]))
    assert len(found) == len(set(found)) > 20


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.00"), (0.0532, "0.0532"), (41.8, "41.8"), (0.931, "0.931"), (1234.5, "1234")],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


# Which pictures


def test_the_worst_pictures_are_the_worst_of_all_that_were_sampled(shown: Any) -> None:
    guided, cfg = (Setting(method, 16, "ddim", 3.0) for method in ("guided", "cfg"))
    errors = [
        np.square(image_of(guided, seed) - image_of(cfg, seed).astype(float)).mean()
        for seed in range(NUM_TASKS)
    ]
    worst = np.argsort(errors)[-gallery.NUM_WORST :]
    pictures = shown[0][0].pictures
    assert {p.task.seed for p in pictures} >= {*worst, *range(gallery.NUM_FIRST)}
    for picture in pictures:
        expected = 10 * np.log10(255**2 / errors[picture.task.seed])
        assert picture.psnr == pytest.approx(expected)


def test_cfg_at_equal_cost_is_cfg_at_half_the_steps_by_its_better_solver(shown: Any) -> None:
    (one,) = (one for one in shown[0] if (one.model, one.num_steps) == ("base", 16))
    assert one.ways["cfg_equal_cost"] == "CFG at equal cost (8 steps, DPM++ 2M)"
    picture = one.pictures[3]
    image = image_of(Setting("cfg", 8, "dpmsolver++", 3.0), picture.task.seed)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    assert picture.images["cfg_equal_cost"] == gallery.small(file.getvalue())


def test_cfg_is_at_equal_cost_only_where_it_takes_as_many_forwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of an encoder guide costs 1.34 forwards: 16 cost 21.4, 5 cost 6.7."""
    monkeypatch.chdir(tmp_path)
    three = [Setting(m, n, "ddim", 3.0) for m in ("unguided", "cfg", "guided") for n in (16, 5)]
    half, nearest = (
        [Setting("cfg", n, "dpmsolver++", 3.0) for n in counts] for counts in ((8, 2), (11, 3))
    )
    dear = evaluation("dear", num_steps=(16, 5), flops_ratio=0.67)
    found = {}
    for model, more in (("old", half), ("new", nearest)):
        write_images(model, [*three, *more])
        sets, _ = gallery.gather({model: dataclasses.replace(dear, model=model)})
        found[model] = [one.ways.get("cfg_equal_cost") for one in sets]
    assert found["old"] == [None, None], "half the steps are cheaper"
    assert found["new"] == [
        "CFG at equal cost (11 steps, DPM++ 2M)",
        "CFG at nearest cost (3 steps, DPM++ 2M: 6 forwards, guided 6.7)",
    ]


def num_bytes(one: gallery.PictureSet) -> int:
    return sum(len(image) for picture in one.pictures for image in picture.images.values())


def test_pictures_fit_their_budget(results: Path, evaluations: Any, shown: Any) -> None:
    limit = sum(map(num_bytes, shown[0])) // 3
    fewer, kept = gallery.gather(evaluations, most_bytes=limit)
    assert sum(map(num_bytes, fewer)) <= limit * 1.05
    assert all(len(one.pictures) >= 2 for one in fewer)
    assert kept == shown[1], "what is kept for the next guide is all"
    worst = min(shown[0][0].pictures, key=lambda picture: picture.psnr)
    assert worst in fewer[0].pictures


def test_a_sheet_is_of_the_same_tasks_for_every_guide_whatever_the_page_has_room_for(
    results: Path, evaluations: Any, shown: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[list[str]] = []
    monkeypatch.setattr(gallery, "grid", lambda _, columns, **__: prompts.append(columns))
    tasks = Gallery.open("base").tasks[: gallery.NUM_COLUMNS]
    for sets in (shown[0], gallery.gather(evaluations, most_bytes=20_000)[0]):
        for one in sets:
            gallery.sheet(one)
            assert prompts.pop() == [task.prompt for task in tasks]


def test_with_very_many_models_and_steps_pictures_still_fit_their_budget(
    results: Path, evaluations: Any, shown: Any
) -> None:
    two = [2 * num_bytes(one) / len(one.pictures) for one in shown[0]]
    limit = int(1.1 * (two[0] + two[2]))  # two pictures of each model at its first number of steps
    fewer = gallery.gather(evaluations, most_bytes=limit)[0]
    assert sum(map(num_bytes, fewer)) <= limit
    numbers = {(one.model, one.num_steps): len(one.pictures) for one in fewer}
    assert numbers == {("base", 16): 2, ("base", 8): 0, ("tuned", 16): 2, ("tuned", 8): 0}
    assert "tuned" in page.render(report(evaluations), fewer)


def test_as_sampled_only_a_batch_of_images_is_held_at_a_time(
    results: Path, evaluations: Any, shown: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, read = [], Gallery.files

    def files(self: Gallery, setting: Setting, tasks: Any = None) -> list[bytes]:
        found = read(self, setting, tasks)
        asked.append(len(found))
        return found

    monkeypatch.setattr(Gallery, "files", files)
    monkeypatch.setattr(gallery, "IMAGES_AT_ONCE", 7)
    for first, worst in ((16, 16), (3, 2)):
        monkeypatch.setattr(gallery, "NUM_FIRST", first)
        monkeypatch.setattr(gallery, "NUM_WORST", worst)
        asked.clear()
        sets, kept = gallery.gather(evaluations)
        assert max(asked) == max(7, first + worst) < NUM_TASKS
        assert kept == shown[1], "whatever the batch"
    assert {len(one.pictures) for one in sets} == {5}


def test_large_images_are_made_small() -> None:
    file = io.BytesIO()
    Image.new("RGB", (768, 512)).save(file, "PNG")
    with Image.open(io.BytesIO(gallery.small(file.getvalue()))) as picture:
        assert (picture.format, picture.size) == ("WEBP", (256, 171))


def test_the_champions_pictures_are_those_of_the_same_task(
    tmp_path: Path, results: Path, evaluations: Any, shown: Any
) -> None:
    shown[1].save(tmp_path / gallery.FILE)
    champion = gallery.GuidedPictures.load(tmp_path / gallery.FILE)
    assert champion == shown[1] and len(champion.images) == 2 * 2 * NUM_TASKS
    sets, _ = gallery.gather(evaluations, champion=champion)
    for one in sets:
        assert list(one.ways)[-1] == "champion"
        assert all(p.images["champion"] == p.images["guided"] for p in one.pictures)


def test_a_file_that_holds_no_pictures_is_named(tmp_path: Path) -> None:
    path = tmp_path / gallery.FILE
    path.write_text("no parquet")
    with pytest.raises(ValueError, match="pictures.parquet has no pictures of a report"):
        gallery.GuidedPictures.load(path)


def test_an_image_that_is_not_whole_any_more_is_told_with_what_makes_it_again(
    tmp_path: Path,
    evaluations: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_images("base")
    for file in Path("results/sampled/base").rglob("*.parquet"):
        file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"lacks 40 of .* components\.evaluate --model base"):
        gallery.gather({"base": evaluations["base"]})
    assert "is deleted: `evaluate` makes its images anew" in capsys.readouterr().out


# In a browser


@pytest.fixture(scope="module")
def tab() -> Iterator[chromium.Page]:
    program = chromium.find()
    assert program
    with chromium.browser(program) as tab:
        yield tab


@pytest.fixture(scope="module")
def file(
    tmp_path_factory: pytest.TempPathFactory, results: Path, evaluations: Any, shown: Any
) -> Path:
    path = tmp_path_factory.mktemp("page") / "index.html"
    sets, _ = gallery.gather(evaluations, champion=shown[1])
    page.write(path, report(evaluations), sets)
    return path


@pytest.fixture
def opened(tab: chromium.Page, file: Path) -> chromium.Page:
    tab.resize(1200).open(file.as_uri())
    return tab


def images_shown(tab: chromium.Page) -> list[str]:
    """The first picture of each card."""
    return list(
        tab.tell("[...document.querySelectorAll('.picture')].map(b => b.querySelector('img').src)")
    )


def expected(shown: Any, way: str) -> list[str]:
    pictures = shown[0][0].pictures
    return ["data:image/webp;base64," + base64.b64encode(p.images[way]).decode() for p in pictures]


@has_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_has_no_error_asks_for_nothing_and_is_as_wide_as_the_screen(
    tab: chromium.Page, file: Path, width: int, dark: bool
) -> None:
    tab.resize(width, dark=dark).open(file.as_uri())
    for key in "12345sSh":
        tab.press(key)
    assert tab.errors == [] and tab.requests == []
    assert tab.tell("document.documentElement.scrollWidth") == width
    background = tab.tell("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(20, 22, 26)") == dark


@has_browser
def test_nothing_can_be_asked_for(opened: chromium.Page) -> None:
    ask = "fetch('http://127.0.0.1:9/').then(() => 'asked', () => 'refused')"
    assert opened.tell(ask) == "refused"
    opened.wait("true")
    assert any("Content Security Policy" in error for error in opened.errors)


@has_browser
def test_keys_flip_all_pictures(opened: chromium.Page, shown: Any) -> None:
    assert images_shown(opened) == expected(shown, "guided")
    opened.press("2")
    assert images_shown(opened) == expected(shown, "cfg")
    opened.press("ArrowLeft")
    assert images_shown(opened) == expected(shown, "unguided")
    opened.press("ArrowLeft")
    assert images_shown(opened) == expected(shown, "guided"), "the champion's, which are the same"
    assert opened.tell("document.querySelector('#ways input:checked').value") == "champion"


@has_browser
def test_a_click_flips_one_picture_and_back(opened: chromium.Page, shown: Any) -> None:
    guided, cfg = expected(shown, "guided"), expected(shown, "cfg")
    opened.click("figure:nth-child(2) .picture")
    assert images_shown(opened) == [guided[0], cfg[1], *guided[2:]]
    opened.click("figure:nth-child(2) .picture")
    assert images_shown(opened) == guided


@has_browser
def test_a_click_on_a_way_flips_all(opened: chromium.Page, shown: Any) -> None:
    opened.click("#ways label:nth-of-type(3)")
    assert images_shown(opened) == expected(shown, "cfg_equal_cost")


@has_browser
def test_a_picture_flips_from_the_keyboard(opened: chromium.Page, shown: Any) -> None:
    opened.tell("document.querySelector('.picture').focus()")
    opened.press(" ")
    assert images_shown(opened)[0] == expected(shown, "cfg")[0]


@has_browser
def test_two_ways_slide_over_one_another(opened: chromium.Page, shown: Any) -> None:
    opened.press("s")
    both = opened.tell("[...document.querySelectorAll('.picture')[0].children].map(c => c.src)")
    assert both[:2] == [expected(shown, "cfg")[0], expected(shown, "guided")[0]]
    cut = "document.querySelector('#gallery').style.getPropertyValue('--cut')"
    opened.click(".picture", at=0.25)
    assert opened.tell(cut) == "25%"
    opened.tell("document.querySelector('#cut').focus()")
    opened.press("ArrowRight")
    assert opened.tell(cut) == "26%"


@has_browser
def test_heldout_prompts_alone_and_the_worst_first(opened: chromium.Page, shown: Any) -> None:
    pictures = shown[0][0].pictures
    opened.press("h")
    opened.tell(
        "(() => { const o = document.querySelector('#order'); o.value = 'worst';"
        " o.dispatchEvent(new Event('change')) })()"
    )
    wanted = [p for p in sorted(pictures, key=lambda p: round(p.psnr, 1)) if p.task.is_heldout]
    names = opened.tell("[...document.querySelectorAll('#gallery b')].map(b => b.textContent)")
    assert names == [p.task.prompt for p in wanted] and NASTY in names


@has_browser
def test_another_model_and_step_count_has_its_own_pictures(
    opened: chromium.Page, shown: Any
) -> None:
    choose: Callable[[str, str], Any] = lambda name, value: opened.tell(  # noqa: E731
        f"(() => {{ const s = document.querySelector('{name}'); s.value = '{value}';"
        " s.dispatchEvent(new Event('change')) })()"
    )
    choose("#model", "tuned")
    choose("#steps", "8")
    assert images_shown(opened) == expected([[shown[0][3]]], "guided")
    assert (shown[0][3].model, shown[0][3].num_steps) == ("tuned", 8)


@has_browser
def test_every_control_has_a_name_and_can_be_reached(opened: chromium.Page) -> None:
    nameless = opened.tell(
        "[...document.querySelectorAll('button, input, select, a, [role=region], [role=img]')]"
        ".filter(e => !(e.ariaLabel || e.textContent.trim() || e.labels?.[0]?.textContent.trim()))"
        ".map(e => e.outerHTML.slice(0, 80))"
    )
    assert nameless == []
    levels = opened.tell("[...document.querySelectorAll('h1, h2')].map(h => h.tagName)")
    assert levels == ["H1"] + ["H2"] * 7
    opened.press("Tab")
    assert opened.tell("document.activeElement.className") == "skip"


@has_browser
def test_without_a_script_the_numbers_are_all_there(tab: chromium.Page, file: Path) -> None:
    tab.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        tab.resize(1200).open(file.as_uri())
        hidden = "[...document.querySelectorAll('.panel')].filter(p => !p.offsetHeight).length"
        assert tab.tell(hidden) == 0
        assert tab.tell("getComputedStyle(document.querySelector('#toolbar')).display") == "none"
    finally:
        tab.call("Emulation.setScriptExecutionDisabled", value=False)
