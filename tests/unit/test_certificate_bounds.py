"""The bounds of a certificate against published figures, SciPy, and a direct maximization of the likelihood."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import optimize, stats

from karikomi.errors import InvalidArgument
from karikomi.search.certificate import (
    Flips,
    drop_bound,
    feasibility,
    flip_bound,
    least,
    mean_bound,
    mean_needed,
    needed,
    paired_drop,
    power,
    smallest_budget,
)

# Counts (b, c, n), level of the one-sided bounds, and the published interval of (b - c) / n.
PUBLISHED = [
    # Tango 1998, section 6.1, soft contact lenses: the lower limit of c - b, so the upper one here.
    ((1, 0, 44), 0.05, (None, 0.096), 3),
    # Bentur et al. 2009 in Fagerland, Lydersen and Laake 2014, Table VI: -0.517 to -0.026 of b - c.
    ((1, 7, 21), 0.025, (-0.517, -0.026), 3),
    # 48 and 41 of 549, as PropCIs 0.3 gives it at 90 %.
    ((48, 41, 549), 0.05, (-0.0157, 0.0414), 4),
]


@pytest.mark.parametrize(("counts", "alpha", "interval", "digits"), PUBLISHED)
def test_the_score_interval_is_the_published_one(
    counts: tuple[int, int, int], alpha: float, interval: tuple[Any, float], digits: int
) -> None:
    b, c, n = counts
    low, high = interval
    assert round(drop_bound(Flips(b, c, n), alpha=alpha), digits) == high
    # The lower limit is the upper one of the counts the other way round.
    assert low is None or round(-drop_bound(Flips(c, b, n), alpha=alpha), digits) == low


def likelihood_statistic(b: int, c: int, n: int, drop: float) -> float:
    """Return the score statistic with the probability of a gain by numerical maximization."""

    def loss(gain: float) -> float:
        cells = (gain + drop, gain, 1 - 2 * gain - drop)
        return -float(stats.multinomial.logpmf((b, c, n - b - c), n, cells))

    gain = optimize.minimize_scalar(
        loss, bounds=(0.0, (1 - drop) / 2), method="bounded", options={"xatol": 1e-12}
    ).x
    return (b - c - n * drop) / math.sqrt(n * (2 * gain + drop * (1 - drop)))


@pytest.mark.parametrize(
    "counts", [(3, 1, 50), (10, 4, 300), (7, 0, 90), (40, 20, 160), (2, 9, 400)]
)
@pytest.mark.parametrize("alpha", [0.01, 0.05])
def test_the_bound_solves_the_score_equation(counts: tuple[int, int, int], alpha: float) -> None:
    b, c, n = counts
    bound = drop_bound(Flips(b, c, n), alpha=alpha)
    assert likelihood_statistic(b, c, n, bound) == pytest.approx(
        -stats.norm.ppf(1 - alpha), abs=2e-4
    )


def test_the_bound_where_nothing_flipped_and_where_all_was_lost() -> None:
    z = stats.norm.ppf(0.95)
    assert drop_bound(Flips(0, 0, 500)) == pytest.approx(z * z / (500 + z * z), rel=1e-9)
    assert drop_bound(Flips(30, 0, 30)) == pytest.approx(1.0)
    assert drop_bound(Flips(0, 30, 30)) > -1.0


def test_more_losses_raise_the_bound_and_more_gains_lower_it() -> None:
    grid = [[drop_bound(Flips(b, c, 200)) for c in range(0, 60, 5)] for b in range(0, 60, 5)]
    assert (np.diff(grid, axis=0) > 0).all() and (np.diff(grid, axis=1) < 0).all()


@pytest.mark.parametrize(("lost", "n"), [(0, 600), (1, 1000), (16, 5000), (38, 10_000), (5, 5)])
def test_the_exact_bound_is_the_one_of_scipy(lost: int, n: int) -> None:
    exact = stats.binomtest(lost, n, alternative="less").proportion_ci(0.95, method="exact")
    assert flip_bound(Flips(lost, 0, n)) == pytest.approx(exact.high, rel=1e-9)


@pytest.mark.parametrize(
    ("n", "budget", "most"),
    [(500, 0.01, 1), (1000, 0.005, 1), (1000, 0.01, 4), (2000, 0.005, 4), (5000, 0.005, 16)]
    + [(5000, 0.02, 83), (10_000, 0.005, 38), (10_000, 0.02, 176), (2000, 0.002, 0)],
)
def test_the_most_lost_examples_that_hold(n: int, budget: float, most: int) -> None:
    """A table by hand: the most b with Clopper and Pearson's bound on b of n within the budget."""
    assert flip_bound(Flips(most, 0, n)) <= budget < flip_bound(Flips(most + 1, 0, n))


def test_empirical_bernstein_by_hand() -> None:
    values = np.array([0.0, 0.1, 0.2, 0.3])
    logarithm = math.log(2 / 0.1)
    variance = float(np.sum((values - 0.15) ** 2) / 3)
    wanted = 0.15 + math.sqrt(2 * variance * logarithm / 4) + 7 * logarithm / 9
    # The extent is 2, of which the term has one factor.
    assert mean_bound(values, low=-1, high=1, alpha=0.1) == pytest.approx(
        min(1.0, wanted + 7 * logarithm / 9)
    )
    many = np.tile(np.sqrt(0.02) * np.array([1.0, -1.0]), 5000)
    assert mean_bound(many, low=-1, high=1) == pytest.approx(0.0056, abs=5e-5)


