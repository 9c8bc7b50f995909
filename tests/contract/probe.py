"""Rules of no registry: one keeps what a rule can keep, in every shape; one notes what a rule is passed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from karikomi.rule import (
    Array,
    Decision,
    Namespace,
    Quantity,
    Scope,
    State,
    check_limit,
    leave,
    shrink_to,
)


@dataclass(frozen=True, slots=True)
class TensorEMA:
    """What a rule that learns of each tensor keeps.

    The first norm of a tensor may be `limit`, later ones `limit` times the mean of its own so far.
    """

    limit: float

    scope: ClassVar[Scope] = Scope.TENSOR
    of: ClassVar[Quantity] = Quantity.GRADIENT
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        check_limit(self.limit, where="TensorEMA")

    def init(self, like: Array, *, xp: Namespace) -> State:
        return {
            "mean": xp.zeros_like(like),
            "seen": xp.zeros_like(like),
            "ring": xp.zeros_like(like) * xp.zeros((2, 1), dtype=like.dtype),
            "largest": xp.sum(xp.zeros_like(like)),
        }

    def decide(
        self,
        norms: Array,
        state: State,
        *,
        present: Array,
        facts: Mapping[str, Array],
        xp: Namespace,
    ) -> tuple[Decision, State]:
        one = xp.ones_like(norms)
        seen = state["seen"] > 0
        learned = xp.where(seen, 0.5 * state["mean"] + 0.5 * norms, norms)
        after = {
            "mean": xp.where(present, learned, state["mean"]),
            "seen": xp.where(present, one, state["seen"]),
            "ring": 0.5 * state["ring"] + xp.where(present, norms, 0.0 * norms),
            "largest": xp.maximum(state["largest"], xp.max(norms)),
        }
        limit = self.limit * xp.where(seen, state["mean"], one)
        return Decision(shrink_to(norms, limit, xp=xp), None, leave(xp)), after


@dataclass(frozen=True)
class Noting:
    """Change nothing and note the facts and norms that are passed to a rule of this scope."""

    scope: Scope
    noted: dict[str, Any] = field(default_factory=dict)

    of: ClassVar[Quantity] = Quantity.GRADIENT
    needs: ClassVar[frozenset[str]] = frozenset({"sizes", "weights"})

    def init(self, like: Array, *, xp: Namespace) -> State:
        return {}

    def decide(
        self,
        norms: Array,
        state: State,
        *,
        present: Array,
        facts: Mapping[str, Array],
        xp: Namespace,
    ) -> tuple[Decision, State]:
        self.noted.update(facts, norms=norms)
        return Decision(xp.ones_like(norms), None, leave(xp)), state
