"""The page of one training from its record: loss, norms, contributions, skipped steps."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from karikomi.files import as_path
from karikomi.report.page import Page, Part, Section, Table, Tile, Words, render, write_page
from karikomi.report.record_curves import read_history
from karikomi.report.result_checks import named, table
from karikomi.report.terminal import align, printable, wrap
from karikomi.report.training_section import loss_chart, norm_chart, validation_chart
from karikomi.report.wording import MISSING, count, number, percent, plain

_SHOWN = 12


@dataclass(frozen=True, slots=True)
class TrainingPage:
    """Write the page of a training to a file when called with the rows of a record.

    `path`: of the file, which is replaced atomically. Raises `Unwritable` if it cannot be written.

    >>> page = TrainingPage("training.html")
    >>> page([{"event": "step", "step": 1, "norm": 4.0, "factor": 0.25, "clipped": True}]).name
    'training.html'
    """

    path: str | os.PathLike[str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", as_path(self.path))

    def __call__(self, rows: Iterable[Mapping[str, Any]]) -> Path:
        """Draw and write the page, and return its path."""
        return write_page(self.path, training_page(rows))


def training_page(rows: Iterable[Mapping[str, Any]], *, title: str = "Training") -> str:
    """Return the HTML page of one training from the rows of its record, read once.

    Loss and gradient norm before and after clipping, with the clipped and skipped steps marked; how much
    each tensor contributes to the norm, on average; the latest skipped steps with the tensors at fault.

    >>> rows = [{"event": "step", "step": 1, "norm": 4.0, "factor": 0.25, "clipped": True, "loss": 2.0}]
    >>> "1 of 1 steps" in training_page(rows)
    True
    """
    seen = _Seen()
    history = read_history(seen.through(rows))
    parts: list[Part] = [Words("No steps were recorded, so there are no curves.")]
    if history.stages:
        parts = [norm_chart(history)]
        if any(loss is not None for _, loss in history.loss):
            parts.append(loss_chart(history))
        if any(value is not None for _, value in history.validation):
            parts.append(validation_chart(history, [], "loss"))
    sections = [Section("Curves", parts)]
    if seen.largest:
        sections.append(Section("Largest norms", [Words(seen.summit()), seen.summits()]))
    if seen.shares:
        sections.append(Section("Contributions", [seen.contributions()]))
    if seen.skips:
        sections.append(Section("Skipped steps", [seen.skipped_steps()]))
    norms = [norm for _, norm in history.norm if norm is not None]
    return render(Page(title, seen.lead(), seen.tiles(norms), sections))


def training_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the same for a terminal, in 80 columns: counts, the largest norms with tensor and step, skipped steps.

    >>> row = {"event": "step", "step": 7, "norm": 5.0, "gradients": {"top": {"a": 4.0, "b": 3.0}}}
    >>> print(training_table([row]))
    0 of 1 steps were clipped (0.0 %), 0 were skipped.
    The largest norm of a tensor was 4, of a in step 7.
    tensor  largest norm  step
    a                  4     7
    b                  3     7
    Before clipping.
    """
    seen = _Seen()
    for _ in seen.through(rows):
        pass
    lines = [seen.lead()]
    if seen.largest:
        found = seen.summits()
        lines += [*wrap(printable(seen.summit())), *align([found.columns, *found.rows])]
        lines += wrap(found.note)
    if seen.skips:
        found = seen.skipped_steps()
        lines += ["", *align([found.columns, *found.rows], left=2)]
    return "\n".join(lines)


