"""The report of a shrink: costs before and after, what went, what had to go together, what stayed and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

FASTER = 1.05
"""Times that differ by less are not told apart."""
EVEN, ROUND = 4, 8
"""Widths that are multiples of these suit the vectors of processors: of layers below 64 units, and of others."""
OUTPUT, SINGLE = "its units are outputs of the network", "it has one unit"
"""Why layers of every network keep their units."""
_LISTED = 12


@dataclass(frozen=True, slots=True)
class Refit:
    """One layer that was re-fitted: its relative error on held-out data before and after, and whether it was kept.

    `why`: the reason if it was not tried.
    """

    before: float = 0.0
    after: float = 0.0
    kept: bool = False
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShrinkReport:
    """The account of a shrink; print it.

    `widths_before`, `widths_after`: layer name -> output units. `parameters_before`,
    `parameters_after`: numbers of the whole network, a shared one counted once. `macs_before`, `macs_after`:
    multiply-accumulates on the example inputs. `ms_before`, `ms_after`: milliseconds of a forward pass on them,
    the median, measured in turn on this machine. `max_difference`: the largest difference to the original's
    outputs (of which the removed units are zero), relative to the largest; measured before anything is re-fitted.
    `compensation`: layer -> its re-fit, "" -> the whole network (its loss, or the relative distance of its outputs
    to the original's). `left_alone`: layer name -> why units of it that look dead (or all of them) stayed, counted
    in the smaller network. `frozen`: layer name, or place, -> why nothing there can go. `together`: first tensor
    of a group -> operators, with source lines, because of which its units go together; `members`: the same -> all
    tensors that the units are found in. `statistics`: places where a norm, a softmax or a mean goes over fewer
    entries, or a sum over fewer of what is not zero. `form`: "module", of the same class, or "graph", exported; then
    `literals` has the numbers in the code that are in the way. `kept`: tensor name -> axis -> indices that were kept.
    `latencies`: share and milliseconds that were tried for a budget in them. `hint`: what may make it faster.

    >>> report = ShrinkReport(
    ...     widths_before={"fc1": 300}, widths_after={"fc1": 191}, parameters_before=3000,
    ...     parameters_after=1910, left_alone={}, max_difference=0.0, ms_before=3.0, ms_after=2.0)
    >>> report.removed, report.as_dict()["removed"], report.verdict
    (109, 109, '1.50x faster: 3.00 -> 2.00 ms.')
    """

    widths_before: dict[str, int]
    widths_after: dict[str, int]
    parameters_before: int
    parameters_after: int
    left_alone: dict[str, str]
    max_difference: float
    macs_before: int = 0
    macs_after: int = 0
    ms_before: float | None = None
    ms_after: float | None = None
    frozen: dict[str, str] = field(default_factory=dict)
    together: dict[str, list[str]] = field(default_factory=dict)
    members: dict[str, list[str]] = field(default_factory=dict)
    statistics: list[str] = field(default_factory=list)
    literals: list[str] = field(default_factory=list)
    form: str = "module"
    latencies: list[tuple[float, float]] = field(default_factory=list)
    kept: dict[str, dict[int, list[int]]] = field(default_factory=dict)
    compensation: dict[str, Refit] = field(default_factory=dict)

    @property
    def removed(self) -> int:
        """The number of units that are gone."""
        return sum(self.widths_before.values()) - sum(self.widths_after.values())

    @property
    def verdict(self) -> str:
        """Whether it is faster; if not, the reason."""
        if not self.ms_before or not self.ms_after:
            return "The time was not measured."
        times = f"{self.ms_before:.3g} -> {self.ms_after:.3g} ms"
        ratio = self.ms_before / self.ms_after
        if ratio >= FASTER and self._smaller:
            return f"{ratio:.2f}x faster: {self.ms_before:.2f} -> {self.ms_after:.2f} ms."
        return f"Not faster ({times}): {self.reason}."

    @property
    def _smaller(self) -> bool:
        """Whether anything went: times of two networks that are the same differ by chance."""
        return (self.removed, self.parameters_before) != (0, self.parameters_after)

    @property
    def hint(self) -> str:
        """What to try where the time fell less than the multiply-accumulates, and some widths are uneven; else empty.

        Uneven is a width that is no multiple of 4 and was one of 8.

        >>> ShrinkReport(widths_before={"a": 16}, widths_after={"a": 7}, parameters_before=9, parameters_after=4,
        ...     left_alone={}, max_difference=0.0, macs_before=100, macs_after=50, ms_before=2.0, ms_after=1.9).hint
        'Kernels are slower at uneven widths (1 layer, such as a: 16 -> 7): try multiple_of=4.'
        """
        before, after = self.widths_before, self.widths_after
        uneven = [name for name, n in before.items() if n % ROUND == 0 and after[name] % EVEN]
        if not uneven or not self.ms_before or not self.ms_after or not self.macs_before:
            return ""
        if self.ms_after / self.ms_before < FASTER * self.macs_after / self.macs_before:
            return ""
        first = max(uneven, key=lambda name: before[name])
        size = ROUND if min(before[name] for name in uneven) >= 8 * ROUND else EVEN
        count = f"{len(uneven)} layer{'s' if len(uneven) > 1 else ''}"
        example = f"{first}: {before[first]} -> {after[first]}"
        return f"Kernels are slower at uneven widths ({count}, such as {example}): try multiple_of={size}."

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as plain values, for JSON."""
        return {
            **asdict(self),
            "removed": self.removed,
            "verdict": self.verdict,
            "reason": self.reason,
            "hint": self.hint,
        }

    def __str__(self) -> str:
        """Return the account as text: whether it is faster, the costs, the layers, and the reasons."""
        costs = [("", "before", "after", "")]
        for name, before, after in (
            ("parameters", self.parameters_before, self.parameters_after),
            ("multiply-accumulates", self.macs_before, self.macs_after),
            ("milliseconds", self.ms_before, self.ms_after),
        ):
            costs.append((name, _number(before), _number(after), _share(before, after)))
        layers = [
            (name, _number(width), _number(self.widths_after[name]), "")
            for name, width in self.widths_before.items()
            if self.widths_after[name] != width
        ]
        lines = [self.verdict, *filter(None, [self.hint]), "", *_aligned(costs)]
        head = ("layer", "units", "after", "")
        lines += ["", *_aligned([head, *_first(layers, "layers")])] if layers else []
        lines += ["", self.refits] if self.refits else []
        for title, rows in (
            ("Went together:", self._joined()),
            (
                "Stayed:",
                [f"{name}: {why}" for name, why in {**self.frozen, **self.left_alone}.items()],
            ),
            (
                "Not re-fitted:",
                [f"{name}: {refit.why}" for name, refit in self.compensation.items() if refit.why],
            ),
            ("Fewer entries in the statistics of:", self.statistics),
            ("An exported graph, since the code has the old sizes at:", self.literals),
        ):
            lines += ["", title, *(f"  {row}" for row in _first(rows, "more"))] if rows else []
        return "\n".join(line.rstrip() for line in lines)

    @property
    def refits(self) -> str:
        """How many layers were re-fitted, and what that changed on held-out data; empty if nothing was tried."""
        if not self.compensation:
            return ""
        whole = self.compensation[""]
        change = f"{whole.before:.3g} -> {whole.after:.3g}"
        if not whole.kept:
            return (
                f"Nothing is re-fitted: on held-out data the whole network is no better ({change})."
            )
        layers = [refit for name, refit in self.compensation.items() if name]
        kept = sum(refit.kept for refit in layers)
        return f"Re-fitted: {kept} of {len(layers)} layers; the whole network on held-out data: {change}."

    @property
    def reason(self) -> str:
        """Why it is no faster, where it is not."""
        stay = {**self.frozen, **self.left_alone}
        macs = self.macs_before, self.macs_after
        return why_no_faster(self.removed, *macs, stay, widths=self.widths_before)

    def _joined(self) -> list[str]:
        """Return a line for each group from which units went, of several tensors: which, and because of what."""
        lines = []
        for name, members in self.members.items():
            gone = any(member.split(",")[0] in self.kept for member in members)
            if gone and len(members) > 1:
                sites = "; ".join(self.together.get(name, [])[:3])
                others = ", ".join(members[1:5]) + (", ..." if members[5:] else "")
                lines.append(f"{members[0]} with {others}" + (f": {sites}" if sites else ""))
        return lines


def _number(value: float | None) -> str:
    if value is None:
        return "n/a"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def _share(before: float | None, after: float | None) -> str:
    return f"{after / before:.1%}" if before and after is not None else ""


def _first(rows: Sequence[Any], what: str) -> list[Any]:
    """Return the first rows, and how many there are beside them."""
    shown = list(rows[:_LISTED])
    more = len(rows) - len(shown)
    if more and isinstance(shown[0], tuple):
        return [*shown, (f"and {more} {what}", "", "", "")]
    return [*shown, f"and {more} {what}"] if more else shown


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def why_no_faster(
    removed: int,
    macs_before: int,
    macs_after: int,
    stay: Mapping[str, str],
    *,
    widths: Mapping[str, int] | None = None,
) -> str:
    """Return why fewer units do not mean less time.

    `stay`: layer -> why none of its units went; `widths`: units of all layers.

    >>> why_no_faster(0, 10, 10, {"head": "its units are outputs of the network"})
    'no unit was removed (its units are outputs of the network)'
    >>> why_no_faster(0, 10, 10, {"head": "its units are outputs of the network"}, widths={"body": 8, "head": 2})
    'no unit was removed, though body could lose some'
    """
    if not removed:
        free = [name for name, width in (widths or {}).items() if width > 1 and name not in stay]
        more = f" and {len(free) - 1} other layer{'s' if len(free) > 2 else ''}" if free[1:] else ""
        though = f", though {free[0]}{more} could lose some" if free else ""
        reasons = list(
            dict.fromkeys(why for why in stay.values() if not free or why not in (OUTPUT, SINGLE))
        )
        return f"no unit was removed{though}" + (f" ({'; '.join(reasons[:2])})" if reasons else "")
    if macs_after >= macs_before:
        return "the multiply-accumulates are as many as before"
    return (
        f"the multiply-accumulates fell by {1 - macs_after / macs_before:.0%}, but on these inputs and this machine"
        " the time is not spent on them (small layers, calls and memory)"
    )
