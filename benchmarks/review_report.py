"""What a reviewer looks at, in numbers: the size of the page, what it asks for, the run's numbers.

`python -m benchmarks.review_report` measures the results/report of this checkout.
"""

import json
from pathlib import Path

from benchmarks.command import command_parser, errors_in_one_line
from components import headlines
from components.evaluation import Evaluation
from components.paths import REPORT
from pnp_core.files import read_json
from tests import chromium

SCREENS = ((390, False), (1200, False), (1200, True))  # width in pixels, dark
KEYS = "12345sh"  # what a reviewer would press


def measure(folder: Path = REPORT) -> dict[str, float]:
    """`report_kb`, `report_requests`, `report_errors` and `headline_metrics`.

    The page is opened in a headless Chromium on each screen, and its keys are pressed.

    Raises:
        ValueError: there is no report in `folder`, or no Chromium here.
    """
    page, program = folder / "index.html", chromium.find()
    if not page.exists():
        raise ValueError(f"there is no {page}: dvc repro makes it")
    if program is None:
        raise ValueError("no Chromium is installed: apt-get install chromium")
    requests = errors = 0
    with chromium.browser(program) as tab:
        for width, dark in SCREENS:
            tab.resize(width, dark=dark).open(page.absolute().as_uri())
            for key in KEYS:
                tab.press(key)
            tab.tell("document.body.offsetHeight")
            requests, errors = requests + len(tab.requests), errors + len(tab.errors)
    models = read_json(folder / "summary.json")["models"]
    evaluations = {
        name: Evaluation.from_json(values, where=f"{folder}/summary.json")
        for name, values in models.items()
    }
    num_steps = [steps for evaluation in evaluations.values() for steps in evaluation.num_steps]
    return {
        "report_kb": round(page.stat().st_size / 1000),
        "report_requests": requests,
        "report_errors": errors,
        "headline_metrics": len(headlines.numbers(evaluations, [], num_steps)),
    }


def page(scratch: Path) -> tuple[dict[str, float], str]:  # noqa: ARG001, what a measure is given
    """The report of this checkout, for `benchmarks.review`. Raises as `measure` does."""
    widths = ", ".join(str(width) for width, _ in SCREENS)
    return measure(), f"{REPORT} on screens {widths} pixels wide"


@errors_in_one_line()
def main() -> None:
    """Print what the report of this checkout measures."""
    command_parser("review_report", __doc__).parse_args()
    print(json.dumps(measure()))


if __name__ == "__main__":
    main()
