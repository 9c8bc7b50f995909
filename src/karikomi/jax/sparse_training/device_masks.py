"""Which scores are the lowest, in compiled code: as `karikomi.selection` finds them, and without a sort.

Read as integers, the bits of floats sort like the floats. So thresholds are found by halving the range of these
integers and counting, for all pools at once. Sums of comparisons need no memory, are made where the parts of a sharded
array are, and are the same under ``vmap``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from karikomi.errors import Unsupported
from karikomi.prune.layout import Layout
from karikomi.prune.pattern import NofM
from karikomi.prune.radix_threshold import LARGEST

Arrays = Sequence[jax.Array]

_LOST = np.uint32(0xFFFFFFFF)
"""The key of what takes no part, above that of infinity."""


def lowest(
    numbers: Arrays, among: Arrays, counts: jax.Array, pools: Sequence[Sequence[int]]
) -> list[jax.Array]:
    """Return where the lowest of each pool are: bool arrays in the shapes of `numbers`.

    Compared in float32, ``-0.0`` equal to ``0.0``; ties by the order of the pool, then by index order, as
    everywhere in karikomi. `numbers`: arrays of any shapes and float types, finite where `among` (bool) is true; the
    others take no part. `pools`: the positions of the arrays that are compared with one another, each in one pool.
    `counts`: int32, shape (pools,); not more than there are.

    >>> found = lowest([jnp.array([2.0, 1.0]), jnp.array(1.0)], [jnp.ones(2, bool), jnp.array(True)],
    ...                jnp.array([1]), [[0, 1]])
    >>> [array.tolist() for array in found]
    [[False, True], False]

    Source: radix selection (Knuth 1973, "The Art of Computer Programming" 3, section 5.2.5), one bit at a time.
    """
    keys = [_keys(array, mask) for array, mask in zip(numbers, among, strict=True)]
    if not keys:
        return []
    for pool in pools:
        _check_countable(sum(keys[place].size for place in pool))
    pool_of = np.empty(len(keys), np.int32)
    for number, pool in enumerate(pools):
        pool_of[list(pool)] = number
    counts = jnp.asarray(counts, jnp.int32)
    limits = _limits(keys, counts, pool_of)
    own = [limits[number] for number in pool_of]
    below = _counted([key < limit for key, limit in zip(keys, own, strict=True)])
    equal = [key == limit for key, limit in zip(keys, own, strict=True)]
    left = counts - _summed(below, pool_of, len(pools))
    taken = _first_of_each(_counted(equal), left, pools)
    ends = _ends(equal, taken)
    return [
        (key < limit) | (tie & (_places(key.shape) < end))
        for key, limit, tie, end in zip(keys, own, equal, ends, strict=True)
    ]


def best_of_groups(numbers: jax.Array, kept: jax.Array, layout: Layout, pattern: NofM) -> jax.Array:
    """Return the mask of the best `keep` of every `of` inputs; ties by index, and what is gone is the worst.

    `numbers`: scores of a weight whose inputs `of` divides. `kept`: what is not gone yet.

    >>> scores = jnp.array([[3.0, 1.0, 1.0, 2.0]])
    >>> best_of_groups(scores, jnp.ones((1, 4), bool), Layout(0, 1), NofM(keep=2, of=4)).tolist()
    [[True, False, False, True]]
    """
    axes = (layout.units, layout.inputs)
    scores = jnp.where(kept, numbers.astype(jnp.float32), -jnp.inf)
    canonical = jnp.moveaxis(scores, axes, (0, -1))  # type: ignore[arg-type]
    groups = jnp.reshape(canonical, (-1, pattern.of))
    mine, other = groups[:, :, None], groups[:, None, :]
    earlier = np.tril(np.ones((pattern.of, pattern.of), bool), -1)
    ranks = jnp.sum((other < mine) | ((other == mine) & earlier), axis=2, dtype=jnp.int32)
    stays = jnp.reshape(ranks >= pattern.of - pattern.keep, canonical.shape)
    return kept & jnp.moveaxis(stays, (0, -1), axes)  # type: ignore[arg-type]


def moved(
    weights: Arrays, masks: Arrays, worth: Arrays, counts: jax.Array
) -> tuple[list[jax.Array], jax.Array]:
    """Return ``(masks after so many weights of each tensor have moved, whether all entries are finite)``.

    The smallest ``|w|`` of the kept are dropped; of all that are then masked, those just dropped included, those
    of the largest `worth` are kept. Compared in float32, ties by index order. `counts`: int32, one per tensor,
    not more than are kept.

    >>> kept = jnp.array([True, True, False, False])
    >>> after, _ = moved([jnp.array([3.0, 1.0, 0.0, 0.0])], [kept], [jnp.array([0.0, 0.0, 2.0, 5.0])],
    ...                  jnp.array([1]))
    >>> after[0].tolist()
    [True, False, False, True]
    """
    alone = [[place] for place in range(len(weights))]
    gone = lowest([jnp.abs(weight) for weight in weights], masks, counts, alone)
    kept = [mask & ~drop for mask, drop in zip(masks, gone, strict=True)]
    back = lowest([-number for number in worth], [~mask for mask in kept], counts, alone)
    good = finite([*weights, *worth], [jnp.ones(a.shape, bool) for a in (*weights, *worth)])
    return [mask | grown for mask, grown in zip(kept, back, strict=True)], good


def finite(numbers: Arrays, among: Arrays) -> jax.Array:
    """Return whether all numbers are finite in float32 where `among` is true."""
    flags = [
        jnp.all(jnp.isfinite(array.astype(jnp.float32)) | ~mask)
        for array, mask in zip(numbers, among, strict=True)
    ]
    return jnp.all(jnp.stack(flags)) if flags else jnp.array(True)


def counted(masks: Arrays) -> jax.Array:
    """Return how many entries of each array are true: int32, shape (arrays,)."""
    return _counted(masks)


def _keys(numbers: jax.Array, among: jax.Array) -> jax.Array:
    """Return uint32 numbers in the order of the floats, 0 for minus infinity, the largest for what takes no part."""
    bits = lax.bitcast_convert_type(numbers.astype(jnp.float32), jnp.int32)
    signed = jnp.where(bits < 0, -(bits & np.int32(0x7FFFFFFF)), bits)
    keys = lax.bitcast_convert_type(signed, jnp.uint32) + np.uint32(LARGEST)
    return jnp.where(among, keys, _LOST)


def _limits(keys: Arrays, counts: jax.Array, pool_of: np.ndarray) -> jax.Array:
    """Return the least key of each pool up to which there are at least `counts`."""

    def halved(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = low + (high - low) // 2
        inside = [key <= middle[number] for key, number in zip(keys, pool_of, strict=True)]
        enough = _summed(_counted(inside), pool_of, len(counts)) >= counts
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    low = jnp.zeros(counts.shape, jnp.uint32)
    high = jnp.full(counts.shape, 2 * LARGEST, jnp.uint32)
    return lax.fori_loop(0, (2 * LARGEST).bit_length(), halved, (low, high))[0]


def _first_of_each(equal: jax.Array, left: jax.Array, pools: Sequence[Sequence[int]]) -> jax.Array:
    """Return how many ties each array gives up, where its pool has so many `left`, in the order of the pool."""
    order = np.array([place for pool in pools for place in pool], np.int32)
    starts = np.cumsum([0, *(len(pool) for pool in pools)])[:-1]
    number_of = np.repeat(np.arange(len(pools)), [len(pool) for pool in pools])
    # One pool after the other; sums of all ties of a network could leave 32 bits, differences do not.
    before = jnp.cumsum(equal[order]) - equal[order]
    before = before - before[np.minimum(starts, len(order) - 1)][number_of]
    taken = jnp.clip(left[number_of] - before, 0, equal[order])
    return jnp.zeros_like(equal).at[order].set(taken)


def _ends(flags: Arrays, taken: jax.Array) -> list[jax.Array]:
    """Return, for each array, the index before which `taken` of its flags are true."""
    sizes = np.array([flag.size for flag in flags], np.int32)
    places = [_places(flag.shape) for flag in flags]

    def halved(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = low + (high - low) // 2
        inside = [f & (p < end) for f, p, end in zip(flags, places, list(middle), strict=True)]
        enough = _counted(inside) >= taken
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    def searched() -> jax.Array:
        turns = int(sizes.max(initial=0)).bit_length()
        return lax.fori_loop(0, turns, halved, (jnp.zeros_like(taken), jnp.asarray(sizes)))[0]

    def all_or_none() -> jax.Array:
        return jnp.where(taken > 0, sizes, 0)

    partly = jnp.any((taken > 0) & (taken < _counted(flags)))
    return list(lax.cond(partly, searched, all_or_none))


def _counted(flags: Arrays) -> jax.Array:
    return jnp.stack([jnp.sum(flag, dtype=jnp.int32) for flag in flags])


def _summed(numbers: jax.Array, pool_of: np.ndarray, pools: int) -> jax.Array:
    return jnp.zeros(pools, jnp.int32).at[pool_of].add(numbers)


def _places(shape: tuple[int, ...]) -> jax.Array:
    """Return the index of each entry in index order, without a reshape, which would gather what is sharded."""
    places = jnp.zeros(shape, jnp.int32)
    for axis in range(len(shape)):
        step = math.prod(shape[axis + 1 :])
        places = places + lax.broadcasted_iota(jnp.int32, shape, axis) * np.int32(step)
    return places


def _check_countable(size: int) -> None:
    if size > np.iinfo(np.int32).max:
        raise Unsupported(
            "compiled counts have 32 bits, and so many weights share a threshold",
            where="jax",
            got=f"{size:,}",
            allowed=f"{np.iinfo(np.int32).max:,}",
            hint='allocation="uniform" or "erk", or masks made between steps',
        )
