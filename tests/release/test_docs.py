"""Tests of the documentation site: every public name has an entry, every page can be reached.

The site is built once, without a network, as ``.ci/run`` builds it.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import pkgutil
import re
import subprocess
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import llm_sampling
from llm_sampling import backends, generation
from llm_sampling.generation import models
from llm_sampling.tools import explain, tuning

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"

#: A role of reStructuredText. All of them must be replaced by links on the site.
ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):(?:`|<code>)")


def own_names(module: ModuleType) -> list[str]:
    """Return the classes and functions without a leading underscore that a module defines."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]


#: module -> the public names that are imported from it. The module huggingface has a test of its
#: own, because it needs transformers.
PUBLIC: dict[str, Sequence[str]] = {
    "llm_sampling": llm_sampling.__all__,
    "llm_sampling.backends": [*own_names(backends), "BACKENDS"],
    "llm_sampling.backends.base": ["BackendModule", "SampleCall"],
    "llm_sampling.generation": generation.__all__,
    "llm_sampling.generation.models": own_names(models),
    "llm_sampling.integrations.continuous_batching": ["fused_continuous_batching"],
    "llm_sampling.integrations.grammar": ["GrammarMasks", "check", "llguidance", "xgrammar"],
    "llm_sampling.integrations.sglang": ["register"],
    "llm_sampling.integrations.vllm": ["register"],
    "llm_sampling.tools.explain": explain.__all__,
    "llm_sampling.tools.tuning": tuning.__all__,
}


def entries() -> list[str]:
    """Return the paths of all objects that have an entry in the pages of the API reference."""
    pages = sorted((DOCS / "reference").glob("*.md"))
    texts = [page.read_text(encoding="utf-8") for page in pages]
    return [path for text in texts for path in re.findall(r"^::: (\S+)$", text, re.MULTILINE)]


def without_entry(public: Mapping[str, Sequence[str]], paths: Sequence[str]) -> set[str]:
    """Return the public names that none of the paths leads to.

    A path may lead to the object through another module than the one it is imported from.
    """
    found = {(path.rpartition(".")[2], id(pkgutil.resolve_name(path))) for path in paths}
    return {
        f"{module}.{name}"
        for module, names in public.items()
        for name in names
        if (name, id(getattr(importlib.import_module(module), name))) not in found
    }


def test_every_public_name_has_an_entry() -> None:
    paths = [path for path in entries() if ".huggingface." not in path]
    assert without_entry(PUBLIC, paths) == set()


def test_every_public_name_of_hugging_face_has_an_entry() -> None:
    pytest.importorskip("transformers", reason="needs the extra 'cli'")
    module = importlib.import_module("llm_sampling.integrations.huggingface")
    paths = [path for path in entries() if ".huggingface." in path]
    assert without_entry({module.__name__: own_names(module)}, paths) == set()


def test_a_name_without_an_entry_is_seen() -> None:
    paths = [path for path in entries() if path != "llm_sampling.Sampler"]
    paths = [path for path in paths if ".huggingface." not in path]
    assert without_entry(PUBLIC, paths) == {"llm_sampling.Sampler"}


def test_no_name_has_two_entries() -> None:
    assert len(set(entries())) == len(entries())


@pytest.mark.parametrize("path", [path for path in entries() if ".huggingface." not in path])
def test_every_entry_has_a_docstring(path: str) -> None:
    """Every class, function and module in the API reference has a written docstring.

    The signature that a dataclass gets as its docstring does not count. Data is exempt: it is
    documented by a comment.
    """
    value = pkgutil.resolve_name(path)
    if inspect.isclass(value) or inspect.isroutine(value) or inspect.ismodule(value):
        assert value.__doc__
        assert not value.__doc__.startswith(f"{value.__name__}(")


def pages_of(nav: Any) -> Iterator[str]:
    """Yield the pages in a navigation of MkDocs."""
    if isinstance(nav, str):
        yield nav
    else:
        for entry in nav.values() if isinstance(nav, dict) else nav:
            yield from pages_of(entry)


def test_every_page_is_in_the_navigation_once() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    found = list(pages_of(config["nav"]))
    assert len(set(found)) == len(found)
    assert {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")} <= set(found)


# ---- the site ------------------------------------------------------------------------------------


def without_mkdocs() -> str:
    """Return the reason why the site cannot be built here, or an empty text."""
    needed = ("mkdocs", "material", "mkdocstrings_handlers", "griffe_sphinx")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    return f"needs the extra 'docs': {', '.join(missing)}" if missing else ""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site with the command of ``.ci/run``, behind a proxy that refuses connections."""
    reason = without_mkdocs()
    if reason:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    folder = tmp_path_factory.mktemp("site")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, **nowhere, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


def test_site_has_every_entry(site: Path) -> None:
    """The inventory, which other projects' documentation uses for links, lists every entry."""
    inventory = (site / "objects.inv").read_bytes()
    listed = zlib.decompress(inventory[inventory.index(b"zlib.\n") + 6 :]).decode()
    names = {line.split()[0] for line in listed.splitlines()}
    assert set(entries()) <= names
    missing = {f"{module}.{name}" for module, own in PUBLIC.items() for name in own} - names
    # The function `explain` has the same path as its module, so its entry is MODULE.FUNCTION.
    assert missing == {path for path in missing if f"{path}.{path.rpartition('.')[2]}" in names}


def test_site_shows_no_role(site: Path) -> None:
    seen = [page.name for page in site.rglob("*.html") if ROLE.search(page.read_text("utf-8"))]
    assert seen == []


def test_site_fetches_nothing(site: Path) -> None:
    """No script, style, font or picture of a page is loaded from another server."""
    loads = re.compile(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=\"?(?:https?:)?//[^\s>]*")
    for page in site.rglob("*.html"):
        assert loads.findall(page.read_text(encoding="utf-8")) == [], page.name


def test_links_to_sources_lose_the_link_alone(site: Path) -> None:
    """Links to source files, which the site does not have, become plain text.

    The start page is README.md, whose table of backends links to the sources of the kernels.
    """
    start = (site / "index.html").read_text(encoding="utf-8")
    assert "(csrc/cpu/sample.cpp)" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert "sample.cpp" not in start
    assert "<td>C++</td>" in start


def test_roles_become_links() -> None:
    """A role becomes a link to the object that its name means at the place of the docstring."""
    griffe = pytest.importorskip("griffe", reason="needs the extra 'docs'")
    spec = importlib.util.spec_from_file_location("roles", DOCS / "extensions" / "roles.py")
    assert spec is not None
    assert spec.loader is not None
    roles = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(roles)
    source = (
        "class A:\n"
        '    """See :func:`f`, :meth:`g` and :class:`~elsewhere.B`."""\n'
        "    def g(self):\n"
        '        """Call :func:`pkg.f`.\n\n'
        "        Returns:\n"
        "            int64 ``(rows,)``: the tokens.\n"
        '        """\n'
        "def f(): ...\n"
    )
    package = griffe.visit("pkg", filepath=Path("pkg/__init__.py"), code=source)
    roles.RolesExtension().on_package(pkg=package)

    def link(path: str, shown: str) -> str:
        return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'

    assert package["A"].docstring.value == (
        f"See {link('pkg.f', 'f')}, {link('pkg.A.g', 'g')} and {link('elsewhere.B', 'B')}."
    )
    assert package["A.g"].docstring.value == (
        f"Call {link('pkg.f', 'pkg.f')}.\n\nReturns:\n    int64 ``(rows,)``, the tokens."
    )
