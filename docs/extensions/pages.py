"""An MkDocs hook: pages that stand outside of docs/, and links that work there and on the site.

The README is the first page, and the changelog, the contributing guide, the benchmarks and the
examples are pages too. Every Markdown file links to others by their paths in the repository; here
these become paths of the site. What the site does not have, such as a source file, loses its link
and keeps its name.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]

#: Files outside of docs/ to their paths on the site.
OUTSIDE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks/index.md",
    "examples/README.md": "examples.md",
}
OUTSIDE |= {
    path.relative_to(ROOT).as_posix(): path.relative_to(ROOT).as_posix()
    for kind in ("*.md", "*.json", "*.png")
    for path in sorted((ROOT / "benchmarks" / "results").glob(kind))
}

LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the files outside of docs/."""
    for path, uri in OUTSIDE.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make paths of the site out of paths of the repository."""
    uri = page.file.src_uri
    if uri == "index.md":
        page.meta["hide"] = ["navigation"]
    source = next((path for path, at in OUTSIDE.items() if at == uri), f"docs/{uri}")

    def rewritten(match: re.Match[str]) -> str:
        mark, label, target, anchor = match.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if "://" in target or not (ROOT / path).exists():
            return match[0]
        there = OUTSIDE.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(there) is None:
            return label
        return f"{mark}[{label}]({posixpath.relpath(there, posixpath.dirname(uri))}{anchor or ''})"

    return LINK.sub(rewritten, markdown)