def test_the_bernstein_bound_covers() -> None:
    random = np.random.default_rng(0)
    draws = random.beta(0.3, 3.0, size=(400, 300))
    missed = sum(mean_bound(row, low=0, high=1, alpha=0.1) < 0.3 / 3.3 for row in draws)
    assert missed <= 40


@pytest.mark.parametrize(
    ("values", "range_"),
    [([0.5], (0, 1)), ([0.5, 2.0], (0, 1)), ([0.5, math.nan], (0, 1)), ([0.5, 0.5], (1, 1))],
)
def test_means_out_of_range_are_refused(values: list[float], range_: tuple[float, float]) -> None:
    with pytest.raises(InvalidArgument):
        mean_bound(np.array(values), low=range_[0], high=range_[1])


def test_needed_is_near_the_normal_formula_and_has_the_power() -> None:
    # (1.645 + 0.842)^2 * 0.02 / 0.005^2 = 4947.
    n = needed(0.005, flips=0.02)
    assert 4_947 <= n <= 5_300
    assert power(0.005, n, flips=0.02) >= 0.8 > power(0.005, int(0.9 * n), flips=0.02)
    # 1237 by the same formula; the counts are whole numbers, and the bound is wider than the normal one.
    assert 1_237 < needed(0.01, flips=0.02) < 1_400


def test_power_is_that_of_draws() -> None:
    random = np.random.default_rng(1)
    n, flips, drop = 800, 0.03, 0.004
    cells = ((flips + drop) / 2, (flips - drop) / 2, 1 - flips)
    counts = random.multinomial(n, cells, size=1500)
    passed = [
        drop_bound(Flips(int(b), int(c), n)) <= 0.01
        for b, c in map(tuple, np.unique(counts[:, :2], axis=0))
        for _ in range(int(np.sum((counts[:, 0] == b) & (counts[:, 1] == c))))
    ]
    assert power(0.01, n, flips=flips, drop=drop) == pytest.approx(np.mean(passed), abs=0.04)


def test_what_cannot_be_certified_is_known_beforehand() -> None:
    x = 0.005
    assert drop_bound(Flips(0, 0, least(x))) <= x < drop_bound(Flips(0, 0, least(x) - 1))
    verdicts = [feasibility(x, n).verdict for n in (500, 1_000, 6_000)]
    assert verdicts == ["cannot", "unlikely", "can"]
    text = feasibility(x, 500).sentence()
    assert "cannot" in text and "539" in text and f"{needed(x):,}" in text
    assert feasibility(x, 500).as_dict()["verdict"] == "cannot"
    assert power(smallest_budget(1000), 1000) >= 0.8


def test_means_need_what_holds_for_them() -> None:
    n = mean_needed(0.01, deviation=0.02, extent=0.2)
    random = np.random.default_rng(0)
    held = [
        mean_bound(np.clip(random.normal(0, 0.02, n), -0.1, 0.1), low=-0.1, high=0.1) <= 0.01
        for _ in range(200)
    ]
    assert np.mean(held) >= 0.75


def test_paired_drop_takes_the_bound_that_fits() -> None:
    before, after = np.array([1.0] * 90 + [0.0] * 10), np.array([1.0] * 88 + [0.0] * 12)
    tested = paired_drop(before, after, sign=1).tested(0.05)
    assert tested.method.startswith("Tango") and tested.bound == drop_bound(Flips(2, 0, 100))
    assert tested.beside["flips exact"] == flip_bound(Flips(2, 0, 100))
    # The other way round for an error.
    assert paired_drop(before, after, sign=-1).drop == -tested.drop
    shares = paired_drop(before / 2, after / 2, sign=1, clip=0.25)
    found = shares.tested(0.05)
    assert found.method.startswith("Maurer") and found.beside["beyond the clip"] == 2
    assert found.drop == pytest.approx(0.01)


def test_a_score_that_is_nan_is_as_bad_as_any() -> None:
    pair = paired_drop(np.array([0.5, 0.5]), np.array([0.5, math.nan]), sign=1)
    assert pair.differences.tolist() == [0.0, 1.0]
    with pytest.raises(InvalidArgument, match="dense"):
        paired_drop(np.array([0.5, math.nan]), np.array([0.5, 0.5]), sign=1)


@pytest.mark.parametrize("alpha", [0.0, -0.1, 0.6, math.nan])
def test_levels_out_of_range(alpha: float) -> None:
    with pytest.raises(InvalidArgument, match="alpha"):
        drop_bound(Flips(0, 0, 10), alpha=alpha)


@pytest.mark.parametrize("counts", [(-1, 0, 10), (6, 5, 10), (0, 0, 0), (1.5, 0, 10)])
def test_counts_that_are_none(counts: Any) -> None:
    with pytest.raises(InvalidArgument, match="counts"):
        Flips(*counts)
