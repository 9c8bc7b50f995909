"""Choice of the step rows that a record keeps near its bound, and counts of the others.

Pure functions of a row, of the bytes before it and of the row before it: a run that was
killed and resumed leaves out the same rows as one that was not. Each row that is kept counts those
left out before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

_CHUNKS = 32
_LONGEST = 1 << 16


class LeftOut(NamedTuple):
    """The steps left out since the last row: how many, clipped, skipped, and their largest norm."""

    steps: int = 0
    clipped: int = 0
    skipped: int = 0
    norm: float | None = None

    def plus(self, row: Mapping[str, Any]) -> LeftOut:
        """Return the count with one more row."""
        norms = [norm for norm in (self.norm, row.get("norm")) if norm is not None]
        return LeftOut(
            self.steps + 1,
            self.clipped + bool(row.get("clipped")),
            self.skipped + bool(row.get("skipped")),
            max(norms, default=None),
        )


def every(length: int, bound: int) -> int:
    """Return n, if every n-th step is to be kept in a record of this length and bound, in bytes.

    1 in its first half; then it doubles with each 1/32 of the bound, up to 65,536. Rows of the same
    size thus last about 4,096 times as many steps as fit into the bound.

    >>> [every(percent, 100) for percent in (0, 49, 50, 56, 99)]
    [1, 1, 2, 4, 65536]
    """
    over = length - bound / 2
    return 1 if over < 0 else min(2 << int(over / bound * _CHUNKS), _LONGEST)


def keeps(row: Mapping[str, Any], size: int, length: int, bound: int, *, quiet: bool) -> bool:
    """Return whether a row of `size` bytes is kept in a record of `length` bytes.

    Besides every n-th step: skipped steps, and the first that is clipped after `quiet` (no clipped
    step in the last row or left out since), until three quarters of the bound are used, since such
    events may be as frequent as steps. A row that would exceed the bound is never kept.
    """
    if length + size > bound:
        return False
    step = row.get("step")
    if not isinstance(step, int) or step % every(length, bound) == 0:
        return True
    event = bool(row.get("skipped")) or (bool(row.get("clipped")) and quiet)
    return event and 4 * length < 3 * bound
