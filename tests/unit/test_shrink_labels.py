"""The integers of shrinking: labels that are joined, groups, products of kept indices, and how many units stay."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from depth import examples
from karikomi.errors import InvalidArgument
from karikomi.shrink.label_planes import Labelled, along, is_product, kept_along, reduced, reshaped
from karikomi.shrink.labels import Labels
from karikomi.shrink.meetings import Meetings
from karikomi.shrink.unit_groups import (
    groups_of,
    isomorphic,
    kept_of,
    staying,
    to_budget,
    together,
    uniform,
)

PAIRS = st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=12)


def labels_of(*sizes: int) -> tuple[Labels, list[np.ndarray]]:
    labels = Labels()
    return labels, [labels.new(f"t{i}", 0, size) for i, size in enumerate(sizes)]


def connected(pairs: list[tuple[int, int]], size: int) -> list[int]:
    """Return the smallest label that each is connected with, by repeated passes."""
    least = list(range(size))
    for _ in range(size):
        for a, b in pairs:
            least[a] = least[b] = min(least[a], least[b])
    return least


@settings(max_examples=examples(40, full=400), deadline=None)
@given(PAIRS)
def test_what_is_joined_has_one_root(pairs: list[tuple[int, int]]) -> None:
    labels, _ = labels_of(11)
    zero = {b if a == 0 else a for a, b in pairs if 0 in (a, b) and a != b}
    inner = [(a, b) for a, b in pairs if a and b]
    for a, b in pairs:
        labels.join(np.array([a]), np.array([b]), f"{a}-{b}")
    expected = connected(inner, 12)
    assert labels.roots(np.arange(12)).tolist() == expected
    # In one call, and in another order, it is the same.
    other, _ = labels_of(11)
    if pairs:
        ones, others = np.array(pairs[::-1]).T
        other.join(others, ones, "all")
    assert other.roots(np.arange(12)).tolist() == expected
    # What meets 0 stays, with all that it is joined with.
    classes = labels.classes()
    fixed = {expected[label] for label in zero}
    assert set(classes.reasons) == fixed
    assert classes.free().tolist() == [bool(n) and expected[n] not in fixed for n in range(12)]


def test_a_label_that_meets_no_label_is_fixed_whatever_is_joined_later() -> None:
    labels, (rows, columns) = labels_of(3, 3)
    labels.join(rows, np.array([0, 5, 5]), "first")
    labels.join(rows[:1], columns[:1], "second")
    assert labels.roots(columns).tolist() == [1, 2, 6]
    assert labels.classes().reasons == {1: "first"}


@settings(max_examples=examples(30, full=300), deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 3), st.integers(0, 5)),
        max_size=8,
    )
)
def test_groups_are_a_partition_of_what_is_free(joins: list[tuple[int, int, int, int]]) -> None:
    labels, tensors = labels_of(6, 6, 6, 6)
    for a, i, b, j in joins:
        labels.join(tensors[a][i : i + 1], tensors[b][j : j + 1], "here")
    labels.fix(tensors[0][:1], "output")
    classes = labels.classes()
    groups = groups_of(classes)
    units = np.concatenate([group.units for group in groups])
    assert sorted(units.tolist()) == sorted(set(classes.roots[classes.free()].tolist()))
    for group in groups:
        for block, places in group.members:
            found = classes.roots[block.labels[places]]
            assert (found == group.units[:, None]).all()
        # Each index of a tensor is in one group, once.
    seen = [
        (b.owner, p) for g in groups for b, places in g.members for p in places.ravel().tolist()
    ]
    assert len(seen) == len(set(seen)) == int(classes.free().sum())


@settings(max_examples=examples(40, full=400), deadline=None)
@given(st.lists(st.booleans(), min_size=12, max_size=12), st.booleans())
def test_a_product_of_indices_by_definition(kept: list[bool], split: bool) -> None:
    labels = Labels()
    first = labels.new("a", 0, 12)
    plane = reshaped(along(first, 1, 0), (12,), (3, 4))
    value = Labelled((3, 4), (plane,))
    if split:
        value = Labelled((3, 4), (along(first[:3], 2, 0), along(first[3:7], 2, 1)))
    mask = np.array([True, *kept])
    stays = np.ones((3, 4), bool)
    for part in value.planes:
        stays &= mask[part]
    rows, columns = (kept_along(value, axis, mask) for axis in (0, 1))
    assert rows.tolist() == np.flatnonzero(mask[value.planes[0]].any(1)).tolist()
    assert is_product(value, mask) == (int(stays.sum()) == len(rows) * len(columns))


SHAPES = [(12,), (3, 4), (4, 3), (2, 6), (2, 3, 2), (1, 12), (6, 1, 2)]


@pytest.mark.parametrize(("old", "new"), [(a, b) for a in SHAPES for b in SHAPES])
def test_a_plane_is_reshaped_as_its_tensor(old: tuple[int, ...], new: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    for axes in itertools.product([False, True], repeat=len(old)):
        small = tuple(n if wide else 1 for n, wide in zip(old, axes, strict=True))
        plane = rng.integers(1, 99, small)
        whole = np.broadcast_to(plane, old).reshape(new)
        assert np.array_equal(np.broadcast_to(reshaped(plane, old, new), new), whole)


def test_of_two_axes_of_units_the_inner_or_the_outer_gets_shorter() -> None:
    for whole, expected in ((False, [1, 2, 3, 1, 2, 3]), (True, [1, 1, 1, 4, 4, 4])):
        run = Meetings(whole=whole)
        rows = run.labels.new("heads", 0, 6)
        plane = reshaped(along(rows, 1, 0), (6,), (2, 3))
        run.by_one_axis(Labelled((2, 3), (plane,)), "view")
        assert run.labels.roots(rows).tolist() == expected


def test_a_product_joins_what_is_summed_and_passes_the_rest() -> None:
    run = Meetings(whole=False)
    a, b = run.labels.new("a", 0, 2), run.labels.new("a", 1, 3)
    c, d = run.labels.new("b", 0, 3), run.labels.new("b", 1, 4)
    one = Labelled((2, 3), (along(a, 2, 0), along(b, 2, 1)))
    other = Labelled((3, 4), (along(c, 2, 0), along(d, 2, 1)))
    out = run.contract(one, "mk", other, "kn", "mn", "matmul")
    assert [plane.ravel().tolist() for plane in out.planes] == [a.tolist(), d.tolist()]
    assert run.labels.roots(c).tolist() == b.tolist()
    assert [ended.tolist() for ended in run.ended] == [b.tolist()]
    # Of three operands, all that have the letter are joined.
    e = run.labels.new("c", 0, 3)
    third = Labelled((3,), (along(e, 1, 0),))
    run.contract_all([one, other, third], ["mk", "kn", "k"], "mn", "einsum")
    assert run.labels.roots(e).tolist() == b.tolist()


@settings(max_examples=examples(60, full=600), deadline=None)
@given(st.integers(1, 64), st.floats(0.01, 1.0), st.integers(1, 16), st.integers(1, 8))
def test_how_many_units_stay(size: int, share: float, multiple: int, least: int) -> None:
    stay = staying(size, share, multiple, least)
    assert min(size, least) <= stay <= size
    assert stay == size or stay % multiple == 0 or stay == least
    assert staying(size, 1.0, 1, 1) == size
    if stay not in (size, least, multiple):
        assert abs(stay - size * share) <= multiple / 2 + 1e-9


def test_equal_scores_go_from_the_first_on() -> None:
    labels, _ = labels_of(8)
    (group,) = groups_of(labels.classes())
    (gone,) = uniform([group], [np.ones(8)], 0.5, 1, 1)
    assert gone.tolist() == [1, 2, 3, 4]
    assert kept_of(labels.classes(), [gone]).tolist() == [True, *[False] * 4, *[True] * 4]


def test_global_allocation_compares_scores_relative_to_their_group() -> None:
    labels, (a, b) = labels_of(4, 4)
    labels.join(a[:0], b[:0], "")
    groups = groups_of(labels.classes())
    scores = [np.array([1.0, 2.0, 3.0, 2.0]), 1000.0 * np.array([1.0, 9.0, 9.0, 5.0])]
    # Relative to their means, 2 and 6000: 0.5 1 1.5 1 and 0.17 1.5 1.5 0.83.
    # The four lowest of eight are 0.17 0.5 0.83 1.
    gone = together(groups, scores, 0.5, 1, 1)
    assert [units.tolist() for units in gone] == [[1, 2], [5, 8]]


def test_isomorphic_allocation_compares_groups_of_the_same_shapes_as_they_are() -> None:
    labels = Labels()
    rows = []
    for owner, shape in {"a": (4, 3), "b": (4, 3), "c": (4, 5)}.items():
        first, other = (labels.new(owner, axis, size) for axis, size in enumerate(shape))
        labels.fix(other, "inputs")
        rows.append(first)
    groups = groups_of(labels.classes())
    assert groups[0].form == groups[1].form != groups[2].form
    scores = [np.array([5.0, 6, 7, 8]), np.array([1.0, 2, 3, 9]), np.array([0.1, 0.4, 0.3, 0.2])]
    # Of a and b go 1, 2, 3 and 5; of c, whose scores are all smaller, the two lowest.
    gone = isomorphic(groups, scores, 0.5, 1, 1)
    places = [np.searchsorted(row, units).tolist() for row, units in zip(rows, gone, strict=True)]
    assert places == [[0], [0, 1, 2], [0, 3]]
    # At least one stays of each.
    assert [len(units) for units in isomorphic(groups, scores, 0.01, 1, 1)] == [3, 3, 3]


def test_a_budget_is_met_from_below_and_closely() -> None:
    share = to_budget(lambda width: 1000 * width**2, 250.0, unit="macs")
    assert share <= 0.5 and share == pytest.approx(0.5, abs=1e-6)
    assert to_budget(lambda width: 7.0, 9.0, unit="ms") == 1.0
    with pytest.raises(InvalidArgument, match="macs: no choice of units is as small.*at least 100"):
        to_budget(lambda width: 100 + width, 50.0, unit="macs")


def test_a_tensor_without_entries_has_no_plane() -> None:
    labels = Labels()
    plane = labels.new("a", 0, 4).reshape(4, 1)[:0]
    assert reduced(labels, plane, "empty") is None and not labels.classes().reasons
