"""The catalogue of planted faults fits the tree: `python tests/faults.py` can plant each of them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import faults

CATALOGUE = faults.catalogue()


@pytest.mark.parametrize("fault", CATALOGUE, ids=lambda fault: fault.name)
def test_a_fault_can_be_planted(fault: faults.Fault) -> None:
    clean = (faults.ROOT / fault.file).read_text(encoding="utf-8")
    planted = fault.applied(clean)
    assert ast.dump(ast.parse(planted)) != ast.dump(ast.parse(clean))
    for test in fault.tests:
        assert (faults.ROOT / test.split("::")[0]).is_file(), test


def test_names_are_unique() -> None:
    names = [fault.name for fault in CATALOGUE]
    assert sorted(set(names)) == sorted(names)


def test_every_folder_of_the_package_has_a_fault() -> None:
    source = faults.ROOT / "src" / "karikomi"
    folders = {path.parent for path in source.rglob("*.py") if path.name != "__init__.py"}
    planted = {(faults.ROOT / fault.file).parent for fault in CATALOGUE}
    assert not sorted(str(folder.relative_to(source)) for folder in folders - planted)
    assert len(CATALOGUE) >= 60


def fault(**changes: object) -> faults.Fault:
    entry = {
        "name": "f",
        "file": "a.py",
        "old": "1",
        "new": "2",
        "tests": ("test_a.py",),
        **changes,
    }
    return faults.Fault(**entry)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("source", "test", "outcome"),
    [
        ("a = 1\n", "from a import a\ndef test_a(): assert a == 1\n", "found"),
        ("a = 1\n", "from a import a\ndef test_a(): assert a\n", "missed"),
        ("a = 1\n", "from a import a\ndef test_a(): assert a == 3\n", "void"),
        ("a = 1 + 1\n", "def test_a(): pass\n", "void"),
        ("a = 1\n", "", "void"),
    ],
    ids=["found", "missed", "fails without it", "twice in the file", "no test"],
)
def test_what_the_outcome_says(tmp_path: Path, source: str, test: str, outcome: str) -> None:
    tree = tmp_path / "tree"
    (tree / "src").mkdir(parents=True)
    (tree / "src" / "a.py").write_text(source)
    (tree / "test_a.py").write_text(test)
    assert faults.tried(fault(file="src/a.py"), tree).outcome == outcome
    assert (tree / "src" / "a.py").read_text() == source
