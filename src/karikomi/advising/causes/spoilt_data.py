"""Data: one batch that does not belong, or data that changed for good."""

from __future__ import annotations

import math

import numpy as np

from karikomi.advising.causes.finding import Finding
from karikomi.advising.detection import LEAST, alarm_level, cusum
from karikomi.advising.recorded import Recorded
from karikomi.advising.signals import Signals, level_before

QUIET_BEFORE = 10
BACK_WITHIN = 20
LASTING = 12
"""How many rows a loss stays at its new level if the data changed."""


def bad_batch(run: Recorded, signals: Signals) -> Finding | None:
    """Norm or loss jumped in one row, without a precursor, and was back soon; of the two the loss is asked first."""
    row = _abrupt(run, signals)
    if row is None:
        return None
    rise = float(signals.norm[row] - level_before(signals.norm, row)[0])
    back = _back(signals.norm, row, rise)
    loss_rise = float(signals.loss[row] - level_before(signals.loss, row)[0])
    loss_back = _back(signals.loss, row, loss_rise)
    # A confident network may be right on a batch whose gradient is a hundredfold one.
    by_norm = back and (rise > math.log(20.0) or not run.has("loss"))
    if not by_norm and not (loss_back and signals.loss_z[row] >= 3.0):
        return None
    tensor = _largest_rise(signals, row)
    loss = f", the loss {math.exp(loss_rise):.3g} times its own" if run.has("loss") else ""
    after = "both were usual again" if back and loss_back else "and then fell"
    return Finding(
        "bad_batch",
        row,
        f"In one step the norm was {math.exp(rise):.3g} times the usual one{loss}, nothing announced it, {after} "
        f"within {BACK_WITHIN} steps: a batch that does not belong.",
        "Look at the batch. A limit above usual norms keeps it from doing harm, kk.clip.SkipSpikes() takes no "
        "step at all; the same batch may be harmless elsewhere, so do not drop data for it alone.",
        tensors=tensor,
        numbers={
            "norm_ratio": math.exp(rise),
            "norm_score": float(signals.norm_z[row]),
            "loss_score": float(signals.loss_z[row]),
        },
        clip_helps=True,
    )


def data_shift(run: Recorded, signals: Signals) -> Finding | None:
    """The level of the loss changed from one row to the next and stayed, while weights and rate were usual."""
    if not run.has("loss"):
        return None
    row = _abrupt(run, signals)
    if row is None:
        row = _alarm(signals)
    if row is None or row + LASTING >= len(run):
        return None
    before, spread = (float(value) for value in level_before(signals.loss, row, 64))
    later = signals.loss[row : row + LASTING]
    rise = float(np.median(later)) - before
    if rise < max(3.0 * spread, math.log(1.3)) or float(np.mean(later > before + rise / 3)) < 0.8:
        return None
    return Finding(
        "data_shift",
        row,
        f"The loss rose {math.exp(rise):.3g}-fold from one step to the next and stayed there, and nothing announced "
        "it: the data are others from here on.",
        "Compare the batches before and after this step (order, labels, preprocessing). No limit is the fix.",
        numbers={
            "loss_ratio": math.exp(rise),
            "loss_score": rise / spread,
            "norm_score": float(signals.norm_z[row]),
        },
    )


def _abrupt(run: Recorded, signals: Signals) -> int | None:
    """Return the first disturbed row, if the ten before it are usual in norm and loss."""
    row = signals.disturbed
    if row is None or row < LEAST or run.bad[row]:
        return None
    before = slice(max(row - QUIET_BEFORE, 0), row)
    limits = [0.75 * threshold for threshold in signals.thresholds]
    quiet = signals.norm_z[before].max() < limits[0] and signals.loss_z[before].max() < limits[1]
    return row if quiet else None


def _back(logs: np.ndarray, row: int, rise: float) -> bool:
    """Return whether more than two thirds of a rise are gone, in the median, within the next rows."""
    later = logs[row + 1 : row + 1 + BACK_WITHIN]
    return bool(later.size) and float(logs[row] - np.median(later)) > rise * 2 / 3


def _alarm(signals: Signals) -> int | None:
    """Return the row at which a chart of the loss begins the rise that ends in an alarm."""
    z = signals.loss_z
    quiet = z[LEAST : max(len(z) // 3, LEAST)]
    level = alarm_level(quiet[-8192:], 10.0)
    chart = cusum(z)
    above = np.flatnonzero(chart > level)
    if not above.size:
        return None
    zeros = np.flatnonzero(chart[: above[0]] == 0.0)
    return int(zeros[-1]) + 1 if zeros.size else None


def _largest_rise(signals: Signals, row: int) -> tuple[str, ...]:
    logs = signals.logs("gradients", slice(row + 1))
    if not logs.shape[1]:
        return ()
    rise = logs[row] - level_before(logs[:row], row)[0]
    known = np.flatnonzero(np.isfinite(rise))
    return tuple(signals.run.names[place] for place in known[np.argsort(-rise[known])][:3])
