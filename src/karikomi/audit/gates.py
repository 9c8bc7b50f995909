"""Conditions that a smaller network has to meet: held, missed, undecided for want of examples, or not run."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy import special

from karikomi.audit.paired.paired_outcomes import drop_interval
from karikomi.audit.paired.share_intervals import share_interval
from karikomi.errors import InvalidArgument, suggest

HELD, MISSED, UNDECIDED, NOT_RUN = "held", "missed", "undecided", "not run"
ALPHA = 0.05
_FORM = re.compile(r"\s*([a-z_]+)\s*([<>])\s*([-+0-9.eE]+)\s*(?:@\s*([a-z]+))?\s*")

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Gate:
    """A condition that fails: `quantity` above (``>``) or below (``<``) `limit`; `adjusted` over all its rows."""

    text: str
    quantity: str
    side: str
    limit: float
    adjusted: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an audit says of a gate: the worst `value`, its `interval` where there is one, and `where` it was found."""

    gate: Gate
    outcome: str
    value: float | None = None
    interval: Interval | None = None
    where: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the verdict as plain data."""
        return {
            "gate": self.gate.text,
            "outcome": self.outcome,
            "value": self.value,
            "interval": list(self.interval) if self.interval else None,
            "where": self.where,
        }


@dataclass(frozen=True, slots=True)
class _Measured:
    """One measurement of a quantity."""

    where: str
    value: float
    interval: Interval | None = None


def gate_of(text: str) -> Gate:
    """Return the gate that a text states, such as ``drop>0.005`` or ``class_drop>0.03@holm``.

    Quantities: ``drop``, ``negative_flips``, ``churn``, ``class_drop`` and ``slice_drop`` (the worst) and
    ``stable_flips`` (predictions that changed in every network of a population), with intervals;
    ``corruption_drop`` (the worst, beyond the clean drop), ``attack_drop``, ``calibration_error``, ``alignment`` (the
    lowest of the layers) and ``explanation`` (place between floor and ceiling), without. ``@holm``: at one level for
    all classes or slices together. Raises `InvalidArgument` for anything else.

    >>> gate_of("class_drop > 0.03 @holm")
    Gate(text='class_drop>0.03@holm', quantity='class_drop', side='>', limit=0.03, adjusted=True)
    """
    match = _FORM.fullmatch(text)
    try:
        limit = float(match[3]) if match else None
    except ValueError:
        limit = None
    if match is None or limit is None or match[4] not in (None, "holm"):
        raise InvalidArgument(
            "not a condition",
            where="--fail-if",
            got=repr(text),
            allowed="QUANTITY>NUMBER or QUANTITY<NUMBER, with @holm after it for classes and slices",
        )
    quantity, side, adjusted = match[1], match[2], match[4] == "holm"
    if quantity not in QUANTITIES:
        raise InvalidArgument(
            "unknown quantity",
            where="--fail-if",
            got=quantity,
            allowed=", ".join(QUANTITIES),
            hint=suggest(quantity, QUANTITIES),
        )
    if adjusted and quantity not in ("class_drop", "slice_drop"):
        raise InvalidArgument(
            "@holm is for quantities of several rows",
            where="--fail-if",
            got=text,
            allowed="class_drop, slice_drop",
        )
    return Gate("".join(text.split()), quantity, side, limit, adjusted)


def judged(gate: Gate, result: Mapping[str, Any]) -> Verdict:
    """Return the verdict of an audit's result.

    Missed where the interval of any row lies beyond the limit, or its value where there is no interval; held where all
    intervals lie on the other side; undecided otherwise, as more examples could decide it. What was not measured
    is not run, which is not held.
    """
    rows = QUANTITIES[gate.quantity](result, gate.adjusted)
    if not rows:
        return Verdict(gate, NOT_RUN)
    sign = 1.0 if gate.side == ">" else -1.0
    worst = max(rows, key=lambda row: sign * row.value)
    beyond = [row for row in rows if sign * _nearest(row, sign) > sign * gate.limit]
    if beyond:
        shown = max(beyond, key=lambda row: sign * row.value)
        return Verdict(gate, MISSED, shown.value, shown.interval, shown.where)
    unsure = [row for row in rows if sign * _farthest(row, sign) > sign * gate.limit]
    if unsure:
        shown = max(unsure, key=lambda row: sign * _farthest(row, sign))
        return Verdict(gate, UNDECIDED, shown.value, shown.interval, shown.where)
    return Verdict(gate, HELD, worst.value, worst.interval, worst.where)


def verdict_of(verdicts: Sequence[Verdict]) -> str:
    """Return ``"missed"`` if any gate was, else ``"undecided"`` if any is or was not run, else ``"held"``."""
    outcomes = {verdict.outcome for verdict in verdicts}
    return MISSED if MISSED in outcomes else UNDECIDED if outcomes & {UNDECIDED, NOT_RUN} else HELD


def _nearest(row: _Measured, sign: float) -> float:
    return row.value if row.interval is None else row.interval[0 if sign > 0 else 1]


def _farthest(row: _Measured, sign: float) -> float:
    return row.value if row.interval is None else row.interval[1 if sign > 0 else 0]


def _outcome(name: str) -> Any:
    def measured(result: Mapping[str, Any], adjusted: bool) -> list[_Measured]:
        found = result.get("outcomes")
        if found is None:
            return []
        return [_Measured("", found[name], tuple(found[f"{name}_interval"]))]

    return measured


def _drop(result: Mapping[str, Any], adjusted: bool) -> list[_Measured]:
    if result.get("outcomes"):
        return _outcome("drop")(result, adjusted)
    if result.get("drop") is None:
        return []
    interval = result.get("drop_interval")
    return [_Measured("", result["drop"], tuple(interval) if interval else None)]


def _stable(result: Mapping[str, Any], adjusted: bool) -> list[_Measured]:
    found = result.get("population") or {}
    if found.get("in_all") is None:
        return []
    count, n = found["in_all"], found["examples_judged"]
    return [_Measured("", count / n, share_interval(count, n))]


def _rows(key: str, label: str) -> Any:
    def measured(result: Mapping[str, Any], adjusted: bool) -> list[_Measured]:
        rows = [row for row in result.get(key) or [] if row["before"] is not None]
        level = 1.0 - ALPHA / (len(rows) if adjusted else 1.0) if rows else 0.0
        return [_row(row, label, level) for row in rows]

    return measured


def _row(row: Mapping[str, Any], label: str, level: float) -> _Measured:
    where = f"{label} {row[label]}"
    if "error" not in row:
        interval = drop_interval(row["lost"], row["gained"], row["examples"], level)
        return _Measured(where, row["before"] - row["after"], interval)
    # A single example has no spread: its mean could be anything.
    error = math.inf if row["error"] is None else row["error"]
    half = -float(special.ndtri((1.0 - level) / 2)) * error
    return _Measured(where, row["drop"], (row["drop"] - half, row["drop"] + half))


def _corruptions(result: Mapping[str, Any], adjusted: bool) -> list[_Measured]:
    rows = (result.get("corruptions") or {}).get("rows", [])
    clean = result.get("drop")
    known = [row for row in rows if row["drop"] is not None and clean is not None]
    return [_Measured(row["corruption"], row["drop"] - clean) for row in known]


def _attack(result: Mapping[str, Any], adjusted: bool) -> list[_Measured]:
    found = result.get("attack")
    return [_Measured("", found["before"] - found["worst"])] if found else []


def _calibration(result: Mapping[str, Any], adjusted: bool) -> list[_Measured]:
    found = result.get("calibration")
    return [_Measured("", found["ece_after"])] if found else []


def _alignment(result: Mapping[str, Any], adjusted: bool) -> list[_Measured]:
    rows = result.get("layers") or []
    return [
        _Measured(f"layer {row['layer']}", row["cka"]) for row in rows if row["cka"] is not None
    ]


def _explanation(result: Mapping[str, Any], adjusted: bool) -> list[_Measured]:
    found = ((result.get("explanation") or {}).get("measures") or {}).get("cosine") or {}
    return [_Measured("", found["place"])] if found.get("place") is not None else []


QUANTITIES: dict[str, Any] = {
    "drop": _drop,
    "negative_flips": _outcome("negative_flips"),
    "churn": _outcome("churn"),
    "stable_flips": _stable,
    "class_drop": _rows("classes", "class"),
    "slice_drop": _rows("slices", "slice"),
    "corruption_drop": _corruptions,
    "attack_drop": _attack,
    "calibration_error": _calibration,
    "alignment": _alignment,
    "explanation": _explanation,
}
