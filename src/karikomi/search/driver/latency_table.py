"""The latency table of a run: each network form is measured once, alone, and read ever after."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from karikomi.errors import BadFile, Unsupported
from karikomi.files import write_json
from karikomi.search.lock import read_json


class LatencyTable:
    """Form -> milliseconds, in a file of the run folder, with the machine that they were measured on.

    `form`: a digest of what the time depends on, such as the shapes of the network. A form that is in the table is
    never measured again, on resume and in other processes too, so that a budget in milliseconds decides the same
    each time. Only the process that made it with `measure` adds to it, while nothing else is evaluated.
    """

    def __init__(
        self,
        path: Path,
        machine: Mapping[str, Any],
        measure: Callable[[str], Mapping[str, float]] | None = None,
    ) -> None:
        self.path, self._measure, self.notes = path, measure, list[str]()
        known = read_json(path)
        self._table: dict[str, Any] = known or {"machine": dict(machine), "rows": {}}
        if not isinstance(self._table.get("rows"), dict):
            raise BadFile("not a latency table", where=str(path))
        before = self._table.get("machine", {})
        changed = sorted(key for key in machine if before.get(key) != machine[key])
        if changed:
            self.notes.append(
                f"the latency table was measured with another {', '.join(changed)}: a budget in ms is of that machine"
            )

    @property
    def rows(self) -> dict[str, Mapping[str, float]]:
        """Form -> what was measured."""
        return dict(self._table["rows"])

    def row(self, form: str) -> Mapping[str, float]:
        """Return what was measured of a form, ``ms`` among it, measuring it now where it is new.

        Raises `Unsupported` for a new form where nothing may be measured.
        """
        rows = self._table["rows"]
        if form not in rows:
            if self._measure is None:
                raise Unsupported(
                    "this form is not in the latency table", where=str(self.path), got=form
                )
            rows[form] = dict(self._measure(form))
            write_json(self.path, self._table)
        return {name: float(value) for name, value in rows[form].items()}

    def ms(self, form: str) -> float:
        """Return the milliseconds of a form, as `row`."""
        return self.row(form)["ms"]
