"""Bits of codes under a density learned from their counts: against the entropy, and its differences."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from karikomi.errors import InvalidArgument
from karikomi.quantize.rate_goal import RateGoal
from karikomi.quantize.rate_model import bits_of_magnitudes, interpolated_bits

tallies = st.lists(st.integers(0, 10_000), min_size=2, max_size=40)


def coded_size(counts: np.ndarray) -> float:
    """Return the bits of codes with these counts of magnitudes, signs equally likely, by the entropy's definition."""
    signed = np.concatenate([counts[:1], counts[1:] / 2, counts[1:] / 2]).astype(float)
    signed = signed[signed > 0]
    return float(-(signed * np.log2(signed / signed.sum())).sum())


def test_bits_add_up_to_the_entropy():
    counts = np.array([9e5, 6e4, 2e4, 5e3])
    assert counts @ bits_of_magnitudes(counts) == pytest.approx(coded_size(counts), rel=1e-4)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_slope_is_what_a_move_changes_in_the_size(place):
    """The learned density itself does not contribute: the differential of plug-in entropy."""
    counts = np.array([9e5, 6e4, 2e4, 5e3])
    moved = counts.copy()
    moved[place] -= 1
    moved[place + 1] += 1
    _, slope = interpolated_bits(np.array([place + 0.5]), bits_of_magnitudes(counts))
    assert slope[0] == pytest.approx(coded_size(moved) - coded_size(counts), rel=1e-3)


@given(tallies, st.floats(0.1, 100))
def test_every_magnitude_has_finite_bits_and_none_is_cheaper_further_out(counts, strength):
    bits = bits_of_magnitudes(np.array(counts, float), strength=strength)
    assert np.all(np.isfinite(bits)) and np.all(bits >= 0) and np.all(np.diff(bits) >= 0)


def test_float32_has_finite_bits_too():
    """Of very many zeros and no other code the mean magnitude is below the precision of one plus it."""
    bits = bits_of_magnitudes(np.array([3e6, *[0] * 127], np.float32))
    assert bits.dtype == np.float32 and np.all(np.isfinite(bits))


def test_the_prior_is_a_density():
    """With no codes at all what is left is the prior, which sums to one over both signs."""
    bits = bits_of_magnitudes(np.zeros(5))
    shares = 2.0**-bits
    assert shares[0] + 2 * shares[1:].sum() == pytest.approx(1.0)


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=20), tallies)
def test_interpolation_has_its_slope_and_meets_the_table(ratios, counts):
    table = bits_of_magnitudes(np.array(counts, float))
    array = np.array(ratios)
    values, slopes = interpolated_bits(array, table)
    other, _ = interpolated_bits(-array, table)
    assert np.array_equal(values, other)
    ahead, _ = interpolated_bits(array + 1e-6, table)
    smooth = np.abs(array - np.rint(array)) > 1e-3
    assert np.allclose((ahead - values)[smooth] / 1e-6, slopes[smooth], atol=1e-3)
    whole = np.arange(len(table))
    assert np.array_equal(interpolated_bits(whole, table)[0], table)


def test_a_goal_is_reached_on_a_plant_that_falls_with_the_strength():
    """Bits that follow the strength late and not in proportion: the goal is met within 2 %."""
    goal, strength, used = RateGoal(1_000.0, last=300), 1e-7, 50_000.0
    first = used
    for step in range(600):
        rest = 50_000.0 / (1 + (strength / 1e-6) ** 0.7)
        used += 0.05 * (rest - used)
        strength = goal.next(strength, used=used, path=goal.path(first, step))
    assert used == pytest.approx(1_000.0, rel=0.02)


def test_a_goal_above_the_first_size_stays_there():
    goal = RateGoal(1_000.0, last=10)
    assert goal.path(500.0, 0) == goal.path(500.0, 99) == 500.0
    assert goal.next(goal.least, used=1.0, path=1_000.0) == goal.least
    assert goal.next(goal.most, used=1e9, path=1_000.0) == goal.most


@pytest.mark.parametrize(
    "arguments",
    [{"bits": 0.0}, {"bits": np.inf}, {"last": 0}, {"last": 1.5}, {"gain": 0.0}, {"least": 1.0}],
)
def test_a_bad_goal_is_refused(arguments):
    with pytest.raises(InvalidArgument):
        RateGoal(**{"bits": 1.0, "last": 1, **arguments})
