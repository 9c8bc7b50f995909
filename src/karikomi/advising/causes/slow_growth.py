"""Slow growth: weights that multiply attention or output logits grow through the run, far more than others."""

from __future__ import annotations

import math
import re

import numpy as np

from karikomi.advising.causes.finding import Finding
from karikomi.advising.recorded import Recorded
from karikomi.advising.signals import Signals

GROWTH = 2.0
LEAST_ROWS = 100

LOGITS = re.compile(
    r"(^|[._/])(q|k|wq|wk|q_?proj|k_?proj|query|key|in_?proj|qkv|c_attn|to_q|to_k|lm_?head|unembed|decoder)"
    r"([._/]|_weight|$)",
    re.IGNORECASE,
)
"""Names of projections whose product is a logit, as the common libraries give them."""


def slow_growth(run: Recorded, signals: Signals) -> Finding | None:
    """Query, key or output weights more than doubled, steadily, and grew twice as much as the others."""
    if not run.measured("weights") or len(run) < LEAST_ROWS:
        return None
    logs = signals.coarse["weights"]
    names = [place for place, name in enumerate(run.names) if _is_logit(name)]
    usable = np.isfinite(logs).all(axis=0)
    # What begins at zero (biases) grows by any factor.
    usable &= logs[0] > np.nanmax(logs[0]) - math.log(1e4)
    names = [place for place in names if usable[place]]
    others = [place for place in np.flatnonzero(usable) if place not in names]
    if not names or len(logs) < 8:
        return None
    growth = logs[-1] - logs[0]
    usual = float(np.median(growth[others])) if others else 0.0
    steady = np.mean(np.diff(logs[:: max(len(logs) // 16, 1)], axis=0) > 0, axis=0)
    excess = growth - max(usual, 0.0)
    grown = [p for p in names if excess[p] > math.log(GROWTH) and steady[p] > 0.6]
    if not grown:
        return None
    grown.sort(key=lambda place: -growth[place])
    first = grown[0]
    begin = int(np.argmax(logs[:, first] > logs[0, first] + 0.1 * growth[first]))
    return Finding(
        "slow_growth",
        int(begin * len(run) / len(logs)),
        f"The weights of {run.names[first]} grew {math.exp(growth[first]):.3g}-fold, steadily, the others "
        f"{math.exp(usual):.3g}-fold: suspected growth of logits. Record the largest logits to confirm it.",
        "Normalise queries and keys, or cap the logits (kk.bound.QKClip(100)), or use a z-loss for the output layer. "
        "No limit on gradients helps.",
        tensors=tuple(run.names[place] for place in grown[:4]),
        numbers={"growth": math.exp(growth[first]), "growth_of_others": math.exp(usual)},
    )


def _is_logit(name: str) -> bool:
    return LOGITS.search(name) is not None and "bias" not in name.lower()
