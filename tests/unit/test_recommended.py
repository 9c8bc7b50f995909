"""`Recommended`: the limit by its formula, its renewal as norms fall, what it says, and the bit-exact state."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import karikomi as kk
from karikomi.clip import Recommended
from karikomi.errors import InvalidArgument


def run(rule: Any, norms: Any, state: Any = None) -> tuple[list[float], dict[str, Any]]:
    """Return the norms after the clip, and the state."""
    after = []
    for norm in norms:
        _, outcome, state = kk.numpy.clip({"w": np.array([float(norm)])}, rule, state)
        after.append(outcome.post)
    return after, state


def usual(count: int, scale: float = 1.0, spread: float = 0.2, seed: int = 0) -> np.ndarray:
    return scale * np.exp(spread * np.random.default_rng(seed).standard_normal(count))


@pytest.mark.parametrize(("spread", "ratio"), [(0.05, 3.0), (0.5, math.exp(1.5)), (1.0, 10.0)])
def test_the_limit_is_by_the_spread_between_the_least_and_the_most(
    spread: float, ratio: float
) -> None:
    norms = usual(512, spread=spread)
    _, state = run(Recommended(warmup=512), norms)
    assert state["rule.limit"] / np.median(norms) == pytest.approx(ratio, rel=0.12)
    assert state["rule.median"] == pytest.approx(np.median(norms), rel=0.02)


def test_an_explosion_is_clipped_in_the_warm_up_too_unless_early_is_infinite() -> None:
    norms = np.array([*usual(31), 1e6, *usual(4), 1e6])
    after, state = run(Recommended(early=math.inf), norms)
    assert after[:36] == norms[:36].tolist()
    assert 2.0 < after[36] == pytest.approx(state["rule.limit"])
    after, state = run(Recommended(), norms)
    assert after[31] == pytest.approx(np.median(norms[:31]), rel=0.02)
    assert 2.0 < after[36] == pytest.approx(state["rule.limit"])


@settings(max_examples=10, deadline=None)
@given(
    norms=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20),
    early=st.floats(0.1, 4.0),
)
def test_the_warm_up_is_clipped_at_the_median_of_the_norms_before(
    norms: list[float], early: float
) -> None:
    after, _ = run(Recommended(early=early, warmup=32), norms)
    assert after[0] == norms[0]
    for t in range(1, len(norms)):
        lower, upper = (np.quantile(norms[:t], 0.5, method=m) for m in ("lower", "higher"))
        # Between ranks the histogram interpolates as well; its bins are 2.2 % wide.
        assert after[t] <= min(norms[t], early * upper) * 1.023
        assert after[t] >= min(norms[t], early * lower) / 1.023


def test_an_outlier_in_the_second_step_is_held_and_one_in_the_first_forgotten() -> None:
    after, _ = run(Recommended(), [1.0, 1e6, 1.0, 1e6, 1.0])
    assert after[:2] == [1.0, 1.0]
    after, _ = run(Recommended(), [1e6, 1.0, 1.0, 1e6])
    assert after[3] == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize("ratio", [40.0, 0.125])
def test_the_estimate_is_renewed_when_the_usual_norm_has_moved(ratio: float) -> None:
    """As after a plateau: eight norms at another level, long before their number has doubled."""
    rule = Recommended()
    _, state = run(rule, usual(64))
    low = state["rule.limit"]
    _, state = run(rule, usual(7, ratio, seed=1), state)
    assert state["rule.limit"] == low
    _, state = run(rule, usual(1, ratio, seed=2), state)
    assert state["rule.limit"] / low == pytest.approx(ratio, rel=0.3)
    assert (state["rule.seen"], state["rule.due"]) == (72, 144)
    assert "as estimated after 72 norms: " in rule.explain(state)


def test_four_norms_in_a_row_above_the_limit_triple_it() -> None:
    """After a plateau, of which more norms are known than of what follows."""
    rule = Recommended()
    _, before = run(rule, usual(52))
    low, median = before["rule.limit"], before["rule.median"]
    after, state = run(rule, [2 * low] * 3, before)
    assert after == pytest.approx([low] * 3) and state["rule.limit"] == low
    after, state = run(rule, [2 * low] * 2, state)
    assert after == pytest.approx([low, 2 * low])
    found = {key: state[f"rule.{key}"] for key in ("limit", "median", "at", "due", "rises")}
    wanted = {"limit": 3 * low, "median": 3 * median, "at": 32, "due": 56 + 32, "rises": 1}
    assert found == pytest.approx(wanted)
    assert "as estimated after 32 norms and raised 3-fold since: " in rule.explain(state)
    _, state = run(rule, [5 * low] * 4, state)
    assert "raised 9-fold since" in rule.explain(state)
    _, state = run(rule, usual(80, 5 * low), state)
    assert "raised" not in rule.explain(state) and state["rule.median"] > 4 * low


@settings(max_examples=30, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(["usual", "large", "exploded", "nan"]), max_size=14),
    heavy=st.booleans(),
)
def test_the_limit_rises_after_large_norms_in_a_row_and_for_nothing_else(
    kinds: list[str], heavy: bool
) -> None:
    rule = Recommended()
    norms = usual(32, spread=0.1)
    if heavy:
        norms[::5] *= 20.0
    _, state = run(rule, norms)
    base = max(state["rule.limit"], 3.0 * state["rule.median"])
    assert (state["rule.limit"] < state["rule.median"]) == heavy
    row, wanted = 0, state["rule.limit"]
    values = {"usual": base / 2.9, "large": 2.0 * base, "exploded": 3.1 * base, "nan": math.nan}
    for kind in kinds:
        row = row if kind == "nan" else row + 1 if kind == "large" else 0
        _, state = run(rule, [values[kind]], state)
        if row == 4 or state["rule.at"] != 32:
            assert state["rule.at"] != 32 or state["rule.limit"] == pytest.approx(3.0 * wanted)
            return
        assert state["rule.limit"] == wanted


def test_a_short_explosion_after_many_usual_norms_renews_nothing() -> None:
    _, state = run(Recommended(), usual(64))
    _, after = run(Recommended(), [*usual(20, seed=3), *[1e6] * 15], state)
    assert after["rule.limit"] == state["rule.limit"]


def test_explosions_do_not_move_the_limit() -> None:
    norms = usual(64)
    spoilt = norms.copy()
    spoilt[5:60:8] = 1e9
    limits = [run(Recommended(warmup=64), n)[1]["rule.limit"] for n in (norms, spoilt)]
    assert limits[1] <= limits[0]


def test_where_large_norms_are_frequent_the_limit_is_below_the_median() -> None:
    """One in ten is 20 times as large: q95 is far beyond 1.645 sd; one in fifty is not seen by it."""
    for share, ratio in ((10, 0.7), (50, 3.0)):
        norms = usual(600)
        norms[::share] *= 20.0
        _, state = run(Recommended(warmup=600), norms)
        assert state["rule.limit"] / np.median(norms) == pytest.approx(ratio, rel=0.03)
        logs = np.log(np.quantile(norms, (0.25, 0.5, 0.75, 0.95)))
        wanted = (logs[3] - logs[1]) / (1.644854 * (logs[2] - logs[0]) / 1.348980)
        assert state["rule.tail"] == pytest.approx(wanted, rel=0.15)
    norms[::10] *= 20.0
    rule = Recommended(warmup=600)
    _, state = run(rule, norms)
    assert "large norms are frequent (one in twenty is above 2" in rule.explain(state)
    _, state = run(Recommended(warmup=600, tail=math.inf), norms)
    assert state["rule.limit"] >= 3.0 * state["rule.median"]


def test_large_norms_that_were_frequent_stay_so_until_they_are_clearly_gone() -> None:
    """Of the second 32 norms two in ten are 1.9 times as large: less than at first needed."""
    norms = usual(32, spread=0.2)
    norms[::5] *= 20.0
    rule = Recommended()
    _, state = run(rule, norms)
    assert state["rule.limit"] == pytest.approx(0.7 * state["rule.median"])
    fewer = usual(32, spread=0.1, seed=1)
    fewer[::5] *= 1.9
    _, held = run(rule, fewer, state)
    assert held["rule.seen"] == 64 and held["rule.median"] != state["rule.median"]
    assert held["rule.limit"] == pytest.approx(0.7 * held["rule.median"])
    assert "large norms are frequent" in rule.explain(held)
    _, alone = run(Recommended(warmup=32), fewer)
    assert alone["rule.limit"] == pytest.approx(3.0 * alone["rule.median"])
    _, gone = run(rule, usual(32, seed=2), state)
    assert gone["rule.limit"] == pytest.approx(3.0 * gone["rule.median"])


def test_equal_norms_have_no_tail() -> None:
    _, state = run(Recommended(warmup=8), [1.0] * 8)
    assert (state["rule.tail"], state["rule.spread"]) == (1.0, 0.0)
    assert state["rule.limit"] == pytest.approx(3.0)


def test_the_limit_follows_norms_that_fall_within_a_doubling() -> None:
    _, state = run(Recommended(), usual(32, 2.5))
    high = state["rule.limit"]
    for count, known in ((32, 64), (64, 128)):
        _, state = run(Recommended(), usual(count, 1.0, seed=count), state)
        assert state["rule.seen"] == known
        assert state["rule.limit"] < high / 2.0
    assert state["rule.due"] == 256
    _, state = run(Recommended(every=100), usual(128, 2.0), state)
    assert state["rule.due"] == 356 and state["rule.limit"] > 5.0


def test_scaling_by_a_power_of_two_changes_no_decision() -> None:
    norms = usual(200, spread=0.6)
    after = [run(Recommended(), scale * norms)[0] for scale in (1.0, 2.0**-60, 2.0**60)]
    np.testing.assert_allclose(np.array(after[1]) * 2.0**60, after[0], rtol=1e-12)
    np.testing.assert_allclose(np.array(after[2]) * 2.0**-60, after[0], rtol=1e-12)


def test_a_state_through_json_continues_bit_for_bit() -> None:
    norms = usual(150, spread=0.8)
    whole, _ = run(Recommended(), norms)
    first, state = run(Recommended(), norms[:70])
    rest, _ = run(Recommended(), norms[70:], json.loads(json.dumps(state)))
    assert [*first, *rest] == whole


def test_zeros_and_non_finite_norms_teach_nothing() -> None:
    plain, state = run(Recommended(warmup=8), usual(20))
    mixed = [x for norm in usual(20) for x in (norm, 0.0, math.nan)]
    _, other = run(Recommended(warmup=8), mixed)
    learned = [key for key in state if key.startswith("rule.")]
    assert {key: state[key] for key in learned} == {key: other[key] for key in learned}


def test_it_says_what_it_picked_and_why() -> None:
    rule = Recommended(warmup=8)
    assert rule.explain(None) == "no limit yet: 0 of 8 norms of the warm-up are known"
    _, state = run(rule, usual(5))
    median = np.median(usual(5))
    assert rule.explain(state) == (
        "5 of 8 norms of the warm-up are known: until the estimate limit "
        f"{median:.3g} = 1 x their median {median:.3g}"
    )
    _, other = run(Recommended(early=math.inf), usual(5))
    assert Recommended(early=math.inf).explain(other).startswith("no limit yet: 5 of 32")
    for spread, text in ((0.01, "below the least, 3 x"), (2.0, "above the most, 10 x"), (0.3, "x")):
        _, state = run(rule, usual(8, spread=spread))
        assert rule.explain(state).endswith(text)
    with pytest.raises(InvalidArgument, match="not a state of this rule"):
        rule.explain({"rule.ring": 1})


def test_attach_shows_its_state_to_explain() -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    rule = Recommended(warmup=2)
    handle = kk.torch.attach(optimizer, model, clip=rule)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    assert rule.explain(handle.state_dict()["clip"]).startswith(
        "limit 5.2 = 3 x the median norm 1.73"
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"sigma": 0.0},
        {"tail": 0.5},
        {"tail": math.nan},
        {"heavy": 0.0},
        {"early": 0.0},
        {"early": math.nan},
        {"least": 0.5},
        {"least": 4.0, "most": 3.0},
        {"warmup": 1},
        {"every": 8, "warmup": 9},
    ],
)
def test_numbers_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match="out of range"):
        Recommended(**wrong)