@dataclass(slots=True)
class _Seen:
    """Sums of one pass over the rows, besides the curves."""

    steps: int = 0
    clipped: int = 0
    skipped: int = 0
    measured: int = 0
    shares: dict[str, float] = field(default_factory=dict)
    largest: dict[str, tuple[float, str]] = field(default_factory=dict)
    left_out: float = 0.0
    names: list[str] = field(default_factory=list)
    skips: list[tuple[str, str]] = field(default_factory=list)

    def through(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        """Yield the rows, and count them."""
        for row in rows:
            if row.get("event") == "step":
                self._add(row)
            elif row.get("event") == "names":
                names = row.get("gradients")
                self.names = [named(name) for name in names] if isinstance(names, list) else []
            yield row

    def lead(self) -> str:
        """Return a sentence with the numbers of clipped and skipped steps."""
        share = f" ({percent(self.clipped / self.steps)})" if self.steps else ""
        return (
            f"{count(self.clipped)} of {count(self.steps)} steps were clipped{share}, "
            f"{count(self.skipped)} were skipped."
        )

    def tiles(self, norms: list[float]) -> list[Tile]:
        """Return the figures of the headline."""
        return [
            Tile("steps", count(self.steps)),
            Tile("clipped", percent(self.clipped / self.steps) if self.steps else MISSING),
            Tile("skipped", count(self.skipped)),
            Tile("median norm", plain(median(norms)) if norms else MISSING, "before clipping"),
            Tile("largest norm", plain(max(norms)) if norms else MISSING, "before clipping"),
        ]

    def summit(self) -> str:
        """Return a sentence with the tensor and the step of the largest norm."""
        name, (norm, step) = self._ranked()[0]
        return f"The largest norm of a tensor was {plain(norm)}, of {name} in step {step}."

    def summits(self) -> Table:
        """Return the largest norm of each tensor with its step, the largest first."""
        more = len(self.largest) > _SHOWN
        note = (
            f"Before clipping; {_SHOWN} of {count(len(self.largest))} tensors."
            if more
            else "Before clipping."
        )
        if self.left_out > max(norm for norm, _ in self.largest.values()):
            note += f" A step that the record left out had a norm of {plain(self.left_out)}."
        return Table(
            "Largest norms of single tensors",
            ["tensor", "largest norm", "step"],
            [[name, plain(norm), step] for name, (norm, step) in self._ranked()[:_SHOWN]],
            note=note,
        )

    def _ranked(self) -> list[tuple[str, tuple[float, str]]]:
        return sorted(self.largest.items(), key=lambda pair: (-pair[1][0], pair[0]))

    def contributions(self) -> Table:
        """Return the contributions of tensors, the largest first."""
        ranked = sorted(self.shares.items(), key=lambda pair: (-pair[1], pair[0]))[:_SHOWN]
        return Table(
            "Share of the squared gradient norm",
            ["tensor", "share"],
            [[name, percent(share / self.measured)] for name, share in ranked],
            note="On average over the steps, of the tensors with the largest norms.",
        )

    def skipped_steps(self) -> Table:
        """Return the latest skipped steps."""
        note = f"The last {_SHOWN} of {count(self.skipped)}." if len(self.skips) > _SHOWN else ""
        return Table(
            "What was skipped, and why",
            ["step", "not finite"],
            [list(pair) for pair in self.skips[-_SHOWN:]],
            names=2,
            note=note,
        )

    def _add(self, row: Mapping[str, Any]) -> None:
        left = table(row.get("left_out"))
        self.steps += 1 + int(number(left.get("steps")) or 0)
        self.clipped += (row.get("clipped") is True) + int(number(left.get("clipped")) or 0)
        self.skipped += (row.get("skipped") is True) + int(number(left.get("skipped")) or 0)
        if row.get("skipped") is True:
            bad = row.get("nonfinite")
            tensors = (
                ", ".join(map(str, bad)) if isinstance(bad, list) else "none: the rule skipped it"
            )
            self.skips = [*self.skips[-_SHOWN:], (count(row.get("step")), tensors)]
        self.left_out = max(self.left_out, number(left.get("norm")) or 0.0)
        norms = self._norms(row.get("gradients"))
        stage = f" ({named(row['stage'])})" if "stage" in row else ""
        step = f"{count(row.get('step'))}{stage}"
        for name, norm in norms.items():
            if norm > self.largest.get(name, (0.0, ""))[0]:
                self.largest[name] = norm, step
        self._share(number(row.get("norm")), norms)

    def _norms(self, given: Any) -> dict[str, float]:
        """Return name -> norm of the tensors in a row: the largest by name, or all in the order of the names."""
        pairs = table(table(given).get("top")).items()
        if isinstance(given, list) and len(given) == len(self.names):
            pairs = zip(self.names, given, strict=True)
        return {named(name): norm for name, item in pairs if (norm := number(item)) is not None}

    def _share(self, joint: float | None, norms: Mapping[str, float]) -> None:
        # For element-wise rules, the norm of a row is the largest magnitude, not a joint norm.
        shares = {name: (norm / joint) ** 2 for name, norm in norms.items()} if joint else {}
        if not shares or sum(shares.values()) > 1.001:
            return
        self.measured += 1
        for name, share in shares.items():
            self.shares[name] = self.shares.get(name, 0.0) + share
