"""The widths of a network's layers as a short text."""

from __future__ import annotations

from collections.abc import Sequence

_MOST, _FIRST, _LAST = 12, 5, 3


def chain_of(widths: Sequence[int]) -> str:
    """Return widths joined by dashes, of a long chain its ends and its length.

    >>> chain_of([4, 8, 2]), chain_of([3, *[16] * 20, 10])
    ('4-8-2', '3-16-16-16-16-...-16-16-10 (21 layers)')
    """
    if len(widths) <= _MOST:
        return "-".join(map(str, widths))
    ends = ["-".join(map(str, part)) for part in (widths[:_FIRST], widths[-_LAST:])]
    return f"{ends[0]}-...-{ends[1]} ({len(widths) - 1} layers)"
