"""Dicts and lists of arrays: names for their entries on the way in, the same container on the way out.

Separate from clipping and bounding, which both take and return such containers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar, cast

import numpy as np

from niwaki.errors import InvalidArgument, Refused
from niwaki.numpy.measure import check_arrays
from niwaki.rule import Rule, Scope

Arrays = TypeVar("Arrays", Mapping[str, np.ndarray], Sequence[np.ndarray])


def named(arrays: Arrays, *, where: str) -> dict[str, np.ndarray]:
    """Return name -> array; the entries of a list are named by their place, a generator is consumed once."""
    if isinstance(arrays, np.ndarray) or not isinstance(arrays, Iterable):
        raise InvalidArgument(
            "not a dict or list of arrays", where=where, got=type(arrays).__name__
        )
    pairs = arrays.items() if isinstance(arrays, Mapping) else enumerate(arrays)
    # NumPy turns arrays without axes into scalars at every opportunity.
    found = {str(key): np.asarray(a) if isinstance(a, np.generic) else a for key, a in pairs}
    if not found:
        raise InvalidArgument(
            "there is no array to act on", where=where, hint="an exhausted generator?"
        )
    return found


def like(example: Arrays, values: Sequence[np.ndarray | None]) -> Arrays:
    """Return arrays in the kind of container that `example` is."""
    if isinstance(example, Mapping):
        return cast(Arrays, dict(zip(example, values, strict=True)))
    return cast(Arrays, tuple(values) if isinstance(example, tuple) else list(values))


def check_entries(rule: Rule, arrays: Mapping[str, np.ndarray], *, where: str) -> None:
    """Refuse what is no floating array, and complex entries where a rule acts entry by entry."""
    check_arrays(arrays, where=where)
    for name, array in arrays.items():
        if rule.scope is Scope.ELEMENT and np.iscomplexobj(array):
            raise Refused(
                "complex entries have no order to clamp by",
                where=f"{where}: {name}",
                hint="use a rule by norm",
            )
