"""The section of an audit on the examples whose prediction changed: a table, and their pictures or their text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from karikomi.report.drawing import drawn, frame, label, width
from karikomi.report.page import Chart, Part, Section, Table
from karikomi.report.pictures import SIDE, picture
from karikomi.report.result_checks import named, records
from karikomi.report.wording import shorten

_LISTED, _GAP, _TOP, _LETTERS = 50, 16.0, 20.0, 160
_Rows = Sequence[Mapping[str, Any]]


def changed_section(result: Mapping[str, Any]) -> Section | None:
    """Return the section on changed examples; None where none changed, or the metric has no predictions."""
    examples = records(result.get("changed_examples"), "changed_examples", where="audit")
    if not examples:
        return None
    shown = records(result.get("changed_inputs"), "changed_inputs", where="audit")
    parts: list[Part] = []
    if shown and isinstance(shown[0].get("words"), list | tuple):
        parts.append(_texts(shown))
    elif shown and _pictures(shown) is not None:
        note = "Lost ones first: the true class, then the prediction before and after."
        parts.append(Chart("Changed examples", drawn(lambda: _pictures(shown) or Markup("")), note))
    return Section("Changed predictions", [*parts, _table(examples)])


def outcome(row: Mapping[str, Any]) -> str:
    """Return whether a changed example was lost, gained, or wrong both times."""
    label, before, after = (named(row.get(key)) for key in ("label", "before", "after"))
    return "lost" if before == label else "gained" if after == label else "wrong both times"


def _table(examples: _Rows) -> Table:
    keys = ("index", "label", "before", "after")
    rows = [
        (*(named(example.get(key)) for key in keys), outcome(example))
        for example in examples[:_LISTED]
    ]
    more = len(examples) - len(rows)
    note = f"The first {_LISTED} of {len(examples)}." if more else ""
    return Table("Examples", (*keys, ""), rows, names=5, note=note)


def _texts(shown: _Rows) -> Table:
    rows = []
    for row in shown:
        words = [str(word) for word in row.get("words") or ()]
        # Letters are tokens too; they are joined as they are.
        letters = all(len(word) <= 1 for word in words)
        text = ("" if letters else " ").join(words)
        classes = (named(row.get(key)) for key in ("label", "before", "after"))
        rows.append((shorten(" ".join(text.split()), _LETTERS), *classes))
    columns = ("text", "label", "before", "after")
    return Table("Changed examples", columns, rows, names=4, note="Lost ones first.")


def _pictures(shown: _Rows) -> Markup | None:
    across = max(int((width() - 16.0) // (SIDE + _GAP)), 1)
    parts: list[Markup] = []
    top, tallest = _TOP, 0.0
    for number, row in enumerate(shown):
        if number and number % across == 0:
            top, tallest = top + tallest + 40.0, 0.0
        left = 8.0 + number % across * (SIDE + _GAP)
        made = picture(row.get("input"), left, top)
        if made is None:
            return None
        classes = [shorten(named(row.get(key)), 5) for key in ("label", "before", "after")]
        parts += [label(left, top - 6, f"{classes[0]}: {classes[1]} → {classes[2]}"), made[0]]
        tallest = max(tallest, made[1])
    words = "Inputs whose prediction changed; above each its class, and the predictions before and after."
    return frame("Changed examples", words, top + tallest + 16.0, parts) if parts else None
