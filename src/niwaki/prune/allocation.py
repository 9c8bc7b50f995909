"""Allocations: which tensors compete with which, and how many items each pool gives up.

An *item* is what a pattern removes as one: a weight, a block, a unit, a head, a layer. A pool is a set
of tensors whose items are compared with one another. An allocation is a function
``(tensors, sparsity) -> pools``; a new one is registered under the kind ``allocation``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from niwaki import registry
from niwaki.errors import InvalidArgument

ALLOWED = "0 <= sparsity < 1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """What an allocation may know of one tensor.

    `items`: how many things can go. `shape`: of the weight, for `unit_axis` and `input_axis` see
    `niwaki.prune.Layout`; here in the order (units, inputs, kernel ...). `scores`: returns the scores of
    its items, float32 of shape (items,), in memory. `outliers`: the share of its |w| * input norms that
    stand out (`owl`), or none. `curve`: measured losses of accuracy by sparsity (`sensitivity`), or none.
    """

    items: int
    shape: tuple[int, ...] = ()
    scores: Callable[[], np.ndarray] | None = None
    outliers: float | None = None
    curve: Mapping[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Pool:
    """Tensors that share one threshold: of all their items together, `remove` go."""

    names: tuple[str, ...]
    remove: int


def allocate(name: str, tensors: Mapping[str, Tensor], sparsity: float) -> list[Pool]:
    """Return the pools of the allocation registered as `name`.

    `tensors`: tensor name -> what is known of it. `sparsity`: the share of items that go, in [0, 1).
    Raises `UnknownName` for the name, `InvalidArgument` for the sparsity.

    >>> allocate("global", {"a": Tensor(items=6), "b": Tensor(items=4)}, 0.5)
    [Pool(names=('a', 'b'), remove=5)]
    """
    return registry.find("allocation", name)(tensors, sparsity)


@registry.register(
    "allocation",
    name="global",
    formula="one threshold for all tensors; round(sparsity * total) go",
    source="Frankle and Carbin 2019, The Lottery Ticket Hypothesis",
)
def everything(tensors: Mapping[str, Tensor], sparsity: float) -> list[Pool]:
    """Return one pool of all tensors: the lowest scores go, wherever they are.

    ``remove = round(sparsity * items)``, a half to even. A tensor may lose everything.
    Raises `InvalidArgument` for a sparsity outside of [0, 1).

    >>> everything({"a": Tensor(items=90), "b": Tensor(items=10)}, 0.25)
    [Pool(names=('a', 'b'), remove=25)]

    Source: Frankle and Carbin 2019, "The Lottery Ticket Hypothesis", section 4.
    """
    check_sparsity(sparsity)
    return [Pool(tuple(tensors), round(sparsity * sum(one.items for one in tensors.values())))]


@registry.register(
    "allocation",
    name="uniform",
    formula="one threshold per tensor; sparsity * items go from each, by largest remainder",
    source="Zhu and Gupta 2017, To prune, or not to prune",
)
def each(tensors: Mapping[str, Tensor], sparsity: float) -> list[Pool]:
    """Return one pool per tensor, each of (nearly) the same sparsity.

    ``remove_i`` is ``sparsity * items_i`` rounded by largest remainder, so that the total is exactly
    ``round(sparsity * items)``, and at most ``items_i - 1``: no tensor loses everything.
    Raises `InvalidArgument` for a sparsity outside of [0, 1), or one that cannot spare each tensor
    its one item.

    >>> [pool.remove for pool in each({n: Tensor(items=s) for n, s in zip("abc", (5, 5, 1))}, 0.5)]
    [3, 3, 0]

    Source: the layer-wise sparsity of Zhu and Gupta 2017; the exact total is ours.
    """
    check_sparsity(sparsity)
    return by_quota(tensors, {name: sparsity for name in tensors}, sparsity, where="uniform")


def by_quota(
    tensors: Mapping[str, Tensor], shares: Mapping[str, float], sparsity: float, *, where: str
) -> list[Pool]:
    """Return one pool per tensor of (nearly) its own share, exactly ``round(sparsity * items)`` in all.

    `shares`: tensor name -> the share of its items that go; their mean by items is the sparsity. Each
    tensor keeps one item. Raises `InvalidArgument`, saying `where`, if that leaves too few to remove.
    """
    target = round(sparsity * sum(one.items for one in tensors.values()))
    most = {name: max(one.items - 1, 0) for name, one in tensors.items()}
    if target > sum(most.values()):
        raise InvalidArgument(
            "each tensor keeps at least one, which leaves too few to remove",
            where=where,
            got=f"{target} of {sum(one.items for one in tensors.values())}",
            allowed=f"at most {sum(most.values())}",
        )
    quotas = {name: shares[name] * one.items for name, one in tensors.items()}
    counts = _largest_remainder(quotas, most, target)
    return [Pool((name,), count) for name, count in counts.items()]


def check_sparsity(sparsity: float, *, where: str = "sparsity") -> None:
    """Raise `InvalidArgument` unless ``0 <= sparsity < 1``."""
    number = isinstance(sparsity, int | float) and not isinstance(sparsity, bool)
    if not number or not 0.0 <= sparsity < 1.0:
        raise InvalidArgument(
            "the share of weights to remove is out of range",
            where=where,
            got=repr(sparsity),
            allowed=ALLOWED,
        )


def _largest_remainder(
    quotas: Mapping[str, float], most: Mapping[str, int], target: int
) -> dict[str, int]:
    """Return whole numbers near the quotas, none above its `most`, that add up to `target`."""
    counts = {name: min(math.floor(quota), most[name]) for name, quota in quotas.items()}
    ranked = sorted(quotas, key=lambda name: counts[name] - quotas[name])
    left = target - sum(counts.values())
    while left > 0:
        open_names = [name for name in ranked if counts[name] < most[name]][:left]
        for name in open_names:
            counts[name] += 1
        left -= len(open_names)
    return counts
