"""What a run shows on its page in Prefect's UI: progress bars, the table, the images, links."""

import base64
import contextvars
import io
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

from PIL import Image
from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from components.curves import headline
from components.evaluation import Evaluation
from components.mlflow_place import resolve, without_secrets
from components.params import Params
from components.paths import REPORT
from components.registered import NOT_HERE
from flows.process import StageFailed, run
from pnp_core.files import read_json

PROGRESS = re.compile(r": [\d,]+/[\d,]+ [\w ]+, (\d+)%")  # a line of components.progress
SECONDS_BETWEEN_UPDATES = 2.0
PAGES = ("index.html", "grid.png")  # of a report
SUMMARY = REPORT / "summary.json"
MAX_PIXELS = 1600  # of an image's longer side
LOCAL_MLFLOW = "http://127.0.0.1:5000"  # of `make mlflow`


@contextmanager
def progress_bar(stage: str, log: Callable[[str], None]) -> Iterator[Callable[[str], None]]:
    """A `log` that also moves a progress bar, for as long as a stage runs.

    The bar is an ornament: it is drawn by a thread of its own, and no server that is away holds up
    the stage.
    """
    bar = _Bar(stage)
    thread = threading.Thread(target=contextvars.copy_context().run, args=[bar.draw], daemon=True)
    thread.start()

    def watch(line: str) -> None:
        log(line)
        if found := PROGRESS.search(line):
            bar.percent = int(found[1])

    try:
        yield watch
        bar.percent = 100 if bar.percent is not None else None
    finally:
        bar.over.set()
        thread.join(timeout=SECONDS_BETWEEN_UPDATES)


class _Bar:
    def __init__(self, stage: str) -> None:
        self.percent: int | None = None
        self.over = threading.Event()
        self._stage = stage
        self._shown: int | None = None
        self._id: UUID | None = None

    def draw(self) -> None:
        is_over = False
        while not is_over:
            is_over = self.over.wait(SECONDS_BETWEEN_UPDATES)
            percent = self.percent
            if percent is None or percent == self._shown:
                continue
            try:
                if self._id is None:
                    made = create_progress_artifact(
                        float(percent), key=_key("progress", self._stage), description=self._stage
                    )
                    assert isinstance(made, UUID)  # in a thread without an event loop
                    self._id = made
                else:
                    update_progress_artifact(self._id, float(percent))
                self._shown = percent
            except Exception:
                continue  # the next look tries again


def publish_report(
    params: Params, log: Callable[[str], None], experiment: str | None = None
) -> None:
    """Show results/report: the table, the images, and where the version is in MLflow.

    `experiment`: what the run will be saved by, as its own folder goes when it ends.
    """
    table = (REPORT / "table.md").read_text(encoding="utf-8")
    version, why_not = version_here()
    # The page in MLflow, where a server shows it.
    registered = read_json(SUMMARY).get("registered") if version else None
    page = (registered or {}).get("page")
    pages = [path for name in PAGES if (path := REPORT / name).exists()]
    places = [f"- `{path.absolute()}`" for path in pages]
    if experiment:
        places = [f"- `{path}`, after `dvc exp apply {experiment}`" for path in pages]
    places += [f"- [The run in MLflow]({as_seen(page, params)})"] if page else []
    create_markdown_artifact(
        "\n".join([unwrapped(table), "", *places, ""]),
        key="guide-report",
        description="Guide against CFG",
    )
    if rows := rows_of(table):
        create_table_artifact(rows, key="guide-table", description="Guide against CFG")
    publish_image(REPORT / "grid.png", "guide-images", "Guide against CFG, of the same seeds")
    if version is None:
        log(why_not)
        return
    link, note = version_page(params, version)
    name = params.register_.name
    create_link_artifact(
        link,
        link_text=f"{name} version {version}",
        key="guide-version",
        description=f"The version in MLflow{note}",
    )
    log(f"Version {version} of {name}: {link}{note}")


def version_here() -> tuple[str | None, str]:
    """The version that results/report is of in this checkout's registry; else why none is known."""
    if not SUMMARY.exists():
        return None, f"{REPORT} says of no version"
    said: list[str] = []
    try:
        run("registered", [sys.executable, "-m", "components.registered"], said.append)
    except StageFailed as error:
        return None, said[-1] if error.exit_code == NOT_HERE else str(error)
    return said[-1], ""


def publish_metrics(model: str, path: Path) -> None:
    """Show one model's metrics and pictures, which are in the folder `path`."""
    metrics = headline(Evaluation.load(path))
    rows = [{"metric": name, "value": str(value)} for name, value in metrics.items()]
    create_table_artifact(rows, key=_key("metrics", model), description=f"Results on {model}")
    publish_image(path / "grid.png", _key("images", model), f"Images of {model}")


def publish_image(path: Path, key: str, description: str) -> None:
    """Show a picture on the run's page; it is kept in the server's database, and so made small."""
    if not path.exists():
        return
    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((MAX_PIXELS, MAX_PIXELS))
    file = io.BytesIO()
    small.save(file, "WEBP", quality=80)
    content = base64.b64encode(file.getvalue()).decode()
    create_image_artifact(f"data:image/webp;base64,{content}", key=key, description=description)


def version_page(params: Params, version: str) -> tuple[str, str]:
    """The page of a registered version, and what has to be said beside its address."""
    uri = resolve(params.tracking.uri)
    is_server = uri.startswith(("http://", "https://"))
    place = without_secrets(uri).rstrip("/") if is_server else LOCAL_MLFLOW
    note = "" if is_server else " (after: make mlflow)"
    page = f"{place}/#/models/{params.register_.name}/versions/{version}"
    # MLflow opens on another kind.
    return as_seen(f"{page}?workflowType=machine_learning", params), note


def as_seen(page: str, params: Params) -> str:
    """A page of MLflow's server by the address that a browser has for it, PNP_MLFLOW_UI_URL."""
    own = without_secrets(resolve(params.tracking.uri)).rstrip("/")
    seen = without_secrets(os.environ.get("PNP_MLFLOW_UI_URL", "")).rstrip("/")
    return seen + page.removeprefix(own) if seen and page.startswith(f"{own}/") else page


def unwrapped(text: str) -> str:
    """Markdown with a line for each paragraph: Prefect's page breaks where a line ends."""
    lines = [""]
    for line in text.splitlines():
        goes_on = line and lines[-1] and "|" not in (line[0], lines[-1][0])
        lines[-1:] = [f"{lines[-1]} {line}"] if goes_on else [lines[-1], line]
    return "\n".join(lines[1:])


def rows_of(table: str) -> list[dict[str, str]]:
    """The rows of the first table in a Markdown text, by the names of its columns."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(cells[0], row, strict=False)) for row in cells[2:]] if cells else []


def _key(what: str, name: str) -> str:
    """A key as Prefect wants it: small letters, digits and dashes."""
    return f"{what}-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}"
