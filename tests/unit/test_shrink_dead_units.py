"""Which dead units may go: the decision alone, on numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from karikomi.errors import InvalidArgument
from karikomi.shrink import ShrinkReport, UnitFacts, plan


def units(reads: str, read: str, constants: list[float], **rest: str) -> UnitFacts:
    """Return units from flags: ``reads="10"`` is one unit that reads something, and one not."""
    return UnitFacts(
        incoming_zero=np.array([flag == "0" for flag in reads]),
        outgoing_zero=np.array([flag == "0" for flag in read]),
        constants=np.array(constants),
        **rest,
    )


def test_who_goes_and_who_is_folded() -> None:
    found = plan({"fc": units("11000", "10110", [1, 1, 0, 2, 3])})
    assert found.kept["fc"].tolist() == [0]
    assert found.folded["fc"].tolist() == [3]
    assert found.removed == 4 and found.left_alone == {}


def test_what_nobody_reads_goes_whatever_stands_in_the_way() -> None:
    found = plan({"fc": units("100", "110", [1, 2, np.nan], obstacle="x has no bias")})
    assert found.kept["fc"].tolist() == [0, 1]
    assert found.left_alone == {"fc": "unit 1 is constant, but x has no bias"}


def test_a_constant_that_differs_by_place_stays() -> None:
    found = plan({"conv": units("1000", "1111", [1, np.nan, 2, np.inf])})
    assert found.kept["conv"].tolist() == [0, 1, 3]
    assert found.folded["conv"].tolist() == [2]
    assert found.left_alone == {"conv": "units 1, 3 are constant, but not the same everywhere"}


@pytest.mark.parametrize("constants", [[0.0, 0.0], [1.0, 2.0]])
def test_a_layer_keeps_one_unit(constants: list[float]) -> None:
    found = plan({"fc": units("00", "11", constants)})
    assert found.kept["fc"].tolist() == [0] and found.removed == 1
    assert found.folded["fc"].tolist() == ([1] if constants[1] else [])
    assert "keeps one unit" in found.left_alone["fc"]


def test_a_fixed_layer_stays_whole() -> None:
    found = plan({"fc": units("00", "00", [0, 0], fixed="because")})
    assert found.kept["fc"].tolist() == [0, 1] and found.removed == 0
    assert found.left_alone == {"fc": "because"}


FLAGS = st.lists(st.tuples(st.booleans(), st.booleans(), st.sampled_from([0.0, 1.5, np.nan])))


@given(FLAGS.filter(bool), st.sampled_from([None, "no bias"]))
def test_laws(rows: list[tuple[bool, bool, float]], obstacle: str | None) -> None:
    silent, unread, constants = (np.array(column) for column in zip(*rows, strict=True))
    layer = UnitFacts(
        incoming_zero=silent, outgoing_zero=unread, constants=constants, obstacle=obstacle
    )
    found = plan({"fc": layer})
    kept, folded = set(found.kept["fc"].tolist()), set(found.folded["fc"].tolist())
    assert kept and not kept & folded and found.removed == len(rows) - len(kept)
    assert all(silent[i] and np.isfinite(constants[i]) and obstacle is None for i in folded)
    assert all(silent[i] or unread[i] for i in set(range(len(rows))) - kept)
    live = {i for i in range(len(rows)) if not silent[i] and not unread[i]}
    assert live <= kept


def test_arrays_of_different_lengths() -> None:
    with pytest.raises(InvalidArgument, match="different numbers of units"):
        units("11", "1", [0, 0])


def test_the_report_is_plain() -> None:
    report = ShrinkReport(
        widths_before={"a": 5, "b": 2},
        widths_after={"a": 3, "b": 2},
        parameters_before=10,
        parameters_after=6,
        left_alone={"b": "outputs"},
        max_difference=0.0,
    )
    assert report.removed == 2
    assert report.as_dict()["widths_after"] == {"a": 3, "b": 2}
