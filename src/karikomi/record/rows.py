"""Rows of a record: their entries, and their encoding as a line of plain JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from karikomi.errors import InvalidArgument, check
from karikomi.record.tensors import joint, table
from karikomi.rules.outcome import Outcome

_ENTRIES = frozenset(
    "event step gradients weights weight_norm updates update_norm codes left_out "
    "norm norm_order factor clipped skipped nonfinite".split()
)
_encode = json.JSONEncoder(allow_nan=False).encode

Norms = dict[str, dict[str, float]]
"""``gradients``, ``weights``, ``updates`` -> name of a tensor -> its norm."""


def step_row(
    step: int,
    outcome: Outcome | None,
    facts: Mapping[str, Any],
    given: Mapping[str, Mapping[str, float] | None],
) -> tuple[dict[str, Any], Norms]:
    """Return the row of a step without its tensors, and the norms of these.

    `given`: ``weights`` and ``updates`` -> their norms or ``None``. Raises `InvalidArgument` for a
    fact with the name of an entry that the record has itself.
    """
    row = {} if outcome is None else outcome.as_row()
    check_facts(facts, where="Recorder.step(facts)")
    norms = {} if outcome is None else {"gradients": _gradients(outcome)}
    row = {"event": "step", "step": step, **row, **facts}
    for of, item in given.items():
        if item is not None:
            norms[of] = table(item, of)
            row[f"{of[:-1]}_norm"] = joint(norms[of])
    return row, norms


def check_facts(facts: Mapping[str, Any], *, where: str) -> None:
    """Raise `InvalidArgument` for facts with a name of the record's entries, or not representable in JSON."""
    clash = sorted(facts.keys() & _ENTRIES)
    check(where, (not clash, "the record has entries of this name itself", clash, None))
    for name, value in facts.items():
        plain(value, f"{where}: {name}")


def line(row: Mapping[str, Any]) -> bytes:
    """Return a plain row as one line of JSON."""
    return _encode(row).encode() + b"\n"


def plain(value: Any, where: str = "record") -> Any:
    """Return a value as plain JSON data, or raise `InvalidArgument` with its key.

    Arrays become lists, non-finite numbers ``None``, since JSON has none.
    """
    kind = type(value)
    if kind is float:
        return value if math.isfinite(value) else None
    if kind is str or kind is int or kind is bool or value is None:
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(element, f"{where}: {key}") for key, element in value.items()}
    if isinstance(value, list | tuple):
        return [plain(element, where) for element in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist(), where)
    for known in (int, float, str):
        # A derived type, such as an enumeration.
        if isinstance(value, known):
            return plain(known(value), where)
    raise InvalidArgument(
        "this value cannot be written to a record",
        where=where,
        got=kind.__name__,
        allowed="numbers, text, lists and tables of them",
    )


def _gradients(outcome: Outcome) -> dict[str, float]:
    norms = outcome.tensors()
    if outcome.element_wise or not outcome.peaks:
        return norms
    # Largest magnitudes cannot be compared with the norms of the others.
    return {name: norm for name, norm in norms.items() if name not in outcome.peaks}
