"""A record of steps with the time of each, and their counts."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from karikomi.record import Recorder


class TimedRecorder(Recorder):
    """A recorder that adds ``ms`` to each step's row: the time since the row of the step before.

    The first step of an epoch has none, because evaluation happens in between. Times are written and
    never read back for a decision.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.ms: list[float] = []
        self.epochs: list[dict[str, Any]] = []
        self.steps = self.clipped = self.skipped = 0
        self._last: float | None = None

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row; count it if it is a step, keep it if it is an epoch."""
        now = time.perf_counter()
        if row.get("event") != "step":
            self._last = None
            if row.get("event") == "epoch":
                self.epochs.append({key: row.get(key) for key in ("validation", "loss")})
            super().write(row)
            return
        elapsed = None if self._last is None else 1e3 * (now - self._last)
        self._last = now
        if elapsed is not None:
            self.ms.append(elapsed)
        self.steps += 1
        self.clipped += bool(row.get("clipped"))
        self.skipped += bool(row.get("skipped"))
        super().write({**row, "ms": elapsed})
