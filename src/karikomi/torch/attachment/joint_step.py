"""Track the joint step of several optimizers that are clipped together."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from karikomi.torch.internals import version_of


class JointStep:
    """The optimizers of a joint step that have begun, and those that have ended, their step."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._optimizers = list(optimizers)
        self._begun: set[int] = set()
        self._ended: set[int] = set()
        self._gradients: dict[int, list[tuple[int, int]]] = {}

    def joined(self, optimizer: torch.optim.Optimizer) -> bool:
        """Add a step to the joint step under way; false if it is the first of the next one.

        It is added if this optimizer has not stepped in it yet, and its gradients are those that were
        clipped.
        """
        key = id(optimizer)
        if not self._begun or key in self._begun:
            return False
        if self._gradients.get(key) != _gradients(optimizer):
            return False
        self._begun.add(key)
        return True

    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        """Begin the next joint step."""
        self.drop()
        self._begun = {id(optimizer)}

    def clipped(self) -> None:
        """Record the versions of the clipped gradients."""
        if len(self._optimizers) > 1:
            self._gradients = {
                id(optimizer): _gradients(optimizer) for optimizer in self._optimizers
            }

    def end(self, optimizer: torch.optim.Optimizer) -> bool:
        """Record that a step has ended; true if all have ended."""
        self._ended.add(id(optimizer))
        return len(self._ended) == len(self._optimizers)

    @property
    def partly_done(self) -> bool:
        """Whether some optimizers have completed their step, and none is within one."""
        return bool(self._ended) and self._ended == self._begun

    def drop(self) -> None:
        """End the joint step: one step of it has failed, or all are done."""
        self._begun, self._ended = set(), set()


def _gradients(optimizer: torch.optim.Optimizer) -> list[tuple[int, int]]:
    """Return identities and versions of gradients, which differ after any write to them."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    return [(0, 0) if p.grad is None else (id(p.grad), version_of(p.grad)) for p in held]
