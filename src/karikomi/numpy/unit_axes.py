"""The unit axis and the fan-in of tensors, given by name or glob."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from karikomi.errors import check
from karikomi.schedule import whole
from karikomi.select import spread

Named = Mapping[str, np.ndarray | None]


def resolved_axes(given: Mapping[str, int] | None, found: Named, *, where: str) -> dict[str, int]:
    """Return tensor -> unit axis, or raise `InvalidArgument` for axes that the tensors do not have."""
    axes = spread("unit_axes", given, found, where=where)
    for name, axis in axes.items():
        array = found[name]
        rank = None if array is None else np.ndim(array)
        good = whole(axis) is not None and (rank is None or -rank <= axis < rank)
        allowed = "a whole number" if array is None else f"an axis of shape {np.shape(array)}"
        check(f"{where}: {name}", (good, "the tensor has no such axis", axis, allowed))
    return axes


def resolved_fan_ins(
    given: Mapping[str, int] | None, found: Named, *, where: str
) -> dict[str, int]:
    """Return tensor -> how many inputs feed one output, or raise `InvalidArgument` for other values."""
    inputs = spread("fan_in", given, found, where=where)
    for name, number in inputs.items():
        good = isinstance(number, int | float | np.number) and 0 < number < math.inf
        check(f"{where}: {name}", (good, "a fan-in is a number of inputs", repr(number), "> 0"))
    return inputs
