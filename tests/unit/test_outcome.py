"""The outcome: what it says of kept, clipped, skipped, zeroed and passed steps."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import karikomi as kk
from karikomi.rules.outcome import Outcome

NAN, INF = float("nan"), float("inf")


def outcome(norms: list[float], after: list[float], **facts: Any) -> Outcome:
    names = tuple("abcdefgh"[: len(norms)])
    return Outcome(names, np.array(norms), np.array(after), **{"skipped": False, **facts})


def test_a_clipped_step() -> None:
    one = outcome([3.0, 4.0], [1.5, 2.0])
    assert (one.pre, one.post, one.factor, one.engaged, one.action) == (
        5,
        2.5,
        0.5,
        True,
        "clipped",
    )
    assert one.top() == [("b", 16 / 25), ("a", 9 / 25)]
    assert str(one) == "pre 5 -> post 2.5 x0.5 clipped; top: b 64%"
    assert one.as_row() == {"norm": 5.0, "factor": 0.5, "clipped": True, "skipped": False}


def test_a_kept_step() -> None:
    one = outcome([3.0, 4.0], [3.0, 4.0])
    assert (one.factor, one.engaged, one.action) == (1.0, False, "kept")


def test_a_skipped_step_that_is_finite() -> None:
    one = outcome([3.0, 4.0], [0.3, 0.4], skipped=True)
    assert (one.post, one.factor, one.action) == (0.0, 0.0, "skipped")
    assert one.as_row()["clipped"] is False and one.as_row()["skipped"] is True


@pytest.mark.parametrize("entry", [NAN, INF])
@pytest.mark.parametrize(
    ("policy", "skipped", "action"),
    [("skip", True, "skipped"), ("zero", False, "zeroed"), ("pass", False, "passed")],
)
def test_a_bad_step_names_its_tensor(entry: float, policy: str, skipped: bool, action: str) -> None:
    after = [0.0 if policy == "zero" else entry, 2.0]
    one = outcome([entry, 2.0], after, skipped=skipped, nonfinite_policy=policy)
    assert (one.nonfinite, one.action, one.engaged) == (("a",), action, False)
    assert str(one) == f"{action}: non-finite entries in a"
    assert one.top() == [("b", 1.0)]
    assert one.factor == (0.0 if skipped else 1.0)
    row = one.as_row()
    assert row["norm"] is None and row["nonfinite"] == ["a"]
    json.dumps(row, allow_nan=False)


def test_many_bad_tensors_are_named_in_short() -> None:
    one = outcome([NAN] * 8, [NAN] * 8, skipped=True)
    assert str(one) == "skipped: non-finite entries in a, b, c, ..."


def test_by_element_the_largest_counts() -> None:
    one = outcome([3.0, 4.0], [1.0, 1.0], element_wise=True)
    assert (one.pre, one.post, one.factor) == (4.0, 1.0, 0.25)
    assert str(one).startswith("largest 4 -> post 1 x0.25 clipped")


def test_nothing_is_a_kept_step_of_norm_zero() -> None:
    for one in (outcome([], []), outcome([0.0], [0.0])):
        assert (one.pre, one.post, one.factor, one.action, one.top()) == (0, 0, 1, "kept", [])


def test_huge_norms_do_not_overflow() -> None:
    one = outcome([3e200, 4e200], [3.0, 4.0])
    assert one.pre == pytest.approx(5e200) and one.factor == pytest.approx(1e-200)


@given(st.lists(st.floats(0, 1e150), min_size=1, max_size=8))
def test_shares_add_up_and_fall(norms: list[float]) -> None:
    shares = [share for _, share in outcome(norms, norms).top(8)]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1.0 if any(norms) else 0.0)


@pytest.mark.parametrize("entry", [NAN, INF])
def test_the_factor_speaks_of_the_finite_tensors(entry: float) -> None:
    one = outcome([entry, 3.0, 4.0], [0.0, 1.5, 2.0], nonfinite_policy="zero")
    assert (one.factor, one.engaged, one.action) == (0.5, True, "zeroed")
    assert (one.as_row()["factor"], one.as_row()["clipped"]) == (0.5, True)
    assert str(one) == "zeroed: non-finite entries in a; the others x0.5 clipped"


def test_a_skipped_step_has_clipped_nothing() -> None:
    one = outcome([3.0], [0.3], skipped=True)
    assert not one.engaged and str(one) == "pre 3 -> post 0 x0 skipped; top: a 100%"


def test_by_element_the_largest_are_named_with_their_magnitudes() -> None:
    one = outcome([3.0, 4.0, 0.5], [1.0, 1.0, 0.5], element_wise=True)
    assert one.top(2) == [("b", 4.0), ("a", 3.0)]
    assert str(one) == "largest 4 -> post 1 x0.25 clipped; top: b 4"


def test_every_group_has_its_factor() -> None:
    grads = {"a.w": np.array([3.0, 4.0]), "b.w": np.array([10.0, -10.0]), "c": np.array([8.0, 6.0])}
    groups = kk.clip.Groups(
        {"a.*": kk.clip.ByNorm(1.0), lambda n: n == "b.w": kk.clip.ByValue(5.0)}
    )
    _, found, _ = kk.numpy.clip(grads, groups)
    assert found.factors == pytest.approx({"a.*": 0.2, "1": 0.5, "default": 1.0})
    # Then all of them are scaled: 1, sqrt(50) and 10 have the joint norm sqrt(151).
    _, found, _ = kk.numpy.clip(grads, kk.clip.Chain(groups, kk.clip.ByGlobalNorm(1.0)))
    rest = 151**-0.5
    assert found.factors == pytest.approx({"a.*": 0.2 * rest, "1": 0.5 * rest, "default": rest})
    _, found, _ = kk.numpy.clip(grads, kk.clip.Chain(groups, groups))
    assert list(found.factors) == [
        f"{n}: {glob}" for n in (0, 1) for glob in ("a.*", "1", "default")
    ]
    _, found, _ = kk.numpy.clip({**grads, "c": np.array([np.nan])}, groups)
    assert found.factors == {"a.*": 0.0, "1": 0.0, "default": 0.0}  # no step is taken
    assert kk.numpy.clip(grads, kk.clip.ByNorm(1.0))[1].factors == {}
