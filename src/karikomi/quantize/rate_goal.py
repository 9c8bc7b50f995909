"""Reach a size in a given number of steps: the strength of a penalty on bits, raised or lowered after each."""

from __future__ import annotations

import math
from dataclasses import dataclass

from karikomi.errors import check


@dataclass(frozen=True, slots=True)
class RateGoal:
    """Reach `bits` at step `last`, on a geometric path from the bits at the first step.

    ``path(t) = first (bits / first)**(t / last)`` up to `last`, and `bits` after that;
    ``strength(t + 1) = strength(t) exp(gain clip(log(used / path(t)), -1, 1))``, within `least` and `most`.

    `bits` > 0: for all tensors of the penalty together. `last` >= 1: steps of the optimizer. `gain` > 0: a few
    hundredths; too large a gain oscillates. `least`, `most`: limits of the strength, in loss per bit. Raises
    `InvalidArgument`.

    >>> goal = RateGoal(1_000.0, last=100)
    >>> goal.path(16_000.0, 50), goal.path(16_000.0, 200)
    (4000.0, 1000.0)
    >>> goal.next(1e-6, used=8_000.0, path=4_000.0) > 1e-6 > goal.next(1e-6, used=2_000.0, path=4_000.0)
    True

    Source: integral control of a rate constraint, as in the rate control of video coders; the constraint's
    multiplier is ascended in its logarithm.
    """

    bits: float
    last: int
    gain: float = 0.02
    least: float = 1e-9
    most: float = 1e-3

    def __post_init__(self) -> None:
        check(
            "RateGoal",
            (0 < self.bits < math.inf, "bits out of range", self.bits, "> 0, finite"),
            (type(self.last) is int and self.last >= 1, "last out of range", self.last, ">= 1"),
            (0 < self.gain <= 1, "gain out of range", self.gain, "0 < gain <= 1"),
            (
                0 < self.least < self.most < math.inf,
                "the limits of the strength are not in order",
                (self.least, self.most),
                "0 < least < most",
            ),
        )

    def path(self, first: float, step: int) -> float:
        """Return the bits to have at a step, from those at the first step; never above these."""
        share = min(step / self.last, 1.0)
        return first * min(self.bits / first, 1.0) ** share

    def next(self, strength: float, *, used: float, path: float) -> float:
        """Return the strength of the next step, after a step that used so many bits."""
        apart = max(-1.0, min(math.log(max(used, 1.0) / path), 1.0))
        return max(self.least, min(strength * math.exp(self.gain * apart), self.most))
