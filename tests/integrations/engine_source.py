"""Modules of an engine that cannot be imported here, made of its unpacked source.

They have what the plug-ins compare: functions with their parameters and the names that their code
refers to, and records with their fields. Nothing of the source is run.
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any


class SourceModule(ModuleType):
    """A module whose attributes are made of the source when they are asked for."""

    def __init__(self, root: Path, name: str) -> None:
        super().__init__(name)
        base = root.joinpath(*name.split("."))
        self._is_package = (base / "__init__.py").exists()
        self._path = base / "__init__.py" if self._is_package else base.with_suffix(".py")
        self._root = root
        source = self._path.read_text(encoding="utf-8")
        self._tree = ast.parse(source)
        self._code = compile(source, str(self._path), "exec")

    def __getattr__(self, name: str) -> Any:
        for node in self._tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
                return _made(node, _code_in(self._code, name))
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return getattr(SourceModule(self._root, self._source_of(node)), alias.name)
        raise AttributeError(f"{self.__name__} has no {name}")

    def _source_of(self, node: ast.ImportFrom) -> str:
        """The module that a statement imports from."""
        if node.level == 0:
            return node.module or ""
        package = self.__name__.split(".")
        package = package[: len(package) - node.level + self._is_package]
        return ".".join([*package, *filter(None, [node.module])])


def _code_in(code: CodeType, name: str) -> CodeType:
    """The code of a function or class that is defined in other code; the last one wins."""
    found = [c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == name]
    return found[-1]


def _made(node: ast.FunctionDef | ast.ClassDef, code: CodeType) -> Any:
    if isinstance(node, ast.ClassDef):
        return _class_of(node, code)
    # a cell has to be there for each variable of an outer function
    function = FunctionType(code, {}, closure=tuple(CellType() for _ in code.co_freevars))
    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
    if "property" in decorators:
        return property(function)
    if "classmethod" in decorators:
        return classmethod(function)
    return staticmethod(function) if "staticmethod" in decorators else function


def _class_of(node: ast.ClassDef, code: CodeType) -> type:
    members = {
        one.name: _made(one, _code_in(code, one.name))
        for one in node.body
        if isinstance(one, ast.FunctionDef)
    }
    made = type(node.name, (), members)
    fields = [
        inspect.Parameter(one.target.id, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        for one in node.body
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
    ]
    made.__signature__ = inspect.Signature(fields)  # type: ignore[attr-defined]
    return made
