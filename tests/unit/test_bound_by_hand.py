"""Bounds on small cases worked by hand, in NumPy and torch: schedules, shares over several tensors, heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import karikomi as kk
from karikomi.bound import Clamp, MaxNorm, NonNegative, QKClip, SpectralCap, UnitNorm
from karikomi.bound.standing import standing
from karikomi.rule import Array, Namespace
from karikomi.schedule import Linear

Rows = list[list[float]]
Bound = Callable[..., tuple[dict[str, Rows], Any, Any]]


def in_numpy(weights: Mapping[str, Rows], rule: Any, state: Any = None) -> Any:
    arrays = {name: np.array(rows) for name, rows in weights.items()}
    axes = {name: 0 for name in arrays}
    found, outcome, state = kk.numpy.bound(arrays, rule, state, unit_axes=axes)
    return {name: array.tolist() for name, array in found.items()}, outcome, state


def in_torch(weights: Mapping[str, Rows], rule: Any, state: Any = None) -> Any:
    layers = {}
    for name, rows in weights.items():
        layers[name] = nn.Linear(len(rows[0]), len(rows), bias=False, dtype=torch.float64)
        layers[name].weight.data = torch.tensor(rows, dtype=torch.float64)
    outcome, state = kk.torch.bound_(nn.ModuleDict(layers), rule, state)
    return {name: layer.weight.tolist() for name, layer in layers.items()}, outcome, state


both = pytest.mark.parametrize("bound", [in_numpy, in_torch])
RISING = Linear(1.0, 3.0, steps=(0, 2))


@dataclass(frozen=True)
class Falling:
    """1, 0, -1 and so on."""

    def value(self, step: Array, *, xp: Namespace) -> Array:
        return 1.0 - step


@both
@pytest.mark.parametrize("rule", [MaxNorm(RISING), Clamp(RISING)])
def test_the_share_is_that_of_the_limit_of_the_step(bound: Bound, rule: Any) -> None:
    state, shares = None, []
    for rows in ([[1.0], [0.5]], [[2.0], [1.0]], [[3.0], [2.0]], [[1.0], [2.0]]):
        found, outcome, state = bound({"w": rows}, rule, state)
        assert found == {"w": rows} and not outcome.engaged
        shares.append(outcome.share_at_bound)
    assert shares == [0.5, 0.5, 0.5, 0.0]


@both
@pytest.mark.parametrize("rule", [MaxNorm(Falling()), Clamp(Falling()), UnitNorm(Falling())])
def test_nothing_stands_at_a_limit_that_is_not_above_zero(bound: Bound, rule: Any) -> None:
    rows, state = {"w": [[1.0], [0.0]]}, None
    for share in (0.5, 0.0, 0.0):
        found, outcome, state = bound(rows, rule, state)
        assert outcome.share_at_bound == share and found == rows


def test_standing_by_hand() -> None:
    after, factor = np.array([0.0, 1.0, 3.0, 4.0]), np.array([1.0, 1.0, 0.5, 1.0])
    found = standing(MaxNorm(RISING), after, factor, attempted=2)
    assert found.tolist() == [False, False, True, True]
    found = standing(MaxNorm(RISING), after, factor, attempted=0)
    assert found.tolist() == [False, True, True, True]
    found = standing(NonNegative(), after, factor, attempted=0)
    assert found.tolist() == [False, False, True, False]
    found = standing(MaxNorm(Falling()), after, factor, attempted=1)
    assert found.tolist() == [False, False, True, False]


UNEQUAL = {"a": [[3.0, 4.0], [0.5, 0.0], [0.0, -0.25]], "b": [[0.0, 2.0]]}


@both
@pytest.mark.parametrize(
    ("rule", "share", "expected"),
    [
        (MaxNorm(2.0), 2 / 4, {"a": [[1.2, 1.6], [0.5, 0.0], [0.0, -0.25]], "b": [[0.0, 2.0]]}),
        (MaxNorm(2.5, per="tensor"), 1 / 2, {"b": [[0.0, 2.0]]}),
        (Clamp(2.0), 3 / 8, {"a": [[2.0, 2.0], [0.5, 0.0], [0.0, -0.25]], "b": [[0.0, 2.0]]}),
        (NonNegative(), 4 / 8, {"a": [[3.0, 4.0], [0.5, 0.0], [0.0, 0.0]], "b": [[0.0, 2.0]]}),
        (UnitNorm(1.0), 4 / 4, {"a": [[0.6, 0.8], [1.0, 0.0], [0.0, -1.0]], "b": [[0.0, 1.0]]}),
        (SpectralCap(3.0), 1 / 2, {"b": [[0.0, 2.0]]}),
    ],
    ids=lambda value: str(value) if hasattr(value, "decide") else "",
)
def test_the_share_is_that_of_all_tensors(
    bound: Bound, rule: Any, share: float, expected: dict[str, Rows]
) -> None:
    found, outcome, _ = bound(UNEQUAL, rule)
    assert outcome.share_at_bound == share
    for name, rows in expected.items():
        np.testing.assert_allclose(found[name], rows, rtol=1e-12)
    assert np.linalg.norm(found["a"]) > 1.0


def test_the_largest_singular_value_is_that_of_units_by_the_rest() -> None:
    # Units of (3, 0) and (4, 0), of which one is capped: the singular value is 5, in either layout.
    array = np.zeros((2, 2, 1))
    array[:, 0, 0] = [3.0, 4.0]
    for axis in (0, 1):
        moved = np.moveaxis(array, 0, axis)
        found, outcome, _ = kk.numpy.bound({"w": moved}, SpectralCap(2.5), unit_axes={"w": axis})
        assert outcome.pre == pytest.approx(5.0)
        np.testing.assert_allclose(found["w"], moved / 2, rtol=1e-12)


def heads_in_numpy(rule: Any, logits: dict[str, list[float]], state: Any = None) -> Any:
    arrays = {
        f"{name}.{part}": np.ones((4, 4)) for name in ("first", "second") for part in ("q", "k")
    }
    attention: Any = {name: (f"{name}.q", f"{name}.k") for name in logits}
    found, outcome, state = kk.numpy.bound(arrays, rule, state, logits=logits, attention=attention)
    return {name: array[:, 0].tolist() for name, array in found.items()}, outcome, state


def heads_in_torch(rule: Any, logits: dict[str, list[float]], state: Any = None) -> Any:
    model = nn.ModuleDict(
        {n: nn.MultiheadAttention(4, len(heads), bias=False) for n, heads in logits.items()}
    )
    for layer in model.values():
        nn.init.ones_(layer.in_proj_weight)
    outcome, state = kk.torch.bound_(model, rule, state, logits=logits)
    columns = {
        f"{name}.{part}": layer.in_proj_weight[start : start + 4, 0].tolist()
        for name, layer in model.items()
        for part, start in (("q", 0), ("k", 4))
    }
    return columns, outcome, state


both_heads = pytest.mark.parametrize("bound", [heads_in_numpy, heads_in_torch])


@both_heads
def test_each_attention_is_scaled_by_its_own_heads(bound: Any) -> None:
    rule = QKClip(10.0, alpha=0.25)
    found, outcome, _ = bound(rule, {"first": [160.0], "second": [5.0, 40.0]})
    # 1 / 16 and 1 / 4, to the powers 1 / 4 and 3 / 4.
    assert found["first.q"] == pytest.approx([0.5] * 4, rel=1e-6)
    assert found["first.k"] == pytest.approx([0.125] * 4, rel=1e-6)
    assert found["second.q"] == pytest.approx([1.0, 1.0, *[0.25**0.25] * 2], rel=1e-6)
    assert found["second.k"] == pytest.approx([1.0, 1.0, *[0.25**0.75] * 2], rel=1e-6)
    assert outcome.share_at_bound == pytest.approx(2 / 3)
    assert np.asarray(outcome.after).tolist() == [10.0, 5.0, 10.0]


@both_heads
def test_the_share_of_heads_is_that_of_the_limit_of_the_step(bound: Any) -> None:
    state, shares = None, []
    for logits in ([10.0, 5.0], [20.0, 10.0], [30.0, 30.0]):
        _, outcome, state = bound(
            QKClip(Linear(10.0, 30.0, steps=(0, 2))), {"first": logits}, state
        )
        shares.append(outcome.share_at_bound)
    assert shares == [0.5, 0.5, 1.0]
