"""Tables of a schedule's whole numbers, made before the first step, are what pruning step by step removes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import karikomi as kk
from karikomi.errors import Unsupported
from karikomi.prune import Pool, Tensor
from karikomi.prune.schedules import pool_counts as table_of_counts
from karikomi.prune.schedules.pool_counts import due_steps, pool_counts


def sizes(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {n: Tensor(items=int(np.prod(shape)), shape=shape) for n, shape in shapes.items()}


@settings(max_examples=40)
@given(
    sides=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=2, max_size=4),
    allocation=st.sampled_from(["global", "uniform", "erk", "isomorphic"]),
    sparsity=st.floats(0.1, 0.8),
)
def test_a_table_is_what_a_schedule_removes_step_by_step(
    sides: list[tuple[int, int]], allocation: str, sparsity: float
) -> None:
    shapes = {f"w{number}": shape for number, shape in enumerate(sides)}
    generator = np.random.default_rng(len(sides))
    weights = {name: generator.normal(size=shape) for name, shape in shapes.items()}
    rule = kk.prune.Gradual(sparsity, steps=(0, 9), every=1, allocation=allocation)
    known = sizes(shapes)
    try:
        table = pool_counts(rule, allocation, known, where="")
    except kk.KarikomiError as error:
        # Too little would be left of some tensor, which pruning says as well.
        with pytest.raises(type(error)):
            for step in range(10):
                kk.numpy.prune(weights, sparsity=rule.sparsity_at(step), allocation=allocation)
        return
    masks: dict[str, np.ndarray] = {}
    for step, row in zip(table.due, table.remove, strict=True):
        _, masks = kk.numpy.prune_at(weights, rule, step, masks)
        for pool, remove in zip(table.pools, row, strict=True):
            assert sum(int((~masks[name]).sum()) for name in pool) == remove
    assert (np.diff(table.remove, axis=0) >= 0).all()


def test_a_larger_total_takes_nothing_back() -> None:
    """By largest remainders alone it would: 10 of 60, 60 and 20 are 4, 4 and 2, and 11 are 5, 5 and 1."""
    shapes = {"a": (60,), "b": (60,), "c": (20,)}
    rule = kk.prune.Gradual(11 / 140, steps=(0, 1), every=1, initial=10 / 140, allocation="uniform")
    table = pool_counts(rule, "uniform", sizes(shapes), where="")
    assert table.remove[0].tolist() == [4, 4, 2]
    assert table.remove[1].sum() == 11 and (table.remove[1] >= table.remove[0]).all()
    assert pool_counts(rule, "uniform", sizes(shapes), anew=True, where="").remove[1, 2] == 1
    weights = {name: np.arange(1.0, 1.0 + shape[0]) for name, shape in shapes.items()}
    masks: dict[str, np.ndarray] = {}
    for step in (0, 1):
        _, masks = kk.numpy.prune_at(weights, rule, step, masks)
    assert [int((~masks[name]).sum()) for name in shapes] == table.remove[1].tolist()


def test_what_is_given_is_counted_and_what_may_return_is_not() -> None:
    known = {"a": Tensor(items=10, shape=(10,), gone=8), "b": Tensor(items=10, shape=(10,))}
    rule = kk.prune.Gradual(0.5, steps=(0, 2), every=1)
    table = pool_counts(rule, "uniform", known, where="")
    assert table.remove.tolist() == [[8, 0], [8, 1], [8, 2]]
    table = pool_counts(rule, "uniform", known, first=1, anew=True, where="")
    assert table.remove[0].tolist() == table.remove[1].tolist() == [8, 1]


def test_an_allocation_that_needs_more_than_sizes_is_refused() -> None:
    rule, known = kk.prune.OneShot(0.5), sizes({"a": (2, 2), "b": (4, 1)})
    for allocation, fact in (("lamp", "scores"), ("owl", "outliers"), ("sensitivity", "curve")):
        with pytest.raises(Unsupported, match=f"depends on the {fact} of tensors"):
            pool_counts(rule, allocation, known, where="here")
    with pytest.raises(Unsupported, match="100,000 times; allowed: 65,536"):
        due_steps(kk.prune.Gradual(0.5, steps=(0, 99_999), every=1), where="here")


def test_pools_that_change_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(_: str, tensors: dict[str, Tensor], sparsity: float) -> list[Pool]:
        if sparsity < 0.4:
            return [Pool((name,), 1) for name in tensors]
        return [Pool(tuple(tensors), 2)]

    monkeypatch.setattr(table_of_counts, "allocate", allocate)
    rule = kk.prune.Gradual(0.5, steps=(0, 1), every=1)
    with pytest.raises(Unsupported, match="other tensors at another sparsity"):
        pool_counts(rule, "global", sizes({"a": (4,), "b": (4,)}), where="")
