"""Formats of figures, for page and terminal: units, decimals, and a word for missing values."""

from __future__ import annotations

import math
from typing import Any

from karikomi.tasks.metrics import is_share

MISSING = "n/a"


def shorten(text: str, letters: int, dots: str = "…") -> str:
    """Return text of at most so many letters, the middle left out: names differ at their ends.

    >>> shorten("encoder.layers.0.self_attn.in_proj_weight", 20)
    'encoder.l…roj_weight'
    """
    if len(text) <= letters:
        return text
    head, tail = (letters - len(dots)) // 2, (letters - len(dots) + 1) // 2
    return f"{text[:head]}{dots}{text[len(text) - tail :]}"


def scaled(value: Any, factor: float) -> float | None:
    """Return a number times a factor, or None for other values."""
    exact = number(value)
    return None if exact is None else factor * exact


def number(value: Any) -> float | None:
    """Return a finite float, or None for other values (None, NaN, text, a truth value).

    >>> number(3), number(float("nan")), number("3"), number(True)
    (3.0, None, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        exact = float(value)
    except OverflowError:
        return None
    return exact if math.isfinite(exact) else None


def plain(value: Any, digits: int = 4) -> str:
    """Return a number with `digits` significant digits.

    >>> plain(0.123456), plain(1234567), plain(None)
    ('0.1235', '1.235e+06', 'n/a')
    """
    exact = number(value)
    return MISSING if exact is None else f"{exact:.{digits}g}"


def count(value: Any) -> str:
    """Return a whole number with separators.

    >>> count(50826)
    '50,826'
    """
    exact = number(value)
    return MISSING if exact is None else f"{exact:,.0f}"


def size(value: Any) -> str:
    """Return a number of bytes in decimal units with three significant digits.

    >>> size(900), size(5104), size(203_000), size(999_999), size(2.5e9)
    ('900 B', '5.10 kB', '203 kB', '1.00 MB', '2.50 GB')
    """
    exact = number(value)
    if exact is None:
        return MISSING
    units = ["B", "kB", "MB", "GB", "TB"]
    while abs(exact) >= 999.5 and len(units) > 1:
        exact /= 1000
        del units[0]
    decimals = 2 if abs(exact) < 9.995 else 1 if abs(exact) < 99.95 else 0
    return f"{exact:.{0 if units[0] == 'B' else decimals}f} {units[0]}"


def percent(value: Any, decimals: int = 1) -> str:
    """Return a share (0..1) as per cent.

    >>> percent(0.9634), percent(None)
    ('96.3 %', 'n/a')
    """
    exact = number(value)
    return MISSING if exact is None else f"{100 * exact:.{decimals}f} %"


def ratio(value: Any) -> str:
    """Return how many times smaller.

    >>> ratio(39.83)
    '39.8x'
    """
    exact = number(value)
    return MISSING if exact is None else f"{exact:,.1f}x"


def axis_unit(metric: Any) -> tuple[float, str]:
    """Return the factor of a metric's values on an axis, and the end of the axis' label."""
    return (100.0, ", %") if is_share(metric) else (1.0, "")


def score(value: Any, metric: Any) -> str:
    """Return the value of a metric: per cent for an accuracy, four digits for anything else.

    >>> score(0.974, "accuracy"), score(12.3456, "perplexity")
    ('97.40 %', '12.35')
    """
    return percent(value, 2) if is_share(metric) else plain(value)


def change(value: Any, metric: Any) -> str:
    """Return a difference of a metric with its sign; of an accuracy in percentage points.

    >>> change(-0.002, "accuracy"), change(-1e-9, "accuracy"), change(0.5, "loss")
    ('-0.20 points', '0.00 points', '+0.5')
    """
    exact = number(value)
    if exact is None:
        return MISSING
    if is_share(metric):
        # A difference that rounds to zero has no sign.
        return f"{100 * exact:+.2f} points".replace("+0.00 ", "0.00 ").replace("-0.00 ", "0.00 ")
    return f"{exact:+.4g}" if exact else "0"


def amount(value: Any, metric: Any) -> str:
    """Return a budget or a distance of a metric, without a sign.

    >>> amount(0.005, "accuracy")
    '0.50 points'
    """
    return change(value, metric).lstrip("+-")


def spread(stat: Any, wording: Any = plain) -> str:
    """Return a mean and, on a line of its own, its lowest and highest value.

    >>> print(spread({"mean": 0.5, "min": 0.4, "max": 0.6}, percent))
    50.0 %
    (40.0 to 60.0 %)
    """
    if not isinstance(stat, dict):
        return wording(stat)
    low, mean, high = (number(stat.get(key)) for key in ("min", "mean", "max"))
    if low is None or high is None or low == high:
        return wording(mean)
    first, last = wording(low), wording(high)
    unit = last[last.find(" ") :] if " " in last else ""
    return f"{wording(mean)}\n({first.removesuffix(unit)} to {last})"
