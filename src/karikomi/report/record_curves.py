"""Curves of a record, read in one pass: one axis of steps, few points, all spikes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from karikomi.report.wording import number

Point = tuple[float, float | None]


@dataclass(frozen=True, slots=True)
class StepSpan:
    """A range of steps of one stage, both ends included."""

    name: str
    first: float
    last: float


@dataclass(frozen=True, slots=True)
class History:
    """The curves of one run, all over the same count of steps."""

    loss: list[Point] = field(default_factory=list)
    norm: list[Point] = field(default_factory=list)
    after: list[Point] = field(default_factory=list)
    clipped: list[Point] = field(default_factory=list)
    skipped: list[Point] = field(default_factory=list)
    validation: list[Point] = field(default_factory=list)
    stages: list[StepSpan] = field(default_factory=list)


def read_history(rows: Iterable[Mapping[str, Any]]) -> History:
    """Return the curves of a record.

    Step numbers may continue or restart with each stage; the axis continues in both cases. An
    epoch is placed at the step before it. Rows of other events are left out.

    >>> rows = [{"event": "step", "stage": s, "step": n, "loss": 1.0} for s in "ab" for n in (0, 1)]
    >>> [point[0] for point in read_history(rows).loss]
    [0.0, 1.0, 2.0, 3.0]
    """
    history, axis = History(), _Axis()
    for row in rows:
        event = row.get("event")
        if event == "step":
            _add_step(history, axis.step(number(row.get("step"))), row)
        elif event == "epoch":
            history.validation.append((axis.epoch(), number(row.get("validation"))))
        else:
            continue
        stages, name, at = history.stages, str(row.get("stage", "")), max(axis.position, 0.0)
        if stages and stages[-1].name == name:
            stages[-1] = StepSpan(name, stages[-1].first, max(at, stages[-1].last))
        else:
            stages.append(StepSpan(name, at, at))
    return history


def thin(points: Sequence[Point], buckets: int = 390) -> list[Point]:
    """Return at most two points per bucket, its lowest and its highest, in order: spikes are kept.

    A bucket without values is one gap. Fewer points than that are returned unchanged.

    >>> thin([(0, 1.0), (1, 9.0), (2, 3.0), (3, 2.0), (4, 2.5), (5, 0.0)], buckets=2)
    [(0, 1.0), (1, 9.0), (4, 2.5), (5, 0.0)]
    """
    if len(points) <= 2 * buckets:
        return list(points)
    kept: list[Point] = []
    for bucket in _buckets(points, (points[0][0], points[-1][0]), buckets):
        order = sorted(
            (value, index) for index, (_, value) in enumerate(bucket) if value is not None
        )
        extremes = sorted({order[0][1], order[-1][1]}) if order else [0]
        kept += [bucket[index] for index in extremes]
    return kept


def peaks(points: Sequence[Point], span: tuple[float, float], buckets: int = 130) -> list[Point]:
    """Return the highest point of each part of `span`: overlapping marks are merged.

    >>> peaks([(0, 1.0), (1, 9.0), (10, 3.0)], (0, 10), buckets=2)
    [(1, 9.0), (10, 3.0)]
    """
    filled = _buckets(points, span, buckets)
    return [max(bucket, key=lambda point: point[1] or 0.0) for bucket in filled]


def _buckets(points: Sequence[Point], span: tuple[float, float], buckets: int) -> list[list[Point]]:
    first, last = span
    width = (last - first) / buckets or 1.0
    filled: dict[int, list[Point]] = {}
    for point in points:
        filled.setdefault(min(int((point[0] - first) / width), buckets - 1), []).append(point)
    return [filled[index] for index in sorted(filled)]


@dataclass(slots=True)
class _Axis:
    offset: float = 0.0
    last: float = -1.0
    position: float = -1.0
    stepped: bool = False

    def step(self, number_of_step: float | None) -> float:
        current = self.last + 1 if number_of_step is None else number_of_step
        if current <= self.last:
            self.offset = self.position + 1 - current
        self.last, self.position, self.stepped = current, self.offset + current, True
        return self.position

    def epoch(self) -> float:
        if not self.stepped:
            self.position += 1
        return self.position


def _add_step(history: History, position: float, row: Mapping[str, Any]) -> None:
    norm, factor = number(row.get("norm")), number(row.get("factor"))
    history.loss.append((position, number(row.get("loss"))))
    history.norm.append((position, norm))
    kept = None if norm is None or factor is None else norm * factor
    history.after.append((position, number(kept)))
    if row.get("skipped") is True:
        history.skipped.append((position, norm))
    elif row.get("clipped") is True and norm is not None:
        history.clipped.append((position, norm))
