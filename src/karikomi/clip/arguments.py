"""Checks of the arguments of rules besides limits: ratios, shares, counts and choices.

Shared, so that the error messages are the same for every rule.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

from karikomi.errors import InvalidArgument
from karikomi.rule import Scope, check_limit
from karikomi.schedule import whole

SCOPES = {"global": Scope.GLOBAL, "tensor": Scope.TENSOR}
EXTENTS = {"tensor": Scope.TENSOR, "unit": Scope.UNIT}


def check_order(order: Any, *, where: str) -> float:
    """Return the p of a p-norm, from 1 to infinity, which may also be spelled ``"inf"``.

    Below 1 the triangle inequality fails, and what is measured is no norm.
    """
    if isinstance(order, str) and order == "inf":
        return math.inf
    real = isinstance(order, numbers.Real) and not isinstance(order, bool)
    number = float(order) if real else math.nan
    if not number >= 1.0:
        raise InvalidArgument(
            "the norm is out of range", where=where, got=repr(order), allowed=">= 1, or inf"
        )
    return number


def check_ratio(ratio: Any, *, where: str) -> Any:
    """Return a ratio to the usual norm, a number >= 1 or a schedule; ``inf`` measures only.

    Below 1 every clipped step would lower the usual norm, down to zero.
    """
    ratio = check_limit(ratio, where=f"{where} (ratio)")
    ends = [getattr(ratio, end, ratio) for end in ("start", "stop")]
    if any(isinstance(end, numbers.Real) and end < 1 for end in ends):
        raise InvalidArgument(
            "the ratio must be at least 1", where=where, got=ratio, allowed=">= 1, or a schedule"
        )
    return ratio


def check_number(
    value: Any, name: str, *, where: str, low: float, high: float = math.inf, open_low: bool = False
) -> float:
    """Return a finite number from `low` to `high`; `open_low` excludes `low`."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    number = float(value) if real else math.nan
    inside = low < number <= high if open_low else low <= number <= high
    if not inside or not math.isfinite(number):
        allowed = f"{'>' if open_low else '>='} {low:g}"
        allowed += f" and <= {high:g}" if math.isfinite(high) else ""
        raise InvalidArgument(
            f"{name} is out of range", where=where, got=repr(value), allowed=allowed
        )
    return number


def check_decay(value: Any, name: str, *, where: str) -> float:
    """Return the decay of a running mean per step: 0 <= value < 1."""
    number = check_number(value, name, where=where, low=0.0, high=1.0)
    if number == 1.0:
        raise InvalidArgument(
            f"{name} is out of range", where=where, got=value, allowed=">= 0, < 1"
        )
    return number


def check_count(value: Any, name: str, *, where: str, low: int, high: int = 1_000_000) -> int:
    """Return a whole number from `low` to `high`."""
    count = whole(value)
    if count is None or not low <= count <= high:
        raise InvalidArgument(
            f"{name} is out of range",
            where=where,
            got=repr(value),
            allowed=f"whole numbers from {low} to {high}",
        )
    return count


def check_flag(value: Any, name: str, *, where: str) -> None:
    """Raise `InvalidArgument` unless a value is true or false."""
    if not isinstance(value, bool):
        raise InvalidArgument(
            f"{name} is a flag", where=where, got=repr(value), allowed="True, False"
        )


def check_choice(value: Any, name: str, choices: Any, *, where: str) -> str:
    """Return one of the allowed strings."""
    if not isinstance(value, str) or value not in choices:
        raise InvalidArgument(
            f"{name} is unknown", where=where, got=repr(value), allowed=" or ".join(choices)
        )
    return value
