"""What a caller says beside the arrays, facts, layouts and what goes together: checked where it comes in.

Separate from pruning, so that a mistake is named before anything is measured or selected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from karikomi.errors import InvalidArgument, UnknownName, Unsupported, suggest
from karikomi.prune import FACTS, Coupled, Layout, Score

WHERE = "numpy.prune"

OF_TENSORS = ("macs", "outliers", "curve")
"""Facts that speak of a whole array."""


def check_masks_alone(score: Score) -> None:
    """Refuse a score that also changes the weights that stay: by magnitude in its place nobody asked."""
    if score.updates:
        raise Unsupported(
            f"{type(score).__name__} re-fits the weights that stay, by the inputs of a layer",
            where=f"{WHERE}: score",
            allowed='scores that make masks alone, such as "magnitude" or "wanda"',
            hint="kk.torch.prune_ has it",
        )


def check_facts(
    facts: Mapping[str, Mapping[str, Any]], arrays: Mapping[str, np.ndarray], score: Score
) -> None:
    """Refuse facts that neither karikomi nor the score knows, of other arrays, or of another kind."""
    allowed = {*FACTS, *score.needs, *OF_TENSORS}
    _check_mapping(facts, "facts", "fact -> name of an array -> what is known of it")
    for fact, of in facts.items():
        if fact not in allowed:
            raise UnknownName(
                "unknown fact", where=WHERE, got=repr(fact), hint=suggest(str(fact), allowed)
            )
        where = f"facts[{fact!r}]"
        _check_mapping(of, where, "name of an array -> what is known of it")
        _check_names(of, arrays, where)
        for name, value in of.items():
            _check_fact(fact, value, f"{WHERE}: {name}")


def check_layouts(layouts: Mapping[str, Layout], arrays: Mapping[str, np.ndarray]) -> None:
    """Refuse what is no layout, or does not fit its array."""
    _check_mapping(layouts, "layouts", "name of an array -> karikomi.prune.Layout")
    _check_names(layouts, arrays, "layouts")
    for name, layout in layouts.items():
        if not isinstance(layout, Layout):
            raise InvalidArgument(
                "this is no layout",
                where=f"{WHERE}: layouts[{name!r}]",
                got=repr(layout)[:80],
                allowed="such as kk.prune.Layout(units=0, inputs=1)",
            )
        layout.check(arrays[name].shape, where=f"{WHERE}: {name}")


def check_coupled(coupled: Sequence[Coupled], arrays: Mapping[str, Any]) -> Sequence[Coupled]:
    """Return what goes together, or refuse what is no such thing or speaks of other arrays."""
    for item in coupled:
        if not isinstance(item, Coupled):
            raise InvalidArgument(
                "this says not what goes together",
                where=f"{WHERE}: coupled",
                got=repr(item)[:80],
                allowed="karikomi.prune.Coupled",
            )
        _check_names({member.name: 0 for member in item.members}, arrays, f"coupled {item.of!r}")
    return coupled


def wide(array: Any) -> Any:
    """Return an array of a float type that NumPy has not itself (bfloat16, float8) as float32, exactly."""
    if not isinstance(array, np.ndarray) or array.dtype.kind == "f":
        return array
    foreign = array.dtype.name.startswith(("bfloat", "float"))
    return array.astype(np.float32) if foreign else array


def _check_fact(fact: str, value: object, where: str) -> None:
    """Refuse what is no curve, no number, or no array of numbers, as the fact has it."""
    if fact == "curve":
        kind, fits = "a mapping", isinstance(value, Mapping)
    else:
        array = wide(np.asarray(value))
        kind, fits = "an array of real numbers", array.dtype.kind in "biuf"
        if fact in OF_TENSORS:
            kind, fits = "a number", fits and array.ndim == 0
    if not fits:
        raise InvalidArgument(
            f"the fact {fact!r} of an array is {kind}", where=where, got=repr(value)[:80]
        )


def _check_mapping(given: object, what: str, allowed: str) -> None:
    if not isinstance(given, Mapping):
        raise InvalidArgument(
            "this is no mapping",
            where=f"{WHERE}: {what}",
            got=type(given).__name__,
            allowed=allowed,
        )


def _check_names(of: Mapping[str, Any], arrays: Mapping[str, Any], where: str) -> None:
    for name in of:
        if name not in arrays:
            raise UnknownName(
                "no selected array has this name",
                where=f"{WHERE}: {where}",
                got=repr(name),
                hint=suggest(str(name), arrays),
            )
