"""Things that a person would want to be told once: a clip that never runs, a limit that is never or always met.

It watches counts only, so it costs nothing, and it speaks through `warnings`.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence

import torch

from karikomi.rule import Rule
from karikomi.torch.internals import version_of

OFTEN, SELDOM = 0.95, 0.001
"""The shares of accepted steps above and below which a limit is spoken of."""
ENOUGH_FOR_OFTEN, ENOUGH_FOR_SELDOM = 500, 10_000
UNSTEPPED = 3  # backward passes in a row that changed weights without a step of ours


class LimitWarnings:
    """What one handle has seen, and what it has said already."""

    def __init__(self, rules: Sequence[Rule], found: Mapping[str, torch.Tensor]) -> None:
        self._judged = any(map(_has_a_limit, rules))
        self.accepted = self.engaged = 0
        self._said = self._missed = False
        self._stepped, self._unstepped, self._version = True, 0, 0
        self._sentinel = next((p for p in found.values() if p.requires_grad and p.is_leaf), None)
        self._hook = None
        if self._sentinel is not None:
            self._version = version_of(self._sentinel)
            self._hook = self._sentinel.register_post_accumulate_grad_hook(self._after_backward)

    def stepped(self) -> None:
        """Note a step that ran through the handle's hooks."""
        self._stepped, self._unstepped = True, 0

    def count(self, *, engaged: bool, skipped: bool) -> None:
        """Count a step that was decided on the host."""
        if not skipped:
            self.judge(accepted=self.accepted + 1, engaged=self.engaged + engaged)

    def judge(self, *, accepted: int, engaged: int) -> None:
        """Say once what share of the accepted steps a limit clips, if it is almost all or none."""
        self.accepted, self.engaged = accepted, engaged
        if self._said or not self._judged or accepted < ENOUGH_FOR_OFTEN:
            return
        share = engaged / accepted
        if share > OFTEN:
            self._say(
                f"{share:.1%} of {accepted} steps were clipped: the limit has become the length of "
                "every step, and what you tune is limit times learning rate; a limit that should "
                "catch explosions only lies above the usual norm"
            )
        elif accepted >= ENOUGH_FOR_SELDOM and share < SELDOM:
            self._say(
                f"{share:.2%} of {accepted} steps were clipped: the limit does next to nothing; "
                "lower it, or pass no clip to measure only"
            )

    def detach(self) -> None:
        """Stop watching."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _say(self, text: str) -> None:
        self._said = True
        warnings.warn(f"karikomi: {text}", stacklevel=2)

    def _after_backward(self, parameter: torch.Tensor) -> None:
        changed = version_of(parameter) != self._version
        self._version = version_of(parameter)
        if self._stepped or not changed:
            self._stepped = False
            return
        self._unstepped += 1
        if self._unstepped == UNSTEPPED and not self._missed:
            self._missed = True
            warnings.warn(
                "karikomi: the weights change, but not by a step of the optimizer that was given to "
                "attach, so nothing is clipped; attach to the optimizer that really steps",
                stacklevel=2,
            )


def _has_a_limit(rule: Rule) -> bool:
    # What comes first is the limit, or what it is made of; an infinite one is there to measure.
    fields = dataclasses.fields(rule) if dataclasses.is_dataclass(rule) else ()
    infinite = bool(fields) and getattr(rule, fields[0].name) == math.inf
    return not getattr(rule, "by_design", False) and not infinite
