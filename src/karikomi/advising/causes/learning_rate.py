"""Learning rates: one that jumped up, and updates that are too large for the weights."""

from __future__ import annotations

import math

import numpy as np

from karikomi.advising.causes.finding import Finding
from karikomi.advising.detection import LEAST
from karikomi.advising.recorded import Recorded
from karikomi.advising.signals import Signals, level_before

JUMP = 4.0
"""By what factor a rate must rise in one row; warm-ups and restarts of schedules rise by less, or gradually."""

USUAL = 1e-3
LARGE = 3e-2
"""The change of a weight by a step, in units of its norm: the usual value, and one that few networks survive."""


def rate_jumped(run: Recorded, signals: Signals) -> Finding | None:
    """The recorded rate rose fourfold or more in one row, or all updates did at gradients that did not."""
    row, ratio, seen = _recorded_jump(run)
    if row is None:
        row, ratio = _update_jump(run, signals)
        seen = "updates"
    if row is None:
        return None
    worse = _loss_after(signals, row) if run.has("loss") else math.nan
    if worse < 0.0:
        return None
    what = "The learning rate" if seen == "rate" else "The change of all weights by a step"
    because = (
        "" if seen == "rate" else ", at gradients of the usual size: the learning rate was raised"
    )
    return Finding(
        "learning_rate",
        row,
        f"{what} rose {ratio:.3g}-fold in one step{because}, and the loss is "
        f"{'not known' if math.isnan(worse) else f'{math.exp(worse):.3g} times as large after it'}.",
        "Undo the jump, or raise the rate over some hundred steps. Under Adam a clip limit does not replace "
        "a smaller rate; under SGD a limit caps the step at limit times rate.",
        numbers={"ratio": ratio, "loss_ratio_after": math.exp(worse) if worse == worse else worse},
        clip_helps=run.adaptive is False,
    )


def rate_too_high(run: Recorded, signals: Signals) -> Finding | None:
    """Most tensors change by more than 3 % a step while the loss rises or stands."""
    if not (run.measured("weights") and run.measured("updates") and run.has("loss")):
        return None
    weights, updates = signals.coarse["weights"], signals.coarse["updates"]
    matrices = _matrices(run)
    with np.errstate(invalid="ignore"):
        ratio = updates[:, matrices] - weights[:, matrices]
    parts = slice(len(ratio) // 4, None)
    share = float(np.nanmean(ratio[parts] > math.log(LARGE))) if ratio[parts].size else 0.0
    quarter = max(len(run) // 4, 1)
    first, last = (
        np.median(signals.loss[some]) for some in (slice(quarter), slice(-quarter, None))
    )
    if share < 0.5 or last < first + math.log(0.98):
        return None
    return Finding(
        "learning_rate",
        0,
        f"Most tensors change by more than {LARGE:.0%} of their norm a step ({USUAL:.1%} is usual), and the loss does "
        "not fall.",
        "Lower the learning rate tenfold, or warm it up longer.",
        numbers={"share_of_large_updates": share, "loss_ratio": float(np.exp(last - first))},
        clip_helps=run.adaptive is False,
    )


def _recorded_jump(run: Recorded) -> tuple[int | None, float, str]:
    rate = run.columns["lr"]
    known = np.flatnonzero(np.isfinite(rate) & (rate > 0))
    if len(known) > 1:
        ratio = rate[known[1:]] / rate[known[:-1]]
        # A rate that begins near zero is a warm-up.
        warm = rate[known[:-1]] < 0.02 * rate[known].max()
        jumps = (ratio >= JUMP) & ~warm
        if jumps.any():
            place = int(np.argmax(jumps))
            return int(known[place + 1]), float(ratio[place]), "rate"
    return None, math.nan, "rate"


def _update_jump(run: Recorded, signals: Signals) -> tuple[int | None, float]:
    """Return the row at which most updates rose at once without their gradients, and the factor."""
    if run.has("lr") or not (run.measured("updates") and run.measured("gradients")):
        return None, math.nan
    first = signals.disturbed
    rows = range(LEAST, len(run)) if first is None else range(max(first - 8, LEAST), first + 1)
    for row in rows if len(rows) <= 16 else ():
        now = signals.logs("updates", slice(row, row + 1))[0]
        rise = now - level_before(signals.logs("updates", slice(row)), row)[0]
        own = signals.logs("gradients", slice(row, row + 1))[0]
        pushed = own - level_before(signals.logs("gradients", slice(row)), row)[0]
        both = np.isfinite(rise) & np.isfinite(pushed)
        if both.any() and np.mean((rise - pushed)[both] > math.log(JUMP)) > 0.5:
            return row, float(np.exp(np.median(rise[both])))
    return None, math.nan


def _loss_after(signals: Signals, row: int) -> float:
    """Return by how much the log loss is higher after a row than before it; below 0 if it is not."""
    before = signals.loss[max(row - 32, 0) : row]
    after = signals.loss[row + 1 : row + 33]
    if not before.size or not after.size:
        return math.nan
    return float(np.median(after) - np.median(before))


def _matrices(run: Recorded) -> np.ndarray:
    """Return the places of tensors that are no biases or gains, as far as sizes are known."""
    sizes = run.facts.get("sizes")
    known = sizes if isinstance(sizes, dict) else {}
    counts = np.array([known.get(name) or 0 for name in run.names], np.float64)
    small = counts < 0.01 * counts.max(initial=0.0)
    named = np.array([name.split(".")[-1].startswith("bias") for name in run.names], dtype=bool)
    chosen = ~(small | named)
    return np.flatnonzero(chosen) if chosen.any() else np.arange(len(run.names))
