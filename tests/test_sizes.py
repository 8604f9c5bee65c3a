"""Files and functions stay short enough to be read at once."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60


def sources() -> dict[str, str]:
    return {
        path.relative_to(ROOT).as_posix(): path.read_text()
        for package in ("pnp_core", "components", "flows")
        for path in sorted((ROOT / package).rglob("*.py"))
    }


def test_no_file_of_the_packages_has_more_than_400_lines() -> None:
    long = {name for name, text in sources().items() if text.count("\n") > MAX_FILE_LINES}
    assert not long


def test_no_function_of_the_packages_has_more_than_60_lines() -> None:
    long = {
        f"{name}:{node.name}"
        for name, text in sources().items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    }
    assert not long
