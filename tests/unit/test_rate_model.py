"""Bits of codes under a density learned from their counts: against the entropy, and its differences."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from scipy.optimize import minimize

from karikomi.errors import InvalidArgument
from karikomi.quantize.rate_goal import RateGoal
from karikomi.quantize.rate_model import fitted

whole = st.integers(0, 10**6)


def facts(counts: np.ndarray) -> tuple[float, float, float]:
    """Return how many codes there are, are not zero, and the sum of magnitudes, of counts of magnitudes."""
    counts = np.asarray(counts, float)
    return counts.sum(), counts[1:].sum(), counts @ np.arange(len(counts))


def coded_size(counts: np.ndarray) -> float:
    """Return the bits of codes by the density's definition, at its best parameters, found by search."""
    count, nonzero, magnitude = facts(counts)

    def bits(p: float, theta: float) -> float:
        magnitudes = np.arange(1, len(counts))
        tail = (1 - p) * (1 - theta) * theta ** (magnitudes - 1) / 2
        return -(counts[0] * np.log2(p) + counts[1:] @ np.log2(tail))

    start = np.array([1 - nonzero / count, 1 - nonzero / magnitude])
    found = minimize(lambda at: bits(*at), start, bounds=[(1e-9, 1 - 1e-9)] * 2)
    return float(found.fun)


COUNTS = np.array([9e5, 4e4, 3e4, 5e3])


def test_bits_are_those_of_the_best_density_of_its_kind():
    assert fitted(*facts(COUNTS)).total(*facts(COUNTS)) == pytest.approx(
        coded_size(COUNTS), rel=1e-5
    )


def test_bits_are_at_least_the_entropy_and_close_to_it_for_such_codes():
    geometric = 1e6 * np.concatenate([[0.9], 0.1 * 0.6 * 0.4 ** np.arange(12)])
    signed = np.concatenate([geometric[:1], geometric[1:] / 2, geometric[1:] / 2])
    entropy = -(signed * np.log2(signed / signed.sum())).sum()
    total = fitted(*facts(geometric)).total(*facts(geometric))
    assert entropy <= total <= 1.001 * entropy


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_slope_is_what_a_move_changes_in_the_size(place):
    """The learned density itself does not contribute."""
    moved = COUNTS.copy()
    moved[place] -= 100
    moved[place + 1] += 100
    slope = fitted(*facts(COUNTS)).slope(np.array([place + 0.5]))[0]
    change = (coded_size(moved) - coded_size(COUNTS)) / 100
    assert slope == pytest.approx(change, rel=0.02)


@given(whole, whole, whole)
def test_all_bits_are_finite_and_none_is_cheaper_further_out(zeros, nonzero, beyond):
    for dtype in (np.float32, np.float64):
        magnitude = nonzero + (beyond if nonzero else 0)
        model = fitted(*(dtype(number) for number in (zeros + nonzero, nonzero, magnitude)))
        assert np.all(np.isfinite(model))
        assert model.zero >= 0 and model.first >= model.further > 0


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=20), whole, whole)
def test_the_slope_is_the_derivative_and_codes_are_met(ratios, nonzero, beyond):
    model = fitted(2.0 * nonzero + 1, float(nonzero), float(nonzero + beyond))
    array = np.array(ratios)
    ahead, values = model.bits(array + 1e-6), model.bits(array)
    smooth = np.abs(np.abs(array) % 1 - 0.5) < 0.499
    assert np.allclose((ahead - values)[smooth] / 1e-6, model.slope(array)[smooth], atol=1e-3)
    assert np.array_equal(values, model.bits(-array))
    further = [0, model.first, model.first + model.further, model.first + 2 * model.further]
    assert np.allclose(model.bits(np.arange(4)) - model.zero, further)


def test_every_weight_is_drawn_to_zero_where_the_histogram_has_a_second_peak():
    """As many 2s as 3s and hardly a 1: the free histogram has no slope between them."""
    model = fitted(*facts(np.array([8e4, 1e3, 6e3, 6e3])))
    assert model.further > 0.5


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
