"""What MkDocs is told beyond docs/: the pages in the repository's root, and the reference.

README.md becomes the front page. A link to a file that is no page of the site (a test, a table)
becomes its path. The reference has a section for each module, from its docstrings.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
FRONT_PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
}
PACKAGES = {
    "pnp_core": "The method",
    "components": "Stages and adapters",
    "flows": "Flows",
}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not in docs/."""
    for source, page in FRONT_PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for package, title in PACKAGES.items():
        page = f"reference/{package}.md"
        files.append(File.generated(config, page, content=reference(package, title)))
    return files


def reference(package: str, title: str) -> str:
    """A page with every module of a package that has something to say."""
    lines = [f"# {title}: `{package}`"]
    for path in sorted((ROOT / package).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if path.stem.startswith("_"):  # packages, and what runs them
            continue
        lines += ["", f"## `{name}`", "", f"::: {name}"]
        lines += ["    options:", "      show_root_heading: false"]
    return "\n".join(lines) + "\n"


def on_page_markdown(
    markdown: str,
    page: Any,
    config: Any,  # noqa: ARG001 - MkDocs passes it by name
    files: Files,
) -> str:
    """Links as they are right in the repository, made right for the site."""
    source = page.file.src_uri
    origin = {page: source for source, page in FRONT_PAGES.items()}.get(source, f"docs/{source}")

    def repaired(match: re.Match[str]) -> str:
        text, target, anchor = match["text"], match["target"], match["anchor"] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
        known = FRONT_PAGES.get(path, path.removeprefix("docs/"))
        outside = path not in FRONT_PAGES and not path.startswith("docs/")
        if outside or files.get_file_from_path(known) is None:
            if not (ROOT / path).exists():
                return match[0]  # MkDocs warns of it
            return f"`{path}`" if text.strip("`") in path else f"{text} (`{path}`)"
        relative = posixpath.relpath(known, posixpath.dirname(source) or ".")
        return f"{match['open']}{text}]({relative}{anchor})"

    link = (
        r"(?P<open>!?\[)(?P<text>[^\]]*)\]\((?!\w+:|#)(?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)"
    )
    return re.sub(link, repaired, markdown)
