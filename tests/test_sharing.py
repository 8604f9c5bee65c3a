"""docs/sharing.md, command by command: one checkout makes a result, a clone takes it up."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.toy import make_repository

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/sharing.md").read_text()
REMOTE = "/srv/pnp-guide"  # of the page


def section(title: str) -> list[str]:
    """The commands of a section of the page."""
    body = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    (text,) = (part for part in body if part.startswith(title))
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


class Checkout:
    """A folder in which the page's commands are typed."""

    def __init__(self, folder: Path, remote: Path) -> None:
        self.folder, self.remote = folder, remote

    def type(self, line: str) -> str:
        tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_"))}
        person = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@localhost"}
        person |= {"GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@localhost"}
        home = {"PREFECT_HOME": str(self.folder / ".prefect"), "PATH": tools}
        done = subprocess.run(
            ["sh", "-c", line.replace(REMOTE, str(self.remote))],
            cwd=self.folder,
            env=kept | person | home | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, f"{line}:\n{done.stdout}"
        return done.stdout


@pytest.mark.services
@pytest.mark.timeout(1800)
def test_the_round_of_push_and_pull_works_as_the_page_has_it(tmp_path: Path) -> None:
    ours = Checkout(tmp_path / "ours", tmp_path / "remote")
    make_repository(ours.folder)
    subprocess.run(["git", "clone", "--bare", "--quiet", ours.folder, tmp_path / "hub"], check=True)
    ours.type(f"git remote add origin {tmp_path / 'hub'}")
    ours.type("git fetch --quiet && git branch --set-upstream-to origin/$(git branch --show)")
    for line in section("Once: a remote"):
        ours.type(line)
    told = [ours.type(line) for line in section("Who makes a result")]
    assert "git add dvc.lock && git commit" in told[0] and "To share it: git push" in told[0]

    theirs = Checkout(tmp_path / "theirs", tmp_path / "remote")
    subprocess.run(["git", "clone", "--quiet", tmp_path / "hub", theirs.folder], check=True)
    lines = section("Who uses it")
    assert lines[:2] == ["git pull", "dvc pull"]
    for line in lines[:2]:
        theirs.type(line)
    assert not (theirs.folder / "data/cache").exists(), "and nothing may want it"
    params = theirs.folder / "params.yaml"
    text = params.read_text()
    for seed, line in enumerate(lines[2:], 1):
        params.write_text(re.sub(r"(?s)(evaluate:.*?seed: )\d", rf"\g<1>{seed}", text))
        said = theirs.type(line)
        ran = set(re.findall(r"Running stage '(\w+)", said))
        assert ran == {"evaluate", "register"}, said
    assert not (theirs.folder / "data/cache").exists()

    origin = theirs.type(*section("What a version says"))
    summary = (theirs.folder / "results/report/summary.json").read_text()
    commit = re.findall(r"git_commit (\w+)-dirty", origin)  # params.yaml was edited
    assert commit and f'"git_commit": "{commit[0]}-dirty"' in summary
    lock = re.findall(r"lock_hash +(\w+)", origin)
    assert f'"lock_hash": "{lock[0]}"' in summary
