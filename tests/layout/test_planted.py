"""The catalogue of planted faults fits the tree: `python tests/faults.py` can plant each of them."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

import faults

CATALOGUE = faults.catalogue()


def test_faults_can_be_planted() -> None:
    void = {fault.name: why for fault in CATALOGUE if (why := why_void(fault))}
    assert void == {}


def why_void(fault: faults.Fault) -> str:
    """Return why a fault cannot be planted or found, and nothing if it can."""
    if not _text(fault.file):
        return f"{fault.file} is not there"
    try:
        ast.parse(fault.applied(_text(fault.file)), fault.name)
    except (SyntaxError, ValueError) as error:
        return str(error)
    if "".join(fault.old.split()) == "".join(fault.new.split()):
        return "it changes nothing"
    lacking = [test for test in fault.tests if not _is_there(test)]
    return f"no test {lacking}" if lacking or not fault.tests else ""


def _is_there(test: str) -> bool:
    """Return whether ``file``, or ``file::name`` with or without ``[case]``, names a test."""
    file, _, name = test.partition("::")
    return f"def {name.split('[')[0]}" in _text(file)


@cache
def _text(file: str) -> str:
    path = faults.ROOT / file
    return path.read_text(encoding="utf-8") if path.is_file() else ""


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"file": "src/karikomi/nowhere.py"}, "is not there"),
        ({"old": "nothing like this"}, "0 times"),
        ({"new": "SOURCE = (ROOT"}, "never closed"),
        ({"new": 'SOURCE  =  ROOT/ "src"'}, "changes nothing"),
        ({"tests": ("tests/layout/test_planted.py::test_nowhere",)}, "no test"),
        ({"tests": ()}, "no test"),
    ],
)
def test_a_void_fault_is_found(change: dict, why: str) -> None:
    old, tests = 'SOURCE = ROOT / "src"', ("tests/layout/test_planted.py",)
    right = faults.Fault("a", "tests/layout/source.py", old, "SOURCE = ROOT", tests)
    assert why_void(right) == "" and why in why_void(replace(right, **change))


def test_names_are_unique() -> None:
    names = [fault.name for fault in CATALOGUE]
    assert sorted(set(names)) == sorted(names)


def test_every_folder_of_the_package_has_a_fault() -> None:
    source = faults.ROOT / "src" / "karikomi"
    folders = {path.parent for path in source.rglob("*.py") if path.name != "__init__.py"}
    planted = {(faults.ROOT / fault.file).parent for fault in CATALOGUE}
    assert not sorted(str(folder.relative_to(source)) for folder in folders - planted)
    assert len(CATALOGUE) >= 60


OUTCOMES = {
    "found": ("a = 1\n", "from a import a\ndef test_a(): assert a == 1\n"),
    "missed": ("a = 1\n", "from a import a\ndef test_a(): assert a\n"),
    "void, fails without it": ("a = 1\n", "from a import a\ndef test_a(): assert a == 3\n"),
    "void, twice in the file": ("a = 1 + 1\n", "def test_a(): pass\n"),
    "void, no test": ("a = 1\n", ""),
    "void, no import": ("a = 1\n", "import nothing_of_this_name\n"),
}


def test_what_the_outcomes_say(tmp_path: Path) -> None:
    """In a process of its own, which forks."""
    (tmp_path / "src").mkdir()
    planted = []
    for place, (source, test) in enumerate(OUTCOMES.values()):
        (tmp_path / "src" / f"a{place}.py").write_text(source)
        (tmp_path / f"test_{place}.py").write_text(test.replace("from a ", f"from a{place} "))
        planted.append((f"f{place}", f"src/a{place}.py", "1", "2", (f"test_{place}.py",)))
    program = (
        "import sys; sys.modules['torch'] = None\n"  # which these tests do not need
        "import pathlib, faults\n"
        f"trials = faults.try_all([faults.Fault(*f) for f in {planted!r}], 2, pathlib.Path(sys.argv[1]))\n"
        "print(sorted((t.fault.name, t.outcome) for t in trials))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=faults.ROOT / "tests",
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
    )
    wanted = [(f"f{place}", what.split(",")[0]) for place, what in enumerate(OUTCOMES)]
    assert done.stdout.splitlines()[-1:] == [repr(wanted)], done.stdout + done.stderr
    assert (tmp_path / "src" / "a0.py").read_text() == "a = 1\n"
