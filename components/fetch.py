"""A registered guide's files: `python -m components.fetch --version champion --to FOLDER`.

Prints the version that was fetched. Exits with code 4 if there is no champion.
"""

import argparse
import shutil
import sys
from functools import partial
from pathlib import Path

from components.cli import main
from components.params import Params
from pnp_core.files import atomic_folder

NO_CHAMPION = 4


def run(params: Params, version: str, folder: Path) -> None:
    """Copy a version's files into `folder`, which is replaced.

    Raises ValueError if there is no such version, TrackingError if MLflow can't tell.
    """
    from components.tracking import CHAMPION, Registry

    registry = Registry(params.tracking, params.register_.name)
    number = registry.champion() if version == CHAMPION else version
    if number is None:
        print(f"{registry.name} has no {CHAMPION} yet: promote a version first")
        sys.exit(NO_CHAMPION)
    source = registry.folder(number)
    with atomic_folder(folder) as new:
        shutil.copytree(source, new, dirs_exist_ok=True)
    print(f"{registry.name} version {number}: {folder}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m components.fetch")
    parser.add_argument("--version", default="champion", help="a number, or champion")
    parser.add_argument("--to", type=Path, required=True, help="the folder")
    arguments = parser.parse_args()
    main(partial(run, version=arguments.version, folder=arguments.to))
