"""Schedules: pure functions from a step number to a value, usable wherever a number is.

They speak the array namespace of the rule that asks, so a scheduled limit works under `jit` as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, TypeGuard, runtime_checkable

import numpy as np

from niwaki.errors import InvalidArgument
from niwaki.rule import Array, Namespace


@runtime_checkable
class Schedule(Protocol):
    """Anything with ``value(step, xp)``; `step` is a floating 0-d array."""

    def value(self, step: Array, *, xp: Namespace) -> Array:
        """Return the value at `step`, a 0-d array of the step's dtype."""
        ...


def value_at(limit: float | Schedule, step: Array, *, xp: Namespace) -> Array:
    """Return a number or a schedule as a 0-d array of the dtype of `step`."""
    if isinstance(limit, Schedule):
        return limit.value(step, xp=xp)
    return xp.asarray(float(limit), dtype=step.dtype)


@dataclass(frozen=True, slots=True)
class Linear:
    """From `start` to `stop`, linearly over ``steps = (first, last)``, constant outside.

    >>> float(Linear(1.0, 3.0, steps=(0, 10)).at(5))
    2.0
    """

    start: float
    stop: float
    steps: tuple[int, int]

    def __post_init__(self) -> None:
        _check(self.start, self.stop, self.steps, where="Linear")

    def value(self, step: Array, *, xp: Namespace) -> Array:
        """Return ``start * (1 - u) + stop * u``, u being the share of the way; exact at both ends."""
        share = _share(step, self.steps, xp=xp)
        return self.start * (1.0 - share) + self.stop * share

    def at(self, step: int) -> float:
        """Return the value at an ordinary step number."""
        return float(self.value(np.asarray(float(step)), xp=np))


@dataclass(frozen=True, slots=True)
class Cubic:
    """From `start` to `stop` by a cubic that is steep first: ``stop + (start - stop) * (1 - u)^3``.

    `steps` is ``(first, last)``, `u` the share of the way between them, clamped to [0, 1].

    >>> round(Cubic(0.0, 0.8, steps=(0, 4)).at(2), 9)
    0.7

    Source: Zhu and Gupta 2017, "To prune, or not to prune", eq. 1 (there the initial and final sparsity).
    """

    start: float
    stop: float
    steps: tuple[int, int]

    def __post_init__(self) -> None:
        _check(self.start, self.stop, self.steps, where="Cubic")

    def value(self, step: Array, *, xp: Namespace) -> Array:
        """Return the cubic's value at `step`."""
        rest = 1.0 - _share(step, self.steps, xp=xp)
        return self.stop + (self.start - self.stop) * rest * rest * rest

    def at(self, step: int) -> float:
        """Return the value at an ordinary step number."""
        return float(self.value(np.asarray(float(step)), xp=np))


def _share(step: Array, steps: tuple[int, int], *, xp: Namespace) -> Array:
    first, last = steps
    share = (step - float(first)) / float(last - first)
    return xp.minimum(xp.maximum(share, xp.zeros_like(share)), xp.ones_like(share))


def _check(start: object, stop: object, steps: object, *, where: str) -> None:
    if not all(_is_number(end) and math.isfinite(end) for end in (start, stop)):
        raise InvalidArgument(
            "start and stop must be finite numbers", where=where, got=(start, stop)
        )
    if not _is_range(steps):
        raise InvalidArgument(
            "steps must be (first, last)", where=where, got=steps, allowed="0 <= first < last"
        )


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_range(steps: object) -> bool:
    if not isinstance(steps, tuple) or len(steps) != 2:
        return False
    return all(type(step) is int for step in steps) and 0 <= steps[0] < steps[1]
