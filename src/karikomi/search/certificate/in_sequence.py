"""Fixed-sequence testing: candidates in an order that was chosen beforehand, each at the full level."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from karikomi.errors import check
from karikomi.search.certificate.flips import check_alpha

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class DropBound:
    """One candidate on the certify examples: the observed drop, and its upper bound by a named method."""

    drop: float
    bound: float
    examples: int
    method: str
    beside: dict[str, float]
    """Further bounds that decide nothing, such as the exact one on flips."""


@dataclass(frozen=True, slots=True)
class Certified:
    """The outcome: how many of the sequence were certified, and the tests that were done.

    The tests are those of the certified candidates and, unless all were, of the first that was not.
    """

    count: int
    tests: tuple[DropBound, ...]
    alpha: float
    max_drop: float

    def as_dict(self) -> dict[str, Any]:
        """Return the outcome as plain data."""
        rows = [{name: getattr(t, name) for name in DropBound.__slots__} for t in self.tests]
        return {
            "alpha": self.alpha,
            "max_drop": self.max_drop,
            "certified": self.count,
            "tests": [{**row, "passed": place < self.count} for place, row in enumerate(rows)],
        }


def fixed_sequence(
    candidates: Sequence[T], test: Callable[[T, float], DropBound], *, max_drop: float, alpha: float
) -> Certified:
    """Test candidates in the given order until the first whose bound is above the budget.

    `candidates`: from safe to bold, an order that used no certify example. `test`: ``(candidate, alpha) ->
    DropBound``. Each is tested at the full `alpha`, and nothing behind the first failure is: so the probability
    that any candidate beyond the budget is certified is at most alpha, however many there are.

    >>> def test(drop, alpha): return DropBound(drop, drop + 0.001, 1000, "by hand", {})
    >>> fixed_sequence([0.001, 0.009, 0.002], test, max_drop=0.005, alpha=0.05).count
    1

    Source: fixed-sequence testing as in Angelopoulos et al. 2021, Learn then Test, section 2.
    """
    check_alpha(alpha, where="fixed_sequence")
    good = math.isfinite(max_drop) and max_drop >= 0
    check("fixed_sequence", (good, "max_drop must be >= 0", max_drop, ">= 0"))
    tests: list[DropBound] = []
    for candidate in candidates:
        tests.append(test(candidate, alpha))
        # A bound that is NaN certifies nothing.
        if not tests[-1].bound <= max_drop:
            return Certified(len(tests) - 1, tuple(tests), alpha, max_drop)
    return Certified(len(tests), tuple(tests), alpha, max_drop)
