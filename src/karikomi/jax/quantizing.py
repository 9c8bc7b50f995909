"""Quantize pytrees of parameters on the host, between steps, and decode them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from karikomi.functional.quantizing import codes_of_arrays, decoded
from karikomi.functional.unit_axes import UnitAxes
from karikomi.jax.pytrees import is_floating, leaves_of, on_host, replaced
from karikomi.quantize import Coded


def quantize(
    params: Any,
    *,
    bits: int | None = None,
    entries: int | None = None,
    method: Any = None,
    unit_axes: UnitAxes | None = None,
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> Any:
    """Return the pytree with codes and grids (`karikomi.quantize.Coded`) in place of arrays, outside of ``jit``.

    `params`: a pytree of arrays; names are paths joined with dots (``"dense.kernel"``). All arguments, and what is
    raised, are those of `karikomi.numpy.quantize`, from which the same weights get the same codes: for Flax
    ``unit_axes={"*kernel": -1}``. `decode` returns arrays of JAX, and ``kk.save(tree, path)`` stores the codes of a
    tree of dicts, lists and tuples.

    Also raises `Unsupported` under ``jit``, and for arrays of which other processes hold a part.

    >>> params = {"dense": {"kernel": jnp.array([[1.5, 0.2], [-0.5, 0.0]])}}
    >>> decode(quantize(params, bits=3))["dense"]["kernel"].tolist()
    [[1.5, 0.0], [-0.5, 0.0]]

    Source: max-abs calibration as in ONNX Runtime and NNCF; codebooks after Han, Mao and Dally 2016.
    """
    where = "jax.quantize"
    leaves = leaves_of(params, where=where)
    there = {name: leaf for name, leaf in leaves.items() if is_floating(leaf)}
    coded = codes_of_arrays(
        on_host(there, where=where),
        bits=bits,
        entries=entries,
        method=method,
        unit_axes=unit_axes,
        only=only,
        exclude=exclude,
        where=where,
    )
    return replaced(params, leaves | coded)


def decode(params: Any, *, like: Any = None) -> Any:
    """Return the pytree with arrays in place of codes: float32, or of the types and shardings in `like`.

    `params`: what `quantize` returned; leaves without codes stay as they are. `like`: a pytree of arrays of the same
    names. Raises `InvalidArgument` for a `like` without one of its names.

    >>> params = [jnp.array([0.25, -1.0], jnp.bfloat16)]
    >>> [leaf.dtype.name for leaf in decode(quantize(params, bits=8), like=params)]
    ['bfloat16']
    """
    where = "jax.decode"
    leaves = leaves_of(params, where=where)
    types = None if like is None else leaves_of(like, where=where)
    arrays = {
        name: _placed(leaf, name, types) if isinstance(leaf, Coded) else leaf
        for name, leaf in leaves.items()
    }
    return replaced(params, arrays)


def _placed(coded: Coded, name: str, types: dict[str, Any] | None) -> jax.Array:
    values = decoded(coded, name, types, where="jax.decode")
    sharding = getattr((types or {}).get(name), "sharding", None)
    return jnp.asarray(values) if sharding is None else jax.device_put(values, sharding)
