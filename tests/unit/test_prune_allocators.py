"""Allocations with arguments: ERK with an exponent, shares of some tensors by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import karikomi as kk
from karikomi.errors import InvalidArgument, UnknownName
from karikomi.prune import Tensor

SOME = {
    "stem": Tensor(items=288, shape=(8, 4, 3, 3)),
    "body": Tensor(items=192, shape=(24, 8)),
    "head": Tensor(items=288, shape=(12, 24)),
}


def removed(allocation: Any, sparsity: float, tensors: Any = None) -> dict[str, int]:
    return {p.names[0]: p.remove for p in kk.prune.allocate(allocation, tensors or SOME, sparsity)}


def test_erk_without_arguments_is_erk_and_without_power_uniform() -> None:
    assert removed(kk.prune.ERK(), 0.7) == removed("erk", 0.7)
    assert removed(kk.prune.ERK(power=0), 0.7) == removed("uniform", 0.7)
    spread = [
        np.ptp([n / SOME[k].items for k, n in removed(kk.prune.ERK(power=p), 0.7).items()])
        for p in (0, 0.5, 1)
    ]
    assert spread == sorted(spread) and spread[0] < 0.01 < spread[1] < spread[2]


@pytest.mark.parametrize("others", ["uniform", "erk", kk.prune.ERK(power=0.5, kernel=False)])
@pytest.mark.parametrize("sparsity", [0.3, 0.6, 0.9])
def test_fixed_shares_stand_and_the_others_meet_the_sparsity(others: Any, sparsity: float) -> None:
    found = removed(kk.prune.Fixed({"he*": 0.25}, others), sparsity)
    assert found["head"] == 72
    assert found["stem"] + found["body"] == round(sparsity * 480)
    whole = removed(kk.prune.Fixed({"he*": 0.25}, others, of_all=True), 0.5)
    assert whole["head"] == 72 and sum(whole.values()) == 384


def test_fixed_with_one_threshold_for_the_others() -> None:
    pools = kk.prune.allocate(kk.prune.Fixed({"body": 0.5}, "global"), SOME, 0.5)
    assert [(pool.names, pool.remove) for pool in pools] == [
        (("stem", "head"), 288),
        (("body",), 96),
    ]
    everything = kk.prune.Fixed({"*": 0.5})
    assert removed(everything, 0.9) == {"stem": 144, "body": 96, "head": 144}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: kk.prune.ERK(power=-1.0), "not negative"),
        (lambda: kk.prune.Fixed({}), "no share"),
        (lambda: kk.prune.Fixed({"a": 1.0}), "Fixed.shares: a"),
        (lambda: kk.prune.Fixed({"a": 0.5}, "ekr"), "did you mean 'erk'"),
        (lambda: removed(kk.prune.Fixed({"tail": 0.5}), 0.5), "did you mean 'head'|no tensor"),
        (lambda: removed(kk.prune.Fixed({"head": 0.9}, of_all=True), 0.2), "cannot make up"),
        (lambda: removed(kk.prune.Fixed({"head": 0.0}, of_all=True), 0.9), "cannot make up"),
        (lambda: removed(3, 0.5), "registered name"),
    ],
)
def test_allocations_that_mean_nothing(make: Any, says: str) -> None:
    with pytest.raises((InvalidArgument, UnknownName), match=says):
        make()


def test_allocations_with_arguments_in_schedules_as_data_and_under_budgets() -> None:
    allocation = kk.prune.Fixed({"head": 0.25}, kk.prune.ERK(power=0.5))
    rule = kk.prune.Gradual(0.9, steps=(0, 4), allocation=allocation)
    plain = kk.spec.to_dict(rule, "prune")
    assert kk.spec.from_dict(plain, "prune") == rule and hash(rule) == hash(rule)
    assert plain["allocation"]["others"] == {"rule": "ERK", "power": 0.5, "kernel": True}
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=tensor.shape) for name, tensor in SOME.items()}
    rows = {
        "stem": kk.prune.Layout(0, 1),
        "body": kk.prune.Layout(0, 1),
        "head": kk.prune.Layout(0, 1),
    }
    for of_all in (False, True):
        fixed = kk.prune.Fixed({"head": 0.25}, "erk", of_all=of_all)
        _, masks = kk.numpy.prune(weights, parameters=300, allocation=fixed, layouts=rows)
        assert masks["head"].sum() == 216 and sum(int(m.sum()) for m in masks.values()) <= 300
        assert sum(int(m.sum()) for m in masks.values()) >= 297
