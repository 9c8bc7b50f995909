"""What holds around every decision, shown with a rule that learns and may skip."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

import karikomi as kk
from contract.deciding import judge
from karikomi.errors import InvalidArgument, Unsupported
from karikomi.rule import (
    Array,
    Decision,
    Namespace,
    Quantity,
    Scope,
    State,
    check_limit,
    combine,
    shrink_to,
)
from karikomi.rules import decide
from karikomi.rules.checkpoint import to_plain
from karikomi.rules.stages import alone

NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class SkipJumps:
    """Skip a step whose joint norm is above `limit` times the mean of the accepted ones."""

    limit: float

    scope: ClassVar[Scope] = Scope.GLOBAL
    of: ClassVar[Quantity] = Quantity.GRADIENT
    needs: ClassVar[frozenset[str]] = frozenset()

    def init(self, like: Array, *, xp: Namespace) -> State:
        assert np.isfinite(like).all()
        return {"sum": xp.zeros_like(like), "count": xp.zeros_like(like)}

    def decide(
        self,
        norms: Array,
        state: State,
        *,
        present: Array,
        facts: Mapping[str, Array],
        xp: Namespace,
    ) -> tuple[Decision, State]:
        assert np.isfinite(norms).all()
        seen = state["count"] > 0
        jump = seen & (norms * state["count"] > self.limit * state["sum"])
        one = xp.ones_like(norms)
        after = {"sum": state["sum"] + norms, "count": state["count"] + one}
        return Decision(one, None, xp.any(jump)), after


def run(series: list[list[float]], nonfinite: str = "skip", **present: Any) -> list[Any]:
    """Return verdict and state, as plain values, after each step."""
    rule, rows = SkipJumps(3.0), []
    state = decide.begin(rule, np.array(series[0]), xp=np)
    for norms in series:
        verdict, state = judge(
            rule, np.array(norms), state, present=np.full(2, True), xp=np, nonfinite=nonfinite
        )
        rows.append((verdict, to_plain([alone(rule, ["a", "b"])], state)))
    return rows


def test_a_skip_of_the_rule_commits_nothing_but_its_count() -> None:
    (_, first), (verdict, second), (_, third) = run([[3.0, 4.0], [300.0, 0.0], [5.0, 0.0]])
    assert first == {
        **{"attempted": 1, "accepted": 1, "bad_in_a_row": 0, "skipped_in_a_row": 0},
        **{"rule.sum": [5.0], "rule.count": [1.0]},
    }
    assert bool(verdict.skip) and second == {**first, "attempted": 2, "skipped_in_a_row": 1}
    assert third["rule.sum"] == [10.0] and third["accepted"] == 2


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_bad_norm_never_reaches_the_rule(bad: float) -> None:
    (verdict, first), (_, second) = run([[bad, 4.0], [3.0, 4.0]])
    assert bool(verdict.skip) and verdict.bad.tolist() == [True, False]
    assert first["rule.sum"] == [0.0] and first["bad_in_a_row"] == 1
    assert second["rule.sum"] == [5.0] and second["bad_in_a_row"] == 0


@pytest.mark.parametrize(("policy", "factor"), [("zero", [0.0, 1.0]), ("pass", [1.0, 1.0])])
def test_a_step_that_goes_on_counts_the_good_norms_only(policy: str, factor: list[float]) -> None:
    ((verdict, state),) = run([[NAN, 4.0]], policy)
    assert verdict.factor.tolist() == factor and not bool(verdict.skip)
    assert state["rule.sum"] == [4.0] and state["accepted"] == 1


@pytest.mark.parametrize(
    ("rule", "nonfinite", "skipped"),
    [
        pytest.param(kk.clip.ByNorm(1e-200), "skip", True, id="skip"),
        pytest.param(kk.clip.ByNorm(1e-200), "raise", True, id="raise"),
        pytest.param(kk.clip.ByNorm(1e-200), "zero", False, id="zero"),
        pytest.param(kk.clip.ByNorm(1e-200), "pass", False, id="pass"),
        pytest.param(kk.clip.StableAdamW(1e-200), "skip", False, id="update rule"),
    ],
)
def test_a_factor_lost_to_zero_skips_gradients_where_the_policy_skips(
    rule: Any, nonfinite: str, skipped: bool
) -> None:
    norms = np.array([1e200, 1.0])
    verdict, state = judge(
        rule,
        norms,
        decide.begin(rule, norms, xp=np),
        present=np.full(2, True),
        xp=np,
        nonfinite=nonfinite,
        facts={"sizes": np.ones(2)},
    )
    assert verdict.factor.tolist() == [0.0, 1e-200] and not verdict.bad.any()
    assert bool(verdict.skip) is skipped and state["accepted"] == int(not skipped)


def test_absent_numbers_do_not_count() -> None:
    rule = SkipJumps(3.0)
    state = decide.begin(rule, np.zeros(2), xp=np)
    verdict, state = judge(
        rule, np.array([NAN, 4.0]), state, present=np.array([False, True]), xp=np
    )
    assert not bool(verdict.skip) and not verdict.bad.any()
    assert state["rule.sum"].tolist() == [4.0]


def test_norms_afterwards_follow_the_verdict() -> None:
    norms, one = np.array([NAN, INF, 4.0, 2.0]), np.ones(4)
    factor = np.array([0.0, 0.0, 0.5, 1.0])
    verdict = decide.StageDecision(factor, None, ~np.isfinite(norms), np.array(False))
    assert decide.norms_after(norms, verdict, xp=np).tolist() == [0.0, 0.0, 2.0, 2.0]
    limited = verdict._replace(limit=1.5 * one)
    assert decide.norms_after(norms, limited, xp=np).tolist() == [0.0, 0.0, 1.5, 1.5]


def test_what_is_not_a_rule_here_is_refused() -> None:
    decide.check_rule(SkipJumps(1.0), Quantity.GRADIENT, where="here")
    with pytest.raises(InvalidArgument, match="here: not a rule; got 3"):
        decide.check_rule(3, Quantity.GRADIENT, where="here")
    with pytest.raises(InvalidArgument, match="not a rule; got <class"):
        decide.check_rule(SkipJumps, Quantity.GRADIENT, where="here")
    with pytest.raises(Unsupported, match="SkipJumps acts on a gradient, not on a weight"):
        decide.check_rule(SkipJumps(1.0), Quantity.WEIGHT, where="here")


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1.0, 1e30, 1e300])
def test_norms_combine_without_overflow_or_underflow(scale: float) -> None:
    assert combine(np.array([3.0, 0.0, 4.0]) * scale, xp=np)[0] == pytest.approx(5.0 * scale)
    assert combine(np.zeros(3), xp=np).tolist() == [0.0]


def test_shrinking_is_exactly_one_up_to_the_limit_and_its_slack() -> None:
    norms = np.array([0.0, 0.5, 1.0, 1.0 + 1e-7, 2.0])
    assert shrink_to(norms, np.array(1.0), xp=np)[:3].tolist() == [1.0, 1.0, 1.0]
    assert shrink_to(norms, np.array(1.0), xp=np)[3] < 1.0
    loose = shrink_to(norms, np.array(1.0), xp=np, slack=1e-6)
    assert loose.tolist() == [1.0, 1.0, 1.0, 1.0, 0.5]


@dataclass(frozen=True)
class Dipping:
    """A schedule that goes below zero."""

    def value(self, step: Array, *, xp: Namespace) -> Array:
        return 1.0 - step


@pytest.mark.parametrize("rule", [kk.clip.ByValue, kk.clip.ByNorm, kk.clip.ByGlobalNorm])
def test_no_schedule_reverses_a_gradient_and_zero_leaves_alone(rule: Any) -> None:
    state = None
    for expected in (0.5, 2.0, 2.0):
        found, _, state = kk.numpy.clip([np.array([2.0])], rule(Dipping()), state)
        assert found[0].tolist() == [1.0 if expected == 0.5 else expected]


@pytest.mark.parametrize("wrong", [Scope.UNIT, Dipping, SimpleNamespace(value=3.0)])
def test_a_schedule_has_a_method_value(wrong: Any) -> None:
    with pytest.raises(InvalidArgument, match="must be a number or a schedule"):
        kk.clip.ByNorm(wrong)


@pytest.mark.parametrize("limit", [np.float32(0.5), np.float64(0.5), np.int64(2), np.uint8(1)])
def test_numbers_of_numpy_are_limits(limit: Any) -> None:
    assert type(check_limit(limit, where="here")) in (int, float)
    plain = kk.clip.ByNorm(limit.item())
    assert kk.clip.ByNorm(limit) == plain and hash(kk.clip.ByNorm(limit)) == hash(plain)
    with pytest.raises(InvalidArgument, match="must be positive"):
        kk.clip.ByNorm(-limit.astype(float))
