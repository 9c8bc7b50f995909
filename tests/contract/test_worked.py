"""Every rule against a short series that was worked by hand: factors, limits, skips, and the defaults."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

import karikomi as kk
from contract.deciding import judge
from karikomi import registry
from karikomi.clip import histogram
from karikomi.rules import decide
from karikomi.schedule import Linear

INF = math.inf

Steps = list[tuple[list[float], list[float] | str]]
"""Per step: the norms, and the factors, the limits (of rules by entry), or ``skip``."""

# Squared deviations of 1, 3 and 4.5 from their mean 17 / 6: (121 + 1 + 100) / 36.
SPREAD = math.sqrt((121 + 1 + 100) / 36 / 2)

WORKED: list[tuple[Any, dict[str, list[float]], Steps]] = [
    (kk.clip.ByValue(0.5), {}, [([3.0, 0.1], [0.5, 0.5])]),
    (
        kk.clip.ByValue(Linear(1.0, 3.0, steps=(0, 2))),
        {},
        [([9.0], [1.0]), ([9.0], [2.0]), ([9.0], [3.0]), ([9.0], [3.0])],
    ),
    (kk.clip.ByNorm(2.0), {}, [([1.0, 2.0, 8.0], [1.0, 1.0, 0.25])]),
    (kk.clip.ByGlobalNorm(3.5, norm=1), {}, [([3.0, 4.0], [0.5, 0.5])]),
    (kk.clip.ByGlobalNorm(2.0, norm=INF), {}, [([3.0, 4.0], [0.5, 0.5])]),
    # The limit doubles with a norm above it and halves with one below.
    (
        kk.clip.AdaptiveQuantile(2.0, rate=math.log(4.0)),
        {},
        [([8.0], [0.25]), ([8.0], [0.5]), ([1.0], [1.0]), ([8.0], [0.5])],
    ),
    (
        kk.clip.ZClip(2.0, warmup=2, to="mean"),
        {},
        [([1.0], [1.0]), ([3.0], [1.0]), ([7.0], [2 / 7])],
    ),
    # The spike teaches nothing, so that the next one is judged by the same mean and deviation.
    (
        kk.clip.ZClip(2.0, warmup=2, to="threshold", skip_update_on_spike=True),
        {},
        [([1.0], [1.0]), ([3.0], [1.0]), ([7.0], [4 / 7]), ([8.0], [0.5])],
    ),
    (kk.clip.ByGlobalNorm(2.5), {}, [([3.0, 4.0], [0.5, 0.5]), ([1.5, 2.0], [1.0, 1.0])]),
    # Norms of weights below 0.5 count as 0.5: at most 0.4, 0.05 and 0.2.
    (
        kk.clip.AGC(0.1, eps=0.5),
        {"weights": [4.0, 0.25, 2.0]},
        [([1.0, 1.0, 0.01], [0.4, 0.05, 1.0])],
    ),
    # The percentiles of 4; 2, 4; 2, 4, 8; 2, 4, 8, 16, the last two from the histogram.
    (
        kk.clip.AutoClip(25.0, window=2),
        {},
        [([4.0], [1.0]), ([2.0], [1.0]), ([8.0], [3 / 8]), ([16.0], [3.5 / 16])],
    ),
    # All norms so far and the present one count as they were before they were clipped.
    (kk.clip.AutoClip(50.0), {}, [([1.0], [1.0]), ([3.0], [2 / 3]), ([9.0], [3 / 9])]),
    # Mean 2 and deviation 1; then (2 + 2.8) / 2 and the root of (1 + 0.4^2) / 2.
    (
        kk.clip.ZClip(2.0, alpha=0.5, warmup=2),
        {},
        [([1.0], [1.0]), ([3.0], [1.0]), ([7.0], [2.8 / 7.0]), ([4.0], [3.85 / 4.0])],
    ),
    (
        kk.clip.ZClip(2.0, alpha=0.75, warmup=2, clip_factor=0.5),
        {},
        # The mean is then 0.75 * 2 + 0.25 * 1.4 = 1.85.
        [([1.0], [1.0]), ([3.0], [1.0]), ([7.0], [1.4 / 7.0]), ([2.0], [1.0])],
    ),
    # Warm-up by the joint norm, of which the smallest own norms are kept: 3 and 4.
    (
        kk.clip.AdaGC(1.5, beta=0.75, limit=5.0, warmup=3),
        {},
        [
            ([6.0, 8.0], [0.5, 0.5]),
            ([1.5, 2.0], [1.0, 1.0]),
            ([3.0, 4.0], [1.0, 1.0]),
            # At most 2.25 and 3, then 1.5 times 1.6875 and 2.25.
            ([9.0, 3.0], [0.25, 1.0]),
            ([10.125, 6.75], [0.25, 0.5]),
        ],
    ),
    # Medians of the last three, the present one excluded: of 2, 4; 2, 4, 12; 4, 12, 6.
    (
        kk.clip.Quantile(0.5, window=3, warmup=2),
        {},
        [([2.0], [1.0]), ([4.0], [1.0]), ([12.0], [0.25]), ([6.0], [4 / 6]), ([24.0], [0.25])],
    ),
    # Twice the median of the first two, then of the third and fourth.
    (
        kk.clip.Recommended(least=2.0, most=2.0, warmup=2),
        {},
        [([4.0], [1.0]), ([4.0], [1.0]), ([16.0], [0.5]), ([16.0], [0.5]), ([64.0], [0.5])],
    ),
    # Means 4 and (4 + 2 * 8) / 3.
    (
        kk.clip.EMARatio(2.0, beta=0.5),
        {},
        [([4.0], [1.0]), ([20.0], [0.4]), ([40.0], [1 / 3])],
    ),
    # Means 4, 1 and (4 + 2 * 20) / 3, 1.
    (
        kk.clip.EMARatio(2.0, beta=0.5, per="tensor", learn="raw"),
        {},
        [([4.0, 1.0], [1.0, 1.0]), ([20.0, 1.0], [0.4, 1.0]), ([44.0, 8.0], [2 / 3, 0.25])],
    ),
    (
        kk.clip.SPAM(9.0, warmup=3),
        {},
        [([9.0], [INF]), ([9.0], [INF]), ([9.0], [3.0]), ([9.0], [3.0])],
    ),
    # Of 4, 16 and no entries: root mean squares of 2, 0.25 and 0.
    (
        kk.clip.BlockRMS(0.5),
        {"sizes": [4.0, 16.0, 0.0]},
        [([4.0, 1.0, 0.0], [0.25, 1.0, 1.0])],
    ),
    (kk.clip.StableAdamW(0.5), {"sizes": [4.0, 16.0]}, [([8.0, 1.0], [0.125, 1.0])]),
    (kk.clip.Smooth(2.0), {}, [([3.0, 4.0], [2 / 7, 2 / 7])]),
    (kk.clip.Smooth(2.0, per="tensor"), {}, [([3.0, 4.0], [2 / 5, 2 / 6])]),
    (kk.clip.Normalize(2.0, gamma=1.0), {}, [([3.0, 4.0], [2 / 6, 2 / 6])]),
    (
        kk.clip.Normalize(2.0, gamma=1.0, per="tensor"),
        {},
        [([3.0, 0.25, 0.0], [0.5, 1.6, 1.0])],
    ),
    (kk.clip.SkipLarge(4.0), {}, [([4.0], [1.0]), ([4.01], "skip"), ([1.0], [1.0])]),
    # Of 1 and 3 at most 2 + 2 * sqrt(2), of 1, 3 and 4.5 at most 17 / 6 + 2 * SPREAD; once in a row.
    (
        kk.clip.SkipSpikes(2.0, window=3, warmup=2, patience=1),
        {},
        [
            ([1.0], [1.0]),
            ([3.0], [1.0]),
            ([4.5], [1.0]),
            ([17 / 6 + 2.01 * SPREAD], "skip"),
            ([17 / 6 + 2.01 * SPREAD], [1.0]),
            ([17 / 6 + 2.01 * SPREAD], [1.0]),
            ([99.0], "skip"),
        ],
    ),
    (kk.bound.Clamp(0.5), {}, [([3.0, 0.1], [0.5, 0.5])]),
    (kk.bound.MaxNorm(2.0), {}, [([1.0, 8.0], [1.0, 0.25])]),
    (kk.bound.UnitNorm(2.0), {}, [([1.0, 2.0, 8.0, 0.0], [2.0, 1.0, 0.25, 1.0])]),
    (kk.bound.NonNegative(), {}, [([0.0, 3.0], [1.0, 0.0])]),
    (kk.bound.Box(0.0, 1.0), {}, [([0.0, 3.0], [1.0, 0.0])]),
    (kk.bound.L1Ball(1.0), {}, [([0.0, 3.0], [1.0, 0.0])]),
    (kk.bound.Simplex(), {}, [([0.0, 3.0], [1.0, 0.0])]),
    (kk.bound.HalfSpace(1.0, 0.0), {}, [([0.0, 3.0], [1.0, 0.0])]),
    (kk.bound.MinMaxNorm(1.0, 2.0, rate=0.5), {}, [([0.5, 1.0, 4.0, 0.0], [1.5, 1.0, 0.75, 1.0])]),
    (kk.bound.InitScaled(3.0), {"fan_in": [4.0, 9.0]}, [([9.0, 9.0], [1.5, 1.0])]),
    (kk.bound.SpectralCap(2.0), {}, [([1.0, 8.0], [1.0, 0.25])]),
    (kk.bound.QKClip(10.0), {}, [([5.0, 40.0], [1.0, 0.25])]),
]


@pytest.mark.parametrize(("rule", "facts", "steps"), WORKED, ids=[str(row[0]) for row in WORKED])
def test_a_series_is_decided_as_by_hand(
    rule: Any, facts: dict[str, list[float]], steps: Steps
) -> None:
    known = {name: np.array(values) for name, values in facts.items()}
    state = decide.begin(rule, np.array(steps[0][0]), xp=np)
    for norms, expected in steps:
        present = np.full(len(norms), True)
        decision, state = judge(rule, np.array(norms), state, present=present, xp=np, facts=known)
        assert bool(decision.skip) is (expected == "skip")
        if expected != "skip":
            found = decision.factor if decision.limit is None else decision.limit
            np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_every_rule_is_worked_by_hand() -> None:
    worked = {type(rule) for rule, _, _ in WORKED}
    registered = {entry.thing for kind in ("clip", "bound") for entry in registry.entries(kind)}
    assert {thing for thing in registered if not hasattr(thing, "parts")} == worked


LEARNING = [
    row for row in WORKED if row[0].init(np.ones(1), xp=np) and not isinstance(row[0], kk.clip.SPAM)
]


@pytest.mark.parametrize("present", [True, False])
@pytest.mark.parametrize(
    ("rule", "facts", "steps"), LEARNING, ids=[str(row[0]) for row in LEARNING]
)
def test_zero_and_absent_gradients_teach_nothing(
    rule: Any, facts: dict[str, list[float]], steps: Steps, present: bool
) -> None:
    like = np.ones(len(steps[0][0]))
    state = decide.begin(rule, like, xp=np)
    _, before = judge(rule, like, state, present=like > 0, xp=np)
    here = np.full(like.shape, present)
    _, after = judge(rule, np.zeros_like(like), before, present=here, xp=np)
    for key in before.keys() - set(decide.COUNTERS):
        np.testing.assert_array_equal(after[key], before[key], err_msg=key)


@pytest.mark.parametrize(
    ("apart", "read"), [(0.25, 0.25), (0.75, 1.0), (1.25, 1.0), (-0.75, -1.0), (-0.25, -0.25)]
)
def test_a_bin_of_the_histogram_reaches_half_a_bin_to_either_side(
    apart: float, read: float
) -> None:
    """Of norms in one bin with the first one, the bin is shared out; else its middle is read."""
    state = histogram.begin(np.ones(1), xp=np)
    for norm in (4.0, 1.0, 16.0, 4.0 * 2.0 ** (apart / 32)):
        state = histogram.count(state, np.asarray(norm), np.asarray(True), xp=np)
    # Ranks 0 to 3; the last norm is next to 4, above or below.
    found = histogram.quantile(state, (2 if apart > 0 else 1) / 3, xp=np)
    assert np.log2(float(found) / 4.0) * 32 == pytest.approx(read, abs=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_outermost_bin_reaches_to_the_outermost_norm(sign: int) -> None:
    """Norms of more than 20 octaves from the first share one bin, evenly in their logarithms."""
    state = histogram.begin(np.ones(1), xp=np)
    for octaves in (0, 24, 27, 30):
        norm = np.asarray(2.0 ** (sign * octaves))
        state = histogram.count(state, norm, np.asarray(True), xp=np)
    # The middle one of three, by rank; half a bin is 1 / 64 octave.
    found = histogram.quantile(state, (2 if sign > 0 else 1) / 3, xp=np)
    assert sign * np.log2(float(found)) == pytest.approx((20 - 1 / 64 + 30) / 2, abs=1e-6)


DEFAULTS: dict[type, dict[str, Any]] = {
    kk.clip.AGC: {"limit": 0.01, "eps": 1e-3, "unit": "layer", "norm": 2.0},
    kk.clip.AdaGC: {"ratio": 1.05, "beta": 0.98, "limit": 1.0, "warmup": 100},
    kk.clip.AutoClip: {"percentile": 10.0, "window": 512},
    kk.clip.AdaptiveQuantile: {
        "start": 1.0,
        "quantile": 0.5,
        "rate": 0.2,
        "least": 1e-8,
        "most": INF,
    },
    kk.clip.BlockRMS: {"limit": 1.0},
    kk.clip.EMARatio: {"ratio": 2.0, "beta": 0.99, "per": "global", "learn": "clipped"},
    kk.clip.Normalize: {"limit": 1.0, "gamma": 0.01, "per": "global"},
    kk.clip.Quantile: {"quantile": 0.9, "window": 100, "warmup": 20},
    kk.clip.Recommended: {
        "sigma": 3.0,
        "least": 3.0,
        "most": 10.0,
        "tail": 1.3,
        "heavy": 0.7,
        "early": 1.0,
        "warmup": 32,
        "every": 10_000,
    },
    kk.clip.SPAM: {"threshold": 5000.0, "warmup": 20},
    kk.clip.SkipSpikes: {"sigma": 6.0, "window": 128, "warmup": 64, "patience": 16},
    kk.clip.StableAdamW: {"limit": 1.0},
    kk.clip.ZClip: {
        "z": 2.5,
        "alpha": 0.97,
        "warmup": 25,
        "clip_factor": 1.0,
        "to": "adaptive",
        "skip_update_on_spike": False,
    },
    kk.bound.InitScaled: {"k": 2.0},
    kk.bound.QKClip: {"limit": 100.0, "alpha": 0.5},
    kk.bound.UnitNorm: {"limit": 1.0, "per": "unit", "norm": 2.0},
}


@pytest.mark.parametrize("kind", DEFAULTS)
def test_the_defaults_are_those_of_the_pages(kind: type) -> None:
    assert dataclasses.asdict(kind()) == DEFAULTS[kind]  # type: ignore[call-overload]


@pytest.mark.parametrize("kind", [kk.clip.Smooth, kk.bound.MaxNorm])
def test_the_extent_that_is_not_given(kind: Any) -> None:
    assert kind(1.0).per == ("global" if kind is kk.clip.Smooth else "unit")


def test_the_parts_of_queries_and_keys_multiply_to_the_whole() -> None:
    rule = kk.bound.QKClip(alpha=0.25)
    gamma = np.array([1.0, 1 / 16])
    query, key = rule.split(gamma, shared=False)
    np.testing.assert_allclose(query, [1.0, 0.5], rtol=1e-15)
    np.testing.assert_allclose(key, [1.0, 0.125], rtol=1e-15)
    query, key = rule.split(gamma, shared=True)
    np.testing.assert_allclose(query, gamma, rtol=1e-15)
    np.testing.assert_allclose(key, [1.0, 1.0], rtol=1e-15)
