"""The protocol of rules, between measuring, deciding and applying: arguments, facts and decisions.

A framework folder *measures* (norms of tensors), a rule *decides* (pure arithmetic on one small
vector), the folder *applies* (scales, clamps, skips). Because the arguments of `decide` are small
vectors and an array namespace only, one implementation works in NumPy, torch, JAX and TensorFlow.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, NamedTuple, Protocol, TypeGuard, runtime_checkable

from karikomi.errors import InvalidArgument, check

Array = Any  # any array that the namespace `xp` works on
Namespace = Any  # a module or object with the functions of ARRAY_OPERATIONS
State = dict[str, Array]  # flat; small arrays and scalars only

ARRAY_OPERATIONS = frozenset(
    "abs any arange asarray astype cumulative_sum exp floor isfinite log max maximum minimum ones_like "
    "reshape sort sqrt square sum where zeros zeros_like".split()
)
"""The functions of its namespace that `decide` may use, besides operators and `.dtype`, `.shape` (array-API names).

The contract suite allows no other name, so that an adapter for a new framework has a known size.
"""


class Scope(Enum):
    """What one number of the vector is measured of."""

    ELEMENT = (
        "element"  # the number is the largest magnitude of a tensor; the decision is a `limit`
    )
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
    *("second_moment", "negative_part", "distance", "spectral_norm", "largest_logit"),
)
"""What a rule may need besides norms, named in `needs`.

``weights``: the L2 norm of the weights, one per number. ``sizes``: how many entries each number is measured
of. ``fan_in``: how many inputs feed one output of the layer that a tensor belongs to.

