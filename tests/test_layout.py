"""What holds the repository together: one name per stage, lean imports, documents that are true."""

import ast
import importlib.util
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from prefect import Task
from ruamel.yaml import YAML

import flows.distill
import flows.evaluate
import flows.promote

ROOT = Path(__file__).parent.parent
STAGES = ("prepare", "cache", "distill", "halve", "evaluate", "register")
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def load(name: str) -> dict[str, Any]:
    return dict(YAML(typ="safe").load(ROOT / name))


FOR_SERVERS = ("docker", "helm", "kubectl", "mkdir", "openssl")  # of docs/deploying.md

# One name per stage


def test_dvc_defines_exactly_the_stages() -> None:
    assert tuple(load("dvc.yaml")["stages"]) == STAGES


@pytest.mark.parametrize("stage", [*STAGES, "promote"])
def test_a_stage_has_one_name_everywhere(stage: str) -> None:
    source = (ROOT / f"components/{stage}.py").read_text()
    assert re.search(r"^def run\(params: Params", source, re.MULTILINE), "a module with run()"
    assert stage in load("params.yaml"), "a section of params.yaml"
    flow = flows.promote if stage == "promote" else flows.distill
    task = getattr(flow, stage)
    assert isinstance(task, Task) and task.name == stage, "a Prefect task"


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_runs_the_module_of_the_stages_name(stage: str) -> None:
    defined = load("dvc.yaml")["stages"][stage]
    command = defined.get("do", defined)["cmd"].split()
    assert command[:3] == ["python", "-m", f"components.{stage}"]


def test_the_flow_calls_the_stages_in_the_order_of_the_graph() -> None:
    body = inspect.getsource(flows.distill.bring_up_to_date)
    called = re.findall(rf"^\s+({'|'.join(STAGES)})(?:_all)?\(", body, re.MULTILINE)
    assert tuple(called) == STAGES


def test_every_deployment_names_a_flow() -> None:
    for deployment in load("prefect.yaml")["deployments"]:
        path, name = deployment["entrypoint"].split(":")
        module = sys.modules[path.removesuffix(".py").replace("/", ".")]
        flow = getattr(module, name)
        assert flow.name in ("distill", "evaluate-finetune", "reevaluate", "promote")
        for parameter in flow.parameters.properties.values() if flow.name != "promote" else ():
            assert parameter.get("description"), "what the form in Prefect's UI says of it"


# Lean imports


IMPORTED = """
import importlib, json, sys
for tool in ("prefect", "ray", "mlflow", "dvc"):
    sys.modules[tool] = None  # importing it now raises ImportError
import pnp_core, pnp_core.files
heavy = sorted({"torch", "diffusers", "transformers"} & set(sys.modules))
import pnp_core.plug  # the module has the name of a function
from pnp_core import *
hidden = [name for name in pnp_core.__all__ if not callable(globals()[name])]
found = {"heavy": heavy, "hidden": hidden}
found["plug"] = pnp_core.plug is sys.modules["pnp_core.plug"].plug
found["failed"] = []
for module in sys.argv[1:]:
    try:
        importlib.import_module(module)
    except ImportError as error:
        found["failed"].append(f"{module}: {error}")
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def imported() -> dict[str, Any]:
    """What a process without the pipeline's tools finds as it imports the library."""
    paths = [path.relative_to(ROOT) for path in (ROOT / "pnp_core").rglob("[!_]*.py")]
    modules = [".".join(path.with_suffix("").parts) for path in paths]
    assert "pnp_core.cache.build" in modules
    command = [sys.executable, "-c", IMPORTED, *modules]
    return json.loads(subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE).stdout)


def test_the_method_imports_without_the_pipelines_tools(imported: dict[str, Any]) -> None:
    assert imported["failed"] == []


