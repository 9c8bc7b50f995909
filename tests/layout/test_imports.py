"""Who may import whom: one direction, no cycle, and frameworks only in their own folders."""

from __future__ import annotations

import graphlib
import sys
from pathlib import Path

import pytest

from layout.imports import Import, imports, of_every_module
from layout.source import modules

# A name may import what stands before it, and what lies in its own folder.
ORDER = [
    *("errors", "files", "registry", "rule", "schedule", "select", "tree", "spec"),
    *("outcome", "plan", "conduct", "checkpoint", "rules"),
    *("clip", "bound", "prune", "shrink", "quantize", "pack", "record"),
    *("selection", "reconstruction", "functional", "tasks"),
    *("numpy", "torch", "jax", "keras"),
    *("plugins", "audit", "advising"),
    "search",
    "report",
    # The front door itself, for those who stand after everything that it opens to.
    "karikomi",
    "cli",
    "__main__",
]

# Outside of the framework folders: what `pip install karikomi` brings, and nothing else.
EVERYWHERE = {
    "click",
    "jinja2",
    "markupsafe",
    "ml_dtypes",
    "numpy",
    "pydantic",
    "safetensors",
}
EVERYWHERE |= {"karikomi", "tqdm"} | set(sys.stdlib_module_names)
ALSO = {
    # SciPy for BLAS' sum of magnitudes, which neither torch nor NumPy has: 1-norms as fast as 2-norms.
    "torch": {"torch", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "scipy"},
    "keras": {"keras", "tensorflow", "torch", "jax"},
    "jax": {"jax", "jaxlib", "optax"},
    "tasks": {"sklearn"},
    "search": {"matplotlib", "scipy", "distributed"},
    "advising": {"pyarrow"},
    "pack": {"isal"},
    "report": {"matplotlib"},
    "audit": {"scipy"},
}


def _place(module: str) -> str:
    """Return the name in ORDER that a module belongs to; the front door is `karikomi` itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def against_the_order(module: str, found: list[Import]) -> list[str]:
    """Return one line per import of something that stands after the module's own place."""
    if module == "karikomi":
        return []
    own = _place(module)
    places = [(_place(one.target), one) for one in found if one.target.split(".")[0] == "karikomi"]
    return [
        f"{module}:{one.line} imports {one.target}, and {place} stands after {own}"
        for place, one in places
        if place != own and ORDER.index(place) > ORDER.index(own)
    ]


def strangers(module: str, found: list[Import]) -> list[str]:
    """Return one line per third-party import that the module's folder has no right to."""
    own = _place(module)
    if own == "plugins":
        return []
    allowed = EVERYWHERE | ALSO.get(own, set())
    return [
        f"{module}:{one.line} imports {one.target}"
        for one in found
        if one.target.split(".")[0] not in allowed
    ]


def cycle(found: dict[str, list[Import]]) -> list[str]:
    """Return one cycle of imports that run when a module is loaded, or nothing."""
    graph = {
        name: {one.target for one in ones if one.at_load and one.target in found} - {name}
        for name, ones in found.items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_every_module_has_a_place_in_the_order() -> None:
    """A new top-level module or folder is first given its place above."""
    assert {_place(module) for module in modules()} - set(ORDER) == set()


def test_imports_go_one_way() -> None:
    every = of_every_module().items()
    assert [line for name, found in every for line in against_the_order(name, found)] == []


def test_frameworks_stay_in_their_folders() -> None:
    every = of_every_module().items()
    assert [line for name, found in every for line in strangers(name, found)] == []


def test_no_cycles() -> None:
    assert cycle(of_every_module()) == []


def _written(folder: Path, module: str, text: str) -> list[Import]:
    path = folder / "one.py"
    path.write_text(text, encoding="utf-8")
    return imports(
        module, path, ["karikomi", "karikomi.clip", "karikomi.search", "karikomi.clip.agc"]
    )


@pytest.mark.parametrize(
    "text",
    [
        "import karikomi.search",
        "from karikomi import search",
        "from .. import search",
        "from ..search.campaign import compress",
        "from karikomi import compress",
        "import karikomi as kk",
        "def f():\n    from karikomi.search import compress",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from karikomi import search",
        "import importlib\nimportlib.import_module('karikomi.search')",
    ],
)
def test_the_order_is_checked_in_every_spelling(tmp_path: Path, text: str) -> None:
    """The check itself: each of these is an import of a later place from clip/."""
    assert (
        len(against_the_order("karikomi.clip.one", _written(tmp_path, "karikomi.clip.one", text)))
        == 1
    )


@pytest.mark.parametrize(
    "text", ["from . import agc", "from karikomi import __version__", "from .agc import AGC"]
)
def test_the_order_lets_pass_what_is_allowed(tmp_path: Path, text: str) -> None:
    assert (
        against_the_order("karikomi.clip.one", _written(tmp_path, "karikomi.clip.one", text)) == []
    )


@pytest.mark.parametrize(
    "text", ["import torch", "def f():\n    import tensorflow.keras", "import yaml"]
)
def test_strangers_are_found_at_any_depth(tmp_path: Path, text: str) -> None:
    assert len(strangers("karikomi.clip.one", _written(tmp_path, "karikomi.clip.one", text))) == 1


def test_a_cycle_is_found_unless_one_import_is_late() -> None:
    one_way, late = Import("b", 1, at_load=True), Import("a", 1, at_load=False)
    back = Import("a", 1, at_load=True)
    assert cycle({"a": [one_way], "b": [late]}) == []
    assert sorted(set(cycle({"a": [one_way], "b": [back]}))) == ["a", "b"]
