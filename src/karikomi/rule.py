"""The seam between measuring, deciding and applying: what a rule is, what it sees and what it answers.

A framework folder *measures* (norms of tensors), a rule *decides* (pure arithmetic on one small
vector), the folder *applies* (scales, clamps, skips). Because `decide` sees nothing but small
vectors and an array namespace, one implementation serves NumPy, torch, JAX and TensorFlow.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple, Protocol, TypeGuard, runtime_checkable

from karikomi.errors import InvalidArgument

Array = Any  # any array that the namespace `xp` works on
Namespace = Any  # a module or object with the functions of ARRAY_OPERATIONS
State = dict[str, Array]  # flat; small arrays and scalars only

ARRAY_OPERATIONS = frozenset(
    "abs any arange asarray astype cumulative_sum exp floor isfinite log max maximum minimum ones_like "
    "reshape sort sqrt square sum where zeros zeros_like".split()
)
"""All that `decide` may ask of its namespace besides operators and `.dtype`, `.shape` (array-API names).

The contract suite refuses any other name, so that an adapter for a new framework has a known size.
"""


class Scope(Enum):
    """What one number of the vector speaks of."""

    ELEMENT = "element"  # the number is the largest magnitude of a tensor; the answer is a `limit`
    UNIT = "unit"  # one output unit: a row of a Linear, a filter of a Conv; else the whole tensor
    TENSOR = "tensor"
    GLOBAL = "global"  # one number for all tensors that the rule is given


class Quantity(Enum):
    """Which tensors the rule acts on."""

    GRADIENT = "gradient"
    UPDATE = "update"  # the change of the weights by one step, in units of the learning rate
    WEIGHT = "weight"


NEEDS = (
    *("weights", "sizes", "fan_in"),
    *("second_moment", "negative_part", "spectral_norm", "largest_logit"),
)
"""What a rule may ask measure for, besides norms, by naming it in `needs`.

``weights``: the L2 norm of the weights, one per number. ``sizes``: how many entries each number speaks
of. ``fan_in``: how many inputs feed one output of the layer that a tensor belongs to.

