"""Trees of arrays: a name for every array on the way in, the same containers on the way out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, cast

import numpy as np

from karikomi import tree
from karikomi.errors import InvalidArgument, Unsupported, check
from karikomi.numpy.norms import check_arrays
from karikomi.rule import Rule, Scope

Arrays = TypeVar("Arrays", bound=Iterable[Any])
"""Dicts, lists, tuples and named tuples of arrays and of one another."""


def named(arrays: Iterable[Any], *, where: str) -> dict[str, Any]:
    """Return name -> array for every leaf of a tree; see `karikomi.tree.flatten`."""
    leaves = tree.flatten(arrays, where=where)
    if not leaves:
        raise InvalidArgument(
            "there is no array to act on", where=where, hint="an exhausted generator?"
        )
    # NumPy turns arrays without axes into scalars at every opportunity.
    return {
        name: np.asarray(leaf) if isinstance(leaf, np.generic) else leaf
        for name, leaf in leaves.items()
    }


def like(example: Arrays, arrays: Mapping[str, np.ndarray | None], *, where: str) -> Arrays:
    """Return the containers of `example` with these arrays, by their names."""
    return cast(Arrays, tree.unflatten(example, arrays, where=where))


def beside(
    arrays: Iterable[Any], found: Mapping[str, np.ndarray | None], *, where: str
) -> dict[str, np.ndarray]:
    """Return the arrays of the same names and shapes as those found; there may be more of them."""
    known = named(tree.collected(arrays), where=where)
    for name, array in found.items():
        got = _shape(known[name]) if name in known else "nothing of this name"
        fits = got == _shape(array) or (array is None and name in known)
        what = "this does not go with the gradients"
        check(f"{where}: {name}", (fits, what, got, _shape(array)))
    check_arrays({n: known[n] for n in found if known[n] is not None}, where=where)
    return known


def _shape(array: object) -> str:
    return "None" if array is None else f"shape {np.shape(array)}"  # type: ignore[arg-type]


def check_entries(rule: Rule, arrays: Mapping[str, np.ndarray], *, where: str) -> None:
    """Raise an error for arrays that are not floating, and for complex entries where a rule acts entry by entry."""
    check_arrays(arrays, where=where)
    for name, array in arrays.items():
        if rule.scope is Scope.ELEMENT and np.iscomplexobj(array):
            raise Unsupported(
                "complex entries have no order to clamp by",
                where=f"{where}: {name}",
                hint="use a rule by norm",
            )
