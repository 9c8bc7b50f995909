"""Decide the smaller network: which units are dead, which stay and why, and the account of it.

Pure decisions on a few numbers per unit; a framework folder finds the layers and cuts the tensors.
"""

from __future__ import annotations

from karikomi.shrink.account import ShrinkReport
from karikomi.shrink.dead_units import Plan, UnitFacts, plan

Units = UnitFacts
"""Alias of `UnitFacts`."""

__all__ = ["Plan", "ShrinkReport", "UnitFacts", "Units", "plan"]
