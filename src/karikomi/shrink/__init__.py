"""Decide the smaller network: which units are dead, which stay and why, and the account of it."""

from __future__ import annotations

from karikomi.shrink.account import ShrinkReport
from karikomi.shrink.dead_units import Plan, UnitFacts, plan

Units = UnitFacts
"""Alias of `UnitFacts`."""

__all__ = ["Plan", "ShrinkReport", "UnitFacts", "Units", "plan"]
