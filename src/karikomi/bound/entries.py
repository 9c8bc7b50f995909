"""Numbers or arrays for tensors, for all of them or by name and glob: the ends of a box, the normal of a half-space."""

from __future__ import annotations

import fnmatch
import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from karikomi.errors import InvalidArgument
from karikomi.select import spread

UNGIVEN = "nothing is given for it"
"""Why a bound leaves a tensor alone that none of its names or globs matches."""


class Entries:
    """An array as a constant of a rule: compared and hashed by its numbers, and written as a list."""

    __slots__ = ("_key", "array")

    def __init__(self, array: np.ndarray) -> None:
        self.array = array.copy()
        self.array.flags.writeable = False
        self._key = (array.shape, array.tobytes())

    def tolist(self) -> Any:
        """Return the numbers as nested lists."""
        return self.array.tolist()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Entries) and other._key == self._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return f"array of shape {self.array.shape}"


Given = float | Entries | tuple[tuple[str, "float | Entries"], ...] | None


def as_given(value: Any, *, where: str) -> Given:
    """Return a number, an array, or ``(name or glob, number or array)`` pairs, from these or from a mapping.

    Raises `InvalidArgument` for other objects and for NaN.
    """
    pairs = value.items() if isinstance(value, Mapping) else value
    named = isinstance(value, Mapping | tuple | list) and all(_is_pair(item) for item in pairs)
    if named and len(value):
        return tuple((name, _number_or_array(own, where=where)) for name, own in pairs)
    return None if value is None else _number_or_array(value, where=where)


def by_name(given: Given, names: Iterable[str], *, where: str) -> dict[str, float | np.ndarray]:
    """Return name -> what is given for a tensor, a name before a glob and an earlier glob before a later one."""
    if given is None:
        return {}
    if not isinstance(given, tuple):
        return dict.fromkeys(names, _plain(given))
    names = list(names)
    used = {p: v for p, v in given if any(n == p or fnmatch.fnmatchcase(n, p) for n in names)}
    values = spread(where, used, names, where=where)
    return {name: _plain(value) for name, value in values.items()}


def check_names(given: Given, names: Iterable[str], *, where: str) -> None:
    """Raise `UnknownName` for a name or glob that matches none of these."""
    if isinstance(given, tuple):
        spread(where, dict(given), names, where=where)


def has_names(given: Given) -> bool:
    """Return whether tensors are named."""
    return isinstance(given, tuple)


def is_number(given: Given) -> bool:
    """Return whether one number, or nothing, is given for all entries of all tensors."""
    return given is None or isinstance(given, float)


def check_shape(value: float | np.ndarray, shape: tuple[int, ...], *, where: str) -> None:
    """Raise `InvalidArgument` unless a number or array goes with every entry of a tensor."""
    own = np.shape(value)
    try:
        good = np.broadcast_shapes(own, shape) == tuple(shape)
    except ValueError:
        good = False
    if not good:
        raise InvalidArgument(
            "the array does not go with the tensor", where=where, got=own, allowed=f"as {shape}"
        )


def _plain(value: float | Entries) -> float | np.ndarray:
    return value.array if isinstance(value, Entries) else value


def _is_pair(item: object) -> bool:
    return isinstance(item, tuple | list) and len(item) == 2 and isinstance(item[0], str)


def _number_or_array(value: Any, *, where: str) -> float | Entries:
    if isinstance(value, Entries):
        return value
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        array = np.asarray(float(value))
    else:
        array = _as_array(value, where=where)
    if np.isnan(array).any():
        raise InvalidArgument("a bound is a number", where=where, got="NaN")
    return float(array) if array.ndim == 0 else Entries(array)


def _as_array(value: Any, *, where: str) -> np.ndarray:
    value = value.detach().cpu() if hasattr(value, "detach") else value
    try:
        array = np.asarray(value)
        good = array.dtype.kind in "fiu" or "float" in str(array.dtype)
        array = array.astype(np.float64) if good else array
    except (TypeError, ValueError):
        good, array = False, np.asarray(math.nan)
    if not good:
        raise InvalidArgument(
            "not a number or an array of numbers",
            where=where,
            got=repr(value)[:80],
            allowed="a number, an array, or a mapping from names or globs to these",
        )
    return array
