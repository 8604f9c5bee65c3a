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
from components.promote import version as number_of
from pnp_core.files import atomic_folder

NO_CHAMPION = 4
INDEX = "bundle.json"  # of a guide's folder


def run(params: Params, version: str, folder: Path) -> None:
    """Copy a version's files into `folder`, which is replaced.

    Raises ValueError if there is no such version, or if the folder is not empty and holds no guide,
    TrackingError if MLflow can't tell.
    """
    from components.tracking import CHAMPION, Registry

    if folder.exists() and not _may_go(folder):
        raise ValueError(f"--to {folder}: it holds no guide, and would be replaced: name another")
    registry = Registry(params.tracking, params.register_.name)
    number = registry.champion() if version == CHAMPION else version
    if number is None:
        print(f"{registry.name} has no {CHAMPION} yet: promote a version first")
        sys.exit(NO_CHAMPION)
    with registry.folder(number) as source, atomic_folder(folder) as new:
        shutil.copytree(source, new, dirs_exist_ok=True)
    print(f"{registry.name} version {number}: {folder}")


def _may_go(folder: Path) -> bool:
    """Whether something is a guide's folder, or an empty one."""
    if not folder.is_dir() or folder.resolve() == Path.cwd():
        return False
    names = {path.name for path in folder.iterdir()}
    return not names or INDEX in names


def wanted(text: str) -> str:
    """A version's number, or the champion's name."""
    if text != "champion":
        try:
            return str(number_of(text))
        except ValueError:
            raise argparse.ArgumentTypeError(f"a number, or champion, not {text!r}") from None
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m components.fetch", description="Copy a registered guide's files."
    )
    said = "a number, or champion; default: %(default)s"
    parser.add_argument("--version", type=wanted, default="champion", help=said)
    parser.add_argument("--to", type=Path, required=True, help="the folder")
    arguments = parser.parse_args()
    main(partial(run, version=arguments.version, folder=arguments.to), reads_inputs=False)
