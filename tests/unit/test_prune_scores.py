"""Every score against a case worked by hand, in every array namespace, and against what it claims to predict."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import karikomi.prune.scores.weights
from contract.namespaces import INSTALLED, load_quietly
from karikomi import registry
from karikomi.errors import InvalidArgument, Unsupported
from karikomi.prune import (
    FACTS,
    FPGM,
    LAMP,
    SNIP,
    APoZ,
    BNScale,
    Fisher,
    GraSP,
    L2Norm,
    Magnitude,
    Random,
    SynFlow,
    Taylor,
    Wanda,
    as_score,
)
from karikomi.prune.facts import PER_UNIT

# Two groups of three weights, and for each fact numbers that can be multiplied in the head.
WEIGHTS = [[1.0, -2.0, 2.0], [0.0, 3.0, -4.0]]
OF_WEIGHTS = {
    "gradient": [[2.0, 1.0, -1.0], [5.0, 1.0, 1.0]],
    "squared_gradient": [[4.0, 1.0, 2.0], [9.0, 2.0, 1.0]],
    "hessian_gradient": [[1.0, 3.0, -1.0], [7.0, 1.0, 2.0]],
    "flow": [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]],
    "moved": [[0.5, -0.25, 1.0], [-1.0, 0.25, 0.25]],
    "input_norm": [[2.0, 3.0, 1.0], [2.0, 3.0, 1.0]],
    "noise": [[0.25, 0.5, 0.75], [1.0, 0.125, 0.375]],
    "importance": [[-1.0, 0.5, 2.0], [3.0, 0.0, -4.0]],
}
OF_UNITS = {
    "zeros": [0.25, 1.0],
    "output": [2.0, 0.5],
    "deviation": [0.0, 3.0],
    "gate": [-0.5, 2.0],
}

# name -> scores of the single weights (none: units only), scores of the two groups
BY_HAND: dict[str, tuple[list[list[float]] | None, list[float]]] = {
    "magnitude": ([[1, 2, 2], [0, 3, 4]], [5, 7]),
    "l2": ([[1, 2, 2], [0, 3, 4]], [3, 5]),
    # (1, -2, 2) - (0, 3, -4) = (1, -5, 6)
    "fpgm": (None, [math.sqrt(62), math.sqrt(62)]),
    # groups: sums of squares 9 and 25
    "lamp": (None, [9 / 34, 1.0]),
    "bn_scale": (None, [0.5, 2.0]),
    "apoz": (None, [0.75, 0.0]),
    "activation": (None, [2.0, 0.5]),
    "deviation": (None, [0.0, 3.0]),
    "wanda": ([[2, 6, 2], [0, 9, 4]], [10, 13]),
    "snip": ([[2, 2, 2], [0, 3, 4]], [6, 7]),
    "grasp": ([[1, -6, -2], [0, 3, -8]], [-7, -5]),
    "synflow": ([[1, 4, 6], [0, 15, 24]], [11, 39]),
    # sums of w g: 2 - 2 - 2 and 0 + 3 - 4
    "taylor": ([[4, 4, 4], [0, 9, 16]], [4, 1]),
    "movement": ([[0.5, -0.25, 1.0], [-1.0, 0.25, 0.25]], [1.25, -0.5]),
    "fisher": ([[2, 2, 4], [0, 9, 8]], [8, 17]),
    "importance": ([[-1, 0.5, 2], [3, 0, -4]], [1.5, -1]),
    "random": ([[0.25, 0.5, 0.75], [1.0, 0.125, 0.375]], [0.25, 1.0]),
}

NAMESPACES: dict[str, tuple[str, str]] = {
    "numpy": ("numpy", "numpy"),
    "strict": ("array_api_strict", "array_api_strict"),
    "torch": ("array_api_compat.torch", "torch"),
}
if "jax" in INSTALLED:
    NAMESPACES["jax"] = ("jax.numpy", "jax.numpy")


def arrays(xp: Any, needs: frozenset[str]) -> dict[str, Any]:
    return {name: xp.asarray({**OF_WEIGHTS, **OF_UNITS}[name]) for name in needs}


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("name", BY_HAND)
def test_worked_by_hand(name: str, namespace: str) -> None:
    xp = load_quietly(NAMESPACES[namespace][0])
    score, weights = as_score(name), xp.asarray(WEIGHTS)
    of_weights, of_groups = BY_HAND[name]
    facts = arrays(xp, score.needs)
    found = score.of_groups(weights, facts, xp=xp)
    assert type(found) is type(weights)
    np.testing.assert_allclose(np.asarray(found), of_groups, rtol=1e-6)
    if of_weights is None:
        with pytest.raises(Unsupported):
            score.of_weights(weights, facts, xp=xp)
        return
    found = score.of_weights(weights, facts, xp=xp)
    assert type(found) is type(weights)
    np.testing.assert_allclose(np.asarray(found), of_weights, rtol=1e-6)


def test_every_score_is_worked_by_hand_and_explained() -> None:
    entries = {entry.name: entry for entry in registry.entries("score")}
    rebuilding = {name for name, entry in entries.items() if entry.thing.updates}
    assert set(BY_HAND) == set(entries) - rebuilding
    for name in BY_HAND:
        assert ">>>" in entries[name].thing.__doc__ and "Source:" in entries[name].thing.__doc__


@pytest.mark.parametrize("name", BY_HAND)
def test_needs_are_known_facts(name: str) -> None:
    score = as_score(name)
    assert score.needs <= set(FACTS)
    assert not score.needs & PER_UNIT or score.of_units_only
    assert dataclasses.is_dataclass(score) and hash(score) == hash(as_score(name))


@pytest.mark.parametrize("name", [name for name, (single, _) in BY_HAND.items() if single])
@given(cut=st.integers(0, 6))
def test_blocks_of_a_tensor_score_as_the_whole(name: str, cut: int) -> None:
    score = as_score(name)
    weights = np.array(WEIGHTS).ravel()
    facts = {fact: np.array(OF_WEIGHTS[fact]).ravel() for fact in score.needs}
    parts = [
        score.of_weights(weights[part], {k: v[part] for k, v in facts.items()}, xp=np)
        for part in (slice(None, cut), slice(cut, None))
    ]
    np.testing.assert_array_equal(np.concatenate(parts), score.of_weights(weights, facts, xp=np))


# --- what the scores promise ---


def quadratic(seed: int) -> tuple[np.ndarray, np.ndarray, Callable[[np.ndarray], float]]:
    """Return weights, a symmetric H, and the loss ``(w - c) H (w - c) / 2``, whose gradient is exact."""
    draw = np.random.default_rng(seed)
    root, weights, centre = draw.normal(size=(5, 5)), draw.normal(size=5), draw.normal(size=5)
    hessian = root @ root.T
    return weights, hessian, lambda w: float((w - centre) @ hessian @ (w - centre) / 2)


@pytest.mark.parametrize("seed", range(5))
def test_grasp_is_what_the_gradient_norm_loses_and_the_lowest_helps_most(seed: int) -> None:
    _, hessian, _ = quadratic(seed)
    draw = np.random.default_rng(seed + 100)
    weights, gradient = draw.normal(size=5) * 1e-6, draw.normal(size=5)
    flow = {"hessian_gradient": hessian @ gradient}
    scores = GraSP().of_weights(weights, flow, xp=np)
    # The gradient after weight q is removed is g - H[:, q] w_q, exactly so for a quadratic loss.
    change = [
        np.sum((gradient - hessian[:, q] * weights[q]) ** 2) - np.sum(gradient**2) for q in range(5)
    ]
    np.testing.assert_allclose(change, -2 * scores, atol=1e-4 * np.abs(scores).max())
    assert np.argmin(scores) == np.argmax(change)


@pytest.mark.parametrize("seed", range(5))
def test_fisher_is_the_rise_of_the_loss_at_a_minimum(seed: int) -> None:
    weights, hessian, _ = quadratic(seed)
    curvature = np.diag(hessian)
    scores = Fisher().of_weights(weights, {"squared_gradient": curvature}, xp=np)
    for q in range(5):
        step = np.where(np.arange(5) == q, -weights, 0.0)
        np.testing.assert_allclose(step @ hessian @ step / 2, scores[q])


@pytest.mark.parametrize("group", [[0], [1, 3], [0, 1, 2, 3, 4]])
def test_taylor_and_snip_are_the_change_of_a_linear_loss(group: list[int]) -> None:
    weights, _, _ = quadratic(0)
    slope = np.arange(1.0, 6.0) - 3.5
    change = float(slope @ np.where(np.isin(np.arange(5), group), 0.0, weights) - slope @ weights)
    facts = {"gradient": slope[group][None]}
    np.testing.assert_allclose(Taylor().of_groups(weights[group][None], facts, xp=np), change**2)
    assert SNIP().of_groups(weights[group][None], facts, xp=np)[0] >= abs(change) - 1e-12


def test_synflow_is_the_same_through_every_layer() -> None:
    """Tanaka et al. 2020, theorem 1: what flows in equals what flows out, layer by layer, unit by unit."""
    draw = np.random.default_rng(0)
    first, second = draw.normal(size=(4, 3)), draw.normal(size=(2, 4))
    hidden = np.abs(first).sum(1)
    flow = np.broadcast_to(np.abs(second).sum(0)[:, None], first.shape)
    one = SynFlow().of_weights(first, {"flow": flow}, xp=np)
    two = SynFlow().of_weights(second, {"flow": np.broadcast_to(hidden, second.shape)}, xp=np)
    np.testing.assert_allclose(one.sum(1), two.sum(0))
    np.testing.assert_allclose(one.sum(), np.abs(second) @ np.abs(first) @ np.ones(3) @ np.ones(2))


def test_wanda_compares_within_an_output() -> None:
    assert Wanda.within_rows and not Magnitude.within_rows


def test_what_only_units_have() -> None:
    for score in (APoZ(), BNScale(), FPGM()):
        assert score.of_units_only
        with pytest.raises(Unsupported, match='units, not single weights.*pattern="units"'):
            score.of_weights(np.ones(3), {}, xp=np)


# --- numbers ---

ROWS = st.lists(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=3), min_size=1, max_size=8
)


@given(ROWS, st.sampled_from([1e-250, 1e-30, 1.0, 1e30, 1e250]))
def test_l2_neither_overflows_nor_vanishes(rows: list[list[float]], scale: float) -> None:
    weights = np.array(rows)
    found = L2Norm().of_groups(weights * scale, {}, xp=np)
    assert np.isfinite(found).all()
    expected = [math.hypot(*row) * scale for row in rows]
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-300)


def test_l2_of_zeros_is_zero() -> None:
    assert L2Norm().of_groups(np.zeros((2, 3)), {}, xp=np).tolist() == [0.0, 0.0]


@given(ROWS, st.sampled_from([1, 3, 1024]))
def test_fpgm_is_the_sum_of_all_distances(rows: list[list[float]], step: int) -> None:
    weights = np.array(rows)
    expected = [sum(math.dist(one, other) for other in rows) for one in rows]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(karikomi.prune.scores.weights, "ROWS", step)
        found = FPGM().of_groups(weights, {}, xp=np)
    size = np.abs(weights).max(initial=1e-30)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * size * len(rows))


def test_fpgm_sees_that_opposite_units_are_not_the_same() -> None:
    unit = np.array([1.0, 2.0])
    found = FPGM().of_groups(np.array([unit, -unit, 3 * unit, 3 * unit]), {}, xp=np)
    # On magnitudes the first two would be twins, as near to each other as the last two.
    assert np.argmax(found) == 1
    np.testing.assert_allclose(found / math.sqrt(5), [6.0, 10.0, 6.0, 6.0], atol=1e-6)


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=12))
def test_lamp_by_its_definition(values: list[int]) -> None:
    """Each weight over all that are not smaller, itself and later equals included, earlier ones not."""
    found = LAMP().of_tensor(np.array(values, np.float64), {}, xp=np)
    order = sorted(range(len(values)), key=lambda i: (values[i] ** 2, i))
    for rank, index in enumerate(order):
        left = sum(values[other] ** 2 for other in order[rank:])
        assert found[index] == pytest.approx(values[index] ** 2 / left if left else 0.0)


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_lamp_keeps_the_shape_in_every_namespace(namespace: str) -> None:
    xp = load_quietly(NAMESPACES[namespace][0])
    found = LAMP().of_tensor(xp.asarray([[2.0, -1.0], [1.0, 0.0]]), {}, xp=xp)
    expected = [[1.0, 1 / 6], [1 / 5, 0.0]]
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-6)


def test_lamp_refuses_a_block() -> None:
    with pytest.raises(Unsupported, match='whole tensor.*allocation="lamp"'):
        LAMP().of_weights(np.ones(3), {}, xp=np)


def test_random_treats_groups_alike_whatever_their_size() -> None:
    draw = np.random.default_rng(0)
    small = Random().of_groups(np.ones((4000, 1)), {"noise": draw.random((4000, 1))}, xp=np)
    large = Random().of_groups(np.ones((4000, 50)), {"noise": draw.random((4000, 50))}, xp=np)
    assert abs(np.quantile(small, 0.1) - 0.1) < 0.02 and abs(np.quantile(large, 0.1) - 0.1) < 0.02


@pytest.mark.parametrize("seed", [-1, 1.0, True, None, "1", 1 << 64])
def test_bad_seeds(seed: Any) -> None:
    with pytest.raises(InvalidArgument, match="Random.seed"):
        Random(seed=seed)


@pytest.mark.parametrize("rounds", [0, -3, 2.5, True, None])
def test_bad_rounds(rounds: Any) -> None:
    with pytest.raises(InvalidArgument, match="SynFlow.rounds"):
        SynFlow(rounds=rounds)


def test_rounds() -> None:
    assert SynFlow().rounds == 100 and SynFlow(rounds=7).rounds == 7
    assert {as_score(name).rounds for name in BY_HAND if name != "synflow"} == {1}
