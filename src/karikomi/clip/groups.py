"""Rules of their own for groups of tensors, chosen by name or predicate; or none at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from karikomi.errors import InvalidArgument
from karikomi.registry import register
from karikomi.rule import Composite, Quantity, Rule, shared_quantity
from karikomi.select import TiedNames, select

Pattern = str | Callable[[str], bool]
Inner = Rule | Composite | None


@register(
    "clip",
    formula="g_i = rule_k(g_i) for every tensor i whose name the k-th pattern is the first to match",
    source="composition, as optax.partition and torch parameter groups",
)
@dataclass(frozen=True, init=False, slots=True)
class Groups:
    """Give groups of tensors their own rules; each tensor belongs to the first group that matches it.

    ``Groups({"embed.*": ByNorm(0.5), "head.*": None}, default=AGC(0.01))``: ``None`` leaves the
    group alone (exclusion). A rule of global scope speaks of its group as a whole. Tensors that are
    left alone are still measured: a NaN among them skips the step as any other. A tied weight of a torch module belongs
    to the first group that matches any of its names.

    `groups`: a mapping, or pairs, from a glob over names (or a predicate of a name) to a rule or
    ``None``. `default`: the rule of all tensors that no group matches. A glob that matches no tensor
    raises `UnknownName` with the nearest names when the rule meets its tensors. Raises
    `InvalidArgument` where no group has a rule, and for what is no rule. ``outcome.factors`` (of ``handle.last``)
    has the factor of each group by its glob; it is empty in JAX, where outcomes are read from the state.

    >>> import numpy as np, karikomi as kk
    >>> rule = Groups({"*.bias": None}, default=kk.clip.ByGlobalNorm(1.0))
    >>> grads = {"a.weight": np.array([3.0, 4.0]), "a.bias": np.array([7.0])}
    >>> clipped, outcome, state = kk.numpy.clip(grads, rule)
    >>> [round(float(x), 3) for x in clipped["a.weight"]], clipped["a.bias"].tolist()
    ([0.6, 0.8], [7.0])
    >>> {glob: round(factor, 3) for glob, factor in outcome.factors.items()}
    {'*.bias': 1.0, 'default': 0.2}

    Source: composition as ``optax.partition``. Deviation: the first match wins, and a glob must match.
    """

    groups: tuple[tuple[Pattern, Inner], ...]
    default: Inner

    def __init__(
        self,
        groups: Mapping[Pattern, Inner] | Iterable[tuple[Pattern, Inner]],
        *,
        default: Inner = None,
    ) -> None:
        try:
            pairs = tuple(groups.items() if isinstance(groups, Mapping) else map(tuple, groups))
            pairs = tuple((pattern, rule) for pattern, rule in pairs)
        except (TypeError, ValueError) as error:
            raise InvalidArgument(
                "groups are a mapping, or pairs, from a glob to a rule",
                where="Groups",
                got=repr(groups),
            ) from error
        for pattern, _ in pairs:
            if not (isinstance(pattern, str) or callable(pattern)):
                raise InvalidArgument(
                    "a group is chosen by a glob or a predicate", where="Groups", got=repr(pattern)
                )
        object.__setattr__(self, "groups", pairs)
        object.__setattr__(self, "default", default)
        shared_quantity(self.rules, where="Groups")

    @property
    def rules(self) -> tuple[Rule | Composite, ...]:
        """The rules of the groups, and the default."""
        every = [rule for _, rule in self.groups] + [self.default]
        return tuple(rule for rule in every if rule is not None)

    @property
    def of(self) -> Quantity:
        """Which tensors its rules act on."""
        return self.rules[0].of

    def parts(
        self, names: Sequence[str]
    ) -> list[tuple[str, Rule | Composite, Sequence[bool] | None]]:
        """Return the rule of every group with its members."""
        rules = [*(rule for _, rule in self.groups), self.default]
        keys = [*map(str, range(len(self.groups))), "default"]
        return [
            (key, rule, [name in own for name in names])
            for key, rule, own in zip(keys, rules, self._members(names), strict=True)
            if rule is not None and own
        ]

    def named_groups(self, names: Sequence[str]) -> dict[str, frozenset[str]]:
        """Return the glob of every group that has members, or its place where it is a predicate -> their names."""
        labels = [p if isinstance(p, str) else str(n) for n, (p, _) in enumerate(self.groups)]
        pairs = zip([*labels, "default"], self._members(names), strict=True)
        return {label: frozenset(own) for label, own in pairs if own}

    def _members(self, names: Sequence[str]) -> list[set[str]]:
        """Return the names of every group, those of the default last."""
        free = dict.fromkeys(names)
        found = []
        for pattern, _ in self.groups:
            own = [name for name in _matching(pattern, names) if name in free]
            for name in own:
                del free[name]
            found.append(set(own))
        return [*found, set(free)]


def _matching(pattern: Pattern, names: Sequence[str]) -> list[str]:
    others = names.others if isinstance(names, TiedNames) else {}
    every = [*names, *others]
    if isinstance(pattern, str):
        found = select(every, only=pattern, where="Groups")
    else:
        found = [name for name in every if pattern(name)]
    return [others.get(name, name) for name in found]
