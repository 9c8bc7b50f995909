"""The facts that scores and allocations need beside the weights: one table for all frameworks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple

from karikomi.errors import InvalidArgument, check_known

Facts = Mapping[str, Mapping[str, Any]]
"""Fact -> tensor name -> values."""


class Fact(NamedTuple):
    """What a fact is, what it has one number `per`, and what it is measured `on`.

    Values per weight have the weight's shape (or broadcast to it), per unit the shape (units,).
    """

    meaning: str
    per: Literal["weight", "unit", "tensor"]
    on: Literal[
        "gradients",
        "inputs",
        "outputs",
        "first batch",
        "input norms",
        "training",
        "curves",
        "seed",
        "the caller",
    ]


def _facts(per: Any, on: Any, /, **meanings: str) -> dict[str, Fact]:
    return {name: Fact(meaning, per, on) for name, meaning in meanings.items()}


TABLE = {
    **_facts(
        "weight",
        "gradients",
        gradient="dL/dw, mean over batches",
        squared_gradient="(dL/dw)^2, mean over batches (of one example each: the Fisher diagonal)",
        hessian_gradient="the Hessian of the loss times its gradient",
    ),
    **_facts("weight", "training", moved="the sum over steps of -(learning rate) w dL/dw"),
    **_facts(
        "weight", "the caller", importance="what a weight is worth, by the caller's own measure"
    ),
    **_facts("weight", "seed", noise="uniform random numbers in (0, 1]"),
    **_facts(
        "weight",
        "inputs",
        input_norm="the L2 norm over samples and positions of the input that the weight multiplies",
    ),
    **_facts(
        "weight",
        "first batch",
        flow="dR/d|w| for R the sum of outputs for an input of ones, with |weights|",
    ),
    **_facts(
        "unit",
        "outputs",
        zeros="the share of zeros among a unit's outputs",
        output="the mean magnitude of a unit's outputs",
        deviation="the standard deviation of a unit's outputs",
    ),
    **_facts(
        "unit", "first batch", gate="the scale by which a normalisation multiplies a unit's output"
    ),
    **_facts("tensor", "first batch", macs="multiply-accumulates of one example"),
    **_facts("tensor", "input norms", outliers="the share of |w| * input norm that stands out"),
    **_facts("tensor", "curves", curve="sparsity -> loss of accuracy"),
}

_SHAPES = {"weight": "the weight's shape", "unit": "one per unit", "tensor": "one per tensor"}

FACTS = {name: f"{fact.meaning}; {_SHAPES[fact.per]}" for name, fact in TABLE.items()}
"""What a score or an allocation may need, by name."""

PER_UNIT = frozenset(name for name, fact in TABLE.items() if fact.per == "unit")
PER_TENSOR = frozenset(name for name, fact in TABLE.items() if fact.per == "tensor")


def measured_on(what: str) -> frozenset[str]:
    """Return the names of the facts that are measured on this, of `Fact.on`.

    >>> sorted(measured_on("outputs"))
    ['deviation', 'output', 'zeros']
    """
    return frozenset(name for name, fact in TABLE.items() if fact.on == what)


def check_facts(
    facts: Facts, needs: Collection[str], tensors: Collection[str], *, where: str
) -> None:
    """Raise unless these are mappings of known facts, or the `needs` of a score, of known `tensors`."""
    check_mapping(facts, where=f"{where}: facts", allowed="fact -> tensor name -> values")
    known = {*TABLE, *needs}
    for fact, of in facts.items():
        check_known(fact, known, "unknown fact", where=where)
        place = f"{where}: facts[{fact!r}]"
        check_mapping(of, where=place, allowed="tensor name -> values")
        check_names(of, tensors, where=place)


def check_mapping(given: object, *, where: str, allowed: str) -> None:
    """Raise `InvalidArgument` unless this is a mapping."""
    if not isinstance(given, Mapping):
        raise InvalidArgument(
            "not a mapping", where=where, got=type(given).__name__, allowed=allowed
        )


def check_names(names: Collection[str], known: Collection[str], *, where: str) -> None:
    """Raise `UnknownName` for a name that is not the name of a tensor."""
    for name in names:
        check_known(name, known, "no selected tensor has this name", where=where)
