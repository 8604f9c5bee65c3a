"""docs/reviewing.md: its commands, read from the page and run one after another."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from PIL import Image

from tests.stores import free_port
from tests.toy import ROOT, make_repository, toy_params, write_params

PAGE = ROOT / "docs/reviewing.md"
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
MAY_REFUSE = "# exit code 3 if it is refused"


def commands() -> list[str]:
    """Every line of every block of shell, in order."""
    return [line for block in BLOCK.findall(PAGE.read_text()) for line in block.splitlines()]


def test_the_page_has_commands_for_each_part_of_the_story() -> None:
    told = "\n".join(commands())
    for part in ("--dry-run", "--reevaluate", "--force --reason", "--rollback", "--log", "serve"):
        assert part in told


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A checkout with the toy world; what is started in it ends with the test."""
    folder = tmp_path / "checkout"
    params = toy_params()
    params["evaluate"]["grid_prompts"] = ["green bar", "blue ring"]
    make_repository(folder, params)
    monkeypatch.chdir(folder)
    yield folder
    for process in psutil.process_iter(["cwd"]):
        if process.info["cwd"] == str(folder) and process.pid != os.getpid():
            process.kill()


@pytest.mark.services
@pytest.mark.timeout(1800)
def test_every_command_of_the_page_works(repository: Path) -> None:
    port = free_port()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PNP_", "PREFECT_"))}
    tools = Path(sys.executable).parent
    environment |= {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "MLFLOW_TRACKING_URI": "sqlite:///mlflow.db",
        "OMP_NUM_THREADS": "1",
        **{
            f"GIT_{who}_{what}": "test"
            for who in ("AUTHOR", "COMMITTER")
            for what in ("NAME", "EMAIL")
        },
    }
    for line in commands():
        if line.startswith("git commit --all"):
            params = toy_params()
            params["distill"]["num_images"] //= 2
            write_params(Path(), params)
        line = line.replace("5001", str(port)).replace("openmoji", "tuned")
        with Path("../said.log").open("w+") as log:  # a server's is written to by the server
            done = subprocess.run(
                line, shell=True, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        said = Path("../said.log").read_text()
        allowed = (0, 3) if line.endswith(MAY_REFUSE) else (0,)
        assert done.returncode in allowed and "Traceback" not in said, f"{line}\n{said}"
    for name in ("apple.png", "served.png"):
        assert Image.open(name).width >= 32
