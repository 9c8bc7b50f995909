"""Linear and logarithmic scales from values to pixels, with ticks at round numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from karikomi.report.wording import number

# SVG viewers lose precision, and then the picture, beyond float32.
_LARGEST = 1e30
_SMALLEST = 1e-30


@dataclass(frozen=True, slots=True)
class Scale:
    """A line from `low` at pixel `start` to `high` at pixel `end`.

    >>> Scale(0, 10, 100, 200).place(5)
    150.0
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def place(self, value: float | None) -> float | None:
        """Return the pixel of a value, clamped to the line; None for a value without a position."""
        exact = number(value)
        if exact is None or (self.log and exact <= 0):
            return None
        low, high = _warp(self.low, self.log), _warp(self.high, self.log)
        share = (_warp(exact, self.log) - low) / (high - low)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def ticks(self, most: int = 6) -> list[float]:
        """Return at most about `most` round values between both ends."""
        return (_log_ticks if self.log else _linear_ticks)(self.low, self.high, most)


def fit(
    values: Iterable[float | None],
    start: float,
    end: float,
    *,
    log: bool = False,
    zero: bool = False,
    most: int = 6,
) -> Scale:
    """Return a scale that contains all finite values, widened to round ends.

    With `zero` a linear scale begins at zero, as bars require. Values without a
    position (None, NaN, and on a log scale zero and below) do not count; without any value the scale
    is 0..1 (log: 0.1..10).

    >>> fit([3, 97], 0, 100).ticks()
    [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]
    """
    seen = [exact for value in values if (exact := number(value)) is not None]
    seen = [min(max(value, -_LARGEST), _LARGEST) for value in seen if value > 0 or not log]
    if log:
        low, high = _log_ends([max(value, _SMALLEST) for value in seen] or [0.1, 10.0])
    else:
        low, high = _linear_ends([*seen, 0.0] if zero else seen or [0.0, 1.0], most)
    return Scale(low, high, start, end, log)


def tick_text(value: float) -> str:
    """Return a short name of a tick.

    >>> tick_text(0.30000000000000004), tick_text(20000.0), tick_text(1e6), tick_text(1e-5)
    ('0.3', '20,000', '1e6', '1e-5')
    """
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 1e6:
        text = f"{value:,.6f}".rstrip("0").rstrip(".")
        return text
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def _warp(value: float, log: bool) -> float:
    return math.log10(max(value, 1e-300)) if log else value


def _step(span: float, most: int) -> float:
    rough = span / max(most - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    return next(nice * power for nice in (1, 2, 5, 10) if nice * power >= rough * (1 - 1e-9))


def _linear_ends(seen: list[float], most: int) -> tuple[float, float]:
    low, high = min(seen), max(seen)
    # A span below the float resolution would have equal ticks.
    if high - low <= 1e-9 * max(abs(low), abs(high), _SMALLEST):
        pad = abs(high) * 0.1 or 1.0
        low, high = (low - pad if low else 0.0), high + pad
    step = _step(high - low, most)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step


def _linear_ticks(low: float, high: float, most: int) -> list[float]:
    step = _step(high - low, most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def _log_ends(seen: list[float]) -> tuple[float, float]:
    low, high = math.log10(min(seen)), math.log10(max(seen))
    if high - low >= 2:
        low, high = math.floor(low + 1e-9), math.ceil(high - 1e-9)
        return 10.0**low, 10.0**high
    below = max(value for value in _mantissas(low) if value <= 10**low * (1 + 1e-9))
    above = min(value for value in _mantissas(high) if value >= 10**high * (1 - 1e-9))
    return (below, above) if above > below else (below, below * 10)


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    stride = max(1, math.ceil((last - first + 1) / most))
    ticks = [float(f"1e{exponent}") for exponent in range(first, last + 1, stride)]
    if len(ticks) >= 4 or stride > 1:
        return ticks
    inside = (low * (1 - 1e-9), high * (1 + 1e-9))
    exponents = range(first - 1, last + 1)
    finer = [float(f"{m}e{exponent}") for exponent in exponents for m in (1, 2, 5)]
    return [tick for tick in finer if inside[0] <= tick <= inside[1]]


def _mantissas(exponent: float) -> list[float]:
    whole = math.floor(exponent)
    return [float(f"{m}e{power}") for power in (whole - 1, whole, whole + 1) for m in (1, 2, 5)]
