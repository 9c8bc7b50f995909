"""The unit axes and fan-ins of named arrays, and the stages of a rule for them, before any is measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from karikomi.errors import InvalidArgument
from karikomi.functional.norms import Axes
from karikomi.rule import Composite, Rule
from karikomi.rules.ranked_units import ranked_axes
from karikomi.rules.stages import Stage, stages
from karikomi.schedule import is_number, whole
from karikomi.select import spread

Shapes = Mapping[str, tuple[int, ...]]
UnitAxes = Mapping[str, int | Sequence[int]]
"""Name or glob -> the axis whose index is one output unit, or the axes that together name one."""


def resolved_axes(given: UnitAxes | None, shapes: Shapes, *, where: str) -> dict[str, Axes]:
    """Return name -> ascending, non-negative axes, or raise `InvalidArgument` for axes that the tensors do not have."""
    values = spread("unit_axes", given, shapes, where=where)
    return {
        name: _axes(axes, shapes[name], where=f"{where}: {name}") for name, axes in values.items()
    }


def axes_for(
    rule: Rule | Composite, given: UnitAxes | None, shapes: Shapes, *, where: str
) -> dict[str, Axes]:
    """Return the unit axes of a rule for tensors of these shapes: those given, or by rank if it goes by that."""
    ranked = ranked_axes(rule, shapes, where=where)
    return resolved_axes(given, shapes, where=where) if ranked is None else ranked


def resolved_fan_ins(
    given: Mapping[str, int] | None, shapes: Shapes, *, where: str
) -> dict[str, float]:
    """Return name -> how many inputs feed one output, or raise `InvalidArgument` for other values."""
    values = spread("fan_in", given, shapes, where=where)
    for name, number in values.items():
        if not is_number(number) or not 0 < number < math.inf:
            raise InvalidArgument(
                "a fan-in is a number of inputs",
                where=f"{where}: {name}",
                got=repr(number),
                allowed="> 0",
            )
    return {name: float(number) for name, number in values.items()}


def plan_for(rule: Rule | Composite, shapes: Shapes, axes: Mapping[str, Axes]) -> tuple[Stage, ...]:
    """Return the stages of a rule for tensors of these shapes."""
    units = {name: math.prod(shapes[name][axis] for axis in own) for name, own in axes.items()}
    return stages(rule, list(shapes), units=units)


def _axes(given: int | Sequence[int], shape: tuple[int, ...], *, where: str) -> Axes:
    several = list(given) if isinstance(given, Sequence) else [given]
    rank = len(shape)
    if not several or any(whole(axis) is None or not -rank <= axis < rank for axis in several):
        raise InvalidArgument(
            "the tensor has no such axis", where=where, got=given, allowed=f"axes of shape {shape}"
        )
    return tuple(sorted({axis % rank for axis in several}))