def test_the_library_loads_torch_with_the_first_name_that_needs_it(
    imported: dict[str, Any],
) -> None:
    assert imported["heavy"] == []
    assert imported["hidden"] == [], "a module hides a function"
    assert imported["plug"], "the module hides the function"


def test_text_files_are_read_and_written_in_utf_8_whatever_the_locale() -> None:
    packages = ("pnp_core", "components", "flows")
    for path in (path for package in packages for path in (ROOT / package).rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(call.func, "attr", "") if isinstance(call, ast.Call) else ""
            if name in ("read_text", "write_text"):
                assert isinstance(call, ast.Call)
                assert any(keyword.arg == "encoding" for keyword in call.keywords), (
                    f"{path.relative_to(ROOT)}, line {call.lineno}"
                )


# What is installed


def test_constraints_are_exact_and_satisfy_pyproject() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.+]*", line) for line in lines)
    pinned = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + sum(project["optional-dependencies"].values(), [])
    for requirement in map(Requirement, wanted):
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement}: pinned to {version}"


# Documents


def commands(document: Path) -> list[list[str]]:
    """Every command of the document's `sh` blocks, comments and continuations resolved."""
    blocks = re.findall(r"^```sh\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


COMMANDS = [
    pytest.param(words, id=f"{document.name}: {' '.join(words)[:60]}")
    for document in DOCUMENTS
    for words in commands(document)
]


@pytest.mark.parametrize("words", COMMANDS)
def test_a_documented_command_exists(words: list[str]) -> None:
    while "=" in words[0] or words[0] == "export":  # settings before a command, or alone
        words = words[1:]
        if not words:
            return
    if words[:2] == ["env", "-u"]:
        words = words[3:]
    tool, *arguments = words
    tools = Path(sys.executable).parent
    if tool == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert arguments[0] in targets
    elif Path(tool).name == "python" and arguments[0] == "-m":
        check_module(arguments[1], arguments[2:])
    elif tool in ("dvc", "prefect", "mlflow", "ray", "pytest", "python"):
        assert (tools / tool).exists()
    else:
        assert tool in ("git", "cd", "aws", "curl", ".", "pre-commit", *FOR_SERVERS)


def check_module(name: str, arguments: list[str]) -> None:
    """The module is there, and if it is ours, its package knows the options."""
    spec = importlib.util.find_spec(name)
    assert spec and spec.origin
    if name.split(".")[0] in ("components", "flows", "zoo", "benchmarks"):
        source = "".join(path.read_text() for path in Path(spec.origin).parent.glob("*.py"))
        for option in filter(lambda word: word.startswith("--"), arguments):
            assert f'"{option.split("=")[0]}"' in source, f"{name} has no {option}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text())
    missing = [link for link in links if not (document.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_in_documents_compiles(document: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", document.read_text(), re.M | re.S):
        compile(block, document.name, "exec")


def test_make_says_what_to_do_where_git_knows_no_repository(tmp_path: Path) -> None:
    """As in a folder that was downloaded, before anything is installed."""
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    command = ["make", "--file", str(ROOT / "Makefile"), "need-git"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "git init" in done.stderr
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0


def test_what_make_runs_keeps_what_python_compiles() -> None:
    command = ["make", "--silent", "--eval", "shown:; @env", "shown"]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "SEEN": "1"}
    shown = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert "SEEN=1" in shown and "PYTHONDONTWRITEBYTECODE" not in shown


def test_make_gives_the_services_every_file_that_leaves_them_tests() -> None:
    command = ["make", "--silent", "test-services", "INSTALLED=Makefile", "PY=echo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    leaves = re.compile(r"mark\.services|^from tests\.cases import", re.MULTILINE)
    files = [
        path for path in (ROOT / "tests").rglob("test_*.py") if leaves.search(path.read_text())
    ]
    expected = {path.relative_to(ROOT).as_posix() for path in files}
    assert {line.split()[-1] for line in done.stdout.splitlines()} == expected
    assert "tests/pipelines/test_classes.py" in expected
