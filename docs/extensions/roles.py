"""A Griffe extension: makes Google's docstrings with roles of Sphinx what mkdocstrings reads.

A role such as ``:func:`name` `` becomes a link of the API reference. The name is looked up from
where the docstring stands, as Python would; one that has no entry on the site stays plain code. The
file name of a page becomes a link to the page.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(attr|class|data|func|meth|mod):`(~?)([\w.]+)`")
#: A page of docs/ that a docstring names; MkDocs gives its first heading the id of the file's name.
PAGE = re.compile(r"`{0,2}docs/([a-z-]+)\.md`{0,2}")
#: A section that Griffe knows in the plural only.
EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
#: Up to the first colon Griffe takes the first line of this section for a type. Ours is text.
RETURNS = re.compile(r"^((?:Returns|Yields):\n {4}[^\n:]*): ", re.MULTILINE)


class RolesExtension(griffe.Extension):
    """Rewrites every docstring of a package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Rewrite the docstrings of ``pkg`` and all that is in it."""
        _rewrite(pkg)


def _rewrite(obj: griffe.Object | griffe.Alias) -> None:
    if obj.is_alias:
        return  # its target is visited where it is defined
    if obj.docstring is not None:
        text = ROLE.sub(lambda match: _link(obj, *match.groups()), obj.docstring.value)
        text = PAGE.sub(r'<autoref identifier="\1" optional>\1</autoref>', text)
        obj.docstring.value = RETURNS.sub(r"\1, ", EXAMPLE.sub("Examples:", text))
    for member in obj.members.values():
        _rewrite(member)


def _link(obj: griffe.Object | griffe.Alias, role: str, tilde: str, name: str) -> str:
    """An optional cross-reference of mkdocs-autorefs: plain code where the site has no entry."""
    shown = name.rpartition(".")[2] if tilde else name
    path = _resolved(obj, role, name)
    return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'


def _resolved(obj: griffe.Object | griffe.Alias, role: str, name: str) -> str:
    """The full path of ``name`` as the docstring's object, or one that encloses it, sees it."""
    name = name.removeprefix(f"{obj.package.path}.")
    scope: griffe.Object | griffe.Alias | None = obj
    while scope is not None:
        if name.partition(".")[0] in scope.members:
            found = scope[name]
            # llm_sampling.sample is a module, and the function that the package has by this name
            if role == "func" and found.is_module:
                found = found[found.name]
            return found.canonical_path
        scope = scope.parent
    return name
