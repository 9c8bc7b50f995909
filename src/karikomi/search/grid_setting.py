"""The settings of a sweep: a product of axes, each setting with its runs of several seeds."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from karikomi.clip.by_global_norm import ByGlobalNorm
from karikomi.errors import InvalidArgument, check
from karikomi.prune import check_sparsity
from karikomi.rule import Quantity, Rule
from karikomi.search.driver import Proposal
from karikomi.search.rule_text import rule_of, text_of

AXES = ("limit", "rule", "bound", "rate", "sparsity", "bits")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One training of the grid: a point without its bits, and a seed.

    `limit` of the gradients' global norm, None clips nothing; `rule` is a clip rule in its place, as text. `bound`:
    of the weights, as text. `rate`: the learning rate, None is the recipe's. `bits`: the sizes of grids that the
    trained weights are rounded to, None for as they are; one training serves all.
    """

    limit: float | None = None
    rule: str | None = None
    bound: str | None = None
    rate: float | None = None
    sparsity: float = 0.0
    bits: tuple[int | None, ...] = (None,)
    seed: int = 0
    epochs: int = 1

    @classmethod
    def of(cls, proposal: Proposal) -> Setting:
        """Return the setting of a proposal."""
        values = proposal.settings
        return cls(**{**values, "bits": tuple(values["bits"])})

    def proposal(self) -> Proposal:
        """Return the setting as the driver takes it."""
        return Proposal.of(**{key: getattr(self, key) for key in self.__slots__})

    @property
    def clip(self) -> Any:
        """The rule that clips; an infinite limit measures only."""
        if self.rule is not None:
            return rule_of(self.rule)
        return ByGlobalNorm(math.inf if self.limit is None else self.limit)

    @property
    def weight_bound(self) -> Any:
        """The bound on the weights, or None."""
        return None if self.bound is None else rule_of(self.bound, "bound")

    @property
    def name(self) -> str:
        """The stem of the run's files."""
        clip = f"limit-{self.limit or 'none'}" if self.rule is None else f"rule-{_stem(self.rule)}"
        parts = [clip]
        parts += [] if self.bound is None else [f"bound-{_stem(self.bound)}"]
        parts += [] if self.rate is None else [f"rate-{self.rate!r}"]
        return "_".join([*parts, f"sparsity-{self.sparsity}", f"seed-{self.seed}"])

    def points(self) -> list[tuple[Any, ...]]:
        """Return the points of the grid that this training belongs to, as values of `AXES`."""
        first = (self.limit, self.rule, self.bound, self.rate, self.sparsity)
        return [(*first, bits) for bits in self.bits]

    def words(self) -> str:
        """Return the setting as a user reads it.

        >>> Setting(limit=0.5, sparsity=0.75, seed=1).words()
        'limit 0.5, sparsity 0.75, seed 1'
        """
        clip = f"limit {self.limit:g}" if self.limit else "limit none"
        parts = [clip if self.rule is None else self.rule]
        parts += [] if self.bound is None else [f"bound {self.bound}"]
        parts += [] if self.rate is None else [f"rate {self.rate:g}"]
        return ", ".join([*parts, f"sparsity {self.sparsity:g}", f"seed {self.seed}"])


def grid_of(
    *,
    limits: Sequence[float | None],
    rules: Sequence[Any],
    bounds: Sequence[Any],
    rates: Sequence[float | None],
    sparsities: Sequence[float],
    bits: Sequence[int | None],
    seeds: int,
    epochs: int,
) -> list[Setting]:
    """Return all settings; raises `InvalidArgument` for an axis that is empty, repeats itself or is out of range."""
    for sparsity in sparsities:
        check_sparsity(sparsity, where="sweep(sparsities)")
    for size in bits:
        whole = isinstance(size, int) and not isinstance(size, bool) and 2 <= size <= 16
        good = size is None or whole
        check("sweep(bits)", (good, "bits are a whole number, or None", repr(size), "2..16"))
    axes: dict[str, list[Any]] = {
        "limits": [_limit(limit) for limit in limits],
        "rules": [_rule(rule, "clip") for rule in rules],
        "bounds": [None if bound is None else _rule(bound, "bound") for bound in bounds],
        "rates": [_rate(rate) for rate in rates],
        "sparsities": [float(sparsity) for sparsity in sparsities],
        "bits": list(bits),
    }
    for name, values in axes.items():
        good = (values or name in ("limits", "rules")) and len(set(values)) == len(values)
        check("sweep", (good, f"{name} are empty or repeat themselves", values, None))
    check("sweep", (limits or rules, "limits are empty or repeat themselves", limits, None))
    for name, value in (("seeds", seeds), ("epochs", epochs)):
        good = type(value) is int and value >= 1
        check("sweep", (good, f"{name} must be a whole number", value, ">= 1"))
    clips = [(limit, None) for limit in axes["limits"]] + [(None, rule) for rule in axes["rules"]]
    # Seeds outermost: an interrupted sweep covers the whole grid with fewer seeds.
    product = itertools.product(
        range(seeds), clips, axes["bounds"], axes["rates"], axes["sparsities"]
    )
    return [
        Setting(
            limit=limit,
            rule=rule,
            bound=bound,
            rate=rate,
            sparsity=sparsity,
            bits=tuple(axes["bits"]),
            seed=seed,
            epochs=epochs,
        )
        for seed, (limit, rule), bound, rate, sparsity in product
    ]


def _limit(limit: float | None) -> float | None:
    if limit is None:
        return None
    good = isinstance(limit, int | float) and not isinstance(limit, bool)
    check("sweep(limits)", (good, "a limit is a number or None", repr(limit), None))
    ByGlobalNorm(limit)
    return None if math.isinf(limit) else float(limit)


def _rate(rate: float | None) -> float | None:
    if rate is None:
        return None
    good = isinstance(rate, int | float) and not isinstance(rate, bool) and 0 < rate < math.inf
    check("sweep(rates)", (good, "a learning rate is a number", repr(rate), "> 0, finite"))
    return float(rate)


def _rule(rule: Any, kind: str) -> str:
    made = rule_of(rule, kind) if isinstance(rule, str) else rule
    of = getattr(made, "of", None)
    wanted = Quantity.WEIGHT if kind == "bound" else Quantity.GRADIENT
    if not isinstance(made, Rule) and not hasattr(made, "rules"):
        raise InvalidArgument(f"not a {kind} rule", where="sweep", got=repr(rule))
    check("sweep", (of is wanted, f"a {kind} acts on other tensors", repr(rule), None))
    return text_of(made, kind)


def _stem(text: str) -> str:
    return f"{text.partition('(')[0]}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
