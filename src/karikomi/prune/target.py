"""Targets: how much is removed or kept, in the user's unit; a number with two readings is an error."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

from karikomi.errors import InvalidArgument
from karikomi.prune.allocations.allocation import check_sparsity
from karikomi.schedule import is_number, whole_from

UNITS = {
    "sparsity": "the share of the selected weights that is zero afterwards, in [0, 1)",
    "count": "how many of the weights (units, heads, layers, blocks) are zero afterwards, a whole number >= 0",
    "width": "the share of the units (heads, layers, blocks) that stays, in (0, 1]",
    "heads": "the share of whole heads and groups that stays, in (0, 1]",
    "layers": "the share of residual branches that stays, in (0, 1]",
    "parameters": "what stays of all parameters: a share in (0, 1], or a whole number of them",
    "macs": "what stays of all multiply-accumulates: a share in (0, 1], or a whole number of them",
    "bytes": "what stays of all bytes, masks included where the shapes stay: a share or a number",
    "ms": "milliseconds on this machine, above 0",
}
SHARES = ("width", "heads", "layers")
"""Units whose value is a share in every case; a number of milliseconds never is."""


@dataclass(frozen=True, slots=True)
class Target:
    """`value` of a `unit` out of `UNITS`; a whole number (also as a float above 100) is an absolute budget."""

    unit: str
    value: float

    @property
    def absolute(self) -> bool:
        """Whether the value is a count or a time, not a share."""
        return isinstance(self.value, int) or self.unit == "ms"

    def after(self, number: int, rounds: int) -> Target:
        """Return the target of one of several rounds, each of which removes an equal share of what is left.

        >>> [round(Target("sparsity", 0.99).after(k, 2).value, 6) for k in (1, 2)]
        [0.9, 0.99]
        """
        if number == rounds:
            return self
        if self.absolute:
            raise InvalidArgument(
                "a score that goes by rounds takes a share as its target",
                where=self.unit,
                got=self.value,
                allowed=UNITS[self.unit],
            )
        if self.unit == "sparsity":
            return Target(self.unit, 1.0 - (1.0 - self.value) ** (number / rounds))
        return Target(self.unit, self.value ** (number / rounds))


def target_of(*, where: str, **given: float | None) -> Target:
    """Return the one target that is given; raises `InvalidArgument` for none, several, or a doubtful one.

    >>> target_of(where="prune_", sparsity=0.9, width=None)
    Target(unit='sparsity', value=0.9)
    """
    chosen = {unit: value for unit, value in given.items() if value is not None}
    if len(chosen) != 1:
        raise InvalidArgument(
            "one target is to be given",
            where=where,
            got=", ".join(f"{unit}={value!r}" for unit, value in chosen.items()) or "none",
            allowed="; or ".join(f"{unit}= ({UNITS[unit]})" for unit in given),
        )
    unit, value = chosen.popitem()
    if unit == "count":
        return Target(
            unit, whole_from(0, value, "a count is a number of items", where=f"{where}: count")
        )
    if not is_number(value):
        raise InvalidArgument("a target is a number", where=f"{where}: {unit}", got=repr(value))
    value = int(value) if isinstance(value, numbers.Integral) else float(value)
    if unit == "sparsity":
        if 1.0 < value <= 100.0:
            raise _two_readings(unit, value, where)
        check_sparsity(value, where=unit)
        return Target(unit, float(value))
    if unit == "ms" and 0.0 < value < math.inf:
        return Target(unit, float(value))
    if isinstance(value, int) and value >= 1 and unit not in SHARES:
        return Target(unit, value)
    if 100.0 < value < math.inf and value == int(value) and unit not in SHARES:
        return Target(unit, int(value))
    if isinstance(value, float) and 1.0 < value <= 100.0 and unit != "ms":
        raise _two_readings(unit, value, where)
    if not 0.0 < value <= 1.0 or unit == "ms":
        raise InvalidArgument(
            "the target is out of range",
            where=f"{where}: {unit}",
            got=repr(value),
            allowed=UNITS[unit],
        )
    return Target(unit, float(value))


def _two_readings(unit: str, value: float, where: str) -> InvalidArgument:
    other = f"{unit}={int(value)} if a number of them" if unit not in ("sparsity", *SHARES) else ""
    return InvalidArgument(
        "a share above 1",
        where=f"{where}: {unit}",
        got=repr(value),
        allowed=" or ".join(filter(None, [f"{unit}={value / 100:g} if per cent", other]))
        + f"; {UNITS[unit]}",
    )
