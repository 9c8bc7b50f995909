"""What no file may say: a path that exists on one machine only."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from layout.source import ROOT

FOLDERS = ("src", "tests", "docs", "benchmarks", "examples", "reference", ".ci", ".github")
TEXTS = {
    "",
    ".cfg",
    ".css",
    ".html",
    ".ini",
    ".j2",
    ".json",
    ".md",
    ".py",
    ".sh",
    ".toml",
    ".txt",
    ".yaml",
    ".yml",
}
# At the start of a path only: neither an address on the web nor a folder inside of another matches.
ONE_MACHINE = re.compile(r"(?<![\w.~*}/-])/(?:work|root|tmp|home|Users)/")


def texts() -> Iterator[Path]:
    """Yield every text file of the repository, whether or not git is there to list them."""
    here = (path for path in ROOT.iterdir() if path.is_file() and path.suffix in TEXTS)
    # In a worktree .git is a file, and names the place of the repository.
    yield from (path for path in here if path.name != ".git")
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix in TEXTS and "__pycache__" not in path.parts:
                yield path


def machine_paths(text: str) -> list[str]:
    """Return the lines that hold an absolute path of somebody's machine."""
    return [line.strip() for line in text.splitlines() if ONE_MACHINE.search(line)]


def test_no_file_names_a_path_of_one_machine() -> None:
    found = {
        str(path.relative_to(ROOT)): machine_paths(path.read_text("utf-8")) for path in texts()
    }
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize("folder", ["work", "root", "tmp", "home", "Users"])
def test_a_machine_path_is_found(folder: str) -> None:
    assert machine_paths(f"see '/{folder}/karikomi' for more") != []


@pytest.mark.parametrize(
    "text", ["https://example.org/work/x", "runs/tmp/x", "../work/x", "$HOME/tmp/x"]
)
def test_a_relative_path_is_none(text: str) -> None:
    assert machine_paths(text) == []
