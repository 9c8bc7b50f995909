"""Groups of units that look alike to all tensors, from which some units go; and how many of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from karikomi.errors import InvalidArgument
from karikomi.shrink.labels import Block, Classes


@dataclass(frozen=True, slots=True)
class Group:
    """Units that are found on the same axes, equally often on each.

    `units`: their classes. `members`: the axes with, for each unit, its indices: shape (units, times).
    `name`: the tensor whose first axis these units are the rows of, or the first tensor. `sites`: operations
    because of which its members go together. `form`: for each member the axis, how often a unit is found on it, and
    the axes of its tensor with their sizes; groups of the same form are alike.
    """

    name: str
    units: np.ndarray
    members: tuple[tuple[Block, np.ndarray], ...]
    sites: tuple[str, ...] = ()
    form: tuple[tuple[int, int, tuple[tuple[int, int], ...]], ...] = ()

    def __len__(self) -> int:
        return len(self.units)


def groups_of(
    classes: Classes, *, rows: Callable[[Block], bool] = lambda block: block.axis == 0
) -> list[Group]:
    """Return the groups of all classes that can go, in the order of their first label.

    `rows`: whether the indices of an axis are the units that a tensor makes, for the name of the group. A label
    that belongs to no tensor (of padding, say) goes along with others and is in no group by itself.
    """
    free = classes.free()
    owned = [(number, block) for number, block in enumerate(classes.blocks) if block.owner]
    parts = [
        np.stack([classes.roots[block.labels], np.full(block.size, n), np.arange(block.size)])
        for n, block in owned
    ]
    if not parts:
        return []
    table = np.concatenate(parts, axis=1)
    table = table[:, free[table[0]]]
    table = table[:, np.lexsort((table[2], table[1], table[0]))]
    firsts = np.flatnonzero(np.diff(table[0], prepend=-1))
    alike: dict[tuple[int, ...], list[np.ndarray]] = {}
    for part in np.split(table, firsts[1:], axis=1):
        if part.size:
            alike.setdefault(tuple(part[1].tolist()), []).append(part)
    shapes: dict[str, dict[int, int]] = {}
    for _, block in owned:
        shapes.setdefault(block.owner, {})[block.axis] = block.size
    found = [_group(classes, blocks, several, rows, shapes) for blocks, several in alike.items()]
    return sorted(found, key=lambda group: int(group.units[0]))


def _group(
    classes: Classes,
    blocks: tuple[int, ...],
    several: list[np.ndarray],
    rows: Callable[[Block], bool],
    shapes: Mapping[str, Mapping[int, int]],
) -> Group:
    units = np.array([int(unit[0, 0]) for unit in several])
    places = np.stack([unit[2] for unit in several])
    numbers = np.array(blocks)
    members = tuple((classes.blocks[n], places[:, numbers == n]) for n in dict.fromkeys(blocks))
    sites = dict.fromkeys(
        site for unit in units[:1].tolist() for site in classes.sites.get(unit, [])
    )
    made = [block for block, _ in members if rows(block)]
    name = (made or [block for block, _ in members])[0].owner
    form = sorted(
        (block.axis, own.shape[1], tuple(sorted(shapes[block.owner].items())))
        for block, own in members
    )
    return Group(name, units, members, tuple(sites), tuple(form))


def kept_of(classes: Classes, gone: Sequence[np.ndarray]) -> np.ndarray:
    """Return a boolean per label: whether it stays when the units in `gone` go."""
    away = np.zeros(len(classes.roots), bool)
    for units in gone:
        away[units] = True
    return ~away[classes.roots]


def staying(size: int, share: float, multiple: int, least: int) -> int:
    """Return how many of `size` units stay: the share, rounded to a multiple, at least `least`.

    >>> staying(96, 0.5, 32, 1), staying(10, 0.5, 8, 1), staying(3, 0.1, 1, 1)
    (64, 8, 1)
    """
    wanted = size * share
    rounded = int(wanted / multiple + 0.5) * multiple
    return min(size, max(rounded, min(least, size), min(multiple, size)))


def uniform(
    groups: Sequence[Group], scores: Sequence[np.ndarray], share: float, multiple: int, least: int
) -> list[np.ndarray]:
    """Return the units of each group that go: the lowest scores, the same share of each group."""
    return [
        lowest(group, score, len(group) - staying(len(group), share, multiple, least))
        for group, score in zip(groups, scores, strict=True)
    ]


def together(
    groups: Sequence[Group], scores: Sequence[np.ndarray], share: float, multiple: int, least: int
) -> list[np.ndarray]:
    """Return the units that go: the lowest of all groups, with the scores of a group divided by their mean.

    Source: the normalised global ranking of Fang et al. 2023 (DepGraph).
    """
    return _pooled(groups, [s / (s.mean() or 1.0) for s in scores], share, multiple, least)


def isomorphic(
    groups: Sequence[Group], scores: Sequence[np.ndarray], share: float, multiple: int, least: int
) -> list[np.ndarray]:
    """Return the units that go: the lowest of all groups of the same form, the same share of each form.

    Source: Fang, Ma, Mi and Wang 2024, "Isomorphic Pruning for Vision Models". The paper compares sub-structures of
    the same graph; here also the shapes of their tensors are the same, so that scores are compared as they are.
    """
    gone: dict[int, np.ndarray] = {}
    forms: dict[object, list[int]] = {}
    for number, group in enumerate(groups):
        forms.setdefault(group.form or number, []).append(number)
    for numbers in forms.values():
        own = [groups[number] for number in numbers]
        pool = [scores[number] for number in numbers]
        gone |= dict(zip(numbers, _pooled(own, pool, share, multiple, least), strict=True))
    return [gone[number] for number in range(len(groups))]


def _pooled(
    groups: Sequence[Group], scores: Sequence[np.ndarray], share: float, multiple: int, least: int
) -> list[np.ndarray]:
    """Return the units that go: the lowest scores of all groups together."""
    if not groups:
        return []
    pool = np.concatenate(scores)
    owner = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    order = np.argsort(pool, kind="stable")[: len(pool) - round(len(pool) * share)]
    counts = np.bincount(owner[order], minlength=len(groups))
    left = [
        staying(len(group), 1 - count / len(group), multiple, least)
        for group, count in zip(groups, counts.tolist(), strict=True)
    ]
    return [
        lowest(group, score, len(group) - stay)
        for group, score, stay in zip(groups, scores, left, strict=True)
    ]


def lowest(group: Group, scores: np.ndarray, count: int) -> np.ndarray:
    """Return the `count` units of a group with the lowest scores; the first of equal ones."""
    return group.units[np.sort(np.argsort(scores, kind="stable")[:count])]


ALLOCATIONS: Mapping[str, Callable[..., list[np.ndarray]]] = {
    "uniform": uniform,
    "global": together,
    "isomorphic": isomorphic,
}


def to_budget(
    cost: Callable[[float], float],
    budget: float,
    *,
    unit: str,
    steps: int = 24,
    where: str = "torch.shrink",
) -> float:
    """Return the largest share of units that stays within a budget, by bisection.

    `cost`: from a share in (0, 1] to what the network would cost. Raises `InvalidArgument` if
    the smallest network costs more.
    """
    if cost(1.0) <= budget:
        return 1.0
    low, high = 0.0, 1.0
    least = cost(1e-9)
    if least > budget:
        raise InvalidArgument(
            "no choice of units is as small as that",
            where=f"{where}: {unit}",
            got=f"{budget:,.6g}",
            allowed=f"at least {least:,.6g}",
            hint="what cannot go is in report.frozen",
        )
    for _ in range(steps):
        middle = (low + high) / 2
        if cost(middle) <= budget:
            low = middle
        else:
            high = middle
    return low or 1e-9
