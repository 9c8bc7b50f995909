"""Records of karikomi, of any version: codes of all tensors, lists of them, or the largest by name only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from karikomi.advising.assembly import Assembly
from karikomi.advising.formats.keyed import as_number
from karikomi.advising.recorded import QUANTITIES, Recorded
from karikomi.errors import BadFile, UnknownName, suggest
from karikomi.record import read
from karikomi.record.log_codes import codes_of, decoded

FORMAT = "record of karikomi"
_MOST_TENSORS = 100_000


def read_record(path: Path, stage: str | None = None) -> Recorded:
    """Return the run of a record; of one with stages (`karikomi.compress`), the given or else the first.

    Raises `BadFile` for a file that is no record, or one without steps; `UnknownName` for a stage that
    it does not have.
    """
    assembly = Assembly(str(path), FORMAT)
    tensors, facts, stages = _Tensors(), {}, {}
    for row in read(path):
        event = row.get("event")
        if event == "names":
            tensors.rename(row)
        elif event == "run":
            facts = {key: value for key, value in row.items() if key != "event"}
        elif event == "step":
            own = str(row.get("stage", ""))
            stages[own] = stages.get(own, 0) + 1
            chosen = next(iter(stages)) if stage is None else stage
            if own == chosen:
                _add(assembly, row)
                tensors.add(row)
    if not stages:
        raise BadFile("the record has no step", where=str(path), hint="was the run started?")
    if stage is not None and stage not in stages:
        raise UnknownName("no such stage", where=str(path), got=stage, hint=suggest(stage, stages))
    others = [name for name in stages if name != (next(iter(stages)) if stage is None else stage)]
    if others:
        shown = ", ".join(others[:4]) + (", ..." if others[4:] else "")
        assembly.lost.append(f"the steps of {len(others)} other stages: {shown}")
    codes = tensors.matrices()
    return assembly.finish(names=tuple(tensors.places), codes=codes, facts=facts)


def _add(assembly: Assembly, row: Mapping[str, Any]) -> None:
    left = row.get("left_out")
    culprits = row.get("nonfinite")
    values = {key: _number(row, key) for key in ("norm", "loss", "lr", "factor", "loss_scale")}
    if row.get("skipped") and not culprits:
        # A rule skipped it, or a scaler: a norm of None is then one that overflowed.
        values["norm"] = values["norm"] if values["norm"] == values["norm"] else None
    step = row.get("step")
    assembly.add(
        step if isinstance(step, int) else len(assembly.steps),
        values,
        clipped=row.get("clipped") is True,
        skipped=row.get("skipped") is True,
        left_out=int(left["steps"]) if isinstance(left, dict) and "steps" in left else 0,
        culprits=map(str, culprits) if isinstance(culprits, list) else (),
        order=_order(row.get("norm_order", 2.0)),
    )


def _order(given: Any) -> float:
    """Return the p of a row's norm; 2 for what is none."""
    order = as_number(given)
    return order if order is not None and order >= 1.0 else 2.0


def _number(row: Mapping[str, Any], key: str) -> float | None:
    """Return a number; NaN for one that is there as ``null``, which was not finite; ``None`` if it is absent."""
    if key not in row:
        return None
    value = row[key]
    if value is None:
        return math.nan
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


class _Tensors:
    """The codes of tensors, row by row; the names may change in the middle of a run."""

    def __init__(self) -> None:
        self.places: dict[str, int] = {}
        self._order: dict[str, np.ndarray] = {}
        self._rows: dict[str, list[tuple[np.ndarray, np.ndarray] | None]] = {
            of: [] for of in QUANTITIES
        }

    def rename(self, row: Mapping[str, Any]) -> None:
        """Take in a row of the event ``names``."""
        for of in QUANTITIES:
            names = row.get(of)
            if isinstance(names, list) and len(names) <= _MOST_TENSORS:
                self._order[of] = self._places_of(names)

    def add(self, row: Mapping[str, Any]) -> None:
        """Take in the tensors of a step."""
        codes = row.get("codes")
        for of, rows in self._rows.items():
            text = codes.get(of) if isinstance(codes, dict) else None
            own = self._of_text(of, text) if isinstance(text, str) else self._plain(of, row.get(of))
            rows.append(own)

    def matrices(self) -> dict[str, np.ndarray]:
        """Return quantity -> codes, shape (T, N), 0 where unknown."""
        found = {}
        for of, rows in self._rows.items():
            if any(row is not None for row in rows):
                matrix = np.zeros((len(rows), len(self.places)), np.uint16)
                for row, target in zip(rows, matrix, strict=True):
                    if row is not None:
                        target[row[0]] = row[1]
                found[of] = matrix
        return found

    def _places_of(self, names: Iterable[object]) -> np.ndarray:
        return np.array([self.places.setdefault(str(n), len(self.places)) for n in names], np.intp)

    def _of_text(self, of: str, text: str) -> tuple[np.ndarray, np.ndarray] | None:
        order = self._order.get(of, np.empty(0, np.intp))
        try:
            codes = decoded(text)
        except ValueError:
            return None
        return (order, codes) if len(codes) == len(order) else None

    def _plain(self, of: str, given: Any) -> tuple[np.ndarray, np.ndarray] | None:
        if isinstance(given, dict) and isinstance(given.get("top"), dict):
            pairs = given["top"]
            bad = given.get("nonfinite")
            pairs = {**pairs, **dict.fromkeys(bad if isinstance(bad, list) else (), None)}
            names, values = self._places_of(pairs), list(pairs.values())
        elif isinstance(given, list) and len(given) == len(self._order.get(of, ())):
            names, values = self._order[of], given
        else:
            return None
        numbers = [math.nan if value is None else value for value in values]
        if not all(isinstance(number, int | float) for number in numbers):
            return None
        return names, codes_of(np.array(numbers, np.float64))
