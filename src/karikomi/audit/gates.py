"""Gates on the figures of an audit: conditions under which it fails, for scripts and continuous integration."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from karikomi.errors import InvalidArgument, check_known

_FORM = re.compile(r"\s*(\w+)\s*(>=|>)\s*([-+.\deE]+)\s*")


@dataclass(frozen=True, slots=True)
class Gate:
    """A condition, the value that it was tried on, and whether it passed; None where there is no value."""

    condition: str
    value: float | None
    passed: bool | None


def gates(result: Mapping[str, Any], conditions: Sequence[str]) -> list[Gate]:
    """Return each condition under which an audit fails, tried on its result.

    A condition is ``figure > number`` (or ``>=``). The figures: ``drop`` of the metric in its own unit,
    ``changed`` (share of the predictions), ``class_drop`` (the largest of a class's accuracy) and ``noise_drop``
    (the largest of the metric under noise).

    Raises `InvalidArgument` for another form, and `UnknownName` for another figure.

    >>> seen = {"metric_before": 0.9, "metric_after": 0.8, "goal": "max"}
    >>> [(gate.passed, gate.value is None) for gate in gates(seen, ["drop > 0.005", "changed > 0.1"])]
    [(False, False), (None, True)]
    """
    return [_tried(result, condition) for condition in conditions]


def verdict_of(tried: Sequence[Gate]) -> str:
    """Return ``"missed"`` where a gate failed, ``"undecided"`` where one has no value, else ``"held"``."""
    outcomes = {gate.passed for gate in tried}
    return "missed" if False in outcomes else "undecided" if None in outcomes else "held"


def as_rows(tried: Sequence[Gate]) -> list[dict[str, Any]]:
    """Return gates as plain data."""
    return [asdict(gate) for gate in tried]


def _tried(result: Mapping[str, Any], condition: str) -> Gate:
    found = _FORM.fullmatch(condition)
    try:
        if found is None:
            raise ValueError
        limit = float(found[3])
    except ValueError as error:
        raise InvalidArgument(
            "a gate is a figure, > or >=, and a number",
            where="gates",
            got=repr(condition),
            allowed="such as 'drop > 0.005'",
        ) from error
    check_known(found[1], _FIGURES, "unknown figure of an audit", where="gates")
    value = _FIGURES[found[1]](result)
    if value is None:
        return Gate(condition, None, None)
    fails = value > limit if found[2] == ">" else value >= limit
    return Gate(condition, value, not fails)


def _drop(result: Mapping[str, Any]) -> float | None:
    before, after = result.get("metric_before"), result.get("metric_after")
    if before is None or after is None:
        return None
    return after - before if result.get("goal") == "min" else before - after


def _changed(result: Mapping[str, Any]) -> float | None:
    agreement = result.get("agreement")
    return None if agreement is None else 1.0 - agreement


def _class_drop(result: Mapping[str, Any]) -> float | None:
    rows = result.get("classes") or []
    return max((row["before"] - row["after"] for row in rows), default=None)


def _noise_drop(result: Mapping[str, Any]) -> float | None:
    rows = [
        {"metric_before": row["before"], "metric_after": row["after"], "goal": result.get("goal")}
        for row in result.get("noise") or []
    ]
    drops = [drop for row in rows if (drop := _drop(row)) is not None]
    return max(drops, default=None)


_FIGURES: dict[str, Callable[[Mapping[str, Any]], float | None]] = {
    "drop": _drop,
    "changed": _changed,
    "class_drop": _class_drop,
    "noise_drop": _noise_drop,
}
