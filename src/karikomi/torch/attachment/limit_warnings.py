"""One-time warnings: a clip that never runs, a limit that almost no or almost every step exceeds."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence

import torch

from karikomi.rule import Rule
from karikomi.torch.internals import version_of

OFTEN, SELDOM = 0.95, 0.001
"""The shares of clipped steps above and below which a warning is given."""
ENOUGH_FOR_OFTEN, ENOUGH_FOR_SELDOM = 500, 10_000
UNSTEPPED = 3  # backward passes in a row that changed weights without a step of ours


class LimitWarnings:
    """Counts of the steps of one handle, and which warnings were given."""

    def __init__(self, rules: Sequence[Rule], found: Mapping[str, torch.Tensor]) -> None:
        self._has_limit = any(map(_has_a_limit, rules))
        self.accepted = self.engaged = 0
        self._warned = self._missed = False
        self._stepped, self._unstepped, self._version = True, 0, 0
        self._hook = None
        self.watch(found)

    def watch(self, found: Mapping[str, torch.Tensor]) -> None:
        """Look at one of these parameters after each backward pass, and at no other."""
        self.detach()
        sentinel = next((p for p in found.values() if p.requires_grad and p.is_leaf), None)
        if sentinel is not None:
            self._version = version_of(sentinel)
            hook = torch.compiler.disable(self._after_backward)
            self._hook = sentinel.register_post_accumulate_grad_hook(hook)

    def stepped(self) -> None:
        """Record a step that ran through the handle's hooks."""
        self._stepped, self._unstepped = True, 0

    def count(self, *, engaged: bool, skipped: bool) -> None:
        """Count a step that was decided on the host."""
        if not skipped:
            self.judge(accepted=self.accepted + 1, engaged=self.engaged + engaged)

    def judge(self, *, accepted: int, engaged: int) -> None:
        """Warn once if a limit clips almost all or almost none of the accepted steps."""
        self.accepted, self.engaged = accepted, engaged
        if self._warned or not self._has_limit or accepted < ENOUGH_FOR_OFTEN:
            return
        share = engaged / accepted
        if share > OFTEN:
            self._warn(
                f"{share:.1%} of {accepted} steps were clipped: the limit has become the length of "
                "every step, and what you tune is limit times learning rate; a limit that should "
                "catch explosions only lies above the usual norm"
            )
        elif accepted >= ENOUGH_FOR_SELDOM and share < SELDOM:
            self._warn(
                f"{share:.2%} of {accepted} steps were clipped: the limit does next to nothing; "
                "lower it, or pass no clip to measure only"
            )

    def detach(self) -> None:
        """Remove the hook."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _warn(self, text: str) -> None:
        self._warned = True
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
    # The first field is the limit, or its factor; an infinite one only measures.
    fields = dataclasses.fields(rule) if dataclasses.is_dataclass(rule) else ()
    infinite = bool(fields) and getattr(rule, fields[0].name) == math.inf
    return not getattr(rule, "by_design", False) and not infinite
