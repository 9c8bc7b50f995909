"""Track the joint step of several optimizers that are clipped together.

Separate from the handle because the steps may come in any order, and one that raised never ends.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from karikomi.torch.internals import version_of


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

    def drop(self) -> None:
        """Forget the round: a step in it has failed, or everything is done."""
        self._begun, self._ended = set(), set()


def _gradients(optimizer: torch.optim.Optimizer) -> list[tuple[int, int]]:
    """Return what changes if somebody computes or writes a gradient of this optimizer."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    return [(0, 0) if p.grad is None else (id(p.grad), version_of(p.grad)) for p in held]
