"""Files that earlier versions wrote load for ever, to the same bits."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from karikomi.pack import inspect, load, load_coded

FOLDER = Path(__file__).parent / "earlier_files"
VERSIONS = sorted(path.stem for path in FOLDER.glob("*.karikomi"))


def test_each_version_has_a_file() -> None:
    assert VERSIONS[:3] == ["1.0", "1.1", "1.2"]


@pytest.mark.parametrize("version", VERSIONS)
def test_files_of_earlier_versions_load(version: str) -> None:
    path = FOLDER / f"{version}.karikomi"
    loaded, coded = load(path), load_coded(path)
    rows = [
        f"{name} {array.dtype.name} {'x'.join(map(str, array.shape)) or '-'}"
        f" {hashlib.sha256(array.tobytes()).hexdigest()}"
        for name, array in loaded.items()
    ]
    assert rows == (FOLDER / f"{version}.txt").read_text().splitlines()
    assert list(coded) == list(loaded)
    seen = inspect(path)
    assert seen.payload + seen.tables + seen.header + seen.manifest == path.stat().st_size
