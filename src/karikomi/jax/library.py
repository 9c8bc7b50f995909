"""The JAX library of arrays: `jax.numpy`, in float64 where that is switched on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from karikomi.functional.library import Library
from karikomi.rule import Array


class JaxLibrary(Library):
    """Arrays of JAX, traced or not."""

    def scaled(self, arrays: Sequence[Array], factors: Array) -> list[Array]:
        """Return arrays times a number of a vector each."""
        # XLA would compute the factor again for every entry.
        return super().scaled(arrays, jax.lax.optimization_barrier(factors))


def library() -> Library:
    """Return the library for the current precision: `wide` is float64 only under ``jax_enable_x64``."""
    wide = jnp.promote_types(jax.dtypes.canonicalize_dtype(float), jnp.float32)
    return JaxLibrary(jnp, wide=wide, cond=_cond, itemsize=_itemsize)


def _cond(predicate: Array, first: Callable[[], list], other: Callable[[], list]) -> list:
    # Outside of compiled code every call of `cond` would be compiled again.
    if isinstance(predicate, Tracer):
        return jax.lax.cond(predicate, first, other)
    return first() if bool(predicate) else other()


def _itemsize(dtype: Any) -> int:
    return jnp.dtype(dtype).itemsize
