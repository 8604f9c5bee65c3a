"""The pictures of the page: which ones, small enough to be part of it.

For each model and number of steps the first tasks, which are the same for every guide, and those
where the guide is furthest from CFG. The same task by every way of sampling.
"""

import base64
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from components.evaluation import Evaluation
from components.images import Gallery, Setting, Task, batches
from components.methods import equal_cost_steps, is_same_cost
from components.pictures import grid
from components.progress import Progress

FILE = "pictures.parquet"
EDGE = 256  # pixels at most
QUALITY = 90  # of WebP
NUM_FIRST, NUM_WORST = 16, 16  # of a model at one number of steps
IMAGES_AT_ONCE = 64  # of each way in memory, as they were sampled
# Of all pictures, in bytes of their file; the page has a third more, as base64. Where there are too
# many models and steps for it, each has fewer pictures.
MOST_BYTES = 12 * 2**20
KEY = ("model", "num_steps", "prompt", "negative", "seed")  # of a guided picture
LEAST = 2  # pictures of a set that has any: the worst, and the first of the others
EQUAL_COST = "cfg_equal_cost"
NUM_COLUMNS, ROWS = 8, ("unguided", "cfg", "guided")  # of a sheet


PictureKey = tuple[str, int, str, str, int]  # KEY's


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One task by every way of sampling.

    Attributes:
        task: what it was made from.
        psnr: of guided to CFG, in dB.
        images: WebP, by way.
    """

    task: Task
    psnr: float
    images: Mapping[str, bytes]


@dataclass(frozen=True, kw_only=True)
class PictureSet:
    """The pictures of one model at one number of steps.

    Attributes:
        model: its name in params.yaml.
        num_steps: of guided, CFG and unguided sampling.
        ways: key -> label, in the order in which they are shown.
        pictures: in the order of the tasks; none where the page has no room for any.
        first: those of the first tasks, whatever the page has room for.
        num_tasks: how many they were chosen from.
    """

    model: str
    num_steps: int
    ways: Mapping[str, str]
    pictures: Sequence[Picture]
    first: Sequence[Picture]
    num_tasks: int


@dataclass(frozen=True, kw_only=True)
class GuidedPictures:
    """All guided pictures of a guide, kept so that the next one can be put beside them.

    Attributes:
        images: WebP, by model, number of steps, prompt, negative prompt and seed.
    """

    images: Mapping[PictureKey, bytes] = field(default_factory=dict)

    def of(self, model: str, num_steps: int, task: Task) -> bytes | None:
        """WebP; None if there is none."""
        return self.images.get((model, num_steps, task.prompt, task.negative, task.seed))

    def save(self, path: Path) -> None:
        """Write a parquet file."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        names = (*KEY, "image")
        rows = [dict(zip(names, (*key, image), strict=True)) for key, image in self.images.items()]
        pq.write_table(pa.Table.from_pylist(rows), path)

    @classmethod
    def load(cls, path: Path) -> "GuidedPictures":
        """Read what `save` wrote. Raises ValueError if it is something else."""
        import pyarrow.parquet as pq

        try:
            rows = pq.read_table(path).to_pylist()
            images = {tuple(row[name] for name in KEY): row["image"] for row in rows}
        except KeyError as error:
            why = f"it does not say {error}, as one of another version of this code"
            raise ValueError(f"{path} has no pictures to show: {why}") from None
        except ValueError as error:
            raise ValueError(f"{path} has no pictures of a report: {error}") from None
        return cls(images=images)


def gather(
    evaluations: Mapping[str, Evaluation],
    *,
    champion: GuidedPictures | None = None,
    most_bytes: int = MOST_BYTES,
) -> tuple[list[PictureSet], GuidedPictures]:
    """The pictures to show, and all guided ones to keep.

    Args:
        evaluations: by model; their images are those of results/evaluate.
        champion: of the champion's guide, shown beside the candidate's.
        most_bytes: of all pictures together.
    """
    kept: dict[PictureKey, bytes] = {}
    sets = []
    total = sum(len(one.num_steps) * one.num_images for one in evaluations.values())
    progress = Progress("pictures", total, "images")
    for model, evaluation in evaluations.items():
        pictures = Gallery.open(model)
        for num_steps in evaluation.num_steps:
            made = _Images(pictures, evaluation, num_steps)
            psnrs: dict[Task, float] = {}
            for batch in batches(pictures.tasks, IMAGES_AT_ONCE):
                for task, guided, psnr in made.compared(batch):
                    kept[model, num_steps, task.prompt, task.negative, task.seed] = guided
                    psnrs[task] = psnr
                progress(len(kept))
            sets.append(_chosen(made, psnrs, model, num_steps, champion))
    return _within(sets, most_bytes), GuidedPictures(images=kept)


def small(image: bytes) -> bytes:
    """An image file as WebP of at most `EDGE` pixels a side."""
    return _as_small(_opened(image))


