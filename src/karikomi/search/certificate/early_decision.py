"""Evaluation in the order of the dense margins, that stops when the rest cannot change the decision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from karikomi.errors import check
from karikomi.search.certificate.flips import Flips


@dataclass(frozen=True, slots=True)
class Examined:
    """The counts of the examples that were evaluated, out of `total`; exact for all of them unless it stopped.

    `passed`: the decision, which is that of all examples whether it stopped or not.
    """

    flips: Flips
    total: int
    passed: bool

    @property
    def stopped(self) -> bool:
        """Whether the rest was not evaluated, because it could not change the decision."""
        return self.flips.examples < self.total

    @property
    def least_drop(self) -> float:
        """The observed drop of all examples, or where it stopped the drop of those that were seen, over all."""
        return (self.flips.lost - self.flips.gained) / self.total


def examined(
    right_before: np.ndarray,
    margins: np.ndarray,
    right_after: Callable[[np.ndarray], np.ndarray],
    passes: Callable[[Flips], bool],
    *,
    chunk: int = 256,
) -> Examined:
    """Evaluate a candidate on the examples with the smallest dense margins first, and stop when it is decided.

    `right_before`: (n,) which examples the dense network has right. `margins`: (n,) how far its decision
    is from changing; flips come from small margins. `right_after`: ``places -> which of them the candidate has
    right``. `passes`: the decision on counts; it must not turn to True by more lost examples, nor to False by
    more gained ones. After each `chunk` the decision is tried on the best and the worst counts that are left.

    >>> right = np.ones(1000, dtype=bool)
    >>> bad = examined(right, np.arange(1000.0), lambda places: places > 100, lambda f: f.drop <= 0.05)
    >>> bad.passed, bad.stopped, bad.flips.examples
    (False, True, 256)
    """
    n = len(right_before)
    same = margins.shape == right_before.shape == (n,)
    check(
        "examined",
        (same and n > 0, "one margin for each example", margins.shape, right_before.shape),
        (chunk >= 1, "chunk is a number of examples", chunk, ">= 1"),
    )
    order = np.argsort(margins, kind="stable")
    lost = gained = done = 0
    left_right = int(np.sum(right_before))
    while True:
        places = order[done : done + chunk]
        before, after = right_before[places], np.asarray(right_after(places), dtype=bool)
        lost += int(np.sum(before & ~after))
        gained += int(np.sum(~before & after))
        done += len(places)
        left_right -= int(np.sum(before))
        left_wrong = n - done - left_right
        worst = passes(Flips(lost + left_right, gained, n))
        if worst or not passes(Flips(lost, gained + left_wrong, n)) or done == n:
            return Examined(Flips(lost, gained, done), n, worst)
