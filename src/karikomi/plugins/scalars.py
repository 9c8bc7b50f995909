"""Scalars of a row, as named curves for all trackers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PREFIX = "karikomi/"


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """Return curve name -> value for the row of a step, empty for other rows.

    Booleans are 0 and 1, so that a smoothed ``karikomi/clipped`` is the share of clipped steps. Text,
    tables, lists and non-finite values (``None`` in a row) are left out.

    >>> scalars({"event": "step", "step": 7, "norm": 2.5, "clipped": True, "loss": None, "stage": "train"})
    {'karikomi/norm': 2.5, 'karikomi/clipped': 1.0}
    """
    if row.get("event") != "step":
        return {}
    return {
        f"{PREFIX}{key}": float(value)
        for key, value in row.items()
        if key != "step" and isinstance(value, bool | int | float)
    }
