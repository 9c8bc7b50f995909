"""Allocations: which tensors compete with which, and how many items each pool gives up.

An *item* is what a pattern removes as one: a weight, a block, a unit, a head, a layer. A pool is a set
of tensors whose items are compared with one another. An allocation is a function
``(tensors, sparsity) -> pools``; a new one is registered under the kind ``allocation``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from karikomi import registry
from karikomi.errors import InvalidArgument
from karikomi.schedule import is_number, whole

ALLOWED = "0 <= sparsity < 1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """The facts of one tensor for an allocation.

    `items`: how many things can go. `shape`: of the weight, for `unit_axis` and `input_axis` see
    `karikomi.prune.Layout`; here in the order (units, inputs, kernel ...). `scores`: returns the scores of
    its items, float32 of shape (items,), in memory. `outliers`: the share of its |w| * input norms that
    stand out (`owl`), or none. `curve`: measured losses of accuracy by sparsity (`sensitivity`), or none.
    `gone`: how many of its items are gone already.
    """

    items: int
    shape: tuple[int, ...] = ()
    scores: Callable[[], np.ndarray] | None = None
    outliers: float | None = None
    curve: Mapping[float, float] | None = None
    gone: int = 0


@dataclass(frozen=True, slots=True)
class Pool:
    """Tensors that share one threshold: of all their items together, `remove` go."""

    names: tuple[str, ...]
    remove: int


class Allocator:
    """An allocation with arguments; registered ones go by their names.

    `name`: of the registered allocation whose facts it needs. A subclass has `__call__`, and is a frozen dataclass
    of plain values where it stands in a schedule that is saved.
    """

    __slots__ = ()

    @property
    def name(self) -> str:
        """The registered allocation that this is a form of."""
        raise NotImplementedError

    def __call__(self, tensors: Mapping[str, Tensor], sparsity: float) -> list[Pool]:
        """Return the pools, as a registered allocation does."""
        raise NotImplementedError

    def fewest(self, tensors: Mapping[str, Tensor]) -> int:
        """Return how many items go at the smallest share that can be asked for."""
        return 0

    def least(self, tensors: Mapping[str, Tensor]) -> int:
        """Return how many items at least stay at the largest share that can be asked for."""
        return len(tensors)


Allocation = str | Allocator
"""A registered name, or an object such as ``kk.prune.ERK(power=0.5)``."""


def allocate(name: Allocation, tensors: Mapping[str, Tensor], sparsity: float) -> list[Pool]:
    """Return the pools of the allocation registered as `name`, or of an `Allocator`.

    `tensors`: tensor name -> what is known of it. `sparsity`: the share of items that go, in [0, 1).
    A tensor without items is not passed to the allocation and has a pool of its own.
    Raises `UnknownName` for the name, `InvalidArgument` for the sparsity, and for pools that do not hold
    each tensor once or give up more than they have.

    >>> allocate("global", {"a": Tensor(items=6), "b": Tensor(items=4)}, 0.5)
    [Pool(names=('a', 'b'), remove=5)]
    """
    check_sparsity(sparsity)
    allocation = as_allocation(name)
    some = {tensor: known for tensor, known in tensors.items() if known.items}
    pools = allocation(some, float(sparsity)) if some else []
    _check_pools(pools, some, name_of(name))
    return [*pools, *(Pool((tensor,), 0) for tensor in tensors if tensor not in some)]


def name_of(allocation: Allocation) -> str:
    """Return the registered name of an allocation.

    >>> name_of("erk")
    'erk'
    """
    return allocation.name if isinstance(allocation, Allocator) else allocation


def least_left(allocation: Allocation, tensors: Mapping[str, Tensor]) -> int:
    """Return how many items at least stay, whatever share is asked for: only one threshold for all empties tensors."""
    if isinstance(allocation, Allocator):
        return allocation.least(tensors)
    return 1 if allocation == "global" else len(tensors)


def as_allocation(name: Allocation) -> Callable[[Mapping[str, Tensor], float], list[Pool]]:
    """Return the allocation registered as `name`; raises `UnknownName`, or `InvalidArgument` for no name."""
    if isinstance(name, Allocator):
        return name
    if not isinstance(name, str):
        raise InvalidArgument(
            "an allocation goes by its registered name",
            where="allocation",
            got=repr(name)[:80],
            allowed='such as "erk", or an Allocator such as kk.prune.ERK(power=0.5)',
        )
    return registry.find("allocation", name)


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
    return [
        Pool(tuple(tensors), round(sparsity * sum(tensor.items for tensor in tensors.values())))
    ]


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
    tensor keeps one item, and what is gone already stays gone: where that is more than a tensor's share, the
    others lose less. Raises `InvalidArgument`, saying `where`, if that leaves too few to remove.
    """
    target = round(sparsity * sum(tensor.items for tensor in tensors.values()))
    most = {name: max(tensor.items - 1, 0) for name, tensor in tensors.items()}
    if target > sum(most.values()):
        raise InvalidArgument(
            "each tensor keeps at least one, which leaves too few to remove",
            where=where,
            got=f"{target} of {sum(tensor.items for tensor in tensors.values())}",
            allowed=f"at most {sum(most.values())}",
        )
    quotas = {name: shares[name] * tensor.items for name, tensor in tensors.items()}
    least = {name: min(tensor.gone, tensor.items) for name, tensor in tensors.items()}
    quotas = _above(quotas, least, target)
    most = {name: max(most[name], least[name]) for name in most}
    counts = _largest_remainder(quotas, most, max(target, sum(least.values())))
    return [Pool((name,), count) for name, count in counts.items()]


