"""Which tensor left its usual range first, the largest norms by tensor and step, and the heat map around an event."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from karikomi.advising.recorded import Recorded
from karikomi.advising.signals import Signals, level_before
from karikomi.record.log_codes import NONFINITE, log2_of

SCORE = 4.0
SHOWN = 12
COLUMNS = 48


@dataclass(frozen=True, slots=True)
class Onset:
    """A tensor that left its usual range: the step, its score there, and whether together with the one before it."""

    tensor: str
    step: int
    score: float
    together: bool


@dataclass(frozen=True, slots=True)
class Largest:
    """The largest finite norm: of which tensor (``None``: of all together), in which step."""

    tensor: str | None
    step: int
    norm: float


@dataclass(frozen=True, slots=True)
class HeatMap:
    """Gradients of tensors (rows) over steps (columns) around an event, relative to their usual norms.

    `ratios`: base-10 logarithms of norm over usual norm, the largest of each cell, shape (tensors, cells); NaN where
    unknown, ``inf`` where not finite. `steps`: the first step of each cell. `event`: its cell.
    """

    tensors: tuple[str, ...]
    steps: tuple[int, ...]
    ratios: np.ndarray
    event: int
    left_out: int


def onsets(run: Recorded, signals: Signals, row: int) -> list[Onset]:
    """Return the tensors whose score was above 4 in 2 of 3 rows around an event, in the order of their onset.

    Non-finite counts as above. Order is known to the distance of the rows; onsets in the same or neighbouring rows are
    marked as together.
    """
    if not run.measured("gradients"):
        return []
    rows = signals.around(row)
    scores = signals.scores("gradients", rows)
    bad = run.codes["gradients"][rows] == NONFINITE
    begin = max(row - rows.start - 64, 0)
    wild = ((scores > SCORE) | bad)[begin : row - rows.start + 17]
    padded = np.pad(wild, ((0, 2), (0, 0)))
    # An event may last one row: where it is not finite, that is enough.
    lasting = wild & ((padded[1:-1] | padded[2:]) | bad[begin : begin + len(wild)])
    lasting |= wild & (np.arange(len(wild))[:, None] >= row - rows.start - begin)
    found = []
    for place in np.flatnonzero(lasting.any(axis=0)):
        first = int(np.argmax(lasting[:, place]))
        score = math.inf if bad[begin + first, place] else float(scores[begin + first, place])
        found.append((rows.start + begin + first, -score, int(place)))
    found.sort()
    pairs = zip(found, [None, *found], strict=False)
    return [
        Onset(run.names[own[2]], int(run.steps[own[0]]), -own[1], _near(own, before))
        for own, before in pairs
    ]


def _near(own: tuple[int, float, int], before: tuple[int, float, int] | None) -> bool:
    return before is not None and own[0] - before[0] <= 1


def largest(run: Recorded) -> Largest | None:
    """Return the largest finite norm of a tensor, or of all together where tensors were not recorded."""
    if run.measured("gradients"):
        codes = run.codes["gradients"]
        best, place, row = 0, 0, 0
        for start in range(0, len(codes), 8192):
            some = codes[start : start + 8192]
            finite = np.where(some == NONFINITE, 0, some)
            flat = int(np.argmax(finite))
            if finite.flat[flat] > best:
                best = int(finite.flat[flat])
                row, place = start + flat // some.shape[1], flat % some.shape[1]
        if best:
            norm = 2.0 ** float(log2_of(np.array([best], np.uint16))[0])
            return Largest(run.names[place], int(run.steps[row]), float(f"{norm:.3g}"))
    norms = run.columns["norm"]
    if not np.isfinite(norms).any():
        return None
    row = int(np.nanargmax(norms))
    return Largest(None, int(run.steps[row]), float(f"{norms[row]:.3g}"))


def heat_map(run: Recorded, signals: Signals, row: int, first: list[str]) -> HeatMap | None:
    """Return the map of the 32 rows before an event and the 16 after it; `first`: tensors that must be on it."""
    if not run.measured("gradients"):
        return None
    start = max(row - 32, 0)
    rows = slice(start, min(start + COLUMNS, len(run)))
    logs = signals.logs("gradients", rows).astype(np.float64)
    before = signals.logs("gradients", slice(max(start - 128, 0), start))
    usual = level_before(before, len(before))[0]
    if start < 8:
        usual = level_before(logs, max(row, 1))[0]
    with np.errstate(invalid="ignore"):
        ratios = (logs - usual) / math.log(10.0)
    ratios[run.codes["gradients"][rows] == NONFINITE] = math.inf
    peak = np.where(np.isnan(ratios), -math.inf, ratios).max(axis=0, initial=-math.inf)
    order = {name: place for place, name in enumerate(first)}
    rank = sorted(
        range(len(run.names)),
        key=lambda place: (order.get(run.names[place], len(order)), -peak[place]),
    )
    # In the order of the module: an explosion that runs through the layers is then a diagonal.
    chosen = sorted(rank[:SHOWN])
    return HeatMap(
        tensors=tuple(run.names[place] for place in chosen),
        steps=tuple(int(step) for step in run.steps[rows]),
        ratios=ratios[:, chosen].T,
        event=row - start,
        left_out=len(run.names) - len(chosen),
    )
