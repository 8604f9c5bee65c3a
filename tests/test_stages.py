"""Each stage in this process at toy size: what it writes, what it refuses, how it resumes."""

import errno
import json
import os
import re
import shutil
import socket
import tracemalloc
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from PIL import Image

from components import cache, distill, evaluate, halve, prepare, promote, register, tracking
from components.cli import main
from components.environment import quiet
from components.evaluation import Evaluation
from components.fitting import Record, fit
from components.images import Gallery, Setting
from components.inputs import check_judge
from components.judging import INCEPTION, Judge
from components.params import Params, ParamsError, load_params
from components.progress import Progress, clock
from components.sampling import Sampler, choose_tasks, processor
from components.scores import fid, kid
from components.storage import Mirror
from components.training import share_of_work
from pnp_core.files import read_json, write_bytes, write_json
from tests import toy
from tests.cases import few_of

pytest_plugins = ["tests.toy"]
quiet()


def params_with(**sections: Mapping[str, Any]) -> Params:
    """The toy's parameters with some keys of some sections changed, as params.yaml here."""
    values = toy.toy_params()
    for name, section in sections.items():
        if isinstance(section, Mapping):
            values[name] |= section
        else:
            values[name] = section
    toy.write_params(Path(), values)
    return load_params(Path("params.yaml"))


# prepare


def test_prepare_keeps_the_split_and_the_bytes(world: Path) -> None:
    prepare.run(params_with())
    train = pq.read_table("data/prepared/train.parquet").to_pylist()
    heldout = pq.read_table("data/prepared/heldout.parquet").to_pylist()
    source = pq.read_table("art/main.parquet").to_pylist()
    assert [row["prompt"] for row in heldout] == toy.PROMPTS[::6]
    assert train[0]["image"]["bytes"] == source[1]["image"]["bytes"]
    manifest = read_json(Path("data/prepared/manifest.json"))
    assert manifest["num_images"] == {"train": 20, "heldout": 4}
    prepare.run(params_with())
    assert read_json(Path("data/prepared/manifest.json")) == manifest


def test_prepare_reads_an_image_folder_and_splits_by_prompt(world: Path) -> None:
    folder = Path("pictures")
    folder.mkdir()
    lines = []
    for number in range(40):
        Image.new("RGBA", (50, 40), (255, 0, 0, 0)).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"thing {number // 2}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    section = {"dataset": "pictures", "files": [], "caption_column": "text"}
    prepare.run(params_with(prepare={**section, "heldout_fraction": 0.3}))
    splits = {}
    for split in ("train", "heldout"):
        rows = pq.read_table(f"data/prepared/{split}.parquet").to_pylist()
        splits[split] = {row["prompt"] for row in rows}
    assert splits["train"].isdisjoint(splits["heldout"])
    image, as_is = fit(Record(rows[0]["image"]["bytes"], "", None, ""), toy.RESOLUTION)
    assert as_is and np.asarray(image).min() == 255  # transparency became white


def test_prepare_keeps_further_prompts_that_no_image_has(world: Path) -> None:
    own, heldout = toy.PROMPTS[1], toy.PROMPTS[0]
    Path("prompts.txt").write_text(f"two rings\n\n{own}\n  two rings \n{heldout}\na bar\n")
    prepare.run(params_with())
    assert Path("data/prepared/prompts.txt").read_text() == "two rings\na bar\n"
    before = read_json(Path("data/prepared/manifest.json"))
    Path("prompts.txt").write_text("two rings\n")
    prepare.run(params_with())
    after = read_json(Path("data/prepared/manifest.json"))
    assert (before["num_prompts"]["further"], after["num_prompts"]["further"]) == (2, 1)
    assert before["hash"] != after["hash"]


def test_a_held_out_prompt_is_no_further_one_whatever_editor_wrote_the_file(world: Path) -> None:
    heldout, trained = toy.PROMPTS[0], toy.PROMPTS[1]
    rows = pq.read_table("art/main.parquet").to_pylist()
    rows[0]["caption"] = f"{heldout} "
    pq.write_table(pa.Table.from_pylist(rows), "art/main.parquet")
    lines = "\r\n".join([trained, heldout, "a bar\u2028in two lines", ""])
    Path("prompts.txt").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    params = params_with()
    prepare.run(params)
    assert read_json(Path("data/prepared/manifest.json"))["num_prompts"]["further"] == 1
    prompts = pq.read_table("data/prepared/heldout.parquet")["prompt"].to_pylist()
    assert prompts == toy.PROMPTS[::6]
    assert cache.cache_builder(params).prompts[-1] == "a bar\u2028in two lines"


def write_captions(captions: list[Any]) -> None:
    """Give the rows of art/main.parquet other captions."""
    table = pq.read_table("art/main.parquet")
    captions = [captions[number % len(captions)] for number in range(len(table))]
    pq.write_table(table.set_column(1, "caption", pa.array(captions)), "art/main.parquet")


@pytest.mark.parametrize("caption", [3, ["red", "square"], b"red square"], ids=["int", "list", "b"])
def test_a_caption_that_is_no_text_is_refused_by_its_row(world: Path, caption: Any) -> None:
    write_captions([caption])
    with pytest.raises(ValueError) as caught:
        prepare.run(params_with())
    row = f"art/main.parquet, row 0: the caption is no text: {caption!r} ({type(caption).__name__})"
    assert f"24 of 24 images can't be used: {row}; " in str(caught.value)


@pytest.mark.parametrize(
    ("says", "parts"),
    [
        (["train", "heldout"], {"train": 12, "heldout": 12}),
        (["train", "validation", "test"], {"train": 8, "heldout": 16}),
        (["train", "val", "dev"], {"train": 8, "heldout": 16}),
        (["train", "Train"], "12 of 24 images can't be used: {where} 1: its split is 'Train'"),
        (
            [0, 1],
            "24 of 24 images can't be used: {where} 0: its split is 0, which is neither train",
        ),
    ],
    ids=["ours", "of Hugging Face", "in short", "another spelling", "numbers"],
)
def test_a_split_is_followed_or_refused_by_what_it_says(
    world: Path, says: list[Any], parts: dict[str, int] | str
) -> None:
    table = pq.read_table("art/main.parquet")
    split = pa.array([says[number % len(says)] for number in range(len(table))])
    pq.write_table(table.set_column(2, "split", split), "art/main.parquet")
    if isinstance(parts, dict):
        prepare.run(params_with())
        assert read_json(Path("data/prepared/manifest.json"))["num_images"] == parts
        return
    with pytest.raises(ValueError) as caught:
        prepare.run(params_with())
    assert parts.format(where="art/main.parquet, row") in str(caught.value)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "with a mark"])
