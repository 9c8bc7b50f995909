"""The report of a shrink: widths and parameters before and after, and why units stayed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Refit:
    """One layer that was re-fitted: its relative error on held-out data before and after, and whether it was kept.

    `why`: the reason if it was not tried.
    """

    before: float = 0.0
    after: float = 0.0
    kept: bool = False
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShrinkReport:
    """The account of a shrink.

    `widths_before`, `widths_after`: layer name -> output units. `parameters_before`,
    `parameters_after`: numbers of the whole network, a shared one counted once. `left_alone`: layer
    name -> why units of it that look dead (or all of them) stayed, counted in the smaller network.
    `max_difference`: the largest difference to the original's outputs, relative to the largest; measured
    before anything is re-fitted. `compensation`: layer -> its re-fit, "" -> the whole network (its loss, or the
    relative distance of its outputs to the original's).

    >>> report = ShrinkReport(
    ...     widths_before={"fc1": 300}, widths_after={"fc1": 191}, parameters_before=3000,
    ...     parameters_after=1910, left_alone={}, max_difference=0.0)
    >>> report.removed, report.as_dict()["removed"]
    (109, 109)
    """

    widths_before: dict[str, int]
    widths_after: dict[str, int]
    parameters_before: int
    parameters_after: int
    left_alone: dict[str, str]
    max_difference: float
    macs_before: int = 0
    macs_after: int = 0
    frozen: dict[str, str] = field(default_factory=dict)
    together: dict[str, list[str]] = field(default_factory=dict)
    statistics: list[str] = field(default_factory=list)
    literals: list[str] = field(default_factory=list)
    form: str = "module"
    latencies: list[tuple[float, float]] = field(default_factory=list)
    compensation: dict[str, Refit] = field(default_factory=dict)

    @property
    def removed(self) -> int:
        """The number of units that are gone."""
        return sum(self.widths_before.values()) - sum(self.widths_after.values())

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as plain values, for JSON."""
        return {**asdict(self), "removed": self.removed}
