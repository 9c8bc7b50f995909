"""The gradual schedule, and masks at rest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from karikomi import spec
from karikomi.errors import InvalidArgument, KarikomiError, UnknownName
from karikomi.prune import Gradual, pack_mask, unpack_mask


def test_the_cubic_of_zhu_and_gupta() -> None:
    rule = Gradual(0.875, steps=(100, 900), initial=0.125)
    assert rule.sparsity_at(0) == rule.sparsity_at(100) == 0.125
    assert rule.sparsity_at(500) == 0.875 - 0.75 / 8
    assert rule.sparsity_at(900) == rule.sparsity_at(10_000) == 0.875


@given(st.integers(0, 50), st.integers(1, 200), st.integers(1, 70))
def test_due_at_first_at_last_and_never_outside(first: int, length: int, every: int) -> None:
    rule = Gradual(0.5, steps=(first, first + length), every=every)
    due = [step for step in range(first + length + 100) if rule.due(step)]
    assert due[0] == first and due[-1] == first + length
    assert due[:-1] == list(range(first, first + length, every))


@given(st.floats(0, 0.99), st.floats(0, 1), st.integers(1, 1_000))
def test_sparsity_never_falls(final: float, share: float, last: int) -> None:
    rule = Gradual(final, steps=(0, last), initial=final * share)
    values = [rule.sparsity_at(step) for step in range(0, last + 2, max(last // 50, 1))]
    assert values == sorted(values)
    assert rule.sparsity_at(last) == final


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"sparsity": 1.0}, InvalidArgument, "0 <= sparsity < 1"),
        ({"sparsity": float("nan")}, InvalidArgument, "Gradual.sparsity"),
        ({"initial": -0.1}, InvalidArgument, "Gradual.initial"),
        ({"initial": 1.0}, InvalidArgument, "Gradual.initial"),
        ({"power": 0.0}, InvalidArgument, "Gradual.power: .*> 0"),
        ({"power": float("nan")}, InvalidArgument, "Gradual.power"),
        ({"begin": 5, "end": 4}, InvalidArgument, "begin <= end"),
        ({"begin": -1}, InvalidArgument, "begin: .*>= 0"),
        ({"every": 0}, InvalidArgument, "every: .*>= 1"),
        ({"every": 1.5}, InvalidArgument, "every: .*>= 1"),
        ({"steps": (5, 5)}, InvalidArgument, "first < last"),
        ({"steps": 5}, InvalidArgument, "steps=5"),
        ({"steps": (0.0, 9.0)}, InvalidArgument, "whole numbers"),
        ({"score": "magnitud"}, UnknownName, "did you mean 'magnitude'"),
        ({"allocation": "globl"}, UnknownName, "did you mean 'global'"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[KarikomiError], says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        Gradual(**{"sparsity": 0.9, "steps": (0, 10), **change})
    assert "\n" not in str(caught.value)


def test_as_data_and_back() -> None:
    rule = Gradual(0.9, steps=(0, 10), only=["a.*", "b.*"])  # type: ignore[arg-type]
    assert spec.from_dict(spec.to_dict(rule, "prune"), "prune") == rule
    assert hash(rule) == hash(spec.from_dict(spec.to_dict(rule, "prune"), "prune"))


@given(hnp.arrays(np.bool_, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9)))
def test_packed_masks_come_back(mask: np.ndarray) -> None:
    packed = pack_mask(mask)
    assert packed.nbytes == -(-mask.size // 8)
    np.testing.assert_array_equal(unpack_mask(packed, mask.shape), mask)


@pytest.mark.parametrize(
    ("packed", "shape"),
    [
        (np.zeros(2, np.uint8), (8,)),
        (np.zeros(1, np.uint8), (9,)),
        (np.zeros(1, np.int64), (8,)),
        (np.zeros((1, 1), np.uint8), (8,)),
        (np.ones(1, np.uint8), (7,)),
        (np.zeros(1, np.uint8), (-1, -8)),
    ],
)
def test_packed_masks_that_do_not_fit(packed: np.ndarray, shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidArgument):
        unpack_mask(packed, shape)


def test_only_booleans_are_masks() -> None:
    with pytest.raises(InvalidArgument, match="boolean"):
        pack_mask(np.ones(3))


def test_numbers_of_numpy_are_stored_as_python_s() -> None:
    steps = (np.int64(0), np.int32(9))
    rule = Gradual(np.float32(0.5), steps=steps, every=np.int64(3), initial=np.float16(0.25))  # type: ignore[arg-type]
    assert rule == Gradual(0.5, steps=(0, 9), every=3, initial=0.25)
    stored = (rule.sparsity, rule.initial, rule.every, *rule.steps)
    assert [type(value) for value in stored] == [float, float, int, int, int]
