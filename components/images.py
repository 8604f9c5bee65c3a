"""Sampled images, kept as they are made: a batch that is there is not made again.

results/sampled/<model>/<key>/ holds the batches of one recipe, which is all that its images depend
on besides prompt, negative prompt and seed. The key is its hash, and each parquet file says the
recipe in clear, so that what is read is what was made. Whatever else took forwards of the UNet
lies beside them in JSON.
"""

import fcntl
import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from components.fitting import encode
from components.paths import EVALUATED, RUNS, SAMPLED
from components.progress import clock
from pnp_core.files import atomic_file, read_json, recover_all, remove, write_json

if TYPE_CHECKING:
    import numpy as np

    from pnp_core.guide import Guide

INDEX = "images.json"
SECONDS_BETWEEN_LOOKS = 2.0
ANEW = "`evaluate` makes its images anew"

Recipe = Mapping[str, Any]


class Task(NamedTuple):
    """An image to make."""

    prompt: str
    seed: int
    is_heldout: bool
    negative: str = ""


class Setting(NamedTuple):
    """How to make it."""

    method: str
    num_steps: int
    solver: str
    guidance_scale: float


class Place(NamedTuple):
    """Where an image lies."""

    file: Path
    row: int


def key_of(recipe: Recipe) -> str:
    """Names a recipe's folder."""
    text = json.dumps(recipe, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextmanager
def alone_with(model: str, wait_minutes: float) -> Iterator[None]:
    """While open, no other evaluation here samples the model or forgets images of it.

    Another is told and waited for. Raises ValueError if it goes on for `wait_minutes`.
    """
    RUNS.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    told = False
    with (RUNS / f"evaluate-{model}.lock").open("a+") as file:
        while not _locked(file.fileno()):
            waited = time.monotonic() - began
            file.seek(0)
            busy = f"another evaluation of it is at its images (PID {file.read()})"
            if waited >= 60 * wait_minutes:
                raise ValueError(
                    f"evaluate {model}: {busy}: waited {clock(waited)}, cluster.wait_minutes; run "
                    "the same command when it ends"
                )
            if not told:
                limit = clock(60 * wait_minutes)
                print(f"evaluate {model}: {busy}: waiting, {limit} at most", flush=True)
                told = True
            time.sleep(SECONDS_BETWEEN_LOOKS)
        file.truncate(0)
        print(os.getpid(), end="", file=file, flush=True)
        yield


def _locked(descriptor: int) -> bool:
    """Whether nobody else has locked a file; where the file system has no locks, nobody has."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def guide_identity(guide: "Guide") -> str:
    """SHA-256 over a guide's weights and what its config says."""
    config = {key: value for key, value in guide.config.items() if not key.startswith("_")}
    text = guide.weights_digest() + json.dumps(config, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


class KeptImages:
    """The images of one model, in results/sampled/<model>.

    Args:
        model: its name.
        apart: where what is made goes instead. That folder is then read alone, as DVC has it.
    """

    def __init__(self, model: str, apart: Path | None = None) -> None:
        self.apart, self.folder = apart, apart or SAMPLED / model
        self._folders = [SAMPLED / model, apart] if apart else [self.folder]
        self._places: dict[str, dict[tuple[str, str, int], Place]] = {}
        self._last: tuple[Path, list[bytes]] | None = None

    def missing(self, recipe: Recipe, tasks: Sequence[Task]) -> list[Task]:
        """Those that have no image yet."""
        there = self._index(recipe)
        return [task for task in tasks if _identity(recipe, task) not in there]

    def look_again(self) -> None:
        """Forget what was there: other processes have written."""
        self._places.clear()

    def write(
        self, recipe: Recipe, setting: Setting, tasks: Sequence[Task], images: "np.ndarray"
    ) -> None:
        """Keep a batch: uint8 images (N, height, width, 3) of these tasks, in one atomic step."""
        import pyarrow as pa
        import pyarrow.parquet as pq
        from PIL import Image

        rows = [
            {
                "image": {"bytes": encode(Image.fromarray(image)), "path": None},
                **setting._asdict(),
                "prompt": task.prompt,
                "negative_prompt": task.negative,
                "seed": task.seed,
            }
            for task, image in zip(tasks, images, strict=True)
        ]
        table = pa.Table.from_pylist(rows)
        table = table.replace_schema_metadata({"recipe": json.dumps(recipe, sort_keys=True)})
        names = json.dumps([_identity(recipe, task) for task in tasks])
        name = hashlib.sha256(names.encode()).hexdigest()[:16]
        path = self.folder / key_of(recipe) / f"{name}.parquet"
        with atomic_file(path) as new:
            pq.write_table(table, new, write_page_checksum=True)
        self._places.pop(key_of(recipe), None)

    def files(self, recipe: Recipe, tasks: Sequence[Task]) -> list[bytes]:
        """The images of these tasks as encoded files, in their order. KeyError: one is missing."""
        there = self._index(recipe)
        found = []
        for task in tasks:
            place = there[_identity(recipe, task)]
            if self._last is None or self._last[0] != place.file:
                self._last = place.file, _encoded(place.file)
            found.append(self._last[1][place.row])
        return found

    def read(self, recipe: Recipe, tasks: Sequence[Task]) -> "np.ndarray":
        """The images of these tasks: uint8, (N, height, width, 3). KeyError: one is missing."""
        import numpy as np
        from PIL import Image

        files = self.files(recipe, tasks)
        return np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files])

    def measured(self, recipe: Recipe, measure: Callable[[], Any]) -> Any:
        """What `measure` gave for this recipe before, else what it gives now; a JSON value."""
        name = Path(key_of(recipe), "measured.json")
        for path in (folder / name for folder in self._folders):
            if path.exists():
                kept = read_json(path)
                if kept["recipe"] == json.loads(json.dumps(recipe)):
                    return kept["value"]
        value = json.loads(json.dumps(measure()))
        write_json(self.folder / name, {"recipe": recipe, "value": value})
        return value

    def forget_all_but(self, recipes: Sequence[Recipe]) -> None:
        """Delete what other recipes made, and what a write left that was killed."""
        wanted = {key_of(recipe) for recipe in recipes}
        for folder in self.folder.iterdir():
            if folder.name in wanted:
                recover_all(folder)
            else:
                remove(folder)

    def _index(self, recipe: Recipe) -> dict[tuple[str, str, int], Place]:
        """Where each image of a recipe is. A file that can't be read is deleted, and said so."""
        key = key_of(recipe)
        if key not in self._places:
            found = {}
            for folder in self._folders:
                for file in sorted((folder / key).glob("[!.]*.parquet")):
                    for row, identity in enumerate(_identities(file, recipe)):
                        found[identity] = Place(file, row)
            self._places[key] = found
        return self._places[key]


