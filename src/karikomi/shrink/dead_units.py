"""Dead units: which ones can be removed without changing the outputs of the network.

A unit is dead if all its outgoing weights are zero, or all its incoming ones: then its output is a
constant, which moves into the bias of the next layer. One round decides on all layers at once; since
a removal may make further units dead, rounds are repeated until none is removed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from karikomi.errors import check


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitFacts:
    """Measurements of the units of one layer; arrays of shape (units,).

    `incoming_zero`: all its incoming weights are zero. `outgoing_zero`: all its outgoing weights
    are. `constants`: the largest magnitude that the unit would give the next layer if its incoming
    weights were zero, NaN where that differs from place to place. `obstacle`: why the next layer's bias
    cannot take a constant, or none. `fixed`: why no unit of this layer may be removed, or none. Raises
    `InvalidArgument` for arrays of different lengths.
    """

    incoming_zero: np.ndarray
    outgoing_zero: np.ndarray
    constants: np.ndarray
    obstacle: str | None = None
    fixed: str | None = None

    def __post_init__(self) -> None:
        shapes = {self.incoming_zero.shape, self.outgoing_zero.shape, self.constants.shape}
        good = len(shapes) == 1 and self.constants.ndim == 1 and self.constants.size
        check("UnitFacts", (good, "the arrays have different numbers of units", shapes, None))


@dataclass(frozen=True, slots=True)
class Plan:
    """The decision of one round, by layer name.

    `kept`: sorted indices of the units that stay. `folded`: indices of removed units whose
    constants have to be added to the next bias. `left_alone`: why dead (or all) units stayed.
    `removed`: how many units are removed.
    """

    kept: dict[str, np.ndarray]
    folded: dict[str, np.ndarray]
    left_alone: dict[str, str]
    removed: int


def plan(layers: Mapping[str, UnitFacts]) -> Plan:
    """Return which units of each layer stay.

    A unit is removed if its outgoing weights are zero, or if its incoming ones are and its constant is
    zero or can be folded. At least one unit stays in each layer. The decisions are independent: a unit
    without incoming weights receives no folded constant, so no constant of a round depends on another.

    `layers`: inner layers by name; without those whose units are outputs of the network.

    >>> import numpy as np
    >>> found = plan({"fc1": UnitFacts(
    ...     incoming_zero=np.array([False, True, True, False]),
    ...     outgoing_zero=np.array([False, False, False, True]),
    ...     constants=np.array([0.3, 0.0, 0.5, 0.1]))})
    >>> found.kept["fc1"].tolist(), found.folded["fc1"].tolist(), found.removed
    ([0], [2], 3)

    Source: constant propagation as in Bragagnolo and Barbano 2022, "Simplify", restricted to where
    it is exact (no constant crosses zero padding).
    """
    kept: dict[str, np.ndarray] = {}
    folded: dict[str, np.ndarray] = {}
    left_alone: dict[str, str] = {}
    removed = 0
    for name, units in layers.items():
        removable, folds, reason = _decide(units)
        kept[name], folded[name] = np.flatnonzero(~removable), np.flatnonzero(folds)
        removed += int(removable.sum())
        if reason:
            left_alone[name] = reason
    return Plan(kept, folded, left_alone, removed)


def _decide(units: UnitFacts) -> tuple[np.ndarray, np.ndarray, str | None]:
    """Return which units are removed, which of these are folded, and why others stay."""
    none = np.zeros_like(units.incoming_zero)
    if units.fixed:
        return none, none, units.fixed
    even = np.isfinite(units.constants)
    silent = units.outgoing_zero | (units.incoming_zero & (units.constants == 0))
    constant = units.incoming_zero & ~silent
    folds = constant & even if units.obstacle is None else none
    removable = silent | folds
    reasons = []
    if units.obstacle and (stuck := constant & even).any():
        reasons.append(f"{_listed(stuck)} constant, but {units.obstacle}")
    if (uneven := constant & ~even).any():
        reasons.append(f"{_listed(uneven)} constant, but not the same everywhere")
    if removable.all():
        first = np.arange(removable.size) == 0
        removable, folds = removable & ~first, folds & ~first
        reasons.append("unit 0 is dead, but a layer keeps one unit")
    return removable, folds, "; ".join(reasons) or None


def _listed(chosen: np.ndarray) -> str:
    indices = np.flatnonzero(chosen).tolist()
    shown = ", ".join(map(str, indices[:8])) + (", ..." if indices[8:] else "")
    return f"unit {shown} is" if len(indices) == 1 else f"units {shown} are"
