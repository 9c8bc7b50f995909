"""How large things may grow, how deep they may lie, and what they may not be called."""

from __future__ import annotations

import ast
import importlib
import statistics
import subprocess
import sys
from pathlib import Path

from layout.source import PACKAGE, ROOT, SOURCE, modules, tree

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
# Of each package, a line per argument, in a child of its own where nothing of the package under test is imported yet.
SHADOWED = """
import importlib, os, sys, types
for framework in ("torch", "keras"):
    if any(f".{framework}." in line for line in sys.argv[1:]):
        importlib.import_module(framework)
for line in sys.argv[1:]:
    sys.stdout.flush()
    child = os.fork() if hasattr(os, "fork") else 0
    if child:
        if os.waitpid(child, 0)[1]:
            sys.exit(f"failed: {line}")
        continue
    name, *beside = line.split()
    package = importlib.import_module(name)
    for exported in sorted(set(beside) & set(getattr(package, "__all__", ()))):
        if not isinstance(getattr(package, exported), types.ModuleType):
            print(f"{name}.{exported}")
    if hasattr(os, "fork"):
        sys.stdout.flush()
        os._exit(0)
"""


def beside(folder: Path) -> set[str]:
    """Return the names of the files and folders of a package."""
    found = {path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()}
    return found - FRAMEWORKS


def shadowed(packages: dict[str, Path], source: Path = SOURCE) -> list[str]:
    """Return exported functions and classes, by their packages, that share a name with a file or folder beside them.

    The first access would find the object and, once that file is imported, the second one the
    module. Asked of a fresh interpreter, where nothing is imported yet.
    """
    lines = [" ".join([package, *sorted(beside(folder))]) for package, folder in packages.items()]
    command = [sys.executable, "-c", SHADOWED, *lines]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_no_file_bears_the_name_of_what_is_exported_beside_it() -> None:
    packages = {}
    for package, path in modules().items():
        if path.name != "__init__.py":
            continue
        exported = set(getattr(importlib.import_module(package), "__all__", ()))
        if exported & beside(path.parent):  # where a name could be shadowed at all
            packages[package] = path.parent
    assert packages and shadowed(packages) == []


def test_a_shadowed_name_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "house"
    folder.mkdir()
    (folder / "prune.py").write_text("def prune(): ...\n")
    (folder / "clip.py").write_text("")
    (folder / "__init__.py").write_text(
        "from house import clip\nfrom house.prune import prune\n__all__ = ['clip', 'prune']\n"
    )
    assert shadowed({"house": folder}, tmp_path) == ["house.prune"]
