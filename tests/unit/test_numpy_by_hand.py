"""NumPy's functions on two arrays of unequal size, worked by hand: moments, updates, penalties, schedules."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import karikomi as kk
from karikomi.prune import L1, Gradual, GroupLasso, GrowingL2, OneShot


def test_entries_are_clamped_in_units_of_the_root_of_their_moments() -> None:
    grads = {"a": np.array([8.0, -8.0, 8.0]), "b": np.array([1.0])}
    moments = {"a": np.array([0.25, 4.0, 0.0]), "b": np.array([16.0])}
    found, outcome, _ = kk.numpy.clip(grads, kk.clip.SPAM(4.0, warmup=0), second_moments=moments)
    # At most 2 * 0.5 and 2 * 2; an entry without a history stays.
    assert found["a"].tolist() == [1.0, -4.0, 8.0] and found["b"].tolist() == [1.0]
    assert outcome.pre == 16.0 and outcome.post == 2.0


def test_updates_are_scaled_by_the_root_mean_squares_of_each() -> None:
    updates = {"a": np.array([6.0, 8.0, 0.0, 0.0]), "b": np.array([0.5]), "c": np.zeros(0)}
    found, outcome, _ = kk.numpy.clip(updates, kk.clip.BlockRMS(2.0))
    # The norm 10 of four entries is a root mean square of 5.
    np.testing.assert_allclose(found["a"], [2.4, 3.2, 0.0, 0.0], rtol=1e-12)
    assert found["b"].tolist() == [0.5] and outcome.engaged


WEIGHTS = {"a": np.array([[3.0, -4.0], [0.0, 0.0], [6.0, 8.0]]), "b": np.array([[-2.0]])}


@pytest.mark.parametrize(
    ("rule", "how", "value", "slopes"),
    [
        (
            L1(0.5),
            {},
            0.5 * (21.0 + 2.0),
            {"a": [[0.5, -0.5], [0.0, 0.0], [0.5, 0.5]], "b": [[-0.5]]},
        ),
        (L1(0.5), {"only": "b"}, 1.0, {"a": [[0.0] * 2] * 3, "b": [[-0.5]]}),
        # Units of two entries and of one: the root of 2 times 5 + 0 + 10, and 2.
        (
            GroupLasso(0.5),
            {"unit_axes": {"*": 0}},
            0.5 * (math.sqrt(2.0) * 15.0 + 2.0),
            {
                "a": math.sqrt(0.5) * np.array([[0.6, -0.8], [0.0, 0.0], [0.6, 0.8]]),
                "b": [[-0.5]],
            },
        ),
        # The second rise: 0.25 each; half the squares of -4, 8 and -2.
        (
            GrowingL2(1.0, growth=0.125, every=3),
            {
                "step": 4,
                "masks": {
                    "a": np.array([[True, False], [True, True], [True, False]]),
                    "b": np.array([[False]]),
                },
            },
            0.25 * (16.0 + 64.0 + 4.0) / 2,
            {"a": [[0.0, -1.0], [0.0, 0.0], [0.0, 2.0]], "b": [[-0.5]]},
        ),
    ],
    ids=["all", "one", "units", "marked"],
)
def test_a_penalty_is_the_sum_over_arrays_and_its_gradient(
    rule: Any, how: Any, value: float, slopes: dict[str, Any]
) -> None:
    found, gradients = kk.numpy.penalty(WEIGHTS, rule, **how)
    assert found == pytest.approx(value, rel=1e-12)
    for name, expected in slopes.items():
        np.testing.assert_allclose(gradients[name], expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("step", "strength"), [(0, 0.0), (1, 0.0), (2, 1.0), (4, 1.0), (5, 2.0), (8, 2.5), (99, 2.5)]
)
def test_a_growing_strength_by_hand(step: int, strength: float) -> None:
    rule = GrowingL2(2.5, growth=1.0, every=3, first=2)
    assert rule.strength_at(step) == strength


def test_a_schedule_masks_at_every_step_and_chooses_at_its_own() -> None:
    # Of six weights 0, 2 and 3 are gone after steps 1, 2 and 3.
    rule = Gradual(0.5, steps=(1, 3), every=1)
    weights = {"a": np.array([1.0, 6.0]), "b": np.array([2.0, -3.0, 4.0, 5.0])}
    found, masks = kk.numpy.prune_at(weights, rule, 0)
    assert not masks and found["a"].tolist() == [1.0, 6.0]
    found, masks = kk.numpy.prune_at(weights, rule, 2, masks)
    # 1 - (1 - 1 / 2)^3 = 7 / 8 of the way to one half: 2.6 weights.
    assert found["a"].tolist() == [0.0, 6.0] and found["b"].tolist() == [0.0, 0.0, 4.0, 5.0]
    # What is gone stays gone though the weights have come back, and between steps too.
    moved = {"a": np.array([9.0, 6.0]), "b": np.array([9.0, 9.0, 1.0, 0.5])}
    for step in (4, 3):
        found, masks = kk.numpy.prune_at(moved, rule, step, masks)
        assert found["a"].tolist() == [0.0, 6.0] and found["b"].tolist() == [0.0, 0.0, 1.0, 0.5]


def test_one_shot_goes_at_its_step_alone() -> None:
    weights = {"a": np.array([1.0, -4.0]), "b": np.array([3.0, 2.0])}
    for step, expected in ((1, [1.0, -4.0]), (2, [0.0, -4.0]), (3, [1.0, -4.0])):
        found, masks = kk.numpy.prune_at(weights, OneShot(0.5, 2), step)
        assert found["a"].tolist() == expected and bool(masks) is (step == 2)


def test_units_lie_along_the_axis_that_is_named() -> None:
    array = np.array([[3.0, 0.0, 1.0], [4.0, 2.0, 0.0]])
    for axis in (0, 1):
        found, outcome, _ = kk.numpy.bound(
            {"w": array}, kk.bound.MaxNorm(2.0), unit_axes={"w": axis}
        )
        norms = np.linalg.norm(array, axis=1 - axis)
        assert np.asarray(outcome.norms).tolist() == pytest.approx(norms.tolist())
        factors = np.minimum(1.0, 2.0 / norms)
        by_hand = array * (factors[:, None] if axis == 0 else factors)
        np.testing.assert_allclose(found["w"], by_hand, rtol=1e-12)


def test_the_counts_of_masks_and_the_share_of_two_arrays() -> None:
    weights = {"a": np.array([1.0, 2.0]), "b": np.arange(3.0, 9.0)}
    _, masks = kk.numpy.prune(weights, sparsity=0.5)
    assert [int((~mask).sum()) for mask in masks.values()] == [2, 2]
    _, masks = kk.numpy.prune(weights, sparsity=0.5, allocation="uniform")
    assert [int((~mask).sum()) for mask in masks.values()] == [1, 3]
