"""The log's form, and that documents name files which exist."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent
LOG = (ROOT / "docs/LOG.md").read_text()
HEADING = re.compile(
    r"^### E(\d+), (\d{4}-\d\d-\d\d), (first world|second world|no world): (\S.*)$", re.MULTILINE
)
# pages that name files of the repository in `code`
NAMING_FILES = [
    "docs/architecture.md",
    "docs/images/architecture.svg",
    "CONTRIBUTING.md",
    "README.md",
    "docs/concepts.md",
]


def entries() -> list[tuple[int, str, str]]:
    """Number, date and text of each entry, as they stand."""
    found = list(HEADING.finditer(LOG))
    ends = [match.start() for match in found[1:]] + [len(LOG)]
    return [
        (int(match[1]), match[2], LOG[match.end() : end])
        for match, end in zip(found, ends, strict=True)
    ]


def test_every_heading_of_the_logs_entries_has_number_date_world_and_question() -> None:
    below = LOG.split("\n## Entries\n")[1]
    assert len(re.findall(r"^#", below, re.MULTILINE)) == len(entries()) > 100


def test_every_entry_of_the_log_has_command_numbers_and_conclusion_in_this_order() -> None:
    for number, _, text in entries():
        labels = re.findall(r"^\*\*(Command|Numbers|Conclusion)\.\*\*", text, re.MULTILINE)
        assert labels == ["Command", "Numbers", "Conclusion"], f"E{number}"


def test_the_log_is_newest_first_and_numbers_its_entries_without_gaps() -> None:
    numbers = [number for number, _, _ in entries()]
    assert numbers == list(range(len(numbers), 0, -1))
    assert all(later >= earlier for (_, later, _), (_, earlier, _) in pairwise(entries()))


def test_the_logs_lines_have_at_most_120_characters() -> None:
    assert [line for line in LOG.splitlines() if len(line) > 120] == []


def test_references_to_entries_of_the_log_lead_to_entries() -> None:
    anchors = set(re.findall(r'^<a id="(e\d+)"></a>$', LOG, re.MULTILINE))
    assert anchors == {f"e{number}" for number, _, _ in entries()}
    for page in ROOT.glob("**/*.md"):
        if ".venv" not in page.parts:
            links = set(re.findall(r"(?:LOG\.md|\()#(e\d+)\)", page.read_text()))
            assert links <= anchors, page
    assert {f"e{number}" for number in re.findall(r"\bE(\d+)\b", LOG)} <= anchors


def test_tables_that_the_log_names_are_there() -> None:
    named = re.findall(r"`(benchmarks/results/[^`]+\.md)`", LOG)
    assert named and all((ROOT / name).exists() for name in named)


@pytest.mark.parametrize("page", NAMING_FILES)
def test_files_and_folders_that_a_page_names_exist(page: str) -> None:
    text = re.sub(r"^```(?!mermaid).*?^```", "", (ROOT / page).read_text(), flags=re.M | re.S)
    tops = "|".join(path.name for path in ROOT.iterdir() if path.name[0] not in "._")
    written = ("build/", "data/", "guides/", "results/", "runs/", "zoo/runs")  # not in git
    named = re.findall(rf"(?<![\w/.-])((?:{tops})(?:/[\w./-]*\w/?)?)(?![\w/<*])", text)
    paths = [name for name in named if "/" in name or name.endswith((".yaml", ".toml", ".py"))]
    missing = [
        name
        for name in paths
        if not f"{name}/".startswith(written)
        and not (ROOT / name).exists()
        and not (ROOT / f"{name}.py").exists()  # a module by its name alone
    ]
    assert paths and not missing


@pytest.mark.parametrize(
    "name",
    [".pre-commit-config.yaml", ".github/workflows/ci.yml", ".devcontainer/devcontainer.json"],
)
def test_what_runs_elsewhere_calls_make_targets_that_exist(name: str) -> None:
    configured = YAML(typ="safe").load(ROOT / name)  # JSON is YAML
    text = (ROOT / name).read_text()
    called = re.findall(r"\bmake ([a-z-]+)", text)
    if name.endswith("ci.yml"):
        called += configured["jobs"]["make"]["strategy"]["matrix"]["target"]
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert called and set(called) <= set(targets)
