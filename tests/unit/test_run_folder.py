"""The identity of a run folder, and which facts and arrays come back from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from karikomi.errors import Unsupported
from karikomi.search.folder import Folder
from karikomi.search.lock import claim


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"seed": 2, "task": "t"}, "seed"),
        ({"task": "t"}, "seed"),
        ({"seed": 1, "task": "t", "code": 3}, "code"),
        ({"seed": 2, "task": "u"}, "seed, task"),
    ],
)
def test_every_key_of_both_identities_counts(
    other: dict[str, object], named: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.json"
    assert claim(path, {"seed": 1, "task": "t"}) is False
    assert claim(path, {"task": "t", "seed": 1}) is True
    with pytest.raises(Unsupported, match=f"another run; different: {named};"):
        claim(path, other)
    assert claim(path, {"seed": 1, "task": "t"}) is True


def test_a_finished_stage_comes_back_with_its_own_facts_and_arrays(tmp_path: Path) -> None:
    arrays = {"a": np.arange(3), "b": np.float32([0.5])}
    with Folder(tmp_path / "out", {"a": 1}) as folder:
        folder.finish("first", {"validation": 0.5}, arrays)
        folder.finish("second", {"validation": 0.25}, {"a": np.arange(4)})
        folder.write_arrays("third", {"a": np.arange(5)}, {"epoch": 2})
    with Folder(tmp_path / "out", {"a": 1}) as folder:
        assert folder.done("first") == {"validation": 0.5}
        assert folder.done("second") == {"validation": 0.25}
        assert folder.done("third") is None
        found, facts = folder.read_arrays("first")
        assert {name: array.tolist() for name, array in found.items()} == {
            "a": [0, 1, 2],
            "b": [0.5],
        }
        assert (facts, folder.read_arrays("third")[1]) == ({}, {"epoch": 2})


def test_arrays_in_any_order_of_memory_come_back_as_they_are(tmp_path: Path) -> None:

    turned = np.moveaxis(np.arange(24.0).reshape(2, 2, 2, 3), -1, 1)
    given = {
        "turned": turned,
        "fortran": np.asfortranarray(turned),
        "every second": np.arange(9)[::2],
        "scalar": np.array(3),
    }
    with Folder(tmp_path / "run", {"task": "t"}) as folder:
        folder.write_arrays("stage", given)
        back, _ = folder.read_arrays("stage")
    for name, array in given.items():
        np.testing.assert_array_equal(back[name], array)