class Gallery:
    """The pictures of an evaluated model, for who shows them.

    Attributes:
        tasks: in the order of every list of pictures.
        settings: those that there are pictures of.
    """

    def __init__(self, model: str, tasks: Sequence[Task], recipes: Mapping[Setting, Recipe]):
        self.tasks, self.settings = tuple(tasks), tuple(recipes)
        self._recipes, self._kept = recipes, KeptImages(model)

    @classmethod
    def open(cls, model: str) -> Self:
        """What the last evaluation of the model showed."""
        values = read_json(EVALUATED / model / INDEX)
        recipes = {Setting(**x["setting"]): x["recipe"] for x in values["settings"]}
        return cls(model, [Task(**x) for x in values["tasks"]], recipes)

    @property
    def guides(self) -> dict[int, str]:
        """The identity of the guide that made the pictures, by number of steps."""
        return {s.num_steps: r["guide"] for s, r in self._recipes.items() if s.method == "guided"}

    def save(self, folder: Path) -> None:
        """Write the list of what there is; the pictures stay where they are."""
        settings = [{"setting": s._asdict(), "recipe": r} for s, r in self._recipes.items()]
        tasks = [task._asdict() for task in self.tasks]
        write_json(folder / INDEX, {"tasks": tasks, "settings": settings})

    def files(self, setting: Setting, tasks: Sequence[Task] | None = None) -> list[bytes]:
        """Encoded pictures, one for each task. Raises ValueError if they are not there any more."""
        wanted = self.tasks if tasks is None else tuple(tasks)
        recipe = self._recipes[setting]
        if lost := self._kept.missing(recipe, wanted):
            folder = self._kept.folder
            raise ValueError(
                f"{folder} lacks {len(lost)} of the images that were judged, of {setting.method} "
                f"at {setting.num_steps} steps: dvc repro makes them again, or python -m "
                f"components.evaluate --model {folder.name}"
            )
        return self._kept.files(recipe, wanted)


def batches(tasks: Sequence[Task], size: int) -> Iterator[Sequence[Task]]:
    """The tasks in order, `size` at a time; the last batch may be smaller."""
    return (tasks[start : start + size] for start in range(0, len(tasks), size))


def _identity(recipe: Recipe, task: Task) -> tuple[str, str, int]:
    """What makes a task's image another one; without guidance, no negative prompt does."""
    return task.prompt, "" if recipe["method"] == "unguided" else task.negative, task.seed


def _identities(file: Path, recipe: Recipe) -> list[tuple[str, str, int]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = ["prompt", "negative_prompt", "seed"]
    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as opened:
            written = json.loads((opened.schema_arrow.metadata or {}).get(b"recipe", b"null"))
            rows = opened.read(columns).to_pylist()
            opened.read(["image"])  # so that its checksums are compared
    except (pa.ArrowException, OSError, ValueError) as error:
        print(f"{file} is not whole ({error}) and is deleted: {ANEW}", flush=True)
        file.unlink()
        return []
    if key_of(written) != key_of(recipe):
        print(f"{file} is of another recipe than its folder and is deleted: {ANEW}", flush=True)
        file.unlink()
        return []
    return [
        _identity(recipe, Task(row["prompt"], row["seed"], False, row["negative_prompt"]))
        for row in rows
    ]


def _encoded(file: Path) -> list[bytes]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as opened:
        rows = opened.read(["image"]).to_pylist()
    return [row["image"]["bytes"] for row in rows]