def test_captions_of_an_image_folder_are_whole_lines_whatever_is_in_them(
    world: Path, mark: bytes
) -> None:
    Path("pictures").mkdir()
    Image.new("RGB", (50, 40)).save("pictures/0.png")
    captions = {"train": "a bar\u2028and\u0085a disc", "heldout": "a ring"}
    lines = [
        json.dumps({"file_name": "0.png", "caption": caption, "split": split}, ensure_ascii=False)
        for split, caption in captions.items()
    ]
    Path("pictures/metadata.jsonl").write_bytes(mark + "\r\n".join(lines).encode())
    prepare.run(params_with(prepare={"dataset": "pictures", "files": []}))
    for split, caption in captions.items():
        table = pq.read_table(f"data/prepared/{split}.parquet")
        assert table["prompt"].to_pylist() == [caption]


def test_metadata_in_another_encoding_is_refused_by_its_file(world: Path) -> None:
    Path("pictures").mkdir()
    line = '{"file_name": "0.png", "caption": "caf\xe9"}'
    Path("pictures/metadata.jsonl").write_bytes(line.encode("latin-1"))
    with pytest.raises(ValueError, match=r"pictures/metadata\.jsonl is no text in UTF-8"):
        prepare.run(params_with(prepare={"dataset": "pictures", "files": []}))


def with_trained_captions(num_rows: int) -> list[str]:
    """Give the first held-out rows of art/main.parquet captions of train; the others' captions."""
    rows = pq.read_table("art/main.parquet").to_pylist()
    trained = [row["caption"] for row in rows if row["split"] == "train"]
    heldout = [row for row in rows if row["split"] == "heldout"]
    for row, caption in zip(heldout[:num_rows], trained, strict=False):
        row["caption"] = caption
    pq.write_table(pa.Table.from_pylist(rows), "art/main.parquet")
    return [row["caption"] for row in heldout[num_rows:]]


def test_a_caption_of_both_parts_counts_as_trained(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    still_held_out = with_trained_captions(3)
    trained = pq.read_table("art/main.parquet").to_pylist()[1]["caption"]
    params = params_with(evaluate={"grid_prompts": [trained, still_held_out[0]]})
    prepare.run(params)
    assert "prepare: 3 captions are in both parts, and count as trained" in capsys.readouterr().out
    tasks = choose_tasks(params.evaluate)
    assert [task.is_heldout for task in tasks[:2]] == [False, True]
    assert {task.prompt for task in tasks if task.is_heldout} == set(still_held_out)
    num_heldout = sum(task.is_heldout for task in tasks)
    assert num_heldout == len(tasks) / 2, "in turns, as ever"


def test_data_without_a_prompt_of_its_own_to_hold_out_is_refused(world: Path) -> None:
    prepare.run(params_with())
    assert not with_trained_captions(4)
    with pytest.raises(ValueError, match="every held-out caption of art is also one of train"):
        prepare.run(params_with())
    shutil.copy("data/prepared/train.parquet", "data/prepared/heldout.parquet")
    with pytest.raises(ValueError, match="every prompt of .*heldout.parquet is also in train"):
        choose_tasks(params_with().evaluate)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": {"bytes": b"no image", "path": None}}, "row 1: not a readable image"),
        ({"image": None}, "row 1: column 'image' holds no encoded image"),
        ({"image": toy.encoded(np.zeros((9, 64, 3), np.uint8))}, "row 1: 64x9 pixels, fewer"),
        ({"caption": " "}, "row 1: the caption is empty"),
    ],
)
def test_prepare_names_a_bad_row(world: Path, row: Mapping[str, Any], message: str) -> None:
    rows = pq.read_table("art/main.parquet").to_pylist()
    rows[1] |= row
    pq.write_table(pa.Table.from_pylist(rows), "art/main.parquet")
    with pytest.raises(ValueError, match=re.escape(f"art/main.parquet, {message}")):
        prepare.run(params_with())
    assert not Path("data/prepared").exists()


