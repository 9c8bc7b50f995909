"""Whose step is whose: optimizers that step together, steps that failed, steps within steps.

Separate from the handle because hooks alone do not say any of this: a step that raised never ends, and a
subclass whose ``step`` calls its parent's runs every hook twice.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

_HOOKED = ("wrapper", "torch.optim.optimizer")  # the function that runs the hooks around a step


class JointStep:
    """Which of the optimizers that step together have begun, and which have ended, their step."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._optimizers = list(optimizers)
        self._begun: set[int] = set()
        self._ended: set[int] = set()
        self._gradients: dict[int, list[tuple[int, int]]] = {}

    def joined(self, optimizer: torch.optim.Optimizer) -> bool:
        """Take in a step that belongs to the round under way; false if it is the first of another.

        It belongs if this optimizer has not stepped in it, and its gradients are still those that
        were clipped.
        """
        own = id(optimizer)
        if (
            not self._begun
            or own in self._begun
            or self._gradients.get(own) != _gradients(optimizer)
        ):
            return False
        self._begun.add(own)
        return True

    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        """Begin another round."""
        self.drop()
        self._begun = {id(optimizer)}

    def clipped(self) -> None:
        """Note the gradients as they are now."""
        if len(self._optimizers) > 1:
            self._gradients = {
                id(optimizer): _gradients(optimizer) for optimizer in self._optimizers
            }

    def end(self, optimizer: torch.optim.Optimizer) -> bool:
        """Note that a step has ended; true if all have now."""
        self._ended.add(id(optimizer))
        return len(self._ended) == len(self._optimizers)

    @property
    def partly_done(self) -> bool:
        """Whether some have stepped and ended, and none has begun without an end."""
        return bool(self._ended) and self._ended == self._begun

    def under_way(self, optimizer: torch.optim.Optimizer) -> bool:
        """Return whether a step of this optimizer has begun and not ended."""
        return id(optimizer) in self._begun - self._ended

    def drop(self) -> None:
        """Forget the round: a step in it has failed, or everything is done."""
        self._begun, self._ended = set(), set()


def within_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether this step runs within another step of the same optimizer."""
    count, frame = 0, sys._getframe(1)
    while frame is not None:
        if (frame.f_code.co_name, frame.f_globals.get("__name__")) == _HOOKED:
            args = frame.f_locals.get("args") or (None,)
            count += args[0] is optimizer
        frame = frame.f_back
    return count > 1


def still_scaled(others: Sequence[torch.optim.Optimizer]) -> bool:
    """Return whether an AMP scaler is stepping now that has not unscaled the gradients of these."""
    frame = sys._getframe(1)
    while frame is not None:
        scaler = frame.f_locals.get("self")
        if isinstance(scaler, torch.amp.GradScaler) and scaler.is_enabled():
            states = scaler._per_optimizer_states
            return any(states[id(other_item)]["stage"].name == "READY" for other_item in others)
        frame = frame.f_back
    return False


def _gradients(optimizer: torch.optim.Optimizer) -> list[tuple[int, int]]:
    """Return what changes if somebody computes or writes a gradient of this optimizer."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    return [(0, 0) if p.grad is None else (id(p.grad), p.grad._version) for p in held]
