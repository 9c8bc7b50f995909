"""Which variable of a model a mask means, also where layers were renamed, loaded from a file or built again.

Keras writes no paths into a file: what was ``base/d/kernel`` beside ``d/kernel`` is loaded as ``d/kernel`` twice.
Names alone would then put masks on other weights than they were made for, so a mask also knows where it stood.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from karikomi.errors import InvalidArgument
from karikomi.keras.arrays.variables import names_of

Shape = tuple[int, ...]

# What `names_of` puts behind a path that several variables bear.
_NUMBERED = re.compile(r"(.+)#(\d+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class VariablePlace:
    """Where a variable stood: as number `at`, from 0, of the `among` with its leaf and shape.

    `bearing`: how many variables of the model bore its path.
    """

    at: int
    among: int
    bearing: int


def names(variables: Sequence[Any]) -> list[str]:
    """Return the path of each variable, with ``#2`` behind one that was there before."""
    return names_of(list(variables), [str(place) for place in range(len(variables))])


def places_of(variables: Mapping[str, Any]) -> dict[str, VariablePlace]:
    """Return name -> place for the variables of a model, in its order, by the names of `names`.

    >>> import keras
    >>> one, other = (keras.Variable([0.0], name="kernel") for _ in range(2))
    >>> places_of({"a/kernel": one, "kernel": other})["kernel"]
    VariablePlace(at=1, among=2, bearing=1)
    """
    alike: dict[tuple[str, Shape], list[str]] = {}
    for name, variable in variables.items():
        alike.setdefault(_kind(name, variable.shape), []).append(name)
    bearing = Counter(_split(name)[0] for name in variables)
    return {
        name: VariablePlace(number, len(others), bearing[_split(name)[0]])
        for others in alike.values()
        for number, name in enumerate(others)
    }


def matched(
    shapes: Mapping[str, Shape], places: Mapping[str, VariablePlace], variables: Sequence[Any]
) -> dict[str, Any]:
    """Return name of a mask -> the variable that it means, or ``None`` for one that is not there.

    In this order: the variable with its path, if as many bear it as before; if as many as before have its
    leaf and shape, the one that differs in the first part of its path alone, or else the one in its place.
    A mask without a place is found by its path, or what follows the first part. Raises `InvalidArgument`
    where several are meant equally, and for two masks of one variable.
    """
    search = _Search(shapes, variables)
    found = {name: search.find(name, places.get(name)) for name in shapes}
    owner: dict[int, str] = {}
    for name, variable in found.items():
        if variable is None:
            continue
        if id(variable) in owner:
            raise InvalidArgument(
                "two masks speak of one variable",
                where="Masks",
                got=f"{owner[id(variable)]!r} and {name!r}",
                allowed=f"one for {variable.path}",
            )
        owner[id(variable)] = name
    return found


class _Search:
    """Variables by path, by what follows its first part, and by leaf and shape."""

    def __init__(self, shapes: Mapping[str, Shape], variables: Sequence[Any]) -> None:
        self._shapes = shapes
        self._masks = Counter(_split(name)[0] for name in shapes)
        self._by_path: dict[str, list[Any]] = {}
        self._by_kind: dict[tuple[str, Shape], list[Any]] = {}
        for name, variable in zip(names(variables), variables, strict=True):
            self._by_path.setdefault(_split(name)[0], []).append(variable)
            self._by_kind.setdefault(_kind(name, variable.shape), []).append(variable)

    def find(self, name: str, place: VariablePlace | None) -> Any:
        path, number = _split(name)
        same, alike = self._by_path.get(path, []), self._alike(path)
        before = self._masks[path] if place is None else place.bearing
        if len(same) == before and number <= before:
            return same[number - 1]
        peers = self._by_kind.get(_kind(name, self._shapes[name]), [])
        if place is None or len(peers) != place.among:
            if same or len(alike) > 1 or (alike and place is not None):
                _refuse(name, len(same or alike))
            return alike[0] if alike else None
        if not same and len(alike) == 1 and any(alike[0] is peer for peer in peers):
            return alike[0]
        return peers[place.at]

    def _alike(self, path: str) -> list[Any]:
        rest = path.partition("/")[2]
        return [
            variable
            for other, variables in self._by_path.items()
            if other == rest or other.partition("/")[2] in (path, rest or None)
            for variable in variables
        ]


def _split(name: str) -> tuple[str, int]:
    found = _NUMBERED.fullmatch(name)
    return (found[1], int(found[2])) if found else (name, 1)


def _kind(name: str, shape: Sequence[int]) -> tuple[str, Shape]:
    return _split(name)[0].rpartition("/")[2], tuple(map(int, shape))


def _refuse(name: str, count: int) -> NoReturn:
    raise InvalidArgument(
        "it is not clear which variable this mask means: layers were renamed, added or taken away",
        where=f"Masks: {name}",
        got=f"{count} variables that it could be",
        hint="give each layer a name of its own, or make masks from this model",
    )
