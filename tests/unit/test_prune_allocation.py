"""Allocations remove exactly what was asked for, each by its formula, and say when they cannot."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from karikomi import registry
from karikomi.errors import InvalidArgument, UnknownName
from karikomi.prune import LAMP, Tensor, allocate, outlier_share

SPARSITY = st.floats(0, 1, exclude_max=True)
PER_TENSOR = ["uniform", "erk", "lamp", "owl", "sensitivity"]
EACH = ["global", *PER_TENSOR, "isomorphic"]
LOSSES = st.floats(-0.2, 1.0)


@st.composite
def networks(draw: st.DrawFn, smallest: int = 1) -> dict[str, Tensor]:
    """Return tensors of which everything is known."""
    found = {}
    for index in range(draw(st.integers(1, 8))):
        shape = draw(st.tuples(st.integers(smallest, 40), st.integers(1, 40)))
        seed, ties = draw(st.integers(0, 1000)), draw(st.booleans())
        scores = np.random.default_rng(seed).exponential(10.0 ** (seed % 7 - 3), math.prod(shape))
        scores = (scores.round() if ties else scores).astype(np.float32)
        points = draw(st.dictionaries(st.sampled_from([0.1, 0.5, 0.9]), LOSSES, min_size=1))
        found[f"t{index}"] = Tensor(
            items=math.prod(shape),
            shape=shape,
            scores=lambda scores=scores: scores,
            outliers=draw(st.floats(0, 1)),
            curve=points,
        )
    return found


def sized(**sizes: int) -> dict[str, Tensor]:
    return {name: Tensor(items=size) for name, size in sizes.items()}


def counts(name: str, tensors: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
    pools = allocate(name, tensors, sparsity)
    assert [pool.names for pool in pools] == [(name,) for name in tensors]
    return {pool.names[0]: pool.remove for pool in pools}


# --- laws of all ---


@pytest.mark.parametrize("name", PER_TENSOR)
@given(networks(), SPARSITY)
def test_exactly_so_many_go_and_every_tensor_keeps_one(
    name: str, tensors: dict[str, Tensor], sparsity: float
) -> None:
    total = sum(one.items for one in tensors.values())
    target = round(sparsity * total)
    if target > total - len(tensors):
        with pytest.raises(InvalidArgument, match=f"{name}: each tensor keeps at least one"):
            allocate(name, tensors, sparsity)
        return
    found = counts(name, tensors, sparsity)
    assert sum(found.values()) == target
    assert all(0 <= found[key] < one.items for key, one in tensors.items())


@pytest.mark.parametrize("name", PER_TENSOR)
@given(networks(), SPARSITY, SPARSITY)
def test_more_sparsity_takes_from_none_less(
    name: str, tensors: dict[str, Tensor], one: float, other: float
) -> None:
    total = sum(tensor.items for tensor in tensors.values())
    assume(round(max(one, other) * total) <= total - len(tensors))
    less, more = (counts(name, tensors, sparsity) for sparsity in sorted((one, other)))
    # Rounding to whole items may move one, from a tensor to its neighbour.
    assert all(more[key] >= less[key] - 1 for key in tensors)


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("sparsity", [1.2, 1.0, -0.1, math.nan, math.inf, True, "0.5", None])
def test_sparsity_out_of_range(name: str, sparsity: Any) -> None:
    with pytest.raises(InvalidArgument, match="0 <= sparsity < 1"):
        allocate(name, sized(a=10), sparsity)


@pytest.mark.parametrize(
    ("name", "fact"),
    [
        ("erk", "shape"),
        ("isomorphic", "shape"),
        ("lamp", "scores"),
        ("owl", "outliers"),
        ("sensitivity", "curve"),
    ],
)
def test_a_missing_fact_is_named_with_what_to_give(name: str, fact: str) -> None:
    whole = Tensor(items=1, shape=(1,), scores=lambda: np.ones(1), outliers=0.0, curve={0.5: 0.1})
    with pytest.raises(InvalidArgument, match=f"^b: .*'{name}' needs to know the {fact}.*{fact}: "):
        allocate(name, {"a": whole, "b": Tensor(items=4)}, 0.5)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match="did you mean 'uniform'"):
        allocate("unifrom", sized(a=10), 0.5)


def test_each_is_explained() -> None:
    entries = {entry.name: entry for entry in registry.entries("allocation")}
    assert set(entries) >= set(EACH)
    assert all(entry.formula and entry.source for entry in entries.values())
    for name in EACH:
        assert ">>>" in entries[name].thing.__doc__ and "Source:" in entries[name].thing.__doc__


# --- global, uniform, isomorphic ---


@given(networks(), SPARSITY)
def test_global_is_one_pool_of_everything(tensors: dict[str, Tensor], sparsity: float) -> None:
    (pool,) = allocate("global", tensors, sparsity)
    assert pool.names == tuple(tensors)
    assert pool.remove == round(sparsity * sum(one.items for one in tensors.values()))


@given(st.lists(st.integers(100, 10_000), min_size=1, max_size=12), st.floats(0, 0.9))
def test_uniform_is_within_one_weight_of_uniform(sizes: list[int], sparsity: float) -> None:
    pools = allocate("uniform", {str(i): Tensor(items=n) for i, n in enumerate(sizes)}, sparsity)
    for pool, size in zip(pools, sizes, strict=True):
        assert math.floor(sparsity * size) <= pool.remove <= math.ceil(sparsity * size)


def test_the_largest_remainder_is_rounded_up() -> None:
    # 1.2, 1.8 and 3.0
    assert counts("uniform", sized(a=4, b=6, c=10), 0.3) == {"a": 1, "b": 2, "c": 3}


def test_uniform_passes_on_what_a_tiny_tensor_cannot_give() -> None:
    assert counts("uniform", sized(tiny=1, large=9), 0.8) == {"tiny": 0, "large": 8}


def test_uniform_that_would_empty_a_tensor_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="got 9 of 10; allowed: at most 8"):
        allocate("uniform", sized(a=5, b=5), 0.9)


@given(networks(), st.floats(0, 0.9))
def test_isomorphic_shares_within_a_shape(tensors: dict[str, Tensor], sparsity: float) -> None:
    shapes = {one.shape for one in tensors.values()}
    total = sum(one.items for one in tensors.values())
    assume(round(sparsity * total) <= total - len(shapes))
    pools = allocate("isomorphic", tensors, sparsity)
    assert sum(pool.remove for pool in pools) == round(sparsity * total)
    assert sorted(name for pool in pools for name in pool.names) == sorted(tensors)
    for pool in pools:
        assert len({tensors[name].shape for name in pool.names}) == 1
    assert len(pools) == len(shapes)


# --- erk ---


def water_filling(tensors: Mapping[str, Tensor], sparsity: float) -> dict[str, float]:
    """Return the densities ``min(1, eps * raw)`` of the right total, eps found by bisection."""
    raw = {name: sum(one.shape) / math.prod(one.shape) for name, one in tensors.items()}
    low, high = 0.0, 1e9
    for _ in range(200):
        eps = (low + high) / 2
        kept = sum(one.items * min(1.0, eps * raw[name]) for name, one in tensors.items())
        short = kept < (1 - sparsity) * sum(one.items for one in tensors.values())
        low, high = (eps, high) if short else (low, eps)
    return {name: min(1.0, high * raw[name]) for name in tensors}


@given(networks(smallest=5), st.floats(0, 0.9))
def test_erk_solves_its_equation(tensors: dict[str, Tensor], sparsity: float) -> None:
    total = sum(one.items for one in tensors.values())
    assume(round(sparsity * total) <= total - len(tensors))
    densities = water_filling(tensors, sparsity)
    # Where a tensor would keep less than one item, the others give way.
    assume(all(densities[name] * one.items >= 1 for name, one in tensors.items()))
    for name, removed in counts("erk", tensors, sparsity).items():
        items = tensors[name].items
        assert abs(removed - (1 - densities[name]) * items) <= 1 + 1e-6


def test_erk_by_hand() -> None:
    # Raw densities 1/2 and 1/5; 58 of 116 stay. With neither dense eps = 58 / (16/2 + 100/5) > 2, so
    # the first would be more than dense; without it eps = (58 - 16) / (100/5) = 2.1, and 42 stay.
    small, large = Tensor(items=16, shape=(4, 4)), Tensor(items=100, shape=(10, 10))
    assert counts("erk", {"small": small, "large": large}, 0.5) == {"small": 0, "large": 58}


def test_erk_counts_the_kernel() -> None:
    """At the same size, the longer the sides the denser: 8 + 8 + 3 + 3 against 24 + 24."""
    conv, linear = Tensor(items=576, shape=(8, 8, 3, 3)), Tensor(items=576, shape=(24, 24))
    found = counts("erk", {"conv": conv, "linear": linear}, 0.8)
    kept = 0.2 * 1152
    assert found == {"conv": round(576 - kept * 22 / 70), "linear": round(576 - kept * 48 / 70)}


# --- lamp ---


@given(networks(), st.floats(0, 0.95))
def test_lamp_counts_a_global_ranking(tensors: dict[str, Tensor], sparsity: float) -> None:
    total = sum(one.items for one in tensors.values())
    target = round(sparsity * total)
    assume(target <= total - len(tensors))
    ranked = []
    for name, one in tensors.items():
        scores = np.sort(one.scores().astype(np.float64))  # type: ignore[misc]
        shares = LAMP().of_tensor(scores, {}, xp=np)
        ranked += [(share, name) for share in [*shares[:-1], math.inf]]
    order = {name: place for place, name in enumerate(tensors)}
    chosen = sorted(ranked, key=lambda one: (one[0], order[one[1]]))[:target]
    assert counts("lamp", tensors, sparsity) == {
        name: sum(one == name for _, one in chosen) for name in tensors
    }


def test_lamp_by_hand() -> None:
    """Squares 1, 4, 9: 1/14, 4/13, 1; and 0.01 twice, 0.04: 1/6, 1/5, 1."""
    scores = {"a": [3.0, 1.0, 2.0], "b": [0.1, 0.2, 0.1]}
    tensors = {
        name: Tensor(items=3, scores=lambda values=values: np.array(values, np.float32))
        for name, values in scores.items()
    }
    found = [counts("lamp", tensors, remove / 6) for remove in range(5)]
    assert [(one["a"], one["b"]) for one in found] == [(0, 0), (1, 0), (1, 1), (1, 2), (2, 2)]


def test_lamp_takes_zeros_first_but_one() -> None:
    zeros = Tensor(items=5, scores=lambda: np.zeros(5, np.float32))
    large = Tensor(items=5, scores=lambda: np.arange(1, 6, dtype=np.float32))
    assert counts("lamp", {"large": large, "zeros": zeros}, 0.4) == {"large": 0, "zeros": 4}
    assert counts("lamp", {"large": large, "zeros": zeros}, 0.8) == {"large": 4, "zeros": 4}


def test_lamp_at_the_ends_of_float32() -> None:
    tiny = Tensor(items=3, scores=lambda: np.array([1, 2, 3], np.float32) * np.float32(1e-44))
    huge = Tensor(items=3, scores=lambda: np.array([1, 2, 3], np.float32) * np.float32(1e38))
    assert counts("lamp", {"tiny": tiny, "huge": huge}, 0.67) == {"tiny": 2, "huge": 2}


@pytest.mark.parametrize("bad", [-1.0, math.nan])
def test_lamp_refuses_what_has_no_share(bad: float) -> None:
    tensor = Tensor(items=2, scores=lambda: np.array([bad, bad], np.float32))
    with pytest.raises(InvalidArgument, match="lamp: a.*scores >= 0"):
        allocate("lamp", {"a": tensor}, 0.5)


# --- owl ---


@given(st.lists(st.floats(0, 0.3), min_size=2, max_size=8), st.floats(0.2, 0.8))
def test_owl_is_the_published_map_for_tensors_of_one_size(
    outliers: list[float], sparsity: float
) -> None:
    assume(max(outliers) - min(outliers) > 1e-6)
    tensors = {str(i): Tensor(items=10_000, outliers=one) for i, one in enumerate(outliers)}
    found = counts("owl", tensors, sparsity)
    share = np.array(outliers)
    density = 2 * 0.08 * (share - share.min()) / (share.max() - share.min())
    density = density - density.mean() + (1 - sparsity)
    removed = np.array(list(found.values()))
    np.testing.assert_allclose(removed, (1 - density) * 10_000, atol=1.001)


def test_owl_of_equal_outliers_is_uniform() -> None:
    tensors = {name: Tensor(items=10, outliers=0.1) for name in "ab"}
    assert counts("owl", tensors, 0.5) == {"a": 5, "b": 5}


def test_owl_stays_within_range_at_the_ends() -> None:
    tensors = {"calm": Tensor(items=1000, outliers=0.0), "wild": Tensor(items=1000, outliers=0.5)}
    assert counts("owl", tensors, 0.04) == {"calm": 80, "wild": 0}
    assert counts("owl", tensors, 0.96) == {"calm": 999, "wild": 921}


@given(st.lists(st.lists(st.floats(0, 9), max_size=5), max_size=5), st.floats(0.5, 3))
def test_outliers_are_counted_over_blocks(blocks: list[list[float]], times: float) -> None:
    flat = [value for block in blocks for value in block]
    expected = np.mean(np.array(flat) > times * np.mean(flat)) if flat else 0.0
    # The mean of blocks and that of the whole may differ in the last bit.
    assume(not flat or min(abs(value - times * np.mean(flat)) for value in flat) > 1e-9)
    assert outlier_share(lambda: [np.array(one) for one in blocks], times=times) == expected


# --- sensitivity ---


def loss_at(curve: Mapping[float, float], share: float, worst: float) -> float:
    """Return what pruning a tensor this far costs, as the docstring of the allocation says."""
    points = [(0.0, 0.0), *sorted(curve.items()), (1.0, worst)]
    so_far = np.maximum.accumulate([loss for _, loss in points])
    return float(np.interp(share, [share for share, _ in points], so_far))


@given(networks(smallest=25), st.floats(0, 0.95))
def test_losses_are_equal_where_they_can_be(tensors: dict[str, Tensor], sparsity: float) -> None:
    """No tensor loses more than another could take on: moving one item would cost more."""
    total = sum(one.items for one in tensors.values())
    assume(round(sparsity * total) <= total - len(tensors))
    curves = {name: one.curve or {} for name, one in tensors.items()}
    worst = max(0.0, *(loss for curve in curves.values() for loss in curve.values()))
    found = counts("sensitivity", tensors, sparsity)

    def loss(name: str, more: int) -> float:
        items = tensors[name].items
        return loss_at(curves[name], min(max((found[name] + more) / items, 0.0), 1.0), worst)

    # Two items: one for rounding down, one for rounding up.
    highest = max(loss(name, -2) for name in tensors)
    lowest = min(loss(name, +2) for name, one in tensors.items() if found[name] + 2 < one.items)
    assert highest <= lowest + 1e-9


def test_sensitivity_takes_what_costs_nothing_first() -> None:
    tensors = {
        "free": Tensor(items=100, curve={0.8: 0.0, 0.9: 0.5}),
        "dear": Tensor(items=100, curve={0.2: 0.5}),
    }
    assert counts("sensitivity", tensors, 0.2) == {"free": 40, "dear": 0}
    assert counts("sensitivity", tensors, 0.4) == {"free": 80, "dear": 0}
    # At a loss of 0.25: 85 and 10.
    assert counts("sensitivity", tensors, 0.475) == {"free": 85, "dear": 10}


def test_sensitivity_of_flat_curves_is_uniform() -> None:
    tensors = {name: Tensor(items=100, curve={0.5: -0.1}) for name in "ab"}
    assert counts("sensitivity", tensors, 0.3) == {"a": 30, "b": 30}


@pytest.mark.parametrize("curve", [{}, {1.5: 0.1}, {-0.1: 0.1}, {0.5: math.nan}, {0.5: math.inf}])
def test_bad_curves_are_named(curve: dict[float, float]) -> None:
    with pytest.raises(InvalidArgument, match="sensitivity: a"):
        allocate("sensitivity", {"a": Tensor(items=10, curve=curve)}, 0.5)
