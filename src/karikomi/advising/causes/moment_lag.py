"""Lag of the second moment: Adam divides by a running mean of squares that small gradients have made small."""

from __future__ import annotations

import math

import numpy as np

from karikomi.advising.causes.finding import Finding
from karikomi.advising.detection import LEAST
from karikomi.advising.recorded import Recorded
from karikomi.advising.signals import Signals

RATIO = 5.0
"""The proxy ``g^2 / v`` above which an update is as large as with the root mean square of 2.3 in the literature."""

LASTING = 8
"""In how many of the next twelve rows most tensors must be above: a single batch does that for one."""


def moment_lag(run: Recorded, signals: Signals) -> Finding | None:
    """After a quiet phase most gradients are much larger than the second moments, for many steps, and updates rise."""
    betas = run.facts.get("betas")
    if run.adaptive is not True or not run.measured("gradients") or run.stride > 1:
        return None
    if not (isinstance(betas, list) and len(betas) == 2):
        return None
    beta = float(betas[1])
    ratios = _ratios(signals, beta)
    if ratios is None:
        return None
    above = np.nanmean(ratios > math.log(RATIO), axis=1) > 0.5
    row = _first_run(above[LEAST:], LASTING)
    if row is None:
        return None
    row += LEAST
    rise = float(
        signals.norm[row : row + LASTING].mean() - np.median(signals.norm[LEAST // 4 : row])
    )
    moved = _update_rise(run, signals, row)
    # Gradients that were small, then jumped to a level and stay there; not an explosion that goes on.
    growing = float(
        np.median(signals.norm[row + LASTING : row + 4 * LASTING + 1]) - signals.norm[row]
    )
    if rise < math.log(3.0) or moved < math.log(1.5) or growing > math.log(30.0):
        return None
    typical = float(np.exp(np.nanmedian(ratios[row])))
    place = int(np.nanargmax(ratios[row]))
    return Finding(
        "moment_lag",
        row,
        f"After a quiet phase the squares of gradients are {typical:.3g} times Adam's running mean of them "
        f"(beta2 = {beta:g}), for {_length(above, row)} steps: its updates are too large until the mean has caught up.",
        "Lower beta2 (0.95 to 0.99), or clip updates: attach(update=kk.clip.BlockRMS(1.0)), kk.clip.StableAdamW(). "
        "A lower limit on gradients is not the fix.",
        tensors=(run.names[place],),
        numbers={
            "squares_over_mean": typical,
            "gradient_rise": math.exp(rise),
            "update_rise": math.exp(moved),
            "beta2": beta,
        },
    )


def _ratios(signals: Signals, beta: float) -> np.ndarray | None:
    """Return ``log(g^2 / v)`` with the bias-corrected mean of the steps before, shape (T, N); of up to 20,000 rows.

    A proxy: a ratio of means over a tensor, where StableAdamW has the mean of the ratios.
    """
    first = signals.disturbed
    rows = slice(0, min(len(signals.run), 20_000 if first is None else first + 128))
    logs = np.clip(signals.logs("gradients", rows).astype(np.float64), -80.0, 80.0)
    if not logs.shape[1] or len(logs) < 2 * LEAST:
        return None
    squares = np.exp(2.0 * np.nan_to_num(logs, nan=-80.0))
    mean, weight = np.zeros(logs.shape[1]), 0.0
    found = np.full(logs.shape, np.nan)
    for t, row in enumerate(squares):
        if weight > 0.0:
            with np.errstate(divide="ignore"):
                found[t] = 2.0 * logs[t] - np.log(mean / weight)
        if signals.run.skipped[t] or signals.run.bad[t]:
            continue
        mean = beta * mean + (1.0 - beta) * row
        weight = beta * weight + (1.0 - beta)
    return found


def _first_run(above: np.ndarray, length: int) -> int | None:
    """Return the first true value of a stretch of which two thirds, at least `length` values, are true."""
    width = 3 * length // 2
    if len(above) < width:
        return None
    sums = np.convolve(above, np.ones(width, int), "valid")
    hits = np.flatnonzero((sums >= length) & above[: len(sums)])
    return int(hits[0]) if hits.size else None


def _length(above: np.ndarray, row: int) -> int:
    after = np.flatnonzero(~above[row:])
    return int(after[0]) if after.size else len(above) - row


def _update_rise(run: Recorded, signals: Signals, row: int) -> float:
    """Return by how much updates in units of the rate rose, in the median of tensors; 1 where they are unknown."""
    if not run.measured("updates"):
        return 1.0
    before = signals.logs("updates", slice(max(row - 64, 1), row))
    after = signals.logs("updates", slice(row + 1, row + 33))
    if not before.size or not after.size:
        return 0.0
    rise = np.nanmedian(np.nanmax(after, axis=0) - np.nanmedian(before, axis=0))
    rates = np.nan_to_num(np.log(np.where(run.columns["lr"] > 0, run.columns["lr"], 1.0)))
    return float(
        rise - (np.median(rates[row + 1 : row + 33]) - np.median(rates[max(row - 64, 1) : row]))
    )
