"""The leaves of a pytree under their names: the path to a leaf, joined with dots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from karikomi.errors import InvalidArgument, Unsupported


def named(tree: Any, *, where: str) -> dict[str, jax.Array | None]:
    """Return name -> array, ``None`` for a missing leaf; a Python float is an array without axes.

    Raises `InvalidArgument` for leaves that are not floating or complex, and for two leaves of one name.
    """
    found: dict[str, jax.Array | None] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=_absent)[0]:
        name = _name(path)
        if name in found:
            raise InvalidArgument("two leaves have one name", where=where, got=repr(name))
        dtype = getattr(leaf, "dtype", None)
        if leaf is not None and not is_floating(leaf):
            raise InvalidArgument(
                "not a floating array",
                where=f"{where}: {name}",
                got=type(leaf).__name__ if dtype is None else dtype,
                allowed="float, complex",
                hint="optax.masked leaves parameters of other kinds out",
            )
        found[name] = None if leaf is None else jnp.asarray(leaf)
    return found


def leaves_of(tree: Any, *, where: str) -> dict[str, Any]:
    """Return name -> leaf of any kind, counters and keys included."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=_absent)
    names = named(structure.unflatten([None] * len(leaves)), where=where)
    return dict(zip(names, leaves, strict=True))


def is_floating(leaf: Any) -> bool:
    """Return whether a leaf is an array of floating or complex numbers, or such a Python number."""
    # As optax takes them; NumPy's numbers have a dtype.
    return isinstance(leaf, float | complex) or _is_inexact(getattr(leaf, "dtype", None))


def on_host(params: Any, *, where: str) -> dict[str, Any]:
    """Return name -> host array; leaves that are not floating as they are, ``None`` left out.

    Raises `Unsupported` under ``jit``, and for arrays of which other processes hold a part.
    """
    found = {
        name: leaf for name, leaf in leaves_of(params, where=where).items() if leaf is not None
    }
    floating: Any = named({n: leaf for n, leaf in found.items() if is_floating(leaf)}, where=where)
    for name, leaf in floating.items():
        if isinstance(leaf, Tracer):
            raise Unsupported(
                "this depends on the values of weights, which are not available under jit",
                where=f"{where}: {name}",
                hint="call it between steps",
            )
        if not leaf.is_fully_addressable:
            raise Unsupported(
                "other processes hold a part of this array",
                where=f"{where}: {name}",
                hint="jax.experimental.multihost_utils.process_allgather gathers it",
            )
        found[name] = np.asarray(leaf)
    return found


def replaced(tree: Any, arrays: Mapping[str, Any]) -> Any:
    """Return the tree with other leaves, by the names that `named` gives them."""

    def replacement(path: Any, leaf: Any) -> Any:
        return leaf if leaf is None else arrays[_name(path)]

    return jax.tree_util.tree_map_with_path(replacement, tree, is_leaf=_absent)


def shapes(
    found: Mapping[str, jax.Array | None], beside: Mapping[str, jax.Array | None] | None = None
) -> dict[str, tuple[int, ...]]:
    """Return name -> shape; for a missing leaf that of the array of the same name in `beside`, else an empty one."""
    known = {n: (beside or {}).get(n) if array is None else array for n, array in found.items()}
    return {name: getattr(array, "shape", ()) for name, array in known.items()}


def _name(path: Any) -> str:
    # A tree that is an array has no path to it.
    return jax.tree_util.keystr(path, simple=True, separator=".") or "array"


def _is_inexact(dtype: Any) -> bool:
    try:
        return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)
    except TypeError:  # a type of another framework
        return False


def _absent(leaf: Any) -> bool:
    return leaf is None
