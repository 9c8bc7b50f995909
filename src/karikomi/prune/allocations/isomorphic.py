"""Isomorphic allocation: only tensors of the same shape compete with one another."""

from __future__ import annotations

from collections.abc import Mapping

from karikomi.prune.allocations.allocation import Pool, Tensor, by_quota, check_sparsity
from karikomi.prune.allocations.shares import known
from karikomi.registry import register


@register(
    "allocation",
    name="isomorphic",
    formula="one threshold per shape; sparsity * items go from each, by largest remainder",
    source="Fang et al. 2024, Isomorphic Pruning for Vision Models",
)
def within_shapes(tensors: Mapping[str, Tensor], sparsity: float) -> list[Pool]:
    """Return one pool per shape: scores of different scales are never compared.

    Every pool loses (nearly) the same share, ``round(sparsity * items)`` in all, and keeps one item;
    a tensor may lose everything to others of its shape. Pools stand in the order of their first tensor.
    Raises `InvalidArgument` for a sparsity outside of [0, 1) or out of reach, or a missing shape.

    >>> one, two = Tensor(items=10, shape=(5, 2)), Tensor(items=10, shape=(2, 5))
    >>> within_shapes({"a": one, "b": two, "c": one}, 0.5)
    [Pool(names=('a', 'c'), remove=10), Pool(names=('b',), remove=5)]

    Source: Fang, Ma, Mi and Wang 2024, "Isomorphic Pruning for Vision Models". The paper compares
    sub-structures of the same graph; here the same shape stands for that.
    """
    check_sparsity(sparsity)
    shapes = known(tensors, "shape", where="isomorphic", hint="the shape of its weight")
    alike: dict[tuple[int, ...], list[str]] = {}
    for name, shape in shapes.items():
        alike.setdefault(shape, []).append(name)
    merged = {
        names[0]: Tensor(
            items=sum(tensors[name].items for name in names),
            gone=sum(tensors[name].gone for name in names),
        )
        for names in alike.values()
    }
    pools = by_quota(merged, dict.fromkeys(merged, sparsity), sparsity, where="isomorphic")
    return [
        Pool(tuple(names), pool.remove) for names, pool in zip(alike.values(), pools, strict=True)
    ]
