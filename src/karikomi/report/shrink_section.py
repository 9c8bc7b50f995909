"""The section on shrinking: what the network costs to run before and after, which units went, and why others stayed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from karikomi.report.page import Part, Points, Section, Table, Words
from karikomi.report.result_checks import named, table
from karikomi.report.verdict import difference
from karikomi.report.wording import count, number, percent, plain

_LISTED = 100
_FASTER = 1.05
_COSTS = (("parameters in memory", "parameters"), ("multiply-accumulates", "macs"))


def speed(result: Mapping[str, Any]) -> str:
    """Return how many times as fast a pass is, where it is: by times in turn, their interval is above 1.

    >>> timed = {"ms_before": 3.0, "ms_after": 2.9, "faster": 1.04, "low": 1.02, "high": 1.05}
    >>> speed({"ms_before": 3.0, "ms_after": 2.9, "timed": [timed]})
    '✓ 1.04x as fast'
    >>> speed({"ms_before": 3.0, "ms_after": 2.0}), speed({"ms_before": 3.0, "ms_after": 2.95}), speed({})
    ('✓ 1.50x faster', '✗ not faster', 'n/a')
    """
    before, after = number(result.get("ms_before")), number(result.get("ms_after"))
    if not before or not after:
        return "n/a"
    timed = table((result.get("timed") or [None])[-1])
    if (low := number(timed.get("low"))) and timed.get("ms_after") == after:
        return f"✓ {plain(timed.get('faster'), 3)}x as fast" if low > 1 else "✗ not faster"
    return f"✓ {before / after:.2f}x faster" if before >= _FASTER * after else "✗ not faster"


def milliseconds(result: Mapping[str, Any]) -> str:
    """Return the measured milliseconds of a forward pass before and after."""
    before, after = result.get("ms_before"), result.get("ms_after")
    return f"{plain(before, 3)} → {plain(after, 3)} ms" if number(after) else "was not measured"


def shrink_section(result: Mapping[str, Any]) -> Section:
    """Return the section on the units that were removed from a compressed network."""
    shrink = table(result.get("shrink"))
    before, after = table(shrink.get("widths_before")), table(shrink.get("widths_after"))
    alone = [
        f"{name} was left alone: {named(reason)}."
        for name, reason in list(table(shrink.get("left_alone")).items())[:_LISTED]
    ]
    if not before:
        none: list[Part] = [Words("No units were removed: the widths are as trained.")]
        return Section("Shrinking", [*none, Points(alone)] if alone else none)
    rows = [
        (name, count(width), count(after.get(name)), count(difference(width, after.get(name))))
        for name, width in list(before.items())[:_LISTED]
    ]
    more = len(before) - len(rows)
    note = f"{more} more layers are not listed." if more else ""
    parts: list[Part] = [
        Words(named(shrink.get("verdict"), "")),
        Words(
            f"{count(shrink.get('removed'))} units were removed; parameters"
            f" {count(shrink.get('parameters_before'))} → {count(shrink.get('parameters_after'))}."
        ),
        Table("Costs", ("", "before", "after", ""), _costs(shrink), names=1),
        Table("Widths", ("layer", "units before", "after", "removed"), rows, note=note),
        Points(_joined(shrink)),
        Points(alone),
    ]
    return Section("Shrinking", [part for part in parts if part not in (Words(""), Points([]))])


def _costs(shrink: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for title, key in _COSTS:
        values = shrink.get(f"{key}_before"), shrink.get(f"{key}_after")
        rows.append((title, *map(count, values), _share(*values)))
    values = shrink.get("ms_before"), shrink.get("ms_after")
    return [*rows, ("milliseconds a pass", *(plain(value, 3) for value in values), _share(*values))]


def _share(before: Any, after: Any) -> str:
    first, last = number(before), number(after)
    return percent(last / first) if first and last is not None else "n/a"


def _joined(shrink: Mapping[str, Any]) -> list[str]:
    """Return a line for each group of units that had to go together, with the operators that joined them."""
    lines = []
    for name, sites in list(table(shrink.get("together")).items())[:_LISTED]:
        listed = [named(site) for site in sites] if isinstance(sites, list) else []
        if listed:
            more = f" and {len(listed) - 4} more" if listed[4:] else ""
            lines.append(f"{name}: its units go together by {'; '.join(listed[:4])}{more}.")
    return lines
