"""Match masks to variables of a model, also where layers were renamed, loaded from a file or built again.

Keras writes no paths into a file: ``base/d/kernel`` and ``d/kernel`` are loaded as ``d/kernel`` twice. Names
alone would then match masks to other weights than they were made for, so a mask has a place as well.
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

# The path and the number that `names_of` appends where several variables have one path.
_NUMBERED = re.compile(r"(.+)#(\d+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class VariablePlace:
    """The place of a variable in a model: number `at`, from 0, of the `among` with its leaf and shape.

    `bearing`: the number of variables of the model with its path.
    """

    at: int
    among: int
    bearing: int


def places_of(variables: Mapping[str, Any]) -> dict[str, VariablePlace]:
    """Return name -> place for the variables of a model, in its order, by the names of `names_of`.

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
    """Return name of a mask -> the variable that it is of, or ``None`` for one that is not there.

    In this order: the variable with its path, if as many have it as before; if as many as before have its
    leaf and shape, the one whose path differs in the first part alone, or else the one in its place. A mask
    without a place is matched by its path, or by what follows the first part. Raises `InvalidArgument`
    where several variables match equally, and for two masks of one variable.
    """
    search = _Search(shapes, variables)
    found = {name: search.find(name, places.get(name)) for name in shapes}
    owner: dict[int, str] = {}
    for name, variable in found.items():
        if variable is not None and owner.setdefault(id(variable), name) != name:
            raise InvalidArgument(
                "two masks are of one variable",
                where="Masks",
                got=f"{owner[id(variable)]!r} and {name!r}",
                allowed=f"one for {variable.path}",
            )
    return found


class _Search:
    """Variables by path, by what follows its first part, and by leaf and shape."""

    def __init__(self, shapes: Mapping[str, Shape], variables: Sequence[Any]) -> None:
        self._shapes = shapes
        self._masks = Counter(_split(name)[0] for name in shapes)
        self._by_path: dict[str, list[Any]] = {}
        self._by_kind: dict[tuple[str, Shape], list[Any]] = {}
        for name, variable in zip(names_of(variables), variables, strict=True):
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
                _raise_ambiguous(name, len(same or alike))
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
    match = _NUMBERED.fullmatch(name)
    return (match[1], int(match[2])) if match else (name, 1)


def _kind(name: str, shape: Sequence[int]) -> tuple[str, Shape]:
    return _split(name)[0].rpartition("/")[2], tuple(map(int, shape))


def _raise_ambiguous(name: str, count: int) -> NoReturn:
    raise InvalidArgument(
        "it is not clear which variable this mask is of: layers were renamed, added or taken away",
        where=f"Masks: {name}",
        got=f"{count} variables that match",
        hint="give each layer a unique name, or make masks from this model",
    )
