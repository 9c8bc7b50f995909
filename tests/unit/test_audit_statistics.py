"""The statistics of an audit, against SciPy, against simulations, and by hand."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from scipy.stats import binomtest

from karikomi.audit.attribution.attributions import agreement, integrated
from karikomi.audit.paired.confidences import calibration_error, compared, log_likelihoods
from karikomi.audit.paired.mean_tests import rise_p
from karikomi.audit.paired.paired_outcomes import (
    PairedOutcomes,
    drop_interval,
    holm,
    least_lost,
    mcnemar,
    share_interval,
)
from karikomi.audit.paired.slices import ALPHA, members_of, slice_rows
from karikomi.audit.representation import alignment
from karikomi.errors import InvalidArgument


@settings(deadline=None)
@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_exact_interval_of_a_share(pair: tuple[int, int]) -> None:
    count, n = pair
    known = binomtest(count, n).proportion_ci(0.95, method="exact")
    assert share_interval(count, n) == pytest.approx((known.low, known.high), abs=1e-9)


@settings(deadline=None)
@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_lies_between_the_exact_tests_with_and_without_the_counts(b: int, c: int) -> None:
    if b + c == 0:
        assert mcnemar(b, c) == 0.5
        return
    above = binomtest(b + 1, b + c, alternative="greater").pvalue if b < b + c else 0.0
    exact = binomtest(b, b + c, alternative="greater").pvalue
    assert mcnemar(b, c) == pytest.approx((above + exact) / 2)


def test_holm_by_hand() -> None:
    # Sorted 0.005 0.01 0.03 0.04: times 4, 3, 2, 1 = 0.02 0.03 0.06 0.04, made to rise.
    adjusted = holm(np.array([0.01, 0.04, 0.03, 0.005]))
    assert adjusted == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(np.array([])).shape == (0,)


def test_the_fewest_flips_that_a_test_can_find() -> None:
    for tests in (1, 10, 100):
        fewest = least_lost(tests, ALPHA)
        assert mcnemar(fewest, 0) * tests <= ALPHA < mcnemar(fewest - 1, 0) * tests


def test_intervals_of_a_drop_cover_it() -> None:
    generator = np.random.default_rng(0)
    n, b, c = 400, 0.03, 0.01
    inside = 0
    for _ in range(2_000):
        lost, gained, _ = generator.multinomial(n, [b, c, 1 - b - c])
        low, high = drop_interval(int(lost), int(gained), n)
        inside += low <= b - c <= high
    assert 0.94 <= inside / 2_000 <= 0.99


def test_outcomes_by_hand() -> None:
    before = np.array([True, True, True, False, False, False])
    after = np.array([True, False, False, True, False, False])
    changed = np.array([False, True, True, True, True, False])
    facts = PairedOutcomes(before, after, changed).facts()
    assert facts["drop"] == pytest.approx(1 / 6)
    assert (facts["negative_flips"], facts["positive_flips"]) == pytest.approx((2 / 6, 1 / 6))
    assert facts["churn"] == pytest.approx(4 / 6)


def test_equal_accuracies_with_flips_are_told_apart_by_class() -> None:
    """5 % flips, the accuracy to the third digit the same: one class pays, the others gain."""
    generator = np.random.default_rng(0)
    targets = np.repeat(np.arange(10), 1_000)
    before = generator.random(10_000) < 0.9
    after = before.copy()
    after[np.flatnonzero(before & (targets == 3))[:250]] = False
    after[generator.permutation(np.flatnonzero(~before & (targets != 3)))[:250]] = True
    outcomes = PairedOutcomes(before, after, before != after)
    assert outcomes.facts()["drop"] == 0.0 and outcomes.facts()["churn"] == 0.05
    rows = slice_rows(outcomes, {str(k): np.flatnonzero(targets == k) for k in range(10)})
    assert [row["slice"] for row in rows if row["named"]] == ["3"]
    assert all(row["least_drop"] == least_lost(10, ALPHA) / 1_000 for row in rows)


def test_slices_where_nothing_pays_are_seldom_named() -> None:
    generator = np.random.default_rng(1)
    named = 0
    for _ in range(300):
        flips = generator.random(2_000) < 0.04
        before = generator.random(2_000) < 0.5
        after = np.where(flips, ~before, before)
        labels = generator.integers(0, 10, 2_000)
        groups = {str(k): np.flatnonzero(labels == k) for k in range(10)}
        rows = slice_rows(PairedOutcomes(before, after, flips), groups)
        named += any(row["named"] for row in rows)
    assert named <= 12  # 1 % of 300, and three deviations


def test_targets_of_one_example_are_not_independent() -> None:
    """Whole images flip or none of their pixels: two lost images of 50 are no evidence, though 128 pixels are lost."""
    before = np.ones((50, 64), bool)
    after = before.copy()
    after[:2] = False
    outcomes = PairedOutcomes(before.ravel(), after.ravel(), (before != after).ravel())
    every = {"all": np.arange(before.size)}
    assert slice_rows(outcomes, every)[0]["named"]
    sources = np.repeat(np.arange(50), 64)
    assert not slice_rows(outcomes, every, sources=sources)[0]["named"]
    after[:12] = False
    outcomes = PairedOutcomes(before.ravel(), after.ravel(), (before != after).ravel())
    assert slice_rows(outcomes, every, sources=sources)[0]["named"]


def test_slices_are_booleans_or_labels() -> None:
    places = np.array([0, 0, 1, 2])  # two targets of the first example
    found = members_of({"dark": [True, False, True], "site": ["a", "b", "b"]}, places, 3)
    assert {name: index.tolist() for name, index in found.items()} == {
        "dark": [0, 1, 3],
        "site=a": [0, 1],
        "site=b": [2, 3],
    }
    with pytest.raises(InvalidArgument, match="slice dark.*entry per example"):
        members_of({"dark": [True]}, places, 3)


def test_likelihoods_survive_large_outputs() -> None:
    outputs = np.array([[1e4, 0.0], [0.0, 1e4]], np.float32)
    assert log_likelihoods(outputs, np.array([0, 0])).tolist() == [0.0, -1e4]


def test_the_plain_calibration_error_by_hand() -> None:
    sure = np.repeat([0.6, 0.9], 100)
    right = np.concatenate([np.arange(100) < 70, np.arange(100) < 80])
    found = calibration_error(sure, right, bins=2)
    assert found["ece"] == pytest.approx(0.1)
    assert 0.0 < found["debiased"] <= found["ece"]


def test_overconfidence_is_found_and_a_rescaled_copy_is_not_the_same() -> None:
    generator = np.random.default_rng(0)
    outputs = generator.normal(size=(3_000, 5)) * 2
    shares = np.exp(outputs) / np.exp(outputs).sum(1, keepdims=True)
    targets = np.array([generator.choice(5, p=row) for row in shares])
    same = compared(outputs, outputs + 0.01 * generator.normal(size=outputs.shape), targets)
    worse = compared(outputs, 4 * outputs, targets)
    assert same is not None and worse is not None
    assert same["nll_p"] > 1e-3 and worse["nll_p"] < 1e-10
    assert worse["ece_after"] > worse["ece_before"] + 0.1
    assert compared(outputs[:9], outputs[:9], targets[:9]) is None


def test_a_rise_needs_more_than_noise() -> None:
    generator = np.random.default_rng(0)
    values = [rise_p(generator.normal(size=200)) for _ in range(500)]
    assert 0.02 < np.mean(np.array(values) < 0.05) < 0.08
    assert rise_p(np.array([])) == rise_p(np.array([1.0])) == 0.5
    assert rise_p(np.ones(5)) == 0.0 and rise_p(-np.ones(5)) == 1.0


def test_alignment_of_independent_activations_is_without_bias() -> None:
    """The biased estimate grows with the number of features: for 64 x 500 it is near 0.9."""
    generator = np.random.default_rng(0)
    found = [
        alignment([(generator.normal(size=(64, 500)), generator.normal(size=(64, 300)))])
        for _ in range(20)
    ]
    assert abs(np.mean(found)) < 0.03


def test_alignment_by_batches_is_near_that_of_all() -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(512, 8))
    y = x @ generator.normal(size=(8, 6)) + 0.5 * generator.normal(size=(512, 6))
    whole = alignment([(x, y)])
    parts = alignment([(x[i : i + 64], y[i : i + 64]) for i in range(0, 512, 64)])
    assert 0.2 < whole < 0.99 and abs(whole - parts) < 0.05
    assert np.isnan(alignment([(x[:3], y[:3])])) and np.isnan(alignment([(0 * x, y)]))


def test_integrated_gradients_are_complete() -> None:
    """Their sum is f(x) - f(x0), for a function whose gradient varies along the way."""
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(6,))
    x, start = generator.normal(size=(5, 6)), np.zeros((5, 6))

    def value(z: np.ndarray) -> np.ndarray:
        return np.tanh(z @ weight)

    def slope(z: np.ndarray) -> np.ndarray:
        return (1 - np.tanh(z @ weight) ** 2)[:, None] * weight

    found = integrated(slope, x, start, steps=50)
    assert found.sum(axis=1) == pytest.approx(value(x) - value(start), abs=1e-6)


def test_agreement_by_hand() -> None:
    a = np.array([[1.0, 0.0, 0.0, 0.0], [0.0] * 4, [1.0, 2.0, 3.0, 4.0]])
    b = np.array([[0.0, 1.0, 0.0, 0.0], [1.0] * 4, [-1.0, -2.0, -3.0, -4.0]])
    found = agreement(a, b)
    assert found["cosine"][[0, 2]].tolist() == pytest.approx([0.0, -1.0])
    assert np.isnan(found["cosine"][1])
    assert found["rank"][2] == pytest.approx(1.0) and found["top"].tolist()[::2] == [0.0, 1.0]
