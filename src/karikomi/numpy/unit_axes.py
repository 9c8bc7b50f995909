"""The unit axis and the fan-in of tensors, given by name or glob."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from karikomi.errors import check
from karikomi.schedule import whole
from karikomi.select import spread

Named = Mapping[str, np.ndarray | None]
Axes = int | tuple[int, ...]


def resolved_axes(
    given: Mapping[str, int | Sequence[int]] | None, found: Named, *, where: str
) -> dict[str, Axes]:
    """Return tensor -> unit axis or ascending axes; raise `InvalidArgument` for axes that the tensors do not have."""
    axes = spread("unit_axes", given, found, where=where)
    return {name: _axes(own, found[name], f"{where}: {name}") for name, own in axes.items()}


def _axes(given: int | Sequence[int], array: np.ndarray | None, where: str) -> Axes:
    several = list(given) if isinstance(given, list | tuple) else [given]
    rank = None if array is None else np.ndim(array)
    for axis in several or [None]:
        number = whole(axis)
        good = number is not None and (rank is None or -rank <= number < rank)
        allowed = "a whole number" if array is None else f"an axis of shape {np.shape(array)}"
        check(where, (good, "the tensor has no such axis", given, allowed))
    if len(several) == 1:
        return several[0]  # type: ignore[return-value]
    return tuple(sorted({axis % (rank or 1) for axis in several}))  # type: ignore[operator]


def resolved_fan_ins(
    given: Mapping[str, int] | None, found: Named, *, where: str
) -> dict[str, int]:
    """Return tensor -> how many inputs feed one output, or raise `InvalidArgument` for other values."""
    inputs = spread("fan_in", given, found, where=where)
    for name, number in inputs.items():
        good = isinstance(number, int | float | np.number) and 0 < number < math.inf
        check(f"{where}: {name}", (good, "a fan-in is a number of inputs", repr(number), "> 0"))
    return inputs
