"""Feature x feature x framework: two features in one training do what each of them does, and in their order."""

from __future__ import annotations

import math

import numpy as np
import pytest

from contract import reference_run as by_hand
from contract.pair_runs import DRIVERS
from contract.pairs import (
    CANNOT,
    FEATURES,
    HIDDEN,
    PAIRS,
    POLICIES,
    RANKS,
    UNSEEN,
    policies,
    reason,
    run_of,
)
from contract.reference_run import Trace, trace_of
from depth import FULL
from ranks.two_ranks import SCENARIOS


def runs(driver: str) -> list[tuple[tuple[str, str], str]]:
    """Return the pairs and policies that are run; XLA compiles so long that a quick run has some of JAX's."""
    known = [(p, policy) for p in PAIRS for policy in policies(*p) if reason(*p, driver) is None]
    if driver == "torch on a device":  # Other policies are decided on the host.
        return [each for each in known if each[1] == "skip"]
    if driver != "jax" or FULL:
        return known
    return [each for each in known if each[1] != "raise"][5::20]


RUNS = [
    pytest.param(*each, driver, id=f"{' x '.join(each[0])}, {each[1]}, {driver}")
    for driver in DRIVERS
    for each in runs(driver)
]


def assert_same(found: Trace, expected: Trace) -> None:
    for number, (own, other) in enumerate(zip(found.weights, expected.weights, strict=True)):
        for name, array in other.items():
            said = f"{name} after update {number}"
            np.testing.assert_allclose(own[name], array, rtol=2e-5, atol=2e-6, err_msg=said)


def differ(one: Trace, other: Trace) -> bool:
    if len(one.weights) != len(other.weights):
        return True
    gaps = [
        np.abs(own[name] - two[name]).max()
        for own, two in zip(one.weights, other.weights, strict=True)
        for name in own
    ]
    return bool(max(gaps) > 1e-3)


@pytest.mark.parametrize(("pair", "policy", "driver"), RUNS)
def test_a_pair_does_what_the_reference_does(
    pair: tuple[str, str], policy: str, driver: str
) -> None:
    run = run_of(*pair, policy=policy)
    found, expected = DRIVERS[driver](run), trace_of(run)
    assert_same(found, expected)
    assert found.raised == expected.raised


def test_the_run_of_a_pair_can_tell_each_of_the_two() -> None:
    alone = {
        (name, policy): trace_of(run_of(name, policy=policy))
        for name in FEATURES
        for policy in POLICIES
    }
    for pair in PAIRS:
        for policy in policies(*pair):
            both = trace_of(run_of(*pair, policy=policy))
            for name, other in (pair, pair[::-1]):
                seen = differ(both, alone[other, policy])
                hidden = name in UNSEEN or (name, other) in HIDDEN
                assert seen is not hidden, (name, other, policy)


def test_every_pair_is_run_in_torch_or_cannot_meet_for_a_reason_that_is_told() -> None:
    for pair in PAIRS:
        assert reason(*pair, "torch") is None, pair
    for places, why in (CANNOT | HIDDEN).items():
        assert not set(places) - {*FEATURES, *DRIVERS} and len(why.split()) > 3, places


def test_every_feature_is_met_on_two_ranks_or_it_is_said_why_not() -> None:
    assert RANKS.keys() == FEATURES.keys()
    for feature, met in RANKS.items():
        if isinstance(met, str):
            assert len(met.split()) > 3, feature
        else:
            assert met and not set(met) - set(SCENARIOS), feature


GRADS = {"one.weight": np.array([3.0, 0.0]), "two.weight": np.array([-4.0])}


def test_the_reference_by_hand() -> None:
    assert by_hand.joint(GRADS) == 5.0
    clamped, _, _ = by_hand.by_value(GRADS, 3.5, {})
    assert (clamped["one.weight"][0], clamped["two.weight"][0]) == (3.0, -3.5)
    each, _, _ = by_hand.by_tensor(GRADS, 3.0, {})
    assert (each["one.weight"][0], each["two.weight"][0]) == (3.0, -3.0)
    shrunk, _, _ = by_hand.by_norm(GRADS, 2.5, {})
    assert (shrunk["one.weight"][0], shrunk["two.weight"][0]) == (1.5, -2.0)
    # The mean after a norm of 2 is 2; half of it is left beside half of 1.5 times 2.
    _, _, memory = by_hand.by_mean({"one.weight": np.array([2.0])}, 1.5, {})
    kept, _, memory = by_hand.by_mean(GRADS, 1.5, memory)
    assert kept["two.weight"][0] == pytest.approx(-4.0 * 3.0 / 5.0)
    assert memory["mean"] == (0.5 * 1.0 + 0.5 * 3.0, 0.75)
    squares = {"one.weight": np.array([1.0, 0.0]), "two.weight": np.array([9.0])}
    cut, _, _ = by_hand.by_second_moments(GRADS, 4.0, {"squares": squares})
    assert (cut["one.weight"].tolist(), cut["two.weight"].tolist()) == ([2.0, 0.0], [-4.0])
    # Mean 2 and deviation sqrt(2): 5 is above 2 + 2 sqrt(2) = 4.83, and below 2 + 3 sqrt(2).
    for sigma, skips in ((2.0, True), (3.0, False)):
        assert by_hand.by_spikes(GRADS, sigma, {"ring": [1.0, 3.0]})[1] is skips
    assert by_hand.by_spikes(GRADS, 2.0, {"ring": [1.0, 3.0], "in a row": 1})[1] is False


def test_the_run_by_hand() -> None:
    # The second row of the slopes is 0.5, -1.5; every other step it is turned round, and the rate is 0.25.
    weights = [w["two.weight"][0].tolist() for w in trace_of(run_of()).weights]
    assert weights[:2] == [[-0.5, 1.625], [-0.5 + 0.46875, 1.625 - 0.15625]]
    weights = [w["two.weight"][0] for w in trace_of(run_of("momentum")).weights]
    speed = np.array([-1.875 + 0.25, 0.625 - 0.75])
    np.testing.assert_allclose(weights[1], weights[0] - 0.25 * speed, rtol=1e-12)
    window = trace_of(run_of("accumulation")).weights[0]["two.weight"][0]
    np.testing.assert_allclose(window, [-0.375 + 0.125 * 1.375, 1.25 + 0.125 * 0.875], rtol=1e-12)
    assert trace_of(run_of("bad step")).skipped == [number == 4 for number in range(10)]
    assert trace_of(run_of("patience")).skipped == [number == 5 for number in range(10)]
    clamped = trace_of(run_of("bound")).weights[0]["two.weight"][0].tolist()
    assert clamped == [-0.5, 0.75]
    pulled = trace_of(run_of("penalty")).weights[0]["two.weight"][0].tolist()
    assert pulled == [-0.5 + 0.0625, 1.625 - 0.0625]
    limits = [run_of("value clip", "schedule").limits(step)[0][1] for step in (0, 2, 4, 9)]
    assert limits == [2.0, 1.5, 1.0, 1.0]
    assert math.isinf(run_of().rule.limit)
