"""Allocations remove exactly what was asked for, and say when they cannot."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from niwaki import registry
from niwaki.errors import InvalidArgument, UnknownName
from niwaki.prune import allocate

SIZES = st.lists(st.integers(1, 10_000), min_size=1, max_size=12).map(
    lambda sizes: {f"t{i}": size for i, size in enumerate(sizes)}
)
SPARSITY = st.floats(0, 1, exclude_max=True)


@given(SIZES, SPARSITY)
def test_global_is_one_pool_of_everything(sizes: dict[str, int], sparsity: float) -> None:
    (pool,) = allocate("global", sizes, sparsity)
    assert pool.names == tuple(sizes)
    assert pool.remove == round(sparsity * sum(sizes.values()))


@given(SIZES, SPARSITY)
def test_uniform_is_exact_and_leaves_a_weight(sizes: dict[str, int], sparsity: float) -> None:
    target = round(sparsity * sum(sizes.values()))
    assume(target <= sum(sizes.values()) - len(sizes))
    pools = {pool.names: pool.remove for pool in allocate("uniform", sizes, sparsity)}
    assert list(pools) == [(name,) for name in sizes]
    assert sum(pools.values()) == target
    assert all(0 <= pools[(name,)] < size for name, size in sizes.items())


@given(st.lists(st.integers(100, 10_000), min_size=1, max_size=12), st.floats(0, 0.9))
def test_uniform_is_within_one_weight_of_uniform(sizes: list[int], sparsity: float) -> None:
    pools = allocate("uniform", {str(i): size for i, size in enumerate(sizes)}, sparsity)
    for pool, size in zip(pools, sizes, strict=True):
        assert math.floor(sparsity * size) <= pool.remove <= math.ceil(sparsity * size)


def test_the_largest_remainder_is_rounded_up() -> None:
    pools = allocate("uniform", {"a": 4, "b": 6, "c": 10}, 0.3)  # 1.2, 1.8 and 3.0
    assert [pool.remove for pool in pools] == [1, 2, 3]


def test_uniform_passes_on_what_a_tiny_tensor_cannot_give() -> None:
    pools = allocate("uniform", {"tiny": 1, "large": 9}, 0.8)
    assert [pool.remove for pool in pools] == [0, 8]


def test_uniform_that_would_empty_a_tensor_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="got 9 of 10; allowed: at most 8"):
        allocate("uniform", {"a": 5, "b": 5}, 0.9)


@pytest.mark.parametrize("name", ["global", "uniform"])
@pytest.mark.parametrize("sparsity", [1.2, 1.0, -0.1, math.nan, math.inf, True, "0.5", None])
def test_sparsity_out_of_range(name: str, sparsity: float) -> None:
    with pytest.raises(InvalidArgument, match="0 <= sparsity < 1"):
        allocate(name, {"a": 10}, sparsity)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match="did you mean 'uniform'"):
        allocate("unifrom", {"a": 10}, 0.5)


def test_each_is_explained() -> None:
    entries = [*registry.entries("allocation"), *registry.entries("score")]
    assert {"global", "uniform", "magnitude"} <= {entry.name for entry in entries}
    assert all(entry.formula and entry.source for entry in entries)
