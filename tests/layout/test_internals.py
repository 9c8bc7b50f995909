"""Members private to torch and Keras are used in one ``internals.py`` per framework, and nowhere else."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator

import pytest

from layout.source import modules, tree

OF_TUPLES = {"_replace", "_asdict", "_fields", "_make"}
ATTRIBUTE_FUNCTIONS = {"getattr", "hasattr", "setattr", "delattr"}
# Plugins meet the private members of trainers, each in its own file.
EXEMPT = ("karikomi.torch.internals", "karikomi.keras.internals", "karikomi.plugins")


def is_private(name: object) -> bool:
    """Return whether a name is private; double underscores are Python's, but for TensorFlow's one."""
    if not isinstance(name, str) or not name.isidentifier() or name in OF_TUPLES:
        return False
    return name == "__internal__" or name.startswith("_") and not name.startswith("__")


def defined(trees: Iterable[ast.AST]) -> set[str]:
    """Return the names that are defined or assigned in source text, attributes of ``self`` among them."""
    names = set()
    for node in (node for module in trees for node in ast.walk(module)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names |= {node.attr} if _of_self(node) else set()
    return names


def foreign(module: ast.AST, ours: set[str]) -> list[str]:
    """Return ``line: name`` for private names that `ours`, the package, or this file do not define."""
    here = defined([module])
    return [
        f"{line}: {name}"
        for line, name, of_self in _used(module)
        if is_private(name) and name not in (ours if of_self else here)
    ]


def _used(module: ast.AST) -> Iterator[tuple[int, object, bool]]:
    for node in ast.walk(module):
        if isinstance(node, ast.Attribute):
            yield node.lineno, node.attr, _of_self(node)
        elif isinstance(node, ast.ImportFrom) and not (node.module or "karikomi").startswith(
            "karikomi"
        ):
            yield from ((node.lineno, alias.name, False) for alias in node.names)
            yield from ((node.lineno, part, False) for part in (node.module or "").split("."))
        elif isinstance(node, ast.Import):
            parts = (part for alias in node.names for part in alias.name.split("."))
            yield from ((node.lineno, part, False) for part in parts)
        elif isinstance(node, ast.Call) and len(node.args) > 1:
            function, name = node.func, node.args[1]
            if isinstance(function, ast.Name) and function.id in ATTRIBUTE_FUNCTIONS:
                yield node.lineno, getattr(name, "value", None), False


def _of_self(node: ast.Attribute) -> bool:
    return ast.unparse(node.value) in ("self", "cls", "super()")


def _ours() -> set[str]:
    return defined(tree(path) for name, path in modules().items() if name not in EXEMPT)


def test_private_members_are_used_in_internals_only() -> None:
    ours = _ours()
    found = {
        name: lines
        for name, path in modules().items()
        if not name.startswith(EXEMPT) and (lines := foreign(tree(path), ours))
    }
    assert found == {}


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch._foreach_norm([])",
        "def f(tensor):\n    return tensor._version",
        "def f(model):\n    return model.inner._flatten_layers()",
        "getattr(optimizer, '_step_supports_amp_scaling', False)",
        "from torch.nn.modules.batchnorm import _BatchNorm",
        "import torch._dynamo",
        "from torch._dynamo import disable",
        "class Wrapper(Optimizer):\n    def f(self):\n        return self._trainable_variables",
        "import tensorflow as tf\ntf.__internal__.distribute",
    ],
)
def test_the_check_finds_every_spelling(text: str) -> None:
    # Another file of the package may well define a name of its own that is spelled like this.
    assert len(foreign(ast.parse(text), {"_version"})) == 1


@pytest.mark.parametrize(
    "text",
    [
        "row._replace(name='a')",
        "class A:\n    def f(self):\n        self._version = 1\n        return self._version",
        "class B(A):\n    def f(self):\n        return self._version",
        "tensor.__dict__",
        "from karikomi.clip import _limit",
    ],
)
def test_the_check_lets_pass_what_is_ours(text: str) -> None:
    assert foreign(ast.parse(text), {"_version"}) == []