The others are not passed as facts but change what is measured. ``second_moment``: every gradient entry g is
measured as ``g / sqrt(v)`` (0 where v is 0), v being its running mean of squares, so that norms and limits
are in units of sqrt(v): before the step for rules on gradients, after it and bias-corrected for rules on
updates. Of weights, ``negative_part``: the entries below zero, as magnitudes, and a factor scales these
alone; ``distance``: the L2 norm of what separates the weights from their nearest point in the set that the rule
names by its attribute `nearest`, and a factor scales that difference; ``spectral_norm``: the largest singular value
of the matrix (output units, all the rest); ``largest_logit``: one number per attention head, and a factor scales the
query and key projections of the head.
"""

FACTS = NEEDS
"""Alias of `NEEDS`."""


class Decision(NamedTuple):
    """The decision of a rule: one number per element of its scope.

    `factor`: 1 leaves unchanged, less than 1 scales down, more than 1 up. `limit`: magnitudes are clamped to it.
    `skip`: a boolean 0-d array, whether the step is skipped.
    """

    factor: Array | None
    limit: Array | None
    skip: Array


@runtime_checkable
class Rule(Protocol):
    """A frozen dataclass: its limit comes first and may be positional, all other fields are keyword-only.

    Optional class attributes: ``by_design = True`` if the share of clipped steps follows from the design of
    the rule and not from a chosen limit, so that no warning about that share is given; ``order``, the p of the
    p-norms that are measured for it (>= 1, ``inf`` for largest magnitudes; 2 without it); a method ``axes_by_rank``
    with a field `unit` that is not ``"layer"``, if units go by the shapes of tensors; ``adds_up_itself =
    True`` if it adds up the norms of tensors itself, which is unsupported where some are on other ranks;
    ``skips = True`` if its purpose is to skip steps, which is unsupported where a step cannot be skipped.
    """

    @property
    def scope(self) -> Scope:
        """What one number is measured of."""
        ...

    @property
    def of(self) -> Quantity:
        """Which tensors the rule acts on."""
        ...

    @property
    def needs(self) -> frozenset[str]:
        """The facts needed besides norms, of `NEEDS`; ``step`` (attempted steps so far) is always given."""
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
    """A rule made of rules, each of which acts on some of the tensors."""

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
        """Return ``(key, rule, which of these tensors it acts on)`` in the order of application."""
        ...


def is_composite(rule: Rule | Composite) -> TypeGuard[Composite]:
    """Return whether a rule or composite is a composite; faster than `isinstance` with a protocol."""
    return hasattr(type(rule), "parts")


class Stateless:
    """Base class of rules without state that need norms only."""

    __slots__ = ()

    needs: frozenset[str] = frozenset()

    def init(self, like: Array, *, xp: Namespace) -> State:
        """Return no state."""
        return {}


def shared_quantity(rules: Sequence[object], *, where: str) -> Quantity:
    """Return the quantity that all these rules act on; raise `InvalidArgument` if there is no single one."""
    for rule in rules:
        if isinstance(rule, type) or not isinstance(rule, Rule | Composite):
            raise InvalidArgument("not a rule", where=where, got=repr(rule))
    quantities = {rule.of for rule in rules if isinstance(rule, Rule | Composite)}
    names = ", ".join(sorted(quantity.value for quantity in quantities)) or "no rule at all"
    what = "rules that are combined must act on the same quantity"
    check(where, (len(quantities) == 1, what, names, None))
    return quantities.pop()


def leave(xp: Namespace) -> Array:
    """Return the `skip` of a rule that never skips."""
    return xp.asarray(False)


def shrink_to(norms: Array, limit: Array, *, xp: Namespace, slack: float = 0.0) -> Array:
    """Return ``min(1, limit / norms)``, exactly 1 wherever ``norms <= limit * (1 + slack)``.

    A limit of zero, from a rule or a schedule, gives 1. With `slack` a bound that is applied after every
    step is idempotent under rounding.
    """
    ones = xp.ones_like(norms)
    over = (norms > limit * (1.0 + slack)) & (limit > 0)
    return xp.where(over, limit / xp.where(over, norms, ones), ones)


def brief(rule: Any) -> str:
    """Return the repr of a rule without the fields that have their defaults."""
    pairs = [(field, getattr(rule, field.name)) for field in fields(rule)]
    shown = [f"{field.name}={value!r}" for field, value in pairs if value != field.default]
    return f"{type(rule).__name__}({', '.join(shown)})"


def order_of(rule: object) -> float:
    """Return the p of the p-norms that a rule is decided from, 2 unless the rule has another."""
    return getattr(rule, "order", 2.0)


def combine(norms: Array, *, xp: Namespace, order: float = 2.0) -> Array:
    """Return the p-norm of a vector of p-norms, shape (1,), safe against overflow and underflow.

    ``m * (sum((n / m)^p))^(1/p)`` with ``m = max(n)``, which alone is left for an infinite p.
    """
    largest = xp.max(norms)
    if math.isinf(order):
        return xp.reshape(largest, (1,))
    scale = xp.where(largest > 0, largest, xp.ones_like(largest))
    ratios = norms / scale
    if order == 1.0:
        joint = xp.sum(ratios)
    elif order == 2.0:
        joint = xp.sqrt(xp.sum(xp.square(ratios)))
    else:
        joint = xp.sum(ratios**order) ** (1.0 / order)
    return xp.reshape(scale * joint, (1,))


@dataclass(frozen=True, slots=True, eq=False)
class TracedLimit:
    """A limit of compiled code, as a schedule that returns it at every step.

    It cannot be checked: below zero it counts as zero, and at zero or NaN nothing is clipped.
    """

    array: Array

    def value(self, step: Array, *, xp: Namespace) -> Array:
        """Return the limit as a 0-d array of the dtype of `step`."""
        return xp.astype(xp.reshape(self.array, ()), step.dtype)


def check_limit(limit: Any, *, where: str) -> Any:
    """Return a limit, NumPy's numbers as Python's; raise `InvalidArgument` unless positive or a schedule.

    Infinity is allowed and means measure only. A schedule is anything with a method `value`. An array of one number
    becomes that number; one that is traced, whose number is not known yet, a `TracedLimit`.
    """
    if hasattr(limit, "dtype") and hasattr(limit, "shape"):
        limit = _number_of(limit, where=where)
    if callable(getattr(limit, "value", None)) and not isinstance(limit, type):
        # A schedule stays between its ends, and a limit below zero would reverse gradients.
        for end in ("start", "stop"):
            check_limit(getattr(limit, end, math.inf), where=f"{where} ({end} of the schedule)")
        return limit
    real = isinstance(limit, numbers.Real) and not isinstance(limit, bool)
    allowed = "> 0, or a schedule such as kk.schedule.Linear(1.0, 0.1, steps=(0, 1_000))"
    check(where, (real, "the limit must be a number or a schedule", repr(limit), allowed))
    given: Any = limit
    try:
        number = float(given)
    except OverflowError as error:
        raise InvalidArgument("the limit is too large for a float", where=where) from error
    good = not math.isnan(number) and given > 0
    check(where, (good, "the limit must be positive", limit, "> 0, or inf to measure only"))
    return int(given) if isinstance(limit, numbers.Integral) else number


def _number_of(limit: Any, *, where: str) -> Any:
    shape = tuple(limit.shape)
    check(where, (math.prod(shape) == 1, "the limit must be one number", f"shape {shape}", None))
    try:
        return limit.item() if hasattr(limit, "item") else float(limit)
    except TypeError:
        return TracedLimit(limit)
