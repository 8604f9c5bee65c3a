"""From a report's content to one HTML file."""

import base64
import hashlib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.report.content import Report, view
from components.report.gallery import PictureSet, as_json
from pnp_core.files import write_text

if TYPE_CHECKING:
    from jinja2 import Template

HERE = Path(__file__).parent


def write(path: Path, report: Report, pictures: Sequence[PictureSet]) -> None:
    """Write the page to `path`, whole or not at all."""
    write_text(path, render(report, pictures))


def render(report: Report, pictures: Sequence[PictureSet]) -> str:
    """The page, as HTML."""
    from markupsafe import Markup

    script = (HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    version = f" version {report.version}" if report.version else ""
    return _template().render(
        **view(report),
        title=f"{report.name}{version}",
        # These two are ours, and stand between tags whose content is not escaped.
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=digest,
        pictures=_gallery(pictures),
    )


def _gallery(sets: Sequence[PictureSet]) -> dict[str, Any]:
    from markupsafe import Markup

    text = json.dumps(as_json(sets), separators=(",", ":"))
    return {
        "sets": sets,
        "models": list(dict.fromkeys(one.model for one in sets)),
        "num_ways": max((len(one.ways) for one in sets), default=0),
        "data": Markup(text.replace("<", "\\u003c")),  # a prompt can't end the element
    }


@cache
def _template() -> "Template":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja")
