"""Every import in the source, with what the import tests must know of it."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from layout.source import modules, tree

BY_STRING = {"import_module", "__import__"}  # functions that import what a string names


@dataclass(frozen=True, slots=True)
class Import:
    """One imported module: dotted name, line, and whether importing the file runs it."""

    target: str
    line: int
    at_load: bool


def imports(module: str, path: Path, known: Iterable[str]) -> list[Import]:
    """Return what the file of `module` imports, by line, relative names resolved, at any depth.

    ``from a import b`` counts as ``a.b`` where that is one of the `known` modules, else as ``a``.
    """
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    known = frozenset(known)
    text = path.read_text(encoding="utf-8")
    nodes = _nodes(tree(path), calls=any(name in text for name in BY_STRING))
    found = [
        Import(target, getattr(node, "lineno", 0), at_load)
        for node, at_load in nodes
        for target in _targets(node, package, known)
    ]
    return sorted(found, key=lambda item: item.line)


@cache
def of_every_module() -> dict[str, list[Import]]:
    """Return dotted name -> imports for every module."""
    return {name: imports(name, path, modules()) for name, path in modules().items()}


STATEMENTS = ("body", "orelse", "finalbody", "handlers", "cases")


def _nodes(module: ast.Module, *, calls: bool) -> Iterator[tuple[ast.AST, bool]]:
    """Yield every statement, with `calls` every expression as well, and whether loading the file runs it."""
    waiting: list[tuple[ast.AST, bool]] = [(module, True)]
    while waiting:
        node, at_load = waiting.pop()
        if isinstance(node, ast.If) and _for_type_checking(node):
            parts = [(child, False) for child in node.body]
            parts += [(child, at_load) for child in node.orelse]
        else:
            late = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            below = ast.iter_child_nodes(node) if calls else _statements(node)
            parts = [(child, at_load and not late) for child in below]
        yield from parts
        waiting += parts


def _statements(node: ast.AST) -> list[ast.AST]:
    return [child for field in STATEMENTS for child in getattr(node, field, ())]


def _for_type_checking(node: ast.If) -> bool:
    test = node.test
    return (
        getattr(test, "id", None) == "TYPE_CHECKING"
        or getattr(test, "attr", None) == "TYPE_CHECKING"
    )


def _targets(node: ast.AST, package: str, known: frozenset[str]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        origin = _absolute(node, package)
        for alias in node.names:
            inner = f"{origin}.{alias.name}"
            # The version is a fact, not a use of the front door.
            if inner != "karikomi.__version__":
                yield inner if inner in known else origin
    elif isinstance(node, ast.Call):
        yield from _by_string(node)


def _absolute(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module or ""
    parts = package.split(".")
    base = parts[: len(parts) - node.level + 1]
    return ".".join([*base, node.module] if node.module else base)


def _by_string(call: ast.Call) -> Iterator[str]:
    name = getattr(call.func, "id", None) or getattr(call.func, "attr", None)
    first = call.args[0] if call.args else None
    if name in BY_STRING and isinstance(first, ast.Constant):
        yield str(first.value)