def check_sparsity(sparsity: float, *, where: str = "sparsity") -> None:
    """Raise `InvalidArgument` unless ``0 <= sparsity < 1``."""
    if not is_number(sparsity) or not 0.0 <= sparsity < 1.0:
        raise InvalidArgument(
            "the share of weights to remove is out of range",
            where=where,
            got=repr(sparsity),
            allowed=ALLOWED,
        )


def _check_pools(pools: Any, tensors: Mapping[str, Tensor], allocation: str) -> None:
    """Refuse what an allocation must not return."""
    where = f"allocation {allocation}"
    if not isinstance(pools, list) or not all(isinstance(pool, Pool) for pool in pools):
        raise InvalidArgument(
            "an allocation returns a list of Pool", where=where, got=repr(pools)[:80]
        )
    times = Counter(name for pool in pools for name in pool.names)
    if wrong := [name for name in {**tensors, **times} if (name in tensors) != times[name]]:
        raise InvalidArgument(
            "each tensor is in one pool",
            where=where,
            got=f"{wrong[0]!r} in {times[wrong[0]]}",
            allowed=", ".join(list(tensors)[:5]),
        )
    for pool in pools:
        items, remove = sum(tensors[name].items for name in pool.names), whole(pool.remove)
        if remove is None or not 0 <= remove <= items:
            raise InvalidArgument(
                "a pool gives up so many of its items",
                where=f"{where}: {', '.join(pool.names[:3])}",
                got=repr(pool.remove),
                allowed=f"a whole number, 0 to {items}",
            )


def _above(quotas: Mapping[str, float], least: Mapping[str, int], target: int) -> dict[str, float]:
    """Return the quotas with none below its `least`; those of the others shrink alike for it."""
    held: set[str] = set()
    while True:
        free = sum(quota for name, quota in quotas.items() if name not in held)
        rest = max(target - sum(least[name] for name in held), 0)
        scale = min(rest / free, 1.0) if held and free else 1.0
        found = {
            name: float(least[name]) if name in held else quota * scale
            for name, quota in quotas.items()
        }
        short = {name for name in quotas if found[name] < least[name]}
        if not short:
            return found
        held |= short


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
