"""How many items a schedule removes from which tensors at each of its steps: known before the first of them.

For compiled training: an allocation that goes by sizes and shapes needs no weights, so that its whole numbers, exact as
everywhere else, are a table of constants in which the step is looked up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from karikomi.errors import Unsupported
from karikomi.prune.allocations.allocation import Allocation, Pool, Tensor, allocate
from karikomi.prune.schedules.pruning_schedule import PruningSchedule

MOST_CHANGES = 1 << 16
"""Of the masks of a schedule: beyond it, its table takes minutes, or is larger than a network."""


class PoolCounts(NamedTuple):
    """`due`: the steps at which masks change, rising. `pools`: names of tensors that share a threshold.

    `remove`: int64, shape (steps, pools): how many of a pool's items are gone after that step.
    """

    due: tuple[int, ...]
    pools: tuple[tuple[str, ...], ...]
    remove: np.ndarray


@dataclass(frozen=True, slots=True)
class _Sized:
    """A `Tensor` of which no more is known than sizes."""

    items: int
    shape: tuple[int, ...]
    gone: int
    where: str

    def __getattr__(self, fact: str) -> Any:
        raise Unsupported(
            f"this allocation depends on the {fact} of tensors, and not on their sizes alone",
            where=self.where,
            allowed="global, uniform, erk, isomorphic",
            hint="karikomi.jax.update_masks makes masks between steps",
        )


def due_steps(schedule: PruningSchedule, *, where: str) -> tuple[int, ...]:
    """Return the steps at which masks change; raises `Unsupported` for more than `MOST_CHANGES`.

    >>> import karikomi as kk
    >>> due_steps(kk.prune.Gradual(0.9, steps=(2, 7), every=2), where="")
    (2, 4, 6, 7)
    """
    steps = tuple(step for step in range(schedule.last + 1) if schedule.due(step))
    if len(steps) > MOST_CHANGES:
        raise Unsupported(
            "masks change too often for a table of their sizes",
            where=f"{where}: {type(schedule).__name__}",
            got=f"{len(steps):,} times",
            allowed=f"{MOST_CHANGES:,}",
            hint="a larger every=",
        )
    return steps


def pool_counts(
    schedule: PruningSchedule,
    allocation: Allocation,
    tensors: Mapping[str, Tensor],
    *,
    first: int = 0,
    anew: bool = False,
    where: str,
) -> PoolCounts:
    """Return the table of a schedule.

    `allocation`: a name, or an `Allocator`. `tensors`: name -> items, shapes, how many are gone before. `first`: what
    is due earlier is done at this step, to its sparsity. `anew`: each time from all items, so that what was
    gone may return. Raises `Unsupported` for an allocation that depends on weights or on what is measured.

    >>> import karikomi as kk
    >>> sizes = {"a": Tensor(items=6, shape=(2, 3)), "b": Tensor(items=4, shape=(4,))}
    >>> table = pool_counts(kk.prune.Gradual(0.5, steps=(0, 2), every=1), "uniform", sizes, where="")
    >>> table.due, table.pools, table.remove.tolist()
    ((0, 1, 2), (('a',), ('b',)), [[0, 0], [2, 2], [3, 2]])
    """
    due, place = due_steps(schedule, where=where), f"{where}: allocation {allocation!r}"
    gone = {name: tensor.gone for name, tensor in tensors.items()}
    rows: list[list[Pool]] = []
    for step in due:
        sizes: Any = {
            name: _Sized(tensor.items, tensor.shape, gone[name], place)
            for name, tensor in tensors.items()
        }
        rows.append(allocate(allocation, sizes, schedule.sparsity_at(max(step, first))))
        gone = gone if anew else _gone_after(gone, rows[-1])
    shared = {tuple(pool.names for pool in row) for row in rows}
    if len(shared) > 1:
        raise Unsupported("it compares other tensors at another sparsity", where=place)
    pools = next(iter(shared), ())
    remove = [[pool.remove for pool in row] for row in rows]
    return PoolCounts(due, pools, np.array(remove, np.int64).reshape(len(due), len(pools)))


def _gone_after(gone: Mapping[str, int], pools: list[Pool]) -> dict[str, int]:
    """Return how many items are gone; of tensors that share a threshold, the first has them all."""
    found = dict(gone)
    for pool in pools:
        first, *others = pool.names
        before = sum(gone[name] for name in pool.names)
        found |= {first: max(pool.remove, before)} | dict.fromkeys(others, 0)
    return found
