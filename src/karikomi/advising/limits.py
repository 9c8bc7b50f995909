"""The regime of a run, and the limit for it: the arithmetic of `kk.clip.Recommended` over the histogram of a record."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from karikomi.advising.causes.always_clipped import ALWAYS, engaged_share
from karikomi.advising.recorded import Recorded
from karikomi.advising.signals import Signals
from karikomi.clip import Recommended, histogram
from karikomi.clip.recommended import typical
from karikomi.rule import State

ENOUGH = 200
WIDE = 10.0
"""An excursion of more than so many usual norms is what a limit has to hold."""

REGIMES = {
    "rescue": "norms explode or are not finite: a limit decides whether the training survives",
    "plateau": "no norm is far from the usual: limits from 0.5 to 10 times it differ little",
    "normaliser": "the limit is always met: it sets the length of the step, as a learning rate does",
}


@dataclass(frozen=True, slots=True)
class Limit:
    """A recommended limit on the global norm, and what it follows from.

    `value`: in units of the norm, whose p is `order`. `median`, `mean`: of the norms that it was estimated from,
    `count` of them, steps `first` to `last`. `spread`: robust standard deviation of their logarithms. `tail`: how far
    the 95th percentile is from the median, over what the spread lets expect. `drift`: the median norm of
    the last third over that of the first. `reason`: one line. `confidence`: ``good``, ``fair`` or
    ``poor``, with `doubts`.
    """

    value: float
    median: float
    mean: float
    spread: float
    tail: float
    count: int
    first: int
    last: int
    drift: float
    reason: str
    confidence: str
    doubts: tuple[str, ...]
    order: float = 2.0

    @property
    def rule(self) -> str:
        """The rule with this limit, as it is written in Python."""
        return by_global_norm(self.value, self.order)

    @property
    def multiple(self) -> float:
        """The limit in units of the median norm."""
        return self.value / self.median if self.median else math.nan


def gathered(norms: np.ndarray) -> State:
    """Return the histogram of `karikomi.clip.histogram` with these norms counted at once, shape (n,), all > 0.

    >>> norms = np.array([1.0, 2.0, 4.0])
    >>> state = histogram.begin(np.zeros(1), xp=np)
    >>> for norm in norms:
    ...     state = histogram.count(state, norm, np.array(True), xp=np)
    >>> all(np.array_equal(gathered(norms)[key], value) for key, value in state.items())
    True
    """
    state = histogram.begin(np.zeros(1), xp=np)
    counts = state["counts"]
    middle = len(counts) // 2
    places = np.floor(histogram.PER_OCTAVE * np.log2(norms / norms[0]) + 0.5).astype(np.int64)
    places = np.clip(places, -middle, middle) + middle
    ends = {"first": norms[0], "smallest": norms.min(), "largest": norms.max()}
    counted = np.bincount(places, minlength=len(counts)).astype(counts.dtype)
    return {"counts": counted, **{key: np.asarray(value) for key, value in ends.items()}}


def regime(run: Recorded, signals: Signals) -> str:
    """Return which of `REGIMES` the run is in."""
    if engaged_share(run) >= ALWAYS:
        return "normaliser"
    with np.errstate(invalid="ignore"):
        far = signals.norm - signals.norm_level > math.log(WIDE)
    lost = run.bad.any() or run.bad_loss.any()
    return "rescue" if lost or bool((far & signals.norm_wild).any()) else "plateau"


def recommended(run: Recorded, signals: Signals, rule: Recommended) -> Limit | None:
    """Return the limit, from the last half of the quiet steps; ``None`` for fewer than 8 norms.

    Quiet: before the first excursion if it comes late enough to know what is usual, else all of them, since medians are
    not moved by excursions. The last half, since norms usually fall.
    """
    norms = run.columns["norm"]
    usable = np.flatnonzero(np.isfinite(norms) & (norms > 0) & ~run.skipped)
    quiet = usable
    if signals.disturbed is not None:
        before = usable[usable < signals.disturbed]
        quiet = before if len(before) >= ENOUGH else usable
    if len(quiet) < 8:
        return None
    rows = quiet[len(quiet) // 2 :]
    found = typical(gathered(norms[rows]), xp=np)
    value = float(rule.limit_of(*map(np.asarray, found), xp=np))
    median, spread, tail = map(float, found)
    thirds = np.array_split(norms[quiet], 3)
    drift = float(np.median(thirds[-1]) / np.median(thirds[0]))
    doubts = _doubts(run, len(rows), drift)
    return Limit(
        value=_rounded(value),
        median=median,
        mean=float(norms[rows].mean()),
        spread=spread,
        tail=tail,
        count=len(rows),
        first=int(run.steps[rows[0]]),
        last=int(run.steps[rows[-1]]),
        drift=drift,
        reason=rule.reason(value, median, spread, tail),
        confidence=("good", "fair", "poor")[min(len(doubts), 2)],
        doubts=doubts,
        order=run.order,
    )


def by_global_norm(limit: float, order: float) -> str:
    """Return the text of a rule.

    >>> by_global_norm(4.3, 2.0), by_global_norm(4.3, 1.0), by_global_norm(0.5, math.inf)
    ('ByGlobalNorm(4.3)', 'ByGlobalNorm(4.3, norm=1)', 'ByGlobalNorm(0.5, norm=math.inf)')
    """
    if order == 2.0:
        return f"ByGlobalNorm({limit:g})"
    return f"ByGlobalNorm({limit:g}, norm={'math.inf' if math.isinf(order) else f'{order:g}'})"


def _doubts(run: Recorded, count: int, drift: float) -> tuple[str, ...]:
    found = []
    if count < ENOUGH:
        found.append(f"only {count} norms after the first half; {ENOUGH} are enough")
    if run.stride > 1:
        found.append(
            f"one norm in {run.stride:g} steps: the usual norm is known, spikes between the rows are not"
        )
    if not 1 / 3 < drift < 3:
        found.append(
            f"the usual norm changed {drift:.2g}-fold from the first third to the last: estimate again when it "
            "has doubled or halved, or use kk.clip.Recommended()"
        )
    if run.after_clip:
        found.append(
            "the norms look like those after a clip: the largest one occurs again and again"
        )
    return tuple(found)


def _rounded(value: float) -> float:
    """Return a number with two significant digits: the estimate is not more precise."""
    return float(f"{value:.2g}")
