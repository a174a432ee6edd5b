"""A Griffe extension: roles of reStructuredText in docstrings become links of the API reference.

The docstrings say ``:func:`name` ``, as Sphinx reads it, and mkdocstrings reads Markdown. A name is
looked up from where the docstring stands, as Python would; one that has no entry on the site stays
plain code.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`(~?)([\w.]+)`")
#: A page of docs/ that a docstring names; MkDocs gives its first heading the id of the file's name.
PAGE = re.compile(r"`{0,2}docs/([a-z-]+)\.md`{0,2}")


class RolesExtension(griffe.Extension):
    """Rewrites every docstring of a package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Rewrite the docstrings of ``pkg`` and all that is in it."""
        _rewrite(pkg)


def _rewrite(obj: griffe.Object | griffe.Alias) -> None:
    if obj.is_alias:
        return  # its target is visited where it is defined
    if obj.docstring is not None:
        text = ROLE.sub(lambda match: _link(obj, match[2], bool(match[1])), obj.docstring.value)
        obj.docstring.value = PAGE.sub(r'<autoref identifier="\1" optional>\1</autoref>', text)
    for member in obj.members.values():
        _rewrite(member)


def _link(obj: griffe.Object | griffe.Alias, name: str, is_short: bool) -> str:
    """An optional cross-reference of mkdocs-autorefs, which is plain code where there is no entry."""
    shown = name.rpartition(".")[2] if is_short else name
    path = _resolved(obj, name)
    return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'


def _resolved(obj: griffe.Object | griffe.Alias, name: str) -> str:
    """The full path of ``name`` as the docstring's object, or one that encloses it, sees it."""
    scope: griffe.Object | griffe.Alias | None = obj
    while scope is not None:
        try:
            return scope[name].canonical_path
        except (KeyError, griffe.AliasResolutionError):
            scope = scope.parent
    return name
