"""Allocations: which tensors compete with which, and how many weights each pool gives up.

A pool is a set of tensors whose scores are compared with one another. An allocation is a function
``(sizes, sparsity) -> pools``; a new one is registered under the kind ``allocation``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from niwaki import registry
from niwaki.errors import InvalidArgument

ALLOWED = "0 <= sparsity < 1"


@dataclass(frozen=True, slots=True)
class Pool:
    """Tensors that share one threshold: of all their weights together, `remove` go."""

    names: tuple[str, ...]
    remove: int


def allocate(name: str, sizes: Mapping[str, int], sparsity: float) -> list[Pool]:
    """Return the pools of the allocation registered as `name`.

    `sizes`: tensor name -> number of weights. `sparsity`: the share of weights that go, in [0, 1).
    Raises `UnknownName` for the name, `InvalidArgument` for the sparsity.

    >>> allocate("global", {"a": 6, "b": 4}, 0.5)
    [Pool(names=('a', 'b'), remove=5)]
    """
    return registry.find("allocation", name)(sizes, sparsity)


@registry.register(
    "allocation",
    name="global",
    formula="one threshold for all tensors; round(sparsity * total) go",
    source="Frankle and Carbin 2019, The Lottery Ticket Hypothesis",
)
def everything(sizes: Mapping[str, int], sparsity: float) -> list[Pool]:
    """Return one pool of all tensors: the lowest scores go, wherever they are.

    ``remove = round(sparsity * sum(sizes))``, a half to even. A tensor may lose all its weights.
    Raises `InvalidArgument` for a sparsity outside of [0, 1).

    >>> everything({"a": 90, "b": 10}, 0.25)
    [Pool(names=('a', 'b'), remove=25)]

    Source: Frankle and Carbin 2019, "The Lottery Ticket Hypothesis", section 4.
    """
    check_sparsity(sparsity)
    return [Pool(tuple(sizes), round(sparsity * sum(sizes.values())))]


@registry.register(
    "allocation",
    name="uniform",
    formula="one threshold per tensor; sparsity * size go from each, by largest remainder",
    source="Zhu and Gupta 2017, To prune, or not to prune",
)
def each(sizes: Mapping[str, int], sparsity: float) -> list[Pool]:
    """Return one pool per tensor, each of (nearly) the same sparsity.

    ``remove_i`` is ``sparsity * size_i`` rounded by largest remainder, so that the total is exactly
    ``round(sparsity * sum(sizes))``, and at most ``size_i - 1``: no tensor loses all its weights.
    Raises `InvalidArgument` for a sparsity outside of [0, 1), or one that cannot spare each tensor
    its one weight.

    >>> [pool.remove for pool in each({"a": 5, "b": 5, "c": 1}, 0.5)]
    [3, 3, 0]

    Source: the layer-wise sparsity of Zhu and Gupta 2017; the exact total is ours.
    """
    check_sparsity(sparsity)
    target = round(sparsity * sum(sizes.values()))
    most = {name: max(size - 1, 0) for name, size in sizes.items()}
    if target > sum(most.values()):
        raise InvalidArgument(
            "each tensor keeps at least one weight, which leaves too few to remove",
            where="uniform",
            got=f"{target} of {sum(sizes.values())}",
            allowed=f"at most {sum(most.values())}",
        )
    quotas = {name: sparsity * size for name, size in sizes.items()}
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
