"""The protocol of conditional optimizer steps, and its implementation for torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import keras

Step = Callable[..., None]


class StepBranching:
    """Conditional steps of a backend with one replica that can branch anywhere: torch."""

    replicas = 1
    """How many replicas add up their gradients."""

    def outside(self) -> AbstractContextManager[Any]:
        """Return a context in which values are known, even while a function is being compiled."""
        return nullcontext()

    def either(self, predicate: Any, first: Step, other: Step, arrays: Sequence[Any]) -> None:
        """Call one of two functions with these arrays."""
        keras.ops.cond(predicate, lambda: first(arrays), lambda: other(arrays))

    def assign(self, variables: Sequence[Any], values: Sequence[Any]) -> None:
        """Write variables."""
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)

    def added_up(self, grads: Sequence[Any], concerned: Sequence[bool]) -> list[Any]:
        """Return gradients, those concerned as the sum of those of all replicas."""
        return list(grads)
