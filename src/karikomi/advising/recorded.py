"""What is known of a finished run, whatever recorded it: one array per quantity, and where its rows come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

QUANTITIES = ("gradients", "weights", "updates")

COLUMNS = ("norm", "loss", "lr", "factor", "loss_scale")
"""The columns of numbers; one that was not recorded is NaN everywhere."""


@dataclass(frozen=True)
class Recorded:
    """The rows of a run in order, T of them, and the norms of its N tensors.

    `steps`: their numbers, rising. `columns`: `COLUMNS` -> float64, shape (T,), NaN where a row lacks it or where
    it was not finite. `clipped`, `skipped`, `bad`: bool, shape (T,); a row is bad if a gradient or the norm was
    not finite. `bad_loss`: whether the loss was recorded and was not finite. `culprits`: row -> names of tensors
    with non-finite gradients. `left_out`: steps that the record left out before each row, shape (T,).
    `names`: of the tensors, in module order. `codes`: quantity -> uint16, shape (T, N), of
    `karikomi.record.log_codes`; 0 where unknown. `facts`: of the run (optimizer, betas, sizes). `mean_of`: how many
    steps a loss is the mean of. `order`: the p of the
    norms of gradients. `after_clip`: whether the norms are those after the clip. `lost`: rows that could not be used,
    with the reason.
    """

    source: str
    format: str
    steps: np.ndarray
    columns: Mapping[str, np.ndarray]
    clipped: np.ndarray
    skipped: np.ndarray
    bad: np.ndarray
    bad_loss: np.ndarray
    culprits: Mapping[int, tuple[str, ...]]
    left_out: np.ndarray
    names: tuple[str, ...] = ()
    codes: Mapping[str, np.ndarray] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    mean_of: float = 1.0
    order: float = 2.0
    after_clip: bool = False
    lost: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.steps)

    @cached_property
    def stride(self) -> float:
        """The median distance between the steps of two rows."""
        return float(np.median(np.diff(self.steps))) if len(self) > 1 else 1.0

    def has(self, column: str) -> bool:
        """Return whether any row has this column."""
        return bool(np.isfinite(self.columns[column]).any())

    def measured(self, quantity: str) -> bool:
        """Return whether norms of single tensors were recorded."""
        return quantity in self.codes and bool(self.codes[quantity].any())

    @property
    def adaptive(self) -> bool | None:
        """Whether the optimizer divides by second moments (Adam and its kin); ``None`` if it is not known."""
        name = str(self.facts.get("optimizer") or "").lower()
        if not name:
            return None
        return any(word in name for word in ("adam", "adagrad", "rmsprop", "lamb", "adafactor"))

    @property
    def missing(self) -> list[str]:
        """What a post-mortem would need and the run did not record."""
        found = [
            name
            for name, column in (("loss", "loss"), ("learning rate", "lr"), ("norm", "norm"))
            if not self.has(column)
        ]
        found += [
            f"norms of {quantity}"
            if quantity != "gradients"
            else "gradient norms of single tensors"
            for quantity in QUANTITIES
            if not self.measured(quantity)
        ]
        return found if "optimizer" in self.facts else [*found, "optimizer"]
