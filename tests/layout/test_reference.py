"""The API reference: every public name has a page and a docstring, found without importing anything."""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

import karikomi
from layout.source import PACKAGE, ROOT


def _static() -> ModuleType:
    path = ROOT / "reference" / "public_names.py"
    spec = importlib.util.spec_from_file_location("public_names", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # A dataclass with slots looks its module up while it is made.
    sys.modules["public_names"] = module
    spec.loader.exec_module(module)
    return module


names = _static()
LISTED = [
    package
    for package in names.PACKAGES
    if hasattr(importlib.import_module(names.dotted(package)), "__all__")
]


@pytest.mark.parametrize("package", LISTED)
def test_the_names_found_are_those_that_are_exported(package: str) -> None:
    module = importlib.import_module(names.dotted(package))
    exported = {
        name
        for name in module.__all__
        if not name.startswith("_") and not isinstance(getattr(module, name), ModuleType)
    }
    assert {entry.name for entry in names.public_names(names.dotted(package))} == exported


@pytest.mark.parametrize("package", names.PACKAGES)
def test_a_name_is_defined_where_the_reference_looks_for_it(package: str) -> None:
    public = importlib.import_module(names.dotted(package))
    for entry in names.public_names(names.dotted(package)):
        module = importlib.import_module(entry.path.rpartition(".")[0])
        assert getattr(module, entry.path.rpartition(".")[2]) is getattr(public, entry.name)


def test_every_public_package_has_a_page() -> None:
    modules = {
        name
        for name in karikomi.__all__
        if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()
    }
    # `search` is reached through kk.compress and kk.sweep.
    assert modules | {"karikomi", "search"} == set(names.PACKAGES)


def test_every_public_name_has_a_docstring() -> None:
    assert names.undocumented() == []


@pytest.mark.parametrize(
    ("file", "text", "planted"),
    [
        ("schedule.py", "\ndef planted() -> int:\n    return 1\n", "karikomi.schedule.planted"),
        (
            "clip/planted.py",
            '@register("clip", formula="", source="")\nclass Planted:\n    x = 1\n',
            "karikomi.clip.Planted",
        ),
        (
            "quantize/__init__.py",
            '\nPlanted = int\n__all__ = ["Planted"]\n',
            "karikomi.quantize.Planted",
        ),
    ],
)
def test_a_planted_name_without_a_docstring_is_found(
    tmp_path: Path, file: str, text: str, planted: str
) -> None:
    shutil.copytree(PACKAGE, tmp_path / "karikomi", ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "karikomi" / file
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    if "\n__all__ = " in text:
        before = before.replace("__all__", "_all")
    path.write_text(before + text, encoding="utf-8")
    assert names.undocumented(tmp_path) == [planted]


def test_a_name_that_is_exported_but_not_defined_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "karikomi").mkdir()
    (tmp_path / "karikomi" / "__init__.py").write_text('__all__ = ["missing"]\n')
    with pytest.raises(LookupError, match=r"karikomi\.missing"):
        names.public_names("karikomi", tmp_path)
