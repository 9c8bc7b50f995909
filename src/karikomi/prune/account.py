"""The account of a pruning: one row per tensor, with the reason and the error of the layer's output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from karikomi.prune.layout import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """`removed` of `size` weights of a tensor are zero now, `why`.

    `output_error`: the relative L2 error that this alone makes in the output of its layer, for the inputs
    it had before; none where no data was given. `reads_nothing`: indices of units all of whose weights
    are zero; `unread`: indices of inputs all of whose weights are zero.
    """

    name: str
    removed: int
    size: int
    why: str
    output_error: float | None = None
    reads_nothing: tuple[int, ...] = ()
    unread: tuple[int, ...] = ()

    @property
    def sparsity(self) -> float:
        """The share of its weights that are zero."""
        return self.removed / self.size if self.size else 0.0


@dataclass(frozen=True, slots=True)
class Account:
    """All rows; `output_error` is that of the whole network, `notes` are remarks on the counts.

    `total`: how many weights the network has, biases and all that has no row included; 0 where that is not known.
    """

    rows: tuple[Row, ...] = ()
    output_error: float | None = None
    notes: tuple[str, ...] = field(default=())
    total: int = 0

    @property
    def sparsity(self) -> float:
        """The share of the weights in all rows that are zero."""
        size = sum(row.size for row in self.rows)
        return sum(row.removed for row in self.rows) / size if size else 0.0

    @property
    def sparsity_of_all(self) -> float:
        """The share of all weights of the network that is zero by these rows; NaN where their number is not known."""
        return sum(row.removed for row in self.rows) / self.total if self.total else math.nan

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data, for JSON."""
        return {
            "sparsity_of_all": self.sparsity_of_all if self.total else None,
            "sparsity": self.sparsity,
            "output_error": self.output_error,
            "rows": [asdict(row) for row in self.rows],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        """Return the share of all weights, then a table with one line per tensor.

        >>> print(Account((Row(name="fc", removed=3, size=4, why="magnitude <= 0.1"),), total=6))
        3 of all 6 weights are zero (50.0%), of 4 that are masked 75.0%
        tensor      removed          of  sparsity  output error  why
        fc                3           4     75.0%             -  magnitude <= 0.1
        all               3           4     75.0%             -
        """
        width = max([len(row.name) for row in self.rows] + [8])
        head = f"{'tensor':<{width}}  {'removed':>9}  {'of':>10}  {'sparsity':>8}  {'output error':>12}  why"
        lines = [head, *(_line(row, width) for row in self.rows)]
        removed, size = (sum(getattr(row, key) for row in self.rows) for key in ("removed", "size"))
        whole = Row(name="all", removed=removed, size=size, why="", output_error=self.output_error)
        if self.total:
            share = (
                f"{removed:,} of all {self.total:,} weights are zero ({self.sparsity_of_all:.1%})"
            )
            lines.insert(0, f"{share}, of {size:,} that are masked {self.sparsity:.1%}")
        return "\n".join([*lines, _line(whole, width).rstrip(), *self.notes])


def row_of(
    name: str,
    mask: np.ndarray,
    layout: Layout | None,
    *,
    removed: int,
    why: str | None,
    output_error: float | None,
) -> Row:
    """Return the row of a mask, true where a weight is kept; `layout`: none of a part of a weight."""
    reads_nothing, unread = (), ()
    if layout is not None and layout.inputs is not None:
        canonical = layout.canonical(mask)
        reads_nothing = _empty(canonical.reshape(len(canonical), -1).any(axis=1))
        unread = _empty(canonical.reshape(-1, canonical.shape[-1]).any(axis=0))
    return Row(
        name=name,
        removed=removed,
        size=mask.size,
        why=why or "as before",
        output_error=output_error,
        reads_nothing=reads_nothing,
        unread=unread,
    )


def error_ratio(difference: float, whole: float) -> float:
    """Return the relative L2 error ``sqrt(difference / whole)`` of two sums of squares, 0 for 0 / 0."""
    if whole == 0.0:
        return 0.0 if difference == 0.0 else math.inf
    return math.sqrt(difference / whole)


def _empty(alive: Any) -> tuple[int, ...]:
    return tuple(np.flatnonzero(~np.asarray(alive)).tolist())


def _line(row: Row, width: int) -> str:
    error = "-" if row.output_error is None else f"{row.output_error:.3g}"
    dead = [
        f"{what} {_listed(indices)}"
        for what, indices in (("reads nothing:", row.reads_nothing), ("unread:", row.unread))
        if indices
    ]
    why = "; ".join(filter(None, [row.why, *dead]))
    numbers = f"{row.removed:>9,}  {row.size:>10,}  {row.sparsity:>8.1%}  {error:>12}"
    return f"{row.name:<{width}}  {numbers}  {why}"


def _listed(indices: Sequence[int]) -> str:
    shown = ", ".join(map(str, indices[:6]))
    return f"{shown} and {len(indices) - 6} more" if len(indices) > 6 else shown