The others bring no fact but change what is measured. ``second_moment``: every gradient entry g is
measured as ``g / sqrt(v)`` (0 where v is 0), v being its running mean of squares, so that norms and limits
are in units of sqrt(v): before the step for rules on gradients, after it and bias-corrected for rules on
updates. Of weights, ``negative_part``: the entries below zero, as magnitudes, and a factor scales these
alone; ``spectral_norm``: the largest singular value of the matrix (output units, all the rest);
``largest_logit``: one number per attention head, and a factor scales what the head's logits are made of.
"""


class Decision(NamedTuple):
    """A rule's answer: one number per element of its scope.

    `factor`: 1 leaves alone, less than 1 scales down, more than 1 up. `limit`: what apply clamps magnitudes to.
    `skip`: a boolean 0-d array; true means: take no step.
    """

    factor: Array | None
    limit: Array | None
    skip: Array


@runtime_checkable
class Rule(Protocol):
    """A frozen dataclass: its limit comes first and may be positional, all else is keyword-only.

    If the share of steps that it clips is a matter of its design and not of a limit that was chosen, it
    says so with ``by_design = True``, so that nobody is warned of that share. One that adds up the norms
    of tensors itself says ``adds_up_itself = True``: it is refused where some lie on other ranks. One that
    exists to leave steps out says ``skips = True``: it is refused where a step cannot be left out.
    """

    @property
    def scope(self) -> Scope:
        """What one number speaks of."""
        ...

    @property
    def of(self) -> Quantity:
        """Which tensors the rule acts on."""
        ...

    @property
    def needs(self) -> frozenset[str]:
        """What measure must bring besides norms, of `NEEDS`; ``step`` (attempted steps so far) always comes."""
        ...

    def init(self, like: Array, *, xp: Namespace) -> State:
        """Return the fresh state for vectors like `like`."""
        ...

    def decide(
        self,
        norms: Array,
        state: State,
        *,
        present: Array,
        facts: Mapping[str, Array],
        xp: Namespace,
    ) -> tuple[Decision, State]:
        """Return the decision for this step and the state after it; pure, without value branches."""
        ...


@runtime_checkable
class Composite(Protocol):
    """A rule made of rules: it decides nothing itself, but says which of its rules acts on what."""

    @property
    def of(self) -> Quantity:
        """Which tensors its rules act on."""
        ...

    @property
    def rules(self) -> tuple[Rule | Composite, ...]:
        """The rules that it is made of."""
        ...

    def parts(
        self, names: Sequence[str]
    ) -> list[tuple[str, Rule | Composite, Sequence[bool] | None]]:
        """Return ``(key, rule, which of these tensors it speaks of)`` in the order of application."""
        ...


def is_composite(rule: Rule | Composite) -> TypeGuard[Composite]:
    """Return whether something that is known to be a rule or a composite is the latter, in no time."""
    return hasattr(type(rule), "parts")


class Stateless:
    """The part of a rule that learns nothing and needs nothing but norms."""

    __slots__ = ()

    needs: frozenset[str] = frozenset()

    def init(self, like: Array, *, xp: Namespace) -> State:
        """Return no state."""
        return {}


def shared_quantity(rules: Sequence[object], *, where: str) -> Quantity:
    """Return what all these rules act on, or refuse those that are no rules or act on different things."""
    for rule in rules:
        if isinstance(rule, type) or not isinstance(rule, Rule | Composite):
            raise InvalidArgument("this is no rule", where=where, got=repr(rule))
    found = {rule.of for rule in rules if isinstance(rule, Rule | Composite)}
    if len(found) != 1:
        names = ", ".join(sorted(item.value for item in found)) or "no rule at all"
        raise InvalidArgument(
            "rules that are put together act on the same thing", where=where, got=names
        )
    return found.pop()


def leave(xp: Namespace) -> Array:
    """Return the `skip` of a rule that never skips."""
    return xp.asarray(False)


def shrink_to(norms: Array, limit: Array, *, xp: Namespace, slack: float = 0.0) -> Array:
    """Return ``min(1, limit / norms)``, exactly 1 wherever ``norms <= limit * (1 + slack)``.

    A limit of zero, which only a rule or a schedule can arrive at, leaves alone. `slack` lets a bound
    that is applied after every step be idempotent under rounding.
    """
    ones = xp.ones_like(norms)
    over = (norms > limit * (1.0 + slack)) & (limit > 0)
    return xp.where(over, limit / xp.where(over, norms, ones), ones)


def combine(norms: Array, *, xp: Namespace) -> Array:
    """Return the L2 norm of a vector of L2 norms, shape (1,), safe against overflow and underflow.

    ``m * sqrt(sum((n / m)^2))`` with ``m = max(n)``.
    """
    largest = xp.max(norms)
    scale = xp.where(largest > 0, largest, xp.ones_like(largest))
    return xp.reshape(scale * xp.sqrt(xp.sum(xp.square(norms / scale))), (1,))


def check_limit(limit: Any, *, where: str) -> Any:
    """Return a limit, NumPy's numbers as Python's, or refuse what is neither positive nor a schedule.

    Infinity is allowed and means measure only. A schedule is anything with a method `value`.
    """
    if callable(getattr(limit, "value", None)) and not isinstance(limit, type):
        # A schedule stays between its ends, and a limit below zero would turn gradients around.
        for end in ("start", "stop"):
            check_limit(getattr(limit, end, math.inf), where=f"{where} ({end} of the schedule)")
        return limit
    if isinstance(limit, bool) or not isinstance(limit, numbers.Real):
        raise InvalidArgument(
            "the limit must be a number or a schedule",
            where=where,
            got=repr(limit),
            allowed="> 0, or a schedule such as kk.schedule.Linear(1.0, 0.1, steps=(0, 1_000))",
        )
    try:
        number = float(limit)
    except OverflowError as error:
        raise InvalidArgument("the limit is too large for a float", where=where) from error
    if math.isnan(number) or limit <= 0:
        raise InvalidArgument(
            "the limit must be positive",
            where=where,
            got=limit,
            allowed="> 0, or inf to measure only",
        )
    return int(limit) if isinstance(limit, numbers.Integral) else float(limit)
