"""How large things may grow, how deep they may lie, and what they may not be called."""

from __future__ import annotations

import ast
import importlib.util
import statistics
import sys
import types
from pathlib import Path

import pytest

from layout.source import PACKAGE, ROOT, modules, tree

FILE_MEDIAN, FILE_MOST = 150, 600
FUNCTION_MEDIAN, FUNCTION_MOST = 10, 80
LEVELS = 3
# Names that say where a thing was put and not what it is.
NAMELESS = {"utils", "helpers", "common", "core", "misc", "base"}


def _length(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def function_lengths(module: ast.Module) -> dict[str, int]:
    """Return ``name:line`` -> lines from ``def`` to the last statement, without the docstring."""
    return {
        f"{node.name}:{node.lineno}": _lines(node) - _docstring_lines(node)
        for node in ast.walk(module)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def _lines(node: ast.stmt | ast.expr) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def _docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return _lines(node.body[0]) if ast.get_docstring(node, clean=False) is not None else 0


def test_files_are_short() -> None:
    lengths = {name: _length(path) for name, path in modules().items()}
    assert {name: length for name, length in lengths.items() if length > FILE_MOST} == {}
    assert statistics.median(lengths.values()) <= FILE_MEDIAN


def test_functions_are_short() -> None:
    lengths = {
        f"{name}.{function}": length
        for name, path in modules().items()
        for function, length in function_lengths(tree(path)).items()
    }
    assert {name: length for name, length in lengths.items() if length > FUNCTION_MOST} == {}
    assert statistics.median(lengths.values()) <= FUNCTION_MEDIAN


def test_docstrings_and_decorators_do_not_count() -> None:
    text = '@cache\ndef f():\n    """One.\n\n    Two.\n    """\n    return (\n        1\n    )\n'
    assert function_lengths(ast.parse(text)) == {"f:2": 4}


def test_the_package_is_shallow() -> None:
    files = [
        path.relative_to(PACKAGE) for path in PACKAGE.rglob("*") if "__pycache__" not in path.parts
    ]
    assert [str(path) for path in files if len(path.parts) > LEVELS] == []


def test_names_say_what_a_thing_is() -> None:
    folders = [
        ROOT / name for name in ("src", "tests", "benchmarks", "examples", "docs", "reference")
    ]
    names = [path for folder in folders for path in folder.rglob("*")]
    assert [str(path.relative_to(ROOT)) for path in names if path.stem in NAMELESS] == []


# Folders that are exported as such; to look one up imports it.
FRAMEWORKS = {"torch", "keras", "jax"}


def beside(folder: Path) -> set[str]:
    """Return the names of the files and folders of a package."""
    found = {path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()}
    return found - FRAMEWORKS


def as_loaded(package: str) -> types.ModuleType:
    """Return what the ``__init__`` of a package makes, which no file that is imported later has changed."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shadowed(packages: dict[str, Path]) -> list[str]:
    """Return exported functions and classes, by their packages, that share a name with a file or folder beside them.

    The first access would find the object and, once that file is imported, the second one the module.
    """
    found = []
    for name, folder in packages.items():
        package = as_loaded(name)
        exported = sorted(beside(folder) & set(getattr(package, "__all__", ())))
        found += [
            f"{name}.{thing}"
            for thing in exported
            if not isinstance(getattr(package, thing), types.ModuleType)
        ]
    return found


def test_no_file_bears_the_name_of_what_is_exported_beside_it() -> None:
    packages = {}
    for package, path in modules().items():
        if path.name != "__init__.py":
            continue
        exported = set(getattr(importlib.import_module(package), "__all__", ()))
        if exported & beside(path.parent):  # where a name could be shadowed at all
            packages[package] = path.parent
    assert packages and shadowed(packages) == []


def test_a_shadowed_name_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "house"
    folder.mkdir()
    (folder / "prune.py").write_text("def prune(): ...\n")
    (folder / "clip.py").write_text("")
    (folder / "__init__.py").write_text(
        "from house import clip\nfrom house.prune import prune\n__all__ = ['clip', 'prune']\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert shadowed({"house": folder}) == ["house.prune"]
    finally:
        for name in ("house.prune", "house.clip", "house"):
            sys.modules.pop(name, None)
