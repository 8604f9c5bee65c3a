"""Data sets that memory has no room for: what is read of them at a time, and that it is the same.

The references are pyarrow's own `read_table`, and PIL, on all rows at once.
"""

import inspect
import io
import struct
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from components import cache, dataset, fitting, parquet, prepare, references
from components.dataset import each_record, reference_images
from components.environment import quiet
from components.judging import Judge
from components.params import Model, Params, load_params
from components.parquet import PreparedImages, read_prompts
from components.paths import CACHE, PREPARED
from components.references import References
from pnp_core.cache import CacheBuilder, Example, build_cache
from tests import toy

pytest_plugins = ["tests.toy"]
quiet()

NUM_ROWS = 200
TRAIN = PREPARED / "train.parquet"
AT_ONCE = 8  # references, in these tests
DEPTHS = (1, 2, 4, 8, 16)  # of a grey PNG


@pytest.fixture(params=[NUM_ROWS, 7], ids=["one row group", "row groups of 7"])
def prepared(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A file like those that `prepare` writes, with bytes for images."""
    generator = np.random.default_rng(0)
    images = [{"bytes": generator.bytes(20_000), "path": None} for _ in range(NUM_ROWS)]
    table = pa.table({"image": images, "prompt": [f"thing {n % 9}" for n in range(NUM_ROWS)]})
    path = tmp_path / "train.parquet"
    small: dict[str, Any] = {"use_dictionary": False, "data_page_size": 2**14}
    pq.write_table(table, path, row_group_size=request.param, write_batch_size=8, **small)
    return path


def images_in(path: Path) -> list[bytes]:
    return [row["image"]["bytes"] for row in pq.read_table(path).to_pylist()]


def test_records_one_after_another_are_the_rows_of_the_file(prepared: Path) -> None:
    records = list(each_record(prepared, image_column="image", caption_column="prompt"))
    rows = pq.read_table(prepared).to_pylist()
    assert [(r.image, r.caption) for r in records] == [
        (row["image"]["bytes"], row["prompt"]) for row in rows
    ]
    assert records[-1].where == f"{prepared}, row {NUM_ROWS - 1}"


def test_few_of_the_images_of_a_file_are_in_memory_at_a_time(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "ROWS_AT_ONCE", 4)
    monkeypatch.setattr(parquet, "BYTES_AT_ONCE", 2**14)
    before = pa.total_allocated_bytes()
    held = [
        pa.total_allocated_bytes() - before
        for _ in each_record(prepared, image_column="image", caption_column="prompt")
    ]
    assert len(held) == NUM_ROWS and max(held) < prepared.stat().st_size / 4


def test_prompts_are_read_without_images(prepared: Path) -> None:
    expected = pq.read_table(prepared)["prompt"].to_pylist()
    assert read_prompts(prepared) == expected
    table = pq.read_table(prepared)
    pq.write_table(table.set_column(0, "image", pa.nulls(NUM_ROWS)), prepared)
    assert read_prompts(prepared) == expected


@pytest.mark.parametrize(
    "order",
    [range(NUM_ROWS), range(NUM_ROWS - 1, -1, -20), [5, 5, 90, 3, 140, 141, 199, 0]],
    ids=["in order", "backwards", "here and there"],
)
def test_an_image_is_that_of_its_row_in_whatever_order_rows_are_asked_for(
    prepared: Path, order: range | list[int]
) -> None:
    images, expected = PreparedImages(prepared), images_in(prepared)
    assert [images.read(n) for n in order] == [expected[n] for n in order]


def test_images_in_order_are_read_once_even_with_gaps(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, rows_of = [], parquet.rows_of

    def counting(*arguments: Any) -> Iterator[Any]:
        for row in rows_of(*arguments):
            read.append(row["image"]["bytes"])
            yield row

    monkeypatch.setattr(parquet, "rows_of", counting)
    images, expected = PreparedImages(prepared), images_in(prepared)
    for number in (*range(30), *range(150, 160)):
        assert images.read(number) == expected[number]
    assert len(read) == len(set(read))


def test_a_row_without_an_image_is_named_each_time_and_others_are_still_read(
    prepared: Path,
) -> None:
    rows = pq.read_table(prepared).to_pylist()
    rows[3]["image"] = None
    pq.write_table(pa.Table.from_pylist(rows), prepared)
    images = PreparedImages(prepared)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"train.parquet, row 3: column 'image' holds no"):
            images.read(3)
    assert images.read(4) == rows[4]["image"]["bytes"]


def test_reading_goes_on_after_the_disk_failed_once(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, expected = PreparedImages(prepared), images_in(prepared)
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(parquet, "rows_of", fails)
        images.read(2)
    assert images.read(2) == expected[2]


def fails(*_: Any) -> Iterator[Any]:
    yield None
    raise OSError


@pytest.mark.parametrize("begin", [4, -2500], ids=["the first page", "the footer"])
def test_a_parquet_file_that_is_damaged_within_is_named(prepared: Path, begin: int) -> None:
    content = bytearray(prepared.read_bytes())
    content[begin : begin + 2000] = np.random.default_rng(0).bytes(2000)
    prepared.write_bytes(content)
    with pytest.raises(ValueError, match=r"train.parquet is damaged, .*: get it again"):
        list(each_record(prepared, image_column="image", caption_column="prompt"))


def test_a_parquet_file_with_a_caption_that_is_no_utf_8_is_named(tmp_path: Path) -> None:
    path, caption = tmp_path / "art.parquet", pa.array([b"\xff"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 1, caption.buffers())
    pq.write_table(pa.table({"image": [{"bytes": b"", "path": None}], "prompt": text}), path)
    with pytest.raises(ValueError, match=r"art.parquet is damaged, .*: get it again"):
        list(each_record(path, image_column="image", caption_column="prompt"))


# references


@pytest.fixture
def params(world: Path) -> Params:
    """Of the toy world, with its data prepared."""
    params = load_params(Path("params.yaml"))
    prepare.run(params)
    return params


def pictures() -> np.ndarray:
    """All prepared ones, held out first."""
    files = [PREPARED / "heldout.parquet", TRAIN]
    opened = [Image.open(io.BytesIO(data)) for file in files for data in images_in(file)]
    return np.stack([np.asarray(image) for image in opened])


class FakeJudge:
    """Counts the references that are in memory, decoded, when it looks and when one is decoded."""

    folder, device = "models/judge", "cpu"

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._seen: list[weakref.ref[np.ndarray]] = []
        self._images: list[weakref.ref[Image.Image]] = []
        self._decoded = 0  # into what it has not seen
        self.looks: list[int] = []
        self.held: list[int] = []
        fit = fitting.fit

        def counted(record: fitting.Record, resolution: int) -> tuple[Any, bool]:
            image, as_is = fit(record, resolution)
            self._images.append(weakref.ref(image))
            self.held.append(self._alive() + self._decoded)
            self._decoded += 1
            return image, as_is

        monkeypatch.setattr(dataset, "fit", counted)

    def _alive(self) -> int:
        arrays = [seen() for seen in self._seen]
        images = sum(image() is not None for image in self._images)
        return images + sum(len(array) for array in arrays if array is not None)

    def features(self, images: np.ndarray) -> np.ndarray:
        self._seen.append(weakref.ref(images))
        self._decoded = 0
        self.looks.append(len(images))
        self.held.append(self._alive())
        return images.reshape(len(images), -1)[:, :16].astype(np.float32)


def test_reference_images_are_all_that_are_prepared(params: Params) -> None:
    np.testing.assert_array_equal(reference_images(str(PREPARED), params), pictures())


def test_features_by_parts_are_those_of_all_at_once_to_the_last_bit(
    params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(references, "IMAGES_AT_ONCE", AT_ONCE)
    judge = Judge("models/judge", torch.device("cpu"), batch_size=AT_ONCE // 2)
    found = References(str(PREPARED), params).seen_by(judge).features_MD
    assert len(found) == len(toy.PROMPTS) > 2 * AT_ONCE
    np.testing.assert_array_equal(found, judge.features(pictures()).astype(np.float64))


def test_a_part_is_whole_batches_of_a_judge() -> None:
    batch_size = inspect.signature(Judge).parameters["batch_size"].default
    assert references.IMAGES_AT_ONCE % batch_size == 0


def test_no_more_references_than_a_part_are_decoded_at_a_time(
    params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(references, "IMAGES_AT_ONCE", AT_ONCE)
    judge: Any = FakeJudge(monkeypatch)
    References(str(PREPARED), params).seen_by(judge)
    assert judge.looks == [AT_ONCE] * (len(toy.PROMPTS) // AT_ONCE)
    assert max(judge.held) <= AT_ONCE + 1  # one more: the image that goes into the part


@pytest.mark.parametrize("num_images", [0, 1])
def test_a_reference_of_fewer_than_two_images_is_refused(
    params: Params, num_images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path("art/few.parquet")
    pq.write_table(pq.read_table("art/main.parquet").slice(0, num_images), path)
    judge: Any = FakeJudge(monkeypatch)
    with pytest.raises(ValueError, match=f"art/few.parquet has {num_images} images: too few"):
        References(str(path), params).seen_by(judge)


# the cache


def test_a_cache_is_what_the_same_images_give_that_are_all_in_memory(params: Params) -> None:
    cache.run(params)
    builder = cache.cache_builder(params)
    rows = pq.read_table(TRAIN).to_pylist()
    whole = CacheBuilder(
        builder.pipe,
        [Example(image=row["image"]["bytes"], prompt=row["prompt"]) for row in rows],
        builder.config,
        Path("whole"),
        base=builder.identity.base,
        data_hash=builder.identity.data_hash,
        companions=builder.companions,
        further_prompts=Path(PREPARED, "prompts.txt").read_text().splitlines(),
    )
    build_cache(whole)
    files = {path.name: path.read_bytes() for path in CACHE.iterdir()}
    assert files == {path.name: path.read_bytes() for path in Path("whole").iterdir()}
    assert sum(name.startswith("moments") for name in files) == 2


def test_a_shard_reads_its_own_images_alone(
    params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers, read = [], PreparedImages.read

    def noting(self: PreparedImages, number: int) -> bytes:
        numbers.append(number)
        return read(self, number)

    monkeypatch.setattr(PreparedImages, "read", noting)
    builder = cache.cache_builder(params)
    asked = {}
    for name in builder.plan.num_rows:
        builder.build(name)
        asked[name], numbers[:] = list(numbers), []
    assert asked.pop("moments-00000") == list(range(16))
    assert asked.pop("moments-00001") == list(range(16, 20))
    assert not any(asked.values())


# Where an image's 0th row and 0th column are to be seen, by the EXIF standard.
SIDES = ["top left", "top right", "bottom right", "bottom left"]
SIDES += ["left top", "right top", "right bottom", "left bottom"]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_its_exif_orientation_says(params: Params, orientation: int) -> None:
    stored = np.zeros((toy.RESOLUTION, toy.RESOLUTION, 3), np.uint8)
    stored[0], stored[0, 0] = 128, 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(stored).save(file, "PNG", exif=exif)
    row, column = SIDES[orientation - 1].split()

    def edge(image: np.ndarray, side: str) -> np.ndarray:
        image = image.swapaxes(0, 1) if side in ("left", "right") else image
        return image[-1 if side in ("bottom", "right") else 0]

    fitted, as_is = fitting.fit(fitting.Record(file.getvalue(), "", None, ""), toy.RESOLUTION)
    assert as_is == (orientation == 1)
    builder = cache.cache_builder(params)
    cached = builder.to_tensor(Example(image=file.getvalue(), prompt=""))
    for image in (np.asarray(fitted), (cached.permute(1, 2, 0).numpy() + 1) * 127.5):
        assert edge(image, row).min() > 127 and edge(image, row).max() > 254
        assert edge(image, column).max() > 254 and np.median(edge(image, column)) < 1


@pytest.mark.parametrize("exif", [b"", b"MM", bytes(16), b"MM\0*\0\0\0\x08\0\x05"])
def test_an_image_with_a_damaged_exif_block_is_taken_as_it_lies(
    params: Params, exif: bytes
) -> None:
    pixels = np.arange(toy.RESOLUTION**2 * 3, dtype=np.uint8).reshape(toy.RESOLUTION, -1, 3)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", exif=exif)
    record = fitting.Record(file.getvalue(), "a cat", None, "")
    fitting.check_record(record, toy.RESOLUTION)
    fitted, as_is = fitting.fit(record, toy.RESOLUTION)
    assert as_is and np.array_equal(np.asarray(fitted), pixels)
    cached = cache.cache_builder(params).to_tensor(Example(image=file.getvalue(), prompt=""))
    np.testing.assert_allclose((cached.permute(1, 2, 0).numpy() + 1) * 127.5, pixels, atol=1e-3)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_an_image_of_16_bits_is_the_same_in_8_bits(form: str) -> None:
    pixels = np.arange(toy.RESOLUTION**2, dtype=np.uint8).reshape(toy.RESOLUTION, -1)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint16) * 257).save(file, form)
    record = fitting.Record(file.getvalue(), "a cat", None, "")
    fitting.check_record(record, toy.RESOLUTION)
    fitted, _ = fitting.fit(record, toy.RESOLUTION)
    np.testing.assert_array_equal(np.asarray(fitted), np.stack([pixels] * 3, axis=-1))


def keyed(depth: int, colour: int, key: tuple[int, ...], samples: np.ndarray) -> bytes:
    """A PNG with a transparent colour, as its specification has it: (height, width, channels)."""

    def chunk(name: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)

    height, width, _ = samples.shape
    bits = (samples.reshape(height, -1)[..., None] >> np.arange(depth - 1, -1, -1)) & 1
    rows = np.packbits(bits.reshape(height, -1).astype(np.uint8), axis=1)
    lines = np.pad(rows, ((0, 0), (1, 0)))  # each begins with its filter: none
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"tRNS", struct.pack(f">{len(key)}H", *key))]
    parts += [chunk(b"IDAT", zlib.compress(lines.tobytes())), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("size", [toy.RESOLUTION, 2 * toy.RESOLUTION])
@pytest.mark.parametrize("value", ["nothing", "some", "all"])
@pytest.mark.parametrize(
    ("depth", "colour"), [*((d, 0) for d in (1, 2, 4, 8, 16)), (8, 2), (16, 2)]
)
def test_the_colour_that_a_png_keys_as_transparent_becomes_white(
    depth: int, colour: int, value: str, size: int
) -> None:
    most = 2**depth - 1
    level = {"nothing": 0, "some": most // 2, "all": most}[value]
    other = 0 if level == most else most
    channels = 3 if colour == 2 else 1
    samples = np.full((size, size, channels), other)
    samples[: size // 2] = level
    file = keyed(depth, colour, (level,) * channels, samples)
    record = fitting.Record(file, "a cat", None, "")
    fitted, as_is = fitting.fit(record, toy.RESOLUTION)
    pixels = np.asarray(fitted)
    assert not as_is and (pixels[0] == 255).all()
    assert (pixels[-1] == 255 * other // most).all()


@pytest.mark.parametrize(("kind", "mode"), [(np.float32, "F"), (np.int32, "I")])
def test_an_image_without_a_known_white_is_refused_by_its_mode(kind: type, mode: str) -> None:
    file = io.BytesIO()
    Image.fromarray(np.ones((toy.RESOLUTION, toy.RESOLUTION), kind)).save(file, "TIFF")
    record = fitting.Record(file.getvalue(), "a cat", None, "art, row 3")
    for look in (fitting.check_record, fitting.fit):
        with pytest.raises(ValueError, match=rf"art, row 3: .* \(mode {mode}\)"):
            look(record, toy.RESOLUTION)


def test_an_image_of_too_many_pixels_is_told_so_with_how_many_there_may_be() -> None:
    file = io.BytesIO()
    Image.new("1", (14_000, 14_000)).save(file, "PNG")
    record = fitting.Record(file.getvalue(), "a cat", None, "art, row 3")
    for look in (fitting.check_record, fitting.fit):
        with pytest.raises(ValueError, match="art, row 3: an image of more than 178,956,970 pix"):
            look(record, toy.RESOLUTION)


def test_a_models_own_prompts_are_the_lines_of_its_file_whatever_editor_wrote_it(
    tmp_path: Path,
) -> None:
    (tmp_path / "words.txt").write_bytes(
        "\N{BYTE ORDER MARK}a bar\r\n two\u2028lines \r\n".encode()
    )
    model = Model(path=str(tmp_path), reference="art", prompts="words.txt")
    assert dataset.own_prompts(model) == ("a bar", "two\u2028lines")


@pytest.mark.parametrize("is_absolute", [False, True])
def test_prompts_outside_of_the_models_folder_are_refused(
    tmp_path: Path, is_absolute: bool
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "words.txt").write_text("a bar\n")
    prompts = str(tmp_path / "words.txt") if is_absolute else "../words.txt"
    model = Model(path=str(tmp_path / "model"), reference="art", prompts=prompts)
    with pytest.raises(ValueError, match=r"words.txt in the model's folder: put it there"):
        dataset.own_prompts(model)
