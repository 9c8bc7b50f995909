"""Detectors on logarithms: robust z-scores and one-sided CUSUM charts, causal, in NumPy.

Norms and losses are close to log-normal, so that thresholds in standard deviations mean on their logarithms what
they mean for a normal distribution; of the values themselves "6 sd" is one false alarm per 1,100 steps at a
spread of 0.5 instead of one per 10^9.
"""

from __future__ import annotations

import numpy as np

WINDOW = 128
LEAST = 24
RECENT = 32
SHORT, SHORT_LEAST = 16, 8
FLOOR = 0.05
"""The smallest spread of a logarithm: 5 % of change is never called an outlier by itself."""

_AT_ONCE = 1 << 22


def filled(values: np.ndarray) -> np.ndarray:
    """Return values, shape (T, ...), with each non-finite one replaced by the last finite one before it.

    At the beginning by the first finite one; all of them are 0 if there is none.

    >>> filled(np.array([np.nan, 1.0, np.inf, 3.0])).tolist()
    [1.0, 1.0, 1.0, 3.0]
    """
    good = np.isfinite(values)
    if good.all():
        return values
    rows = np.arange(len(values)).reshape(-1, *(1,) * (values.ndim - 1))
    last = np.maximum.accumulate(np.where(good, rows, -1), axis=0)
    first = np.argmax(good, axis=0)
    found = np.take_along_axis(values, np.where(last < 0, first, last), axis=0)
    return np.where(np.isfinite(found), found, 0.0)


def trailing(logs: np.ndarray, window: int = WINDOW) -> tuple[np.ndarray, np.ndarray]:
    """Return median and robust standard deviation of the `window` values before each one, shape (T, ...).

    ``1.4826 * MAD``, at least `FLOOR`; the value itself is left out. NaN before the first `LEAST` values.
    With a window of `SHORT` values `SHORT_LEAST` are enough. `logs` is finite, see `filled`.
    """
    count, width = len(logs), int(np.prod(logs.shape[1:], dtype=int))
    median, spread = np.full((2, *logs.shape), np.nan)
    for t in range(LEAST if window > SHORT else SHORT_LEAST, min(window, count)):
        median[t], spread[t] = _centre(logs[:t], axis=0)
    if count > window:
        views = np.lib.stride_tricks.sliding_window_view(logs[:-1], window, axis=0)
        chunk = max(_AT_ONCE // (window * max(width, 1)), 1)
        for start in range(0, count - window, chunk):
            some = slice(window + start, min(window + start + chunk, count))
            median[some], spread[some] = _centre(views[start : start + chunk], axis=-1)
    return median, spread


def level(logs: np.ndarray) -> np.ndarray:
    """Return the median of the `SHORT` values before each one, shape (T, ...): the value to expect now."""
    return trailing(logs, SHORT)[0]


def robust_z(logs: np.ndarray, window: int = WINDOW) -> np.ndarray:
    """Return how many robust standard deviations a value is above the `SHORT` before it; 0 where too few are known.

    The spread is the larger one of such deviations in the `window` and in the `RECENT` values before. A level
    over few values and a spread over many: the fall of a loss is no spread, and a spike stays one; and noise that
    has grown (of losses that have become small) makes no spikes.

    >>> logs = np.sin(np.arange(50.0))
    >>> logs[40] = 9.0
    >>> int(np.argmax(robust_z(logs))), bool(robust_z(logs)[40] > 6)
    (40, True)
    """
    clean = filled(logs)
    apart = clean - level(clean)
    known = apart[SHORT_LEAST:]
    median, spread = trailing(known, window)
    spread = np.fmax(spread, trailing(known, RECENT)[1])
    found = np.zeros(clean.shape)
    with np.errstate(invalid="ignore"):
        found[SHORT_LEAST:] = np.nan_to_num((known - median) / spread)
    return found


def cusum(z: np.ndarray, slack: float = 0.5) -> np.ndarray:
    """Return the one-sided chart ``S_t = max(0, S_(t-1) + z_t - slack)``, shape (T, ...).

    With independent normal values an alarm at ``S > 8`` is false once in 19,000 steps and comes 16 steps after a
    shift of one standard deviation; at 10 once in 140,000. Values are cut at 4, so that one outlier is no
    shift. Source: Page 1954, Continuous Inspection Schemes.

    >>> cusum(np.array([0.0, 1.0, 1.0, -3.0])).tolist()
    [0.0, 0.5, 1.0, 0.0]
    """
    total = np.cumsum(np.minimum(z, 4.0) - slack, axis=0)
    return total - np.minimum(np.minimum.accumulate(total, axis=0), 0.0)


def alarm_level(z: np.ndarray, least: float, block: int = 16, rounds: int = 200) -> float:
    """Return a level for `cusum` that the quiet part `z`, shape (T,), exceeds in less than 1 of 100 resamplings.

    A block bootstrap: norms of neighbouring steps are alike, so the level for independent ones is too low.
    Never below `least`; the seed is fixed.
    """
    if len(z) < 4 * block:
        return least
    generator = np.random.default_rng(0)
    starts = generator.integers(0, len(z) - block, (rounds, len(z) // block))
    drawn = z[starts[..., None] + np.arange(block)].reshape(rounds, -1)
    peaks = np.max(cusum(drawn.T), axis=0)
    return max(least, float(np.quantile(peaks, 0.99)))


def _centre(values: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    median = np.median(values, axis=axis, keepdims=True)
    deviation = np.median(np.abs(values - median), axis=axis)
    return np.squeeze(median, axis=axis), np.maximum(1.4826 * deviation, FLOOR)
