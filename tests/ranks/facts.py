"""Judge what the ranks found: each fact is as in one process, and some are the same to the bit."""

from __future__ import annotations

import math
from typing import Any

import pytest

TOLERANCE = 1e-6


def check(ranks: list[dict[str, Any]]) -> None:
    """Fail for a rank that raised, a fact that differs, or ranks that are not alike."""
    for rank, found in enumerate(ranks):
        assert "error" not in found, f"rank {rank}: {found.get('error')}"
        assert found["facts"], "a scenario without facts shows nothing"
        for what, here, alone in found["facts"]:
            assert alike(here, alone), f"rank {rank}, {what}: {here} where one process has {alone}"
    for what, value in ranks[0].get("same", {}).items():
        for found in ranks[1:]:
            assert found["same"][what] == value, f"{what} differs between ranks"


def alike(here: Any, alone: Any) -> bool:
    """Return whether two findings are equal, their numbers to 1e-6."""
    if isinstance(here, bool) or isinstance(here, str) or here is None:
        return here == alone
    if isinstance(here, int | float):
        if isinstance(here, float) and math.isnan(here):
            return math.isnan(alone)
        return here == pytest.approx(alone, rel=TOLERANCE, abs=TOLERANCE)
    if isinstance(here, dict):
        return here.keys() == alone.keys() and all(alike(here[key], alone[key]) for key in here)
    return len(here) == len(alone) and all(map(alike, here, alone))
