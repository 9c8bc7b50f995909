"""Ranges of activations: the histogram against NumPy, and each calibration against its definition."""

from __future__ import annotations

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from karikomi.errors import InvalidArgument, NonFinite, UnknownName
from karikomi.quantize.activation_ranges import (
    CALIBRATIONS,
    MOST_BINS,
    ActivationGrid,
    ActivationHistogram,
    activation_grid,
    mean_squared_error,
)

values = st.floats(-(2.0**60), 2.0**60, width=32)
batches = st.lists(hnp.arrays(np.float32, st.integers(0, 20), elements=values), max_size=6)


def seen_of(*arrays: np.ndarray) -> ActivationHistogram:
    seen = ActivationHistogram("x")
    for array in arrays:
        seen.add(array)
    return seen


@given(batches)
def test_a_histogram_depends_on_no_order(arrays):
    first, second = seen_of(*arrays), seen_of(*arrays[::-1])
    assert (first.low, first.high, first.zeros) == (second.low, second.high, second.zeros)
    assert first.width == second.width or not len(first.counts)
    assert np.array_equal(first.counts, second.counts)


@given(batches)
def test_a_histogram_counts_each_value_in_its_bin(arrays):
    seen = seen_of(*arrays)
    everything = np.concatenate([np.zeros(0, np.float32), *arrays]).astype(np.float64)
    assert len(seen.counts) <= MOST_BINS + 1
    assert seen.counts.sum() + seen.zeros == everything.size
    if everything.any():
        expected, _ = np.histogram(everything[everything != 0], seen.edges)
        # NumPy's last bin is closed; ours never ends at a value.
        assert np.array_equal(seen.counts, expected)


@given(st.floats(-100, 100), st.floats(0, 100))
def test_zero_is_on_every_grid(low, width):
    grid = ActivationGrid.of(low, low + width)
    assert 0 <= grid.zero_point <= 255 and grid.scale > 0
    assert float(grid.rounded(np.zeros(1))[0]) == 0.0
    ends = np.asarray([min(low, 0.0), max(low + width, 0.0)])
    assert np.all(np.abs(grid.rounded(ends) - ends) <= grid.scale * 1.01)


def test_min_max_is_the_affine_formula():
    grid = activation_grid(seen_of(np.float32([-1.0, 0.5]), np.float32([2.0])))
    assert grid.scale == pytest.approx(3.0 / 255) and grid.zero_point == round(255 / 3)


def test_a_percentile_cuts_the_tails_that_numpy_names():
    array = np.random.default_rng(0).normal(size=200_000).astype(np.float32)
    seen = seen_of(array)
    low, high = CALIBRATIONS["percentile"](seen)
    expected = np.quantile(array, [0.000_005, 0.999_995])
    assert np.allclose([low, high], expected, atol=0.05)


def test_the_squared_error_is_the_least_of_all_cuts():
    array = np.abs(np.random.default_rng(1).normal(size=20_000)).astype(np.float32)
    array[0] = 40.0
    _, high = mean_squared_error(seen_of(array))

    def error(top: float) -> float:
        return float(
            np.square(ActivationGrid.of(0.0, top).rounded(array.astype(float)) - array).sum()
        )

    tops = np.linspace(2, 40, 77)
    assert error(high) <= 1.02 * min(map(error, tops))
    assert high < 40


def test_entropy_keeps_the_bulk_and_cuts_an_outlier():
    array = np.random.default_rng(2).normal(size=50_000).astype(np.float32)
    array[0] = 60.0
    low, high = CALIBRATIONS["entropy"](seen_of(array))
    assert 2.5 < high < 20 and low <= -2.5
    bounded = np.random.default_rng(3).uniform(0, 1, 50_000).astype(np.float32)
    assert CALIBRATIONS["entropy"](seen_of(bounded))[1] > 0.9


@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_constant_and_one_sided_tensors_have_a_grid(calibration):
    for array in (np.zeros(5), np.full(5, 3.0), np.full(5, -3.0), np.full(3, 1e-38)):
        grid = activation_grid(seen_of(np.float32(array)), calibration)
        assert np.abs(grid.rounded(array.astype(float)) - array).max() <= max(grid.scale, 1e-37)


def test_what_cannot_be_calibrated_is_named():
    with pytest.raises(NonFinite, match="hidden"):
        ActivationHistogram("hidden").add(np.float32([1.0, np.nan]))
    with pytest.raises(InvalidArgument, match="no values"):
        activation_grid(ActivationHistogram("hidden"))
    with pytest.raises(UnknownName, match="mse"):
        activation_grid(seen_of(np.ones(1)), "msee")
