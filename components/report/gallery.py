"""The pictures of the page: which ones, small enough to be part of it.

For each model and number of steps the first tasks, which are the same for every guide, and those
where the guide is furthest from CFG. The same task by every way of sampling.
"""

import base64
import io
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
MOST_BYTES = 3 * 2**20
EQUAL_COST = "cfg_equal_cost"
NUM_COLUMNS, ROWS = 8, ("unguided", "cfg", "guided")  # of a sheet


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
        pictures: in the order of the tasks.
        num_tasks: how many they were chosen from.
    """

    model: str
    num_steps: int
    ways: Mapping[str, str]
    pictures: Sequence[Picture]
    num_tasks: int


@dataclass(frozen=True, kw_only=True)
class GuidedPictures:
    """All guided pictures of a guide, kept so that the next one can be put beside them."""

    images: Mapping[tuple[str, int, str, int], bytes] = field(default_factory=dict)

    def of(self, model: str, num_steps: int, task: Task) -> bytes | None:
        """WebP; None if there is none."""
        return self.images.get((model, num_steps, task.prompt, task.seed))

    def save(self, path: Path) -> None:
        """Write a parquet file."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        names = ("model", "num_steps", "prompt", "seed", "image")
        rows = [dict(zip(names, (*key, image), strict=True)) for key, image in self.images.items()]
        pq.write_table(pa.Table.from_pylist(rows), path)

    @classmethod
    def load(cls, path: Path) -> "GuidedPictures":
        """Read what `save` wrote. Raises ValueError if it is something else."""
        import pyarrow.parquet as pq

        try:
            rows = pq.read_table(path).to_pylist()
            keys = [(r["model"], r["num_steps"], r["prompt"], r["seed"]) for r in rows]
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path} has no pictures of a report: {error}") from None
        return cls(images=dict(zip(keys, (row["image"] for row in rows), strict=True)))


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
    kept: dict[tuple[str, int, str, int], bytes] = {}
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
                    kept[model, num_steps, task.prompt, task.seed] = guided
                    psnrs[task] = psnr
                progress(len(kept))
            sets.append(_chosen(made, psnrs, model, num_steps, champion))
    total = sum(len(image) for one in sets for p in one.pictures for image in p.images.values())
    if total > most_bytes:
        sets = [_fewer(one, most_bytes / total) for one in sets]
    return sets, GuidedPictures(images=kept)


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
    pictures = one.pictures[:NUM_COLUMNS]
    rows = {
        label: np.concatenate([_pixels(picture.images[way]) for picture in pictures])
        for way, label in one.ways.items()
        if way in ROWS
    }
    return grid(
        rows,
        [picture.task.prompt for picture in pictures],
        title=f"{one.model}, {one.num_steps} steps",
        marked=[picture.task.is_heldout for picture in pictures],
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
        model=model, num_steps=num_steps, ways=ways, pictures=pictures, num_tasks=len(tasks)
    )


def _fewer(one: PictureSet, share: float) -> PictureSet:
    """This share of the pictures at most, the first and the worst in equal parts."""
    number = max(2, int(share * len(one.pictures)))
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
