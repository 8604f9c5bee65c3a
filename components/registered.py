"""The version that results/report is of: `python -m components.registered`.

Prints its number. Exits with code 4 if this registry has no version of it: the report came from
elsewhere, or the version was lost.
"""

import sys

from components.cli import main, without_arguments
from components.params import Params
from components.paths import REPORT
from components.register import version_key
from pnp_core.files import read_json

NOT_HERE = 4


def run(params: Params) -> None:
    """Look for a version with the files and results of this checkout.

    Raises ValueError or OSError if there is no report or it can't be read, TrackingError if MLflow
    can't tell.
    """
    summary = REPORT / "summary.json"
    if not summary.exists():
        raise ValueError(f"there is no {summary}: run the stage register first")
    from components.tracking import Registry

    registry = Registry(params.tracking, params.register_.name)
    version = registry.find(version_key(read_json(summary)))
    if version is None:
        print(
            f"{REPORT} and the guide here are no version of {registry.name} in MLflow at "
            f"{registry.store.name}. To register: dvc repro --force --single-item register"
        )
        sys.exit(NOT_HERE)
    print(version)


if __name__ == "__main__":
    without_arguments("registered", __doc__)
    main(run, reads_inputs=False)
