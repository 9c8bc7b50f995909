"""A limit that is always met: normalised descent, which is no mistake but another method."""

from __future__ import annotations

import numpy as np

from karikomi.advising.causes.finding import Finding
from karikomi.advising.recorded import Recorded
from karikomi.advising.signals import Signals

ALWAYS = 0.95


def engaged_share(run: Recorded) -> float:
    """Return the share of rows in which the recorded clip engaged."""
    return float(np.mean(run.clipped)) if len(run) else 0.0


def always_clipped(run: Recorded, signals: Signals) -> Finding | None:
    """The clip engaged in at least 95 % of the steps."""
    share = engaged_share(run)
    if share < ALWAYS:
        return None
    factor = run.columns["factor"]
    usual = float(np.nanmedian(factor)) if run.has("factor") else float("nan")
    return Finding(
        "always_clipped",
        0,
        f"The limit was met in {share:.1%} of the steps: the direction is the gradient's, the length is the limit.",
        "Tune the learning rate, not the limit. Under SGD the two are one number: move them inversely.",
        numbers={"engaged": share, "median_factor": usual},
    )
