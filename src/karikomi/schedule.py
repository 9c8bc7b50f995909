"""Schedules: pure functions from a step number to a value, usable wherever a number is.

They use the array namespace of the calling rule, so that a scheduled limit works under `jit` as well.
"""

from __future__ import annotations

import math
import numbers
import operator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from karikomi.errors import InvalidArgument, check
from karikomi.rule import Array, Namespace


@runtime_checkable
class Schedule(Protocol):
    """Anything with ``value(step, xp)``; `step` is a floating 0-d array."""

    def value(self, step: Array, *, xp: Namespace) -> Array:
        """Return the value at `step`, a 0-d array of the step's dtype."""
        ...


def value_at(limit: float | Schedule, step: Array, *, xp: Namespace) -> Array:
    """Return a number or a schedule as a 0-d array of the dtype of `step`, never below 0.

    A limit below zero would reverse gradients; a limit of zero leaves tensors unchanged.
    """
    # Numbers first: `isinstance` with a protocol takes microseconds.
    if not isinstance(limit, int | float) and isinstance(limit, Schedule):
        value = limit.value(step, xp=xp)
        return xp.maximum(value, xp.zeros_like(value))
    return xp.asarray(float(limit), dtype=step.dtype)


class _Curve:
    __slots__ = ()

    def at(self: Schedule, step: int) -> float:
        """Return the value at an ordinary step number."""
        return float(self.value(np.asarray(float(step)), xp=np))


@dataclass(frozen=True, slots=True)
class _Ramp(_Curve):
    start: float
    stop: float
    steps: tuple[int, int]

    def __post_init__(self) -> None:
        ends, where = (self.start, self.stop), type(self).__name__
        finite = all(is_number(end) and math.isfinite(end) for end in ends)
        check(where, (finite, "start and stop must be finite numbers", ends, None))
        plain = tuple(map(whole, self.steps)) if isinstance(self.steps, tuple) else ()
        good = len(plain) == 2 and None not in plain and 0 <= plain[0] < plain[1]  # type: ignore[operator]
        check(where, (good, "steps must be (first, last)", self.steps, "0 <= first < last"))
        # Plain numbers, so that the schedule has a plain form.
        for field, value in zip(
            ("start", "stop", "steps"), (*map(_plain, ends), plain), strict=True
        ):
            object.__setattr__(self, field, value)


@dataclass(frozen=True, slots=True)
class Linear(_Ramp):
    """From `start` to `stop`, linearly over ``steps = (first, last)``, constant outside.

    >>> float(Linear(1.0, 3.0, steps=(0, 10)).at(5))
    2.0
    """

    def value(self, step: Array, *, xp: Namespace) -> Array:
        """Return ``start * (1 - u) + stop * u``, u being the share of the way; exact at both ends."""
        share = _share(step, self.steps, xp=xp)
        return self.start * (1.0 - share) + self.stop * share


@dataclass(frozen=True, slots=True)
class Cubic(_Ramp):
    """From `start` to `stop` by a cubic that is steep first: ``stop + (start - stop) * (1 - u)^3``.

    `steps` is ``(first, last)``, `u` the share of the way between them, clamped to [0, 1].

    >>> round(Cubic(0.0, 0.8, steps=(0, 4)).at(2), 9)
    0.7

    Source: Zhu and Gupta 2017, "To prune, or not to prune", eq. 1 (there the initial and final sparsity).
    """

    def value(self, step: Array, *, xp: Namespace) -> Array:
        """Return the cubic's value at `step`."""
        rest = 1.0 - _share(step, self.steps, xp=xp)
        return self.stop + (self.start - self.stop) * rest * rest * rest


@dataclass(frozen=True, slots=True)
class Stepwise(_Curve):
    """Constant from each given step on: ``points = ((0, inf), (500, 1.0))`` measures for 500 steps, then clips.

    `points`: ``(step, value)`` pairs, the first at step 0, in rising order; a value may be ``inf``, so
    that a limit begins after a warm-up.

    >>> import math
    >>> warm = Stepwise(((0, math.inf), (500, 1.0)))
    >>> warm.at(499), warm.at(500)
    (inf, 1.0)
    """

    points: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        pairs: list[Any] = [
            tuple(pair) if isinstance(pair, tuple | list) else () for pair in self.points
        ]
        steps = [whole(pair[0]) if len(pair) == 2 else None for pair in pairs]
        rising = None not in steps and steps == sorted({*steps}) and steps[:1] == [0]  # type: ignore[type-var]
        good = rising and all(is_number(v) and not math.isnan(v) for _, v in pairs)
        what = "points must be (step, number) pairs from step 0 on, in rising order"
        check("Stepwise", (good, what, self.points, None))
        plain = tuple((step, _plain(value)) for step, (_, value) in zip(steps, pairs, strict=True))
        object.__setattr__(self, "points", plain)

    @property
    def start(self) -> float:
        """The smallest value."""
        return min(value for _, value in self.points)

    @property
    def stop(self) -> float:
        """The largest value."""
        return max(value for _, value in self.points)

    def value(self, step: Array, *, xp: Namespace) -> Array:
        """Return the value of the last point that is not after `step`."""
        ones = xp.ones_like(step)
        value = self.points[0][1] * ones
        for first, later in self.points[1:]:
            value = xp.where(step >= float(first), later * ones, value)
        return value


def _share(step: Array, steps: tuple[int, int], *, xp: Namespace) -> Array:
    first, last = steps
    share = (step - float(first)) / float(last - first)
    return xp.minimum(xp.maximum(share, xp.zeros_like(share)), xp.ones_like(share))


def whole(value: Any) -> int | None:
    """Return a whole number, NumPy's as well, as a Python one; ``None`` for anything else.

    >>> import numpy as np
    >>> whole(np.int64(3)), whole(True), whole(3.0)
    (3, None, None)
    """
    if isinstance(value, bool | np.bool_):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def whole_from(least: int, value: Any, what: str, *, where: str) -> int:
    """Return `value` as a whole number, or raise `InvalidArgument` unless it is one and at least `least`."""
    number = whole(value)
    if number is None or number < least:
        allowed = f"a whole number >= {least}"
        raise InvalidArgument(what, where=where, got=repr(value), allowed=allowed)
    return number


def is_number(value: object) -> bool:
    """Return whether a value is a real number, and not a boolean."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _plain(value: numbers.Real | float) -> int | float:
    return int(value) if isinstance(value, numbers.Integral) else float(value)