def _as_small(picture: Image.Image) -> bytes:
    """The same of an open picture, which it makes small in place."""
    picture.thumbnail((EDGE, EDGE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=QUALITY, method=4)
    return file.getvalue()


def sheet(one: PictureSet) -> Image.Image:
    """The first pictures by every way, in rows: the same tasks for every guide."""
    rows = {
        label: np.concatenate([_pixels(picture.images[way]) for picture in one.first])
        for way, label in one.ways.items()
        if way in ROWS
    }
    return grid(
        rows,
        [picture.task.prompt for picture in one.first],
        title=f"{one.model}, {one.num_steps} steps",
        marked=[picture.task.is_heldout for picture in one.first],
    )


def as_json(sets: Sequence[PictureSet]) -> list[dict[str, Any]]:
    """What the page's script reads."""
    return [
        {
            "model": one.model,
            "steps": one.num_steps,
            "ways": dict(one.ways),
            "total": one.num_tasks,
            "pictures": [
                {
                    "prompt": picture.task.prompt,
                    "seed": picture.task.seed,
                    "is_heldout": picture.task.is_heldout,
                    "psnr": round(picture.psnr, 1),
                    "images": {
                        way: base64.b64encode(image).decode()
                        for way, image in picture.images.items()
                    },
                }
                for picture in one.pictures
            ],
        }
        for one in sets
    ]


class _Images:
    """The images of a model at one number of steps, as they were sampled, by way and task."""

    def __init__(self, pictures: Gallery, evaluation: Evaluation, num_steps: int) -> None:
        self.labels = {"unguided": "Unguided", "cfg": "CFG", "guided": "Guided"}
        self._pictures = pictures
        scale = evaluation.guidance_scale
        self._settings = {way: Setting(way, num_steps, "ddim", scale) for way in self.labels}
        guided = evaluation.cell("guided", num_steps)
        if guided is None:
            return
        steps = equal_cost_steps(num_steps, guided.forwards / num_steps)
        for solver, name in {"dpmsolver++": "DPM++ 2M", "ddim": "DDIM"}.items():
            setting = Setting("cfg", steps, solver, scale)
            if EQUAL_COST not in self._settings and setting in pictures.settings:
                self._settings[EQUAL_COST] = setting
                self.labels[EQUAL_COST] = _equal_cost(steps, name, guided.forwards)

    def files(self, way: str, tasks: Sequence[Task]) -> list[bytes]:
        """The encoded images of these tasks, in their order."""
        return self._pictures.files(self._settings[way], tasks)

    def compared(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, bytes, float]]:
        """Each task with its guided picture, made small, and the PSNR of guided to CFG, in dB."""
        from pnp_core.metrics import psnr

        images = zip(self.files("guided", tasks), self.files("cfg", tasks), strict=True)
        for task, (guided, cfg) in zip(tasks, images, strict=True):
            picture = _opened(guided)
            similar = float(psnr(np.asarray(picture)[None], _pixels(cfg))[0])
            yield task, _as_small(picture), similar


def _equal_cost(num_steps: int, solver: str, guided: float) -> str:
    """CFG of about as many forwards as the guide's, which are named where they differ."""
    steps, forwards = "1 step" if num_steps == 1 else f"{num_steps} steps", 2 * num_steps
    if is_same_cost(forwards, guided):
        return f"CFG at equal cost ({steps}, {solver})"
    return f"CFG at nearest cost ({steps}, {solver}: {forwards} forwards, guided {guided:.1f})"


def _chosen(
    made: _Images,
    psnrs: Mapping[Task, float],
    model: str,
    num_steps: int,
    champion: GuidedPictures | None,
) -> PictureSet:
    tasks = list(psnrs)
    first = tasks[:NUM_FIRST]
    rest = sorted(tasks[NUM_FIRST:], key=psnrs.__getitem__)
    shown = {*first, *rest[:NUM_WORST]}
    chosen = [task for task in tasks if task in shown]
    images: dict[Task, dict[str, bytes]] = {task: {} for task in chosen}
    for way in made.labels:
        for task, image in zip(chosen, made.files(way, chosen), strict=True):
            images[task][way] = small(image)
    for task in chosen:
        other = champion.of(model, num_steps, task) if champion else None
        if other is not None:
            images[task]["champion"] = other
    order = ("unguided", "cfg", EQUAL_COST, "guided")
    ways = {way: made.labels[way] for way in order if way in made.labels}
    if any("champion" in found for found in images.values()):
        ways["champion"] = "Champion"
    pictures = [Picture(task=task, psnr=psnrs[task], images=images[task]) for task in chosen]
    return PictureSet(
        model=model,
        num_steps=num_steps,
        ways=ways,
        pictures=pictures,
        first=pictures[:NUM_COLUMNS],
        num_tasks=len(tasks),
    )


def _within(sets: Sequence[PictureSet], most_bytes: int) -> list[PictureSet]:
    """About as many pictures as fit, the same share of every set.

    Where not even `LEAST` of each do, as many sets as fit have those, and the others none: at first
    each model's first number of steps, then each one's second.
    """
    total = sum(map(_num_bytes, sets))
    if total <= most_bytes:
        return list(sets)
    numbers = [int(most_bytes / total * len(one.pictures)) for one in sets]
    fewer = [_fewer(one, max(LEAST, number)) for one, number in zip(sets, numbers, strict=True)]
    if min(numbers) >= LEAST:
        return fewer
    seen: Counter[str] = Counter()
    ranks = []
    for one in sets:
        ranks.append(seen[one.model])
        seen[one.model] += 1
    room = most_bytes
    for i in sorted(range(len(sets)), key=ranks.__getitem__):
        room -= _num_bytes(fewer[i])
        if room < 0:
            fewer[i] = replace(fewer[i], pictures=())
    return fewer


def _num_bytes(one: PictureSet) -> int:
    return sum(len(image) for picture in one.pictures for image in picture.images.values())


def _fewer(one: PictureSet, number: int) -> PictureSet:
    """So many of the pictures, the first and the worst in equal parts."""
    worst = sorted(one.pictures, key=lambda picture: picture.psnr)[: number // 2]
    first = [picture for picture in one.pictures if picture not in worst]
    chosen = [*worst, *first[: number - len(worst)]]
    return replace(one, pictures=[picture for picture in one.pictures if picture in chosen])


def _opened(image: bytes) -> Image.Image:
    with Image.open(io.BytesIO(image)) as opened:
        return opened.convert("RGB")


def _pixels(image: bytes) -> np.ndarray:
    """uint8 (1, height, width, 3)."""
    return np.asarray(_opened(image))[None]
