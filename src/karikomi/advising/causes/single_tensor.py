"""One tensor explodes before the others: its gradient leaves its range and dominates the norm."""

from __future__ import annotations

import math

import numpy as np

from karikomi.advising.causes.finding import Finding
from karikomi.advising.recorded import Recorded
from karikomi.advising.signals import Signals

SCORE = 6.0
SHARE = 0.5
LEAD = 2


def single_tensor(run: Recorded, signals: Signals) -> Finding | None:
    """A tensor with more than half of the norm's p-th power left its range at least two rows before the norm did."""
    row = signals.disturbed
    if row is None or not run.measured("gradients"):
        return None
    rows = signals.around(row)
    logs, scores = signals.logs("gradients", rows), signals.scores("gradients", rows)
    last = min(row - rows.start + 8, len(logs))
    begin = max(row - rows.start - 64, 0)
    wild = scores[begin:last] > SCORE
    if not wild.any():
        return None
    first = np.where(wild.any(axis=0), np.argmax(wild, axis=0), len(wild))
    place = int(np.lexsort((-scores[begin:last].max(axis=0), first))[0])
    lead = row - rows.start - begin - int(first[place])
    share = _share(np.nan_to_num(logs[last - 1], nan=-80.0).astype(np.float64), place, run.order)
    if lead < LEAD or share < SHARE:
        return None
    score = float(scores[begin + first[place], place])
    return Finding(
        "single_tensor",
        row - lead,
        f"The gradient of {run.names[place]} left its usual range {lead} rows before the norm did, and makes up "
        f"{share:.0%} of {'the squared norm' if run.order == 2.0 else 'it'}.",
        "Give it a limit of its own: kk.clip.Groups({pattern: kk.clip.ByNorm(limit)}, default=...), or a rule "
        "per tensor (kk.clip.AdaGC()); look at its initialisation and scale.",
        tensors=(run.names[place],),
        numbers={"score": score, "share": share, "lead": float(lead)},
        clip_helps=True,
    )


def _share(logs: np.ndarray, place: int, order: float) -> float:
    """Return which part of the norm's p-th power is of one tensor; of largest magnitudes, its own over the largest."""
    ratios = np.exp(logs - logs.max())
    if math.isinf(order):
        return float(ratios[place])
    powers = ratios**order
    return float(powers[place] / powers.sum())