def test_prepare_names_the_first_bad_rows_and_counts_all_before_it_decodes_any(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = pq.read_table("art/main.parquet").to_pylist()
    small = toy.encoded(np.zeros((9, 64, 3), np.uint8))
    for number, row in enumerate(rows[1:21]):
        row |= ({"caption": " "}, {"image": None}, {"image": small})[number % 3]
    pq.write_table(pa.Table.from_pylist(rows), "art/main.parquet")
    monkeypatch.setattr(prepare, "prepared", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ValueError) as caught:
        prepare.run(params_with())
    first, *others, last = str(caught.value).split("; ")
    start = "prepare.dataset: 20 of 24 images can't be used: "
    assert first == f"{start}art/main.parquet, row 1: the caption is empty"
    assert "row 2: column 'image' holds no encoded image" in others[0]
    assert others[1].startswith("art/main.parquet, row 3: 64x9 pixels, fewer")
    assert [int(re.findall(r"row (\d+)", each)[0]) for each in others] == list(range(2, 11))
    assert last == "and 10 more"


@pytest.mark.parametrize(
    ("num_bad", "message"),
    [
        (1, "prepare.dataset: art/main.parquet, row 1: not a readable image"),
        (3, "prepare.dataset: 3 of 24 images can't be used: art/main.parquet, row 1: not a "),
        (20, "prepare.dataset: 10 of the first 11 images can't be used: art/main.parquet, row 1: "),
    ],
)
def test_prepare_names_the_first_images_that_can_not_be_decoded(
    world: Path, num_bad: int, message: str
) -> None:
    rows = pq.read_table("art/main.parquet").to_pylist()
    for row in rows[1 : num_bad + 1]:
        row["image"] |= {"bytes": row["image"]["bytes"][:-50]}
    pq.write_table(pa.Table.from_pylist(rows), "art/main.parquet")
    with pytest.raises(ValueError) as caught:
        prepare.run(params_with())
    assert str(caught.value).startswith(message)
    named = [int(number) for number in re.findall(r"row (\d+)", str(caught.value))]
    assert named == list(range(1, min(num_bad, prepare.NUM_TOLD) + 1))
    assert not Path("data/prepared").exists()


def test_prepare_names_every_bad_line_of_an_image_folder(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "NUM_TOLD", 100)
    Path("pictures").mkdir()
    Image.new("RGB", (50, 40)).save("pictures/0.png")
    lines = ['{"file_name": "0.png", "caption": "thing"}', "{", '{"file_name": "1.png"}']
    lines += ['{"file_name": "0.png"}', '{"file_name": "0.png", "caption": null}']
    lines += ['{"file_name": "0.png", "caption": ["red", "square"]}']
    lines += ['{"file_name": "0.png", "caption": "cat \\ud83d"}']
    lines += [
        f'{{"file_name": {name}, "caption": "cat"}}' for name in ('""', "3", '"."', '"\\ud83d"')
    ]
    lines += ["[" * 100_000, f'{{"caption": {"9" * 5000}}}', "[]"]
    Path("pictures/metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError) as caught:
        prepare.run(params_with(prepare={"dataset": "pictures", "files": []}))
    assert str(caught.value).split(": ", 2)[2].split("; ") == [
        "pictures/metadata.jsonl, line 2: not JSON",
        "pictures/metadata.jsonl, line 3: there is no file pictures/1.png",
        "pictures/metadata.jsonl, line 4: no 'caption'",
        "pictures/metadata.jsonl, line 5: the caption is empty",
        "pictures/metadata.jsonl, line 6: the caption is no text: ['red', 'square'] (list)",
        "pictures/metadata.jsonl, line 7: the caption has '\\ud83d', which is half of a character: "
        "write the whole one, or leave it out",
        "pictures/metadata.jsonl, line 8: file_name is '': write the name of an image there",
        "pictures/metadata.jsonl, line 9: file_name is 3: write the name of an image there",
        "pictures/metadata.jsonl, line 10: there is no file pictures",
        "pictures/metadata.jsonl, line 11: there is no file pictures/\ud83d",
        "pictures/metadata.jsonl, line 12: JSON that is nested too deep",
        "pictures/metadata.jsonl, line 13: JSON with a number of too many digits",
        "pictures/metadata.jsonl, line 14: no object with file_name and caption",
    ]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"image_column": "picture"}, "no column 'picture', it has image, caption, split"),
        ({"dataset": "models", "files": []}, "neither parquet files nor a metadata.jsonl"),
        ({"dataset": "params.yaml", "files": []}, "not a parquet file"),
        ({"prompts": "art"}, "prepare.prompts: art is a folder, not a text file"),
        ({"prompts": "art/main.parquet"}, "prepare.prompts: art/main.parquet is no text in UTF-8"),
    ],
)
def test_prepare_refuses(world: Path, section: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        prepare.run(params_with(prepare=section))


def test_prepare_holds_few_of_the_images_and_writes_small_row_groups(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = pq.read_table("art/main.parquet")
    pq.write_table(pa.concat_tables([source] * 10), "art/main.parquet")
    size = 200_000
    monkeypatch.setattr(prepare, "prepared", lambda record, resolution: os.urandom(size))
    monkeypatch.setattr(prepare, "ROWS_IN_A_GROUP", 8)
    tracemalloc.start()
    prepare.run(params_with())
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 24 * size  # of 240: a group of each split, and one that is written
    about = pq.read_metadata("data/prepared/train.parquet")
    sizes = [about.row_group(number).num_rows for number in range(about.num_row_groups)]
    assert sizes == [8] * 25


def test_prepare_refuses_an_empty_dataset(world: Path) -> None:
    pq.write_table(pq.read_table("art/main.parquet").slice(0, 0), "art/main.parquet")
    with pytest.raises(ValueError, match="has no train images, and 0 in all"):
        prepare.run(params_with())


def test_a_failed_run_leaves_the_last_result(world: Path) -> None:
    prepare.run(params_with())
    before = read_json(Path("data/prepared/manifest.json"))
    with pytest.raises(ValueError):
        prepare.run(params_with(prepare={"resolution": 64}))
    assert read_json(Path("data/prepared/manifest.json")) == before
    assert [path.name for path in Path("data").iterdir()] == ["prepared"]


# cache, distill, halve


def test_cache_refuses_images_of_another_size_than_the_bases(world: Path) -> None:
    prepare.run(params_with(prepare={"resolution": 24}))
    with pytest.raises(ValueError, match=r"prepare.resolution: 24 pixels, but .* images of 32,"):
        cache.run(params_with())
    assert not list(Path("data").glob("cache/*"))


def test_a_guide_that_can_not_be_as_small_as_it_must_is_refused_before_the_cache_is_made(
    world: Path,
) -> None:
    prepare.run(params_with())
    small = {**toy.toy_params()["distill"]["guide"], "max_parameters_ratio": 1e-4}
    key = "params.yaml: distill.guide.max_parameters_ratio is 0.0001, and the smallest tiny guide"
    with pytest.raises(ParamsError, match=key):
        cache.run(params_with(distill={"guide": small}))
    assert not list(Path("data").glob("cache/*"))


def test_cache_builds_only_what_is_missing(world: Path) -> None:
    params = params_with()
    prepare.run(params)
    cache.run(params)
    shards = {path: path.stat().st_mtime_ns for path in Path("data/cache").iterdir()}
    lost = Path("data/cache/pairs-forward-00001.safetensors")
    content = lost.read_bytes()
    lost.unlink()
    Path("data/cache/pairs-forward-00099.safetensors").touch()  # of an earlier, larger cache
    Path("data/cache/.pairs-forward-00001.safetensors.123").write_bytes(b"half")  # of a killed run
    cache.run(params)
    after = {path: path.stat().st_mtime_ns for path in Path("data/cache").iterdir()}
    assert {path for path in after if after[path] != shards.get(path)} == {
        lost,
        Path("data/cache/index.json"),
    }
    assert lost.read_bytes() == content
    assert after.keys() == shards.keys()


def test_of_a_cache_by_another_version_of_the_code_it_is_told_that_it_is_made_anew(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    params = params_with()
    prepare.run(params)
    cache.run(params)
    version = read_json(Path("data/cache/index.json"))["version"]
    monkeypatch.setattr("pnp_core.cache.identity.VERSION", version + 1)
    monkeypatch.setattr("pnp_core.cache.build.VERSION", version + 1)
    capsys.readouterr()
    cache.run(params)
    told = f"cache: data/cache was made by version {version} of the code that fills it, not"
    said = capsys.readouterr().out
    assert told in said and "; 0 shards are there" in said
    cache.run(params)
    said = capsys.readouterr().out
    assert told not in said and "; 7 shards are there" in said


def test_a_smaller_batch_size_leaves_a_cache_as_it_is(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the message of a GPU that is too small proposes keeps what was computed, and DVC too."""
    prepare.run(params_with())
    cache.run(params_with())
    files = {path.name: path.read_bytes() for path in Path("data/cache").iterdir()}
    params = params_with(cache={"batch_size": 8})
    capsys.readouterr()
    cache.run(params)
    assert "; 7 shards are there" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in Path("data/cache").iterdir()} == files
    distill.run(params)


def test_with_storage_shards_are_kept_there_alone_and_never_built_twice(
    world: Path, s3: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pnp_core.cache import CacheBuilder

    params = params_with(storage=s3)
    prepare.run(params)
    cache.run(params)
    index = Path("data/cache/index.json")
    assert list(Path("data/cache").iterdir()) == [index]
    written = index.read_bytes()

    index.unlink()  # another machine
    monkeypatch.setattr(CacheBuilder, "build", None)  # there is nothing to build
    monkeypatch.setattr(CacheBuilder, "finish", None)
    cache.run(params)
    assert index.read_bytes() == written
    assert "; 7 shards are there" in capsys.readouterr().out


def test_an_interrupted_cache_goes_on_from_what_is_at_storage(
    world: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pnp_core.cache import CacheBuilder

    params = params_with(storage=s3)
    prepare.run(params)
    build, built = CacheBuilder.build, []

    def dies_after_four(builder: CacheBuilder, name: str) -> None:
        if len(built) == 4:
            raise KeyboardInterrupt
        build(builder, name)
        built.append(name)

    monkeypatch.setattr(CacheBuilder, "build", dies_after_four)
    with pytest.raises(KeyboardInterrupt):
        cache.run(params)
    shutil.rmtree("data/cache")  # another machine goes on
    monkeypatch.setattr(CacheBuilder, "build", lambda b, n: (build(b, n), built.append(n)))
    cache.run(params)
    assert len(built) == len(set(built)) == 7

    cache.run(params_with(storage=None))
    alone = read_json(Path("data/cache/index.json"))
    shutil.rmtree("data/cache")
    cache.run(params_with(storage=s3))
    resumed = read_json(Path("data/cache/index.json"))
    assert resumed["files"] == alone["files"] and resumed["storage"].startswith(s3)


def test_training_from_storage_gives_the_guide_that_training_from_disk_does(
    world: Path, s3: str
) -> None:
    guides = []
    for storage in (None, s3):
        params = params_with(storage=storage)
        prepare.run(params)
        cache.run(params)
        distill.run(params)
        guides.append(weights("guides/distilled"))
        shutil.rmtree("runs")
    assert list(Path("data/cache").iterdir()) == [Path("data/cache/index.json")]
    assert all(torch.equal(guides[0][name], guides[1][name]) for name in guides[0])


def test_the_size_of_a_cache_is_told_before_the_first_shard_is_built(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pnp_core.cache import CacheBuilder

    params = params_with(cache={"num_forward": 4000})
    prepare.run(params)
    monkeypatch.setattr(CacheBuilder, "build", None)
    with pytest.raises(TypeError):
        cache.run(params)
    # a pair: three latents of 4 x 4 x 4 in half precision and three 64-bit numbers
    expected = (4000 + 16) * (3 * 4 * 4 * 4 * 2 + 3 * 8) + 20 * (2 * 128 + 8) + 21 * 16 * 32 * 2
    assert f"4,016 teacher pairs, {expected / 1e6:.0f} MB in" in capsys.readouterr().out


def test_cache_refuses_a_disk_that_cannot_hold_it(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = params_with()
    prepare.run(params)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(ValueError, match="0 MB left: lower cache.num_forward"):
        cache.run(params)
    assert not list(Path("data/cache").iterdir())


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_gpu_is_left_to_ray_workers_that_build_the_cache(
    world: Path, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = params_with(cluster={"num_workers": num_workers})
    prepare.run(params)
    where: set[str] = set()

    def build(_: Params, builder: Any, *__: Any) -> None:
        networks = [*builder.teachers, builder.pipe.vae, builder.pipe.text_encoder]
        where.update(x.device.type for network in networks for x in network.parameters())

    monkeypatch.setattr("components.device.device", lambda: torch.device("meta"))
    monkeypatch.setattr(cache, "build_missing", build)
    with pytest.raises(ValueError, match="lacks text"):
        cache.run(params)
    assert where == {"cpu" if num_workers else "meta"}


def test_distill_resumes_in_the_same_mlflow_run(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = params_with()
    prepare.run(params)
    cache.run(params)
    work = distill.train_guide

    def dies_late(params: Params, report: Any) -> None:
        def report_then_die(num_images: int, metrics: Mapping[str, float]) -> None:
            report(num_images, metrics)
            if num_images == 48:  # past the checkpoint at 32
                raise KeyboardInterrupt

        work(params, report_then_die)

    monkeypatch.setattr(distill, "train_guide", dies_late)
    with pytest.raises(KeyboardInterrupt):
        distill.run(params)
    assert not Path("guides/distilled").exists()
    monkeypatch.setattr(distill, "train_guide", work)
    distill.run(params_with(distill={"checkpoint_every_images": 16}))  # no other run

    store = tracking.Store(params.tracking)
    client = store.client
    run, whole = client.search_runs([store.experiment("toy")], order_by=["attributes.run_name ASC"])
    assert run.data.tags["mlflow.parentRunId"] == whole.info.run_id
    assert run.info.status == whole.info.status == "FINISHED"
    assert run.data.params["distill.batch_size"] == "16"
    history = client.get_metric_history(run.info.run_id, "distill/loss")
    assert sorted(point.step for point in history) == [16, 32, 48, 64]

    interrupted = weights("guides/distilled")
    Path("runs/distill/checkpoint.pt").unlink()
    distill.run(params)
    whole = weights("guides/distilled")
    assert all(torch.equal(interrupted[name], whole[name]) for name in whole)


def test_distill_refuses_the_cache_of_another_base(world: Path) -> None:
    params = params_with()
    prepare.run(params)
    cache.run(params)
    params = params_with(base="models/other", models={})
    Path("models/base").rename("models/other")
    tuned = Path("models/tuned/unet/diffusion_pytorch_model.safetensors")
    Path("models/other/unet/diffusion_pytorch_model.safetensors").write_bytes(tuned.read_bytes())
    with pytest.raises(ValueError, match="with another UNet than the base's: build"):
        distill.run(params)


def test_training_without_what_a_stage_before_it_makes_names_that_stage(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("components.training.run_training", lambda *_, **__: pytest.fail("began"))
    for stage in (distill, halve):
        with pytest.raises(ValueError, match="no teacher cache in data/cache: run the stage cache"):
            stage.run(params_with())
    prepare.run(params_with())
    cache.run(params_with())
    with pytest.raises(ValueError, match="no guide in guides/distilled: run the stage distill fir"):
        halve.run(params_with())


def weights(folder: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(Path(folder) / "diffusion_pytorch_model.safetensors")


# evaluate, register, promote


@pytest.fixture(scope="module")
def our_world(trained_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained world of these tests' own."""
    folder = tmp_path_factory.mktemp("stages") / "world"
    return Path(shutil.copytree(trained_world, folder))


@pytest.fixture
def inside(our_world: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(our_world)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield our_world
    params_with()


def test_halve_bundles_every_step_count(inside: Path) -> None:
    from pnp_core.bundle import GuideBundle

    assert GuideBundle.load("guides/bundle").num_steps == (2, 4, 8)


def test_images_of_each_matching_are_counted_on_from_those_before(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = params_with(halve={"match_steps": 4})  # 32 samples at 4 steps, 96 at 2
    told: dict[str, Any] = {}
    monkeypatch.setattr(halve, "train_stage", lambda *_, **named: told.update(named))
    halve.run(params)
    assert (told["num_images"], told["num_matched"]) == (2 * 64 + 32 + 96, 32 + 96)

    def match(*args: Any, report: Any, **_: Any) -> None:
        config = args[5]
        for done in (16, config.train.num_images + 16):  # the last batch may go beyond
            report(done, {"num_steps": config.num_steps})

    monkeypatch.setattr("pnp_core.match.match", match)
    seen: list[int] = []
    guides: Any = dict.fromkeys((8, 4, 2))
    nothing: Any = SimpleNamespace(unet=None, scheduler=None)
    halve.match_guides(params, guides, nothing, {}, nothing, lambda done, _: seen.append(done))
    assert seen == [128 + 16, 128 + 32, 160 + 16, 160 + 96]


def test_a_matched_image_counts_as_three_halved_ones_in_the_time_left() -> None:
    shares = [share_of_work(done, 400, 100) for done in (0, 150, 300, 350, 400)]
    assert shares == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert share_of_work(150, 300, 0) == 0.5


def test_halve_that_finds_its_rounds_finished_writes_the_same_bytes(inside: Path) -> None:
    def content() -> dict[Path, bytes]:
        return {p: p.read_bytes() for p in Path("guides/bundle").rglob("*") if p.is_file()}

    before = content()
    halve.run(params_with())
    assert content() == before


def test_evaluate_reports_all_methods_side_by_side(inside: Path) -> None:
    evaluation = Evaluation.load(Path("results/evaluate/tuned"))
    assert evaluation.judges == ("models/judge (CLIP, 16 features)",)
    assert (evaluation.num_images, evaluation.num_steps) == (64, (4, 2))
    for num_steps in (4, 2):
        for method in ("unguided", "cfg", "guided"):
            cell = evaluation.cell(method, num_steps)
            assert cell and cell.scores.keys() >= {"fid", "kid", "clip_score", "diversity"}
        assert evaluation.cell("cfg", num_steps // 2, solver="dpmsolver++")
        assert cell.scores["cfg_psnr"].value > 0
        low, high = cell.scores["fid"].interval
        assert low < cell.scores["fid"].value < high
    assert 0 < evaluation.guidance_fvu.value < 2
    assert evaluation.fvu_by_timestep.keys() == evaluation.fvu_intervals.keys()
    assert 0 < evaluation.cost["flops_ratio"] < 1
    assert evaluation.negative.keys() >= {"picture"}
    gallery = Gallery.open("tuned")
    assert len(gallery.settings) == 2 * 4 and len({task.seed for task in gallery.tasks}) == 64
    assert [task.prompt for task in gallery.tasks[:2]] == ["green bar", "blue ring"]
    assert sum(task.is_heldout for task in gallery.tasks[2:8]) == 3
    assert len(set(gallery.files(Setting("guided", 2, "ddim", 4.0)))) == 64
    with Image.open("results/evaluate/tuned/grid.png") as grid:
        assert grid.width > 2 * 96 and grid.height > 6 * 96


def test_rounding_in_bf16_is_no_part_of_guidance_fvu(
    inside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from components.device import load_base
    from pnp_core.bundle import GuideBundle

    monkeypatch.setattr("pnp_core.precision.has_bf16", lambda device_type: True)

    def unexplained(precision: str) -> float:
        params = params_with(evaluate={"precision": precision})
        pipe, bundle = load_base(params.base), GuideBundle.load("guides/bundle")
        sampler = Sampler(pipe, bundle, params)
        return sampler.guidance_fvu(choose_tasks(params.evaluate))

    assert unexplained("bf16") == unexplained("fp32")


@pytest.mark.parametrize("method", few_of(["unguided", "cfg", "guided"], "guided"))
def test_images_sampled_in_bf16_are_nearly_those_of_fp32(
    inside: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from components.device import load_base
    from pnp_core.bundle import GuideBundle
    from pnp_core.metrics import psnr

    monkeypatch.setattr("pnp_core.precision.has_bf16", lambda device_type: True)

    def images(precision: str) -> np.ndarray:
        params = params_with(evaluate={"precision": precision})
        pipe, bundle = load_base(params.base), GuideBundle.load("guides/bundle")
        sampler = Sampler(pipe, bundle, params)
        return sampler.images(method, choose_tasks(params.evaluate), 4)

    assert psnr(images("bf16"), images("fp32")).mean() > 25


def pictures(model: str) -> list[bytes]:
    gallery = Gallery.open(model)
    return [file for setting in gallery.settings for file in gallery.files(setting)]


def test_evaluate_makes_the_same_images_again(inside: Path) -> None:
    before = pictures("base")
    shutil.rmtree("results/sampled/base")
    evaluate.run(load_params(Path("params.yaml")), "base")
    assert pictures("base") == before


def test_methods_differ_and_models_differ(inside: Path) -> None:
    images = [*pictures("base"), *pictures("tuned")]
    assert len(set(images)) == len(images)


def test_evaluate_names_an_unknown_model(inside: Path) -> None:
    with pytest.raises(ValueError, match="no model 'tined'; its models are base, tuned"):
        evaluate.run(load_params(Path("params.yaml")), "tined")


def test_evaluate_refuses_a_judge_that_is_none(inside: Path) -> None:
    with pytest.raises(ValueError, match=r"evaluate\.judges: models/tuned is not a CLIP"):
        evaluate.run(params_with(evaluate={"judges": ["models/tuned"]}), "base")


def test_register_writes_the_report_and_the_lineage(inside: Path) -> None:
    from pnp_core.bundle import GuideBundle

    table = Path("results/report/table.md").read_text()
    assert "| base " in table and "| tuned " in table and "unguided / CFG / guided" in table
    assert max(map(len, table.splitlines())) <= 100
    summary = read_json(Path("results/report/summary.json"))
    registry = tracking.Registry(load_params(Path("params.yaml")).tracking, "pnp-guide")
    version = summary["registered"]["version"]
    with registry.folder(version) as folder:
        assert GuideBundle.load(folder).num_steps == (2, 4, 8)
        assert read_json(folder / "summary.json")["models"] == summary["models"]
        served = mlflow.models.Model.load(str(folder))
    scale = toy.toy_params()["evaluate"]["guidance_scale"]
    assert served.flavors["python_function"]["config"]["guidance_scale"] == scale
    defaults = {spec.name: spec.default for spec in served.signature.params}
    assert defaults["guidance_scale"] == scale == 4.0
    found = registry.store.client.get_model_version("pnp-guide", version)
    assert found.tags.keys() == {
        "git_commit",
        "lock_hash",
        "num_steps",
        "guidance_scale",
        "pnp.key",
    }
    assert found.tags.items() <= {**summary["lineage"], "pnp.key": found.tags["pnp.key"]}.items()
    assert found.tags["num_steps"] == "2, 4, 8" and found.tags["guidance_scale"] == "1 to 8"
    run = registry.store.client.get_run(found.run_id)
    assert run.data.tags.items() >= summary["lineage"].items()
    assert found.description.startswith("Would be refused:"), "it is of no commit"
    assert f"/runs/{found.run_id}/artifacts/report/index.html?workflowType=" in found.description
    assert len(found.description.splitlines()) <= 14


def test_a_pipelines_run_has_its_version_few_numbers_and_a_child_for_each_model(
    inside: Path,
) -> None:
    registry = tracking.Registry(load_params(Path("params.yaml")).tracking, "pnp-guide")
    client = registry.store.client
    run = client.get_run(client.get_model_version("pnp-guide", "1").run_id)
    assert run.info.run_name == "pnp-guide v1" and run.info.status == "FINISHED"
    assert len(run.data.metrics) <= 13 and len(run.data.params) <= 16
    assert run.inputs.dataset_inputs[0].dataset.source_type == "dvc"
    files = {f.path for f in client.list_artifacts(run.info.run_id)}
    assert files >= {"grid.png", "table.md", "results.json", "checks.json", "params.yaml", "images"}
    page = Path(client.download_artifacts(run.info.run_id, "report/index.html", str(inside)))
    assert "version 1</span>" in page.read_text()
    names = {f.path for f in client.list_artifacts(run.info.run_id, "images")}
    for model in ("base", "tuned"):
        for steps in (0, 4, 2):  # 0: all of them, in one picture
            shown = [n for n in names if n.startswith(f"images/{model}+step+{steps}+")]
            assert len(shown) == 2, "a picture, and a small one of it"
    children = client.search_runs(
        [run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run.info.run_id}'"
    )
    by_name = {child.info.run_name: child for child in children}
    assert {"distill", "halve", "base", "tuned"} <= by_name.keys()
    timed_on = f"{processor()}, torch {torch.__version__}"
    assert run.data.tags["timed_on"] == by_name["tuned"].data.tags["timed_on"] == timed_on
    evaluation = Evaluation.load(Path("results/evaluate/tuned"))
    tuned = by_name["tuned"].info.run_id
    history = client.get_metric_history(tuned, "fid/guided")
    cells = {steps: evaluation.cell("guided", steps) for steps in (2, 4)}
    assert {p.step: p.value for p in history} == pytest.approx(
        {steps: cell.scores["fid"].value for steps, cell in cells.items() if cell}
    )
    rounds = {name for name in by_name["halve"].data.metrics if name.endswith("/loss")}
    assert rounds == {"halve/steps-4/loss", "halve/steps-2/loss", "halve/matched-2/loss"}


@pytest.mark.parametrize("content", [b"", None], ids=["empty", "cut"])
def test_a_picture_of_an_evaluation_that_is_not_whole_is_named_before_anything_is_registered(
    inside: Path, content: bytes | None
) -> None:
    params = load_params(Path("params.yaml"))
    registry = tracking.Registry(params.tracking, "pnp-guide")
    before, as_it_was = registry.versions(), with_another_result(0.432)
    picture = Path("results/evaluate/base/grid.png")
    whole = picture.read_bytes()
    picture.write_bytes(whole[: len(whole) // 2] if content is None else content)
    message = r"^results/evaluate/base/grid.png is not there or not whole \(.*--model base$"
    with pytest.raises(ValueError, match=message):
        register.run(params)
    picture.write_bytes(whole)
    Path("results/evaluate/base/evaluation.json").write_text(as_it_was)
    assert registry.versions() == before


def with_another_result(fvu: float) -> str:
    """Change what base was measured to be; returns what was there."""
    results = Path("results/evaluate/base/evaluation.json")
    as_it_was = results.read_text()
    other = {"guidance_fvu": {"value": fvu, "replicates": []}}
    write_json(results, json.loads(as_it_was) | other)
    return as_it_was


@pytest.mark.services
def test_register_that_was_killed_before_its_report_was_written_registers_once(
    inside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = load_params(Path("params.yaml"))
    registry = tracking.Registry(params.tracking, "pnp-guide")
    register.run(params)  # what other tests evaluated anew since
    before, report = registry.versions(), read_json(Path("results/report/summary.json"))
    as_it_was = with_another_result(0.987)
    with pytest.MonkeyPatch.context() as patch:

        def killed(path: Path, value: Any) -> None:
            if path.name == "summary.json" and "registered" in value:
                raise KeyboardInterrupt
            write_json(path, value)

        patch.setattr(register, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            register.run(params)
    assert "registered" not in read_json(Path("results/report/summary.json"))
    register.run(params)
    version = read_json(Path("results/report/summary.json"))["registered"]["version"]
    assert registry.versions() == [*before, int(version)]
    assert registry.summary(version)["models"]["base"]["guidance_fvu"]["value"] == 0.987

    Path("results/evaluate/base/evaluation.json").write_text(as_it_was)
    register.run(params)
    assert read_json(Path("results/report/summary.json")) == report, "that one is there already"
    registry.store.client.delete_model_version("pnp-guide", version)


def test_a_run_that_broke_off_after_its_version_is_finished_and_the_next_guide_has_its_own(
    inside: Path,
) -> None:
    params = load_params(Path("params.yaml"))
    registry = tracking.Registry(params.tracking, "pnp-guide")
    client, upload = registry.store.client, tracking.Run.file

    def newest() -> tuple[str, str]:
        version = str(registry.newest())
        return version, client.get_model_version("pnp-guide", version).run_id

    def fails(run: tracking.Run, path: Path, folder: str | None = None) -> None:
        if path.name == "index.html" and "not registered yet" not in path.read_text():
            raise tracking.TrackingError("MLflow went away")
        upload(run, path, folder)

    as_it_was = with_another_result(0.765)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracking.Run, "file", fails)
        with pytest.raises(tracking.TrackingError, match="went away"):
            register.run(params)
    first, broken = newest()
    assert client.get_run(broken).info.status == "FAILED"
    with_another_result(0.654)
    register.run(params)  # other data, the same settings
    second, run_of_second = newest()
    assert second != first and run_of_second != broken

    with_another_result(0.765)
    tracking.current_pipeline(params)  # as when stages before it ran again
    register.run(params)
    run = client.get_run(broken).info
    assert (run.run_name, run.status) == (f"pnp-guide v{first}", "FINISHED")
    page = Path(client.download_artifacts(broken, "report/index.html", str(inside)))
    assert f"version {first}</span>" in page.read_text()
    assert client.get_run(run_of_second).info.run_name == f"pnp-guide v{second}"
    assert not Path("runs/pipeline.json").exists(), "what runs next is another run of the pipeline"
    Path("results/evaluate/base/evaluation.json").write_text(as_it_was)
    for version in (first, second):
        client.delete_model_version("pnp-guide", version)


def test_a_registry_that_is_down_leaves_the_report_and_gets_the_guide_once_when_it_is_back(
    inside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = load_params(Path("params.yaml"))
    registry = tracking.Registry(params.tracking, "pnp-guide")
    before = registry.versions()
    as_it_was = with_another_result(0.876)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(tracking.TrackingError, match=r"The report is in .*index\.html"):
        register.run(params_with(tracking={"uri": "http://127.0.0.1:9"}))
    summary = read_json(Path("results/report/summary.json"))
    assert "registered" not in summary
    assert summary["models"]["base"]["guidance_fvu"]["value"] == 0.876
    page = Path("results/report/index.html").read_text()
    assert "The champion is not known" in page and "not registered yet" in page

    for _ in range(2):
        register.run(params)
    *others, new = registry.versions()
    assert others == before
    assert "not registered yet" not in Path("results/report/index.html").read_text()
    Path("results/evaluate/base/evaluation.json").write_text(as_it_was)
    registry.store.client.delete_model_version("pnp-guide", str(new))


def test_promote_refuses_then_promotes(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outside_git = promote.Options(allow_dirty=True)
    registry = tracking.Registry(load_params(Path("params.yaml")).tracking, "pnp-guide")
    with pytest.raises(SystemExit) as left:
        promote.run(
            params_with(promote={"guidance_fvu": {"most": 0.001, "max_loss": None}}),
            options=outside_git,
        )
    assert left.value.code == promote.REFUSED == 3
    assert "base: guidance_fvu.most: " in capsys.readouterr().err
    assert registry.champion() is None
    promote.run(params_with(), options=outside_git)
    assert registry.champion() == registry.newest()
    promote.run(params_with(), options=outside_git)
    assert "champion already" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no usable version 99"):
        promote.run(params_with(), version="99")


def test_promote_without_a_candidate(world: Path) -> None:
    with pytest.raises(ValueError, match="run the stage register first"):
        promote.run(params_with())


# what they share


def test_fid_of_few_images_is_that_of_clean_fid() -> None:
    from cleanfid.fid import fid_from_feats

    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(60, 8)), generator.normal(0.3, 1.5, size=(50, 8))
    plain = fid(x, y)
    assert plain == pytest.approx(fid_from_feats(x, y))
    padding = np.zeros((60, 80))  # dimensions that add nothing
    assert fid(np.hstack([x, padding]), np.hstack([y, padding[:50]])) == pytest.approx(plain)
    assert kid(x, y) == kid(x, y) > kid(x, x[:30])


class InceptionLike(torch.nn.Module):
    """Has the parts of the published network that clean-fid touches."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.AdaptiveAvgPool2d(1), torch.nn.Conv2d(3, 2048, 1), torch.nn.Flatten()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.layers(x)
        return features


def test_an_inception_beside_the_judge_gives_fid_and_kid(inside: Path) -> None:
    judge = Judge("models/judge", torch.device("cpu"))
    images = np.random.default_rng(0).integers(0, 255, (5, 32, 32, 3), dtype=np.uint8)
    assert judge.features(images).shape == (5, 16)
    scores = judge.clip_scores(images, toy.PROMPTS[:5])

    shutil.copytree("models/judge", "models/published", dirs_exist_ok=True)
    torch.jit.script(InceptionLike()).save(f"models/published/{INCEPTION}")
    check_judge("models/published")
    judge = Judge("models/published", torch.device("cpu"))
    assert judge.name == "models/published (Inception V3; CLIP score by CLIP)"
    assert judge.features(images).shape == (5, 2048)
    assert np.array_equal(judge.clip_scores(images, toy.PROMPTS[:5]), scores)
    seen, agreement = judge.look(images, toy.PROMPTS[:5])
    assert np.array_equal(seen, judge.features(images)) and np.array_equal(agreement, scores)


def test_a_full_disk_ends_caching_in_one_line_and_the_next_run_goes_on(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    params = params_with()
    prepare.run(params)
    save, written = safetensors.torch.save_file, []

    def fills_up(tensors: Any, path: Path, **options: Any) -> None:
        if len(written) == 3:
            Path(path).write_bytes(b"half a sha")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path, **options)
        written.append(path)

    monkeypatch.setattr(safetensors.torch, "save_file", fills_up)
    with pytest.raises(SystemExit):
        main(cache.run)
    line = capsys.readouterr().err.splitlines()[-1]
    assert (
        "Could not write data/cache/pairs-forward-00000.safetensors: [Errno 28] No space left"
        in line
    )
    assert len(list(Path("data/cache").iterdir())) == 3
    monkeypatch.setattr(safetensors.torch, "save_file", save)
    cache.run(params)
    assert "; 3 shards are there" in capsys.readouterr().out


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that storage would have waited."""
    waited: list[float] = []
    monkeypatch.setattr("components.storage.time.sleep", waited.append)
    return waited


def test_storage_that_comes_back_within_a_minute_is_not_noticed(
    s3: str, waits: list[float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mirror = Mirror(s3)
    write_json(tmp_path / "a.json", 1)
    mirror.put(tmp_path / "a.json", tmp_path)
    read = mirror._files.cat_file

    def away(name: str) -> bytes:
        if sum(waits) < 60:
            raise ConnectionRefusedError("nobody listens")
        content: bytes = read(name)
        return content

    monkeypatch.setattr(mirror._files, "cat_file", away)
    assert mirror.read("a.json") == (tmp_path / "a.json").read_bytes()
    assert waits == sorted(waits) and len(waits) > 3


def test_storage_that_stays_away_ends_in_a_message_that_names_it(
    s3: str, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    monkeypatch.setattr("components.storage.WAITS", (7,))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # botocore's own tries take six seconds
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        s3fs.S3FileSystem.clear_instance_cache()
        said = r"could not read s3://bucket/x/a in \d+ seconds: .*127.0.0"
        with pytest.raises(OSError, match=said):
            Mirror("s3://bucket", "x").read("a")
    assert waits == [7]


def test_storage_that_refuses_says_so_at_once(
    s3: str, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str) -> bytes:
        raise PermissionError("Access Denied")

    mirror = Mirror(s3)
    monkeypatch.setattr(mirror, "_files", type("Refusing", (), {"cat_file": staticmethod(refuse)}))
    with pytest.raises(PermissionError, match=f"may not read {s3}/a: Access Denied"):
        mirror.read("a")
    assert not waits


@pytest.mark.services
def test_a_shard_altered_at_storage_is_named(world: Path, s3: str) -> None:
    params = params_with(storage=s3)
    prepare.run(params)
    cache.run(params)
    index = read_json(Path("data/cache/index.json"))
    mirror = Mirror(index["storage"])
    name = f"pairs-forward-00001.{index['files']['pairs-forward-00001']}.safetensors"
    write_bytes(Path(name), mirror.read(name)[:-1])
    mirror.put(Path(name), Path())
    with pytest.raises(ValueError, match=f"shard pairs-forward-00001 is not .*{mirror.url}/{name}"):
        distill.run(params)
    assert not Path("guides/distilled").exists()


def test_mirror_in_a_folder(tmp_path: Path) -> None:
    here = tmp_path / "here"
    (tmp_path / "there").mkdir()
    mirror = Mirror(str(tmp_path / "there"), "some/name")
    write_json(here / "a.json", 1)
    mirror.put(here / "a.json", here)
    assert mirror.names() == {"a.json"}
    assert mirror.read("a.json") == (here / "a.json").read_bytes()
    with pytest.raises(FileNotFoundError, match="there is no .*there/some/name/b.json"):
        mirror.read("b.json")
    assert Mirror(str(tmp_path / "nowhere")).names() == set()


def test_progress_lines(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("cache", 4, "shards", seconds_between=0)
    for done in range(5):
        progress(done)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "cache: 0/4 shards, 0%"
    assert lines[-1].startswith("cache: 4/4 shards, 100%") and "took 0:00" in lines[-1]
    assert (clock(75), clock(3722)) == ("1:15", "1:02:02")


def test_how_long_it_will_take_is_told_as_soon_as_it_is_known_by_the_share_of_the_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("components.progress.time.monotonic", lambda: now[0])
    progress = Progress("evaluate base", 100, "images")
    progress(0, share=0.0)
    for now[0], done, share in ((0.5, 5, 0.01), (4.0, 20, 0.1), (6.0, 40, 0.2), (15.0, 60, 0.3)):
        progress(done, share=share)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("/")[0] for line in lines] == ["evaluate base: 20", "evaluate base: 60"]
    assert "0:36 left" in lines[0] and "0:35 left" in lines[1]


def test_user_errors_are_one_line(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stage(params: Params) -> None:
        raise ValueError("this\nis\nwrong")

    with pytest.raises(SystemExit) as left:
        main(stage)
    assert left.value.code == 1
    assert capsys.readouterr().err == "error: this is wrong\n"
    Path("params.yaml").unlink()
    with pytest.raises(SystemExit) as left:
        main(stage)
    assert left.value.code == 2
    monkeypatch.setenv("PNP_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no params.yaml"):
        main(stage)
