"""Whether two networks look at the same inputs: integrated gradients, with a floor and a ceiling on the same axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Gradients = Callable[[np.ndarray], np.ndarray]
"""From inputs (n, ...) to the gradient of the explained outputs by them."""

STEPS = 50
TOP = 0.1
TOGETHER = 1 << 17  # entries of inputs that are passed on at once


def integrated(
    gradients: Gradients, inputs: np.ndarray, baseline: np.ndarray, *, steps: int = STEPS
) -> np.ndarray:
    """Return the integrated gradients ``(x - x0) mean_k grad f(x0 + t_k (x - x0))``, of the inputs' shape.

    `steps` nodes and weights of Gauss and Legendre on [0, 1]. Their sum over an example is f(x) - f(x0). Of small
    inputs several nodes are passed on at once: all examples at the first of them, all at the next, and so on.

    >>> x = np.array([[1.0, 2.0]])
    >>> integrated(lambda z: 2 * z, x, np.zeros_like(x), steps=8).round(6).tolist()
    [[1.0, 4.0]]

    Source: Sundararajan, Taly and Yan 2017.
    """
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    total, at_once = np.zeros(inputs.shape), max(TOGETHER // max(inputs.size, 1), 1)
    for first in range(0, steps, at_once):
        some = (nodes[first : first + at_once] + 1.0) / 2.0
        points = np.concatenate([baseline + node * (inputs - baseline) for node in some])
        slopes = gradients(points.astype(inputs.dtype)).reshape(len(some), *inputs.shape)
        for weight, slope in zip(weights[first : first + at_once] / 2.0, slopes, strict=True):
            total += weight * slope
    return total * (inputs - baseline)


def agreement(first: np.ndarray, second: np.ndarray) -> dict[str, np.ndarray]:
    """Return per example how far two attributions agree.

    ``cosine``, ``rank``, the rank correlation of magnitudes, and ``top``, the overlap of the largest tenth.
    An example whose attributions are all zero, or not finite, in either has NaN.

    >>> a = np.array([[3.0, 1.0, 0.0, -2.0]])
    >>> {name: values.tolist() for name, values in agreement(a, a).items()}
    {'cosine': [1.0], 'rank': [1.0], 'top': [1.0]}
    """
    a, b = (part.reshape(len(part), -1).astype(np.float64) for part in (first, second))
    known = np.isfinite(a).all(1) & np.isfinite(b).all(1) & a.any(1) & b.any(1)
    found = {name: np.full(len(a), np.nan) for name in ("cosine", "rank", "top")}
    a, b = a[known], b[known]
    if len(a):
        found["cosine"][known] = _cosines(a, b)
        found["rank"][known] = _cosines(*(_centred_ranks(np.abs(part)) for part in (a, b)))
        found["top"][known] = _overlaps(np.abs(a), np.abs(b))
    return found


def placed(value: float, floor: float, ceiling: float) -> float | None:
    """Return where an agreement lies: 0 at its floor (unrelated networks), 1 at its ceiling (the method's own error).

    None where the ceiling is no higher than the floor.

    >>> placed(0.75, 0.5, 1.0)
    0.5
    """
    return (value - floor) / (ceiling - floor) if ceiling > floor else None


def summary(parts: dict[str, dict[str, np.ndarray]]) -> dict[str, Any]:
    """Return medians of agreements, and where the networks' lie between floor and ceiling.

    `parts`: ``"networks"``, ``"floor"``, ``"ceiling"`` -> the arrays of `agreement`.
    """
    rows: dict[str, Any] = {}
    for measure in ("cosine", "rank", "top"):
        middle = {name: _median(values[measure]) for name, values in parts.items()}
        rows[measure] = {
            **middle,
            "place": None
            if None in middle.values()
            else placed(middle["networks"], middle["floor"], middle["ceiling"]),  # type: ignore[arg-type]
        }
    return rows


def _median(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else None


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    def unit(rows: np.ndarray) -> np.ndarray:
        # By the largest entry first: squares of small attributions underflow.
        rows = rows / np.maximum(np.abs(rows).max(axis=1, keepdims=True), 1e-300)
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-300)

    return np.clip((unit(a) * unit(b)).sum(axis=1), -1.0, 1.0)


def _centred_ranks(rows: np.ndarray) -> np.ndarray:
    ranks = rows.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable").astype(np.float64)
    return ranks - ranks.mean(axis=1, keepdims=True)


def _overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    count = max(round(TOP * a.shape[1]), 1)
    tops = [np.argsort(-part, axis=1, kind="stable")[:, :count] for part in (a, b)]
    shared = [len(np.intersect1d(x, y)) for x, y in zip(*tops, strict=True)]
    return np.array([same / (2 * count - same) for same in shared])
