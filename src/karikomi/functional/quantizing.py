"""Codes of named host arrays, for frameworks whose weights are trees of arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from karikomi.errors import InvalidArgument, Unsupported, suggest
from karikomi.functional.unit_axes import UnitAxes, resolved_axes
from karikomi.quantize import Coded
from karikomi.quantize.method import Method
from karikomi.quantize.output_units import units_along
from karikomi.select import select
from karikomi.selection.array_arguments import wide


def codes_of_arrays(
    arrays: Mapping[str, np.ndarray],
    *,
    bits: int | None,
    entries: int | None,
    method: Any,
    unit_axes: UnitAxes | None,
    only: str | Sequence[str] | None,
    exclude: str | Sequence[str] | None,
    where: str,
) -> dict[str, Coded]:
    """Return name -> codes and grid of the selected floating arrays.

    `unit_axes`: name or glob -> the axis, or the axes, whose indices have scales of their own; other arrays have one
    scale. Raises `InvalidArgument`, `UnknownName`, `Unsupported` without a floating array, `NonFinite`.
    """
    chosen = Method.of(method, {"bits": bits, "entries": entries}, where=where)
    if not arrays:
        raise Unsupported("there is no floating array to quantize", where=where)
    shapes = {name: np.shape(array) for name, array in arrays.items()}
    axes = resolved_axes(unit_axes, shapes, where=where)
    return {
        name: chosen.quantizer.quantize(
            wide(arrays[name]),
            chosen.size,
            units=units_along(axes.get(name, ()), shapes[name]),
            name=name,
        )
        for name in select(arrays, only=only, exclude=exclude, where=where)
    }


def decoded(coded: Coded, name: str, like: Mapping[str, Any] | None, *, where: str) -> np.ndarray:
    """Return the float32 values of codes, or those in the type of the array of this name in `like`."""
    if like is None:
        return coded.decode()
    if name not in like:
        raise InvalidArgument(
            "like has no array of this name", where=f"{where}: {name}", hint=suggest(name, like)
        )
    return coded.decode().astype(like[name].dtype)
