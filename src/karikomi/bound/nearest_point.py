"""What bounds have in common that move weights to the nearest point of a set."""

from __future__ import annotations

from collections.abc import Mapping

from karikomi.rule import Array, Decision, Namespace, Quantity, State, Stateless, leave


class NearestPoint(Stateless):
    """Base class of projections, which each framework computes; a subclass names its set in ``nearest``."""

    __slots__ = ()

    of = Quantity.WEIGHT
    needs = frozenset({"distance"})

    def decide(
        self,
        norms: Array,
        state: State,
        *,
        present: Array,
        facts: Mapping[str, Array],
        xp: Namespace,
    ) -> tuple[Decision, State]:
        """Return a factor of 0 for every distance from the set that there is, else 1."""
        ones = xp.ones_like(norms)
        return Decision(xp.where(norms > 0, 0.0 * ones, ones), None, leave(xp)), state
