"""The last norms of accepted steps, in a ring of fixed length, and their quantiles.

Shared by several rules. A norm of exactly zero is not kept: it comes from an empty batch or a frozen
network and is not a usual norm.
"""

from __future__ import annotations

import math

from karikomi.rule import Array, Namespace, State


def begin(like: Array, length: int, *, xp: Namespace) -> State:
    """Return an empty ring: ``ring``, the ``place`` of the next norm, and how many were ``seen``."""
    nothing = xp.sum(xp.zeros_like(like))
    return {"ring": xp.zeros((length,), dtype=like.dtype), "place": nothing, "seen": nothing}


def teaches(norms: Array, present: Array, *, xp: Namespace) -> Array:
    """Return whether a step's global norm, shape (1,), enters the statistics; a 0-d bool."""
    return xp.any(present & (norms > 0))


def append(state: State, norms: Array, taught: Array, *, xp: Namespace) -> State:
    """Return the ring with the norm of a step in place of the oldest, or as it was."""
    ring, place, seen = state["ring"], state["place"], state["seen"]
    length = ring.shape[0]
    here = (_places(ring, xp=xp) == place) & taught
    after = xp.where(place + 1 < length, place + 1, xp.zeros_like(place))
    return {
        "ring": xp.where(here, norms, ring),
        "place": xp.where(taught, after, place),
        "seen": xp.where(taught & (seen < length), seen + 1, seen),
    }


def known(state: State, *, xp: Namespace) -> Array:
    """Return which places of the ring hold a norm."""
    return _places(state["ring"], xp=xp) < state["seen"]


def quantile(state: State, share: float, *, xp: Namespace) -> Array:
    """Return a quantile of the ring, linear between ranks, as a 0-d array; 0 while it is empty."""
    ring, seen = state["ring"], state["seen"]
    ranked = xp.sort(xp.where(known(state, xp=xp), ring, math.inf * xp.ones_like(ring)))
    last = xp.where(seen > 0, seen - 1, seen)
    low, part = rank(share, last, xp=xp)
    high = xp.where(low < last, low + 1, last)
    places, zeros = _places(ring, xp=xp), xp.zeros_like(ring)
    filled = xp.where(known(state, xp=xp), ranked, zeros)
    below = xp.sum(xp.where(places == low, filled, zeros))
    above = xp.sum(xp.where(places == high, filled, zeros))
    return below + (above - below) * part


def rank(share: float, last: Array, *, xp: Namespace) -> tuple[Array, Array]:
    """Return the rank below ``share * last``, counted from 0, and the part of the way to the next."""
    exact = share * last
    low = xp.floor(exact)
    return low, exact - low


def _places(ring: Array, *, xp: Namespace) -> Array:
    return xp.arange(ring.shape[0], dtype=ring.dtype)
