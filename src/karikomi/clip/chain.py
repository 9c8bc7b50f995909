"""Several rules one after the other, each on what the one before left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from karikomi.errors import InvalidArgument
from karikomi.registry import register
from karikomi.rule import Composite, Quantity, Rule, shared_quantity


@register(
    "clip",
    formula="g = rule_k(... rule_2(rule_1(g)))",
    source="composition, as optax.chain",
)
@dataclass(frozen=True, init=False, slots=True)
class Chain:
    """Apply rules in order: the next one sees the norms that the one before left.

    ``Chain(ZClip(), ByGlobalNorm(1.0))`` caps an adaptive rule. Gradients are measured once, at the
    finest scope that is asked for; again only where a later rule needs numbers of another kind
    (a norm after a clamp, norms of tensors after norms of units). If one rule skips the step, no
    rule learns from it.

    `rules`: one or more that act on the same thing, `Groups` and chains among them. Raises
    `InvalidArgument` for none at all, for what is no rule, and for rules on gradients beside rules
    on updates.

    >>> import numpy as np, karikomi as kk
    >>> rule = Chain(kk.clip.ByValue(3.0), kk.clip.ByGlobalNorm(1.0))
    >>> grads, outcome, state = kk.numpy.clip({"a": np.array([3.0, 400.0])}, rule)
    >>> [round(float(x), 3) for x in grads["a"]]
    [0.707, 0.707]

    Source: composition as ``optax.chain``. Deviation: one measurement for all rules that can share it.
    """

    rules: tuple[Rule | Composite, ...]

    def __init__(self, *rules: Rule | Composite) -> None:
        if not rules:
            raise InvalidArgument("a chain has at least one rule", where="Chain", got="none")
        shared_quantity(rules, where="Chain")
        object.__setattr__(self, "rules", rules)

    @classmethod
    def from_fields(cls, rules: Sequence[Rule | Composite]) -> Chain:
        """Return the chain of these rules, as a file spells it."""
        if not isinstance(rules, list | tuple):
            raise InvalidArgument("the rules are a list", where="Chain", got=repr(rules))
        return cls(*rules)

    @property
    def of(self) -> Quantity:
        """Which tensors its rules act on."""
        return self.rules[0].of

    def parts(
        self, names: Sequence[str]
    ) -> list[tuple[str, Rule | Composite, Sequence[bool] | None]]:
        """Return every rule for all tensors, in order."""
        return [(str(place), rule, None) for place, rule in enumerate(self.rules)]
