"""Rows of any source to the arrays of a `Recorded`: duplicates after restarts, missing values, non-finite ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from karikomi.advising.recorded import COLUMNS, Recorded
from karikomi.errors import BadFile

NONE = -1


@dataclass(slots=True)
class Assembly:
    """Rows, added one after the other in the order in which they were written.

    A number that is not finite is a fact and is kept as such; one that is absent is unknown.
    """

    source: str
    format: str
    steps: list[int] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=lambda: {key: [] for key in COLUMNS})
    flags: dict[str, list[bool]] = field(
        default_factory=lambda: {key: [] for key in ("clipped", "skipped", "bad", "bad_loss")}
    )
    left_out: list[int] = field(default_factory=list)
    culprits: dict[int, tuple[str, ...]] = field(default_factory=dict)
    orders: list[float] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    def add(
        self,
        step: int,
        values: Mapping[str, float | None],
        *,
        clipped: bool = False,
        skipped: bool = False,
        left_out: int = 0,
        culprits: Iterable[str] = (),
        order: float = 2.0,
    ) -> None:
        """Add a row; a value of ``None`` is unknown, a NaN or an infinite one was not finite.

        `order`: the p of its norm.
        """
        place = len(self.steps)
        self.steps.append(step)
        for key, column in self.values.items():
            value = values.get(key)
            column.append(math.nan if value is None or not math.isfinite(value) else float(value))
        names = tuple(culprits)
        if names:
            self.culprits[place] = names
        self.flags["bad"].append(bool(names) or _not_finite(values.get("norm")))
        self.flags["bad_loss"].append(_not_finite(values.get("loss")))
        self.flags["clipped"].append(clipped)
        self.flags["skipped"].append(skipped)
        self.left_out.append(left_out)
        self.orders.append(math.nan if values.get("norm") is None else order)

    def kept(self) -> np.ndarray:
        """Return the places of the rows that count: of a step that was written again, the later one."""
        steps = np.array(self.steps, np.int64)
        # From the end: a row counts if no later row has its step or one before it.
        least_after = np.minimum.accumulate(steps[::-1])[::-1]
        keep = np.ones(len(steps), dtype=bool)
        keep[:-1] = steps[:-1] < least_after[1:]
        return np.flatnonzero(keep)

    def of_one_order(self, kept: np.ndarray) -> tuple[np.ndarray, float]:
        """Return the places of the rows whose norms can be compared, and the p of these: that of the last norm."""
        orders = np.array(self.orders)[kept]
        known = orders[~np.isnan(orders)]
        order = float(known[-1]) if known.size else 2.0
        fits = np.isnan(orders) | (orders == order)
        others = ", ".join(sorted({named_norm(float(p)) for p in orders[~fits]}))
        if others:
            self.lost.append(
                f"{int((~fits).sum()):,} rows with {others}, which cannot be compared with the {named_norm(order)} at "
                "the end"
            )
        return kept[fits], order

    def finish(
        self,
        *,
        names: tuple[str, ...] = (),
        codes: Mapping[str, np.ndarray] | None = None,
        facts: Mapping[str, Any] | None = None,
        mean_of: float = 1.0,
        after_clip: bool = False,
    ) -> Recorded:
        """Return the run; raises `BadFile` without any row that has a norm or a loss."""
        kept = self.kept()
        again = len(self.steps) - len(kept)
        if again:
            self.lost.append(f"{again:,} rows of steps that were written again after a restart")
        kept, order = self.of_one_order(kept)
        columns = {key: np.array(column)[kept] for key, column in self.values.items()}
        flags = {key: np.array(flag, dtype=bool)[kept] for key, flag in self.flags.items()}
        known = np.isfinite(columns["norm"]) | np.isfinite(columns["loss"])
        known |= flags["bad"] | flags["bad_loss"]
        if not known.any():
            raise BadFile(
                "no step has a gradient norm or a loss",
                where=self.source,
                hint="name the column of the norms with --map norm=COLUMN",
            )
        places = {int(old): new for new, old in enumerate(kept)}
        return Recorded(
            source=self.source,
            format=self.format,
            steps=np.array(self.steps, np.int64)[kept],
            columns=columns,
            culprits={places[p]: own for p, own in self.culprits.items() if p in places},
            left_out=np.array(self.left_out, np.int64)[kept],
            names=names,
            codes={of: matrix[kept] for of, matrix in (codes or {}).items()},
            facts=facts or {},
            mean_of=mean_of,
            after_clip=after_clip,
            order=order,
            lost=[*self.lost],
            **flags,
        )


def named_norm(order: float) -> str:
    """Return norms of an order in words.

    >>> named_norm(2.0), named_norm(1.5), named_norm(math.inf)
    ('2-norms', '1.5-norms', 'largest magnitudes')
    """
    return "largest magnitudes" if math.isinf(order) else f"{order:g}-norms"


def _not_finite(value: float | None) -> bool:
    return value is not None and not math.isfinite(value)
