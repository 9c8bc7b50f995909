"""The public names of karikomi, found in the source without importing it, with docstrings checked.

Static, so that the reference is built without torch, Keras and JAX. `tests/layout/test_reference.py`
compares the result with the ``__all__`` of the imported packages.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src"
PACKAGES = (
    *("karikomi", "clip", "bound", "prune", "shrink", "quantize", "pack", "torch", "keras", "jax"),
    *("numpy", "record", "tasks", "search", "audit", "advising", "report", "plugins"),
    *("rule", "schedule", "select", "spec", "registry", "errors"),
)
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | ast.Assign | ast.AnnAssign


@dataclass(frozen=True, slots=True)
class PublicName:
    """A name as users write it, the dotted path where it is defined, and whether it has a docstring."""

    name: str
    path: str
    documented: bool


def dotted(package: str) -> str:
    """Return the full dotted name of an entry of `PACKAGES`.

    >>> dotted("clip"), dotted("karikomi")
    ('karikomi.clip', 'karikomi')
    """
    return package if package == "karikomi" else f"karikomi.{package}"


def public_names(module: str, source: Path = SOURCE) -> list[PublicName]:
    """Return the public names of a module, sorted; submodules are left to their own pages.

    These are the registered rules (`karikomi.clip`, `karikomi.bound`), else the names mirrored under
    ``TYPE_CHECKING``, else a literal ``__all__``, else every definition without an underscore.
    """
    body = _tree(_file(module, source)).body
    names = [*_registered(module, source), *_mirrored(body)] or _listed(body) or _defined(body)
    public = (_public_name(module, name, source) for name in names)
    return sorted((name for name in public if name is not None), key=lambda entry: entry.name)


def undocumented(source: Path = SOURCE) -> list[str]:
    """Return the dotted public names of all packages, and the packages, that have no docstring."""
    lacking = [
        module
        for module in map(dotted, PACKAGES)
        if not ast.get_docstring(_tree(_file(module, source)))
    ]
    for module in map(dotted, PACKAGES):
        names = public_names(module, source)
        lacking += [f"{module}.{entry.name}" for entry in names if not entry.documented]
    return lacking


def _file(module: str, source: Path) -> Path:
    place = source.joinpath(*module.split("."))
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _registered(module: str, source: Path) -> Iterator[str]:
    kind = module.rpartition(".")[2]
    if module not in ("karikomi.clip", "karikomi.bound"):
        return
    for path in _file(module, source).parent.glob("*.py"):
        for node in _tree(path).body:
            if isinstance(node, ast.ClassDef) and any(
                isinstance(call, ast.Call)
                and getattr(call.func, "id", "") == "register"
                and isinstance(call.args[0], ast.Constant)
                and call.args[0].value == kind
                for call in node.decorator_list
            ):
                yield node.name


def _mirrored(body: list[ast.stmt]) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            for inner in node.body:
                if isinstance(inner, ast.ImportFrom):
                    yield from (alias.asname for alias in inner.names if alias.asname)


def _listed(body: list[ast.stmt]) -> list[str]:
    for node in body:
        if isinstance(node, ast.Assign) and _targets(node) == ["__all__"]:
            return list(ast.literal_eval(node.value))
    return []


def _defined(body: list[ast.stmt]) -> list[str]:
    kinds = ast.ClassDef | ast.FunctionDef
    return [node.name for node in body if isinstance(node, kinds) and not node.name.startswith("_")]


def _public_name(module: str, name: str, source: Path) -> PublicName | None:
    """Follow imports from a module to the definition of a name; None for a submodule."""
    origin = module
    while True:
        # By the listed names: a file system that ignores case would take `Target` for target.py.
        if name in {path.stem for path in _file(origin, source).parent.iterdir()} and (
            _file(origin, source).name == "__init__.py"
        ):
            return None
        body = _tree(_file(origin, source)).body
        for index, node in enumerate(body):
            if isinstance(node, Definition) and name in _targets(node):
                return PublicName(name, f"{origin}.{name}", _has_docstring(body, index))
        origin, name_there = _imported(body, name) or _rule_module(origin, name, source)
        if name_there != name:
            name = name_there


def _imported(body: list[ast.stmt], name: str) -> tuple[str, str] | None:
    for node in ast.walk(ast.Module(body, [])):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return node.module or "", alias.name
    return None


def _rule_module(package: str, name: str, source: Path) -> tuple[str, str]:
    for path in _file(package, source).parent.glob("*.py"):
        if any(name in _targets(n) for n in _tree(path).body if isinstance(n, ast.ClassDef)):
            return f"{package}.{path.stem}", name
    raise LookupError(f"{package}.{name} is public, but its definition was not found")


def _targets(node: Definition) -> list[str]:
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    if isinstance(node, ast.AnnAssign):
        return [node.target.id] if isinstance(node.target, ast.Name) else []
    return [node.name]


def _has_docstring(body: list[ast.stmt], index: int) -> bool:
    node = body[index]
    if isinstance(node, ast.Assign | ast.AnnAssign):
        after = body[index + 1] if index + 1 < len(body) else None
        return isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    return bool(ast.get_docstring(node))  # type: ignore[arg-type]
