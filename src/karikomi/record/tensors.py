"""Norms of single tensors in a row: all of them, or the largest by name and quantiles."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import compress
from typing import Any

import numpy as np

from karikomi.errors import InvalidArgument

LEVELS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
"""The quantiles of a sketch; each is the norm of one of the tensors (the nearest rank)."""


def sketched(norms: Mapping[str, float], most: int) -> dict[str, Any]:
    """Return the `most` largest norms by name, and quantiles of all finite ones.

    ``tensors``: their number. ``top``: name -> norm, largest first, which is also the order of
    the shares ``(norm / joint norm)^2``. ``quantiles``: at `LEVELS`. ``nonfinite``, if any:
    the first `most` names. Numbers have 6 significant digits.

    >>> sketched({"a": 1.0, "b": 4.0, "c": float("nan"), "d": 2.0}, 1)
    {'tensors': 4, 'top': {'b': 4.0}, 'quantiles': [1.0, 1.0, 1.0, 2.0, 4.0, 4.0, 4.0], 'nonfinite': ['c']}
    """
    names, values = list(norms), np.fromiter(norms.values(), np.float64, len(norms))
    finite = np.isfinite(values)
    bad = [] if finite.all() else list(compress(names, ~finite))
    if bad:
        names, values = list(compress(names, finite)), values[finite]
    order = np.argsort(-values, kind="stable")
    ranked, last = values[order], len(values) - 1
    leaders = zip(order[:most].tolist(), ranked[:most].tolist(), strict=True)
    places = [last - round(level * last) for level in LEVELS] if names else []
    return {
        "tensors": len(norms),
        "top": {names[place]: _rounded(norm) for place, norm in leaders if norm > 0.0},
        "quantiles": [_rounded(norm) for norm in ranked[places].tolist()] if names else [],
        **({"nonfinite": bad[:most]} if bad else {}),
    }


def listed(norms: Mapping[str, float]) -> list[float | None]:
    """Return all norms in their order, to 6 significant digits; ``None`` for non-finite ones."""
    return [_rounded(norm) if math.isfinite(norm) else None for norm in norms.values()]


def joint(norms: Mapping[str, float]) -> float | None:
    """Return the joint L2 norm, without overflow; ``None`` if a tensor has non-finite entries.

    >>> joint({"a": 3.0, "b": 4.0})
    5.0
    """
    total = math.hypot(*norms.values())
    return total if math.isfinite(total) else None


def table(norms: object, of: str) -> dict[str, float]:
    """Return a mapping of name -> norm as plain numbers, or raise `InvalidArgument`."""
    if isinstance(norms, Mapping):
        try:
            return {str(name): float(norm) for name, norm in norms.items()}
        except (TypeError, ValueError):
            pass
    raise InvalidArgument(
        "not a table of norms",
        where=f"Recorder.step({of})",
        got=type(norms).__name__,
        allowed="a mapping of tensor name -> norm",
    )


def _rounded(norm: float) -> float:
    return float(f"{norm:.6g}")
