"""The section of an audit on what both networks look at: in words, between floor and ceiling, and in pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from karikomi.report.attribution_maps import map_pairs, word_pairs
from karikomi.report.bars import Dots, dot_chart
from karikomi.report.drawing import Axis, drawn
from karikomi.report.page import Chart, Part, Section, Table, Words
from karikomi.report.result_checks import named, records, table
from karikomi.report.wording import count, number, plain

_LISTED = 40
_SAME, _PARTLY = 0.8, 0.4
"""Places between floor and ceiling from which on attributions are called the same, or partly so."""
_NAMES = {"cosine": "cosine", "rank": "rank correlation", "top": "overlap of the top tenth"}
_PARTS = ("networks", "floor", "ceiling")
_TITLE = "Do both look at the same inputs?"


def explanation_section(found: Mapping[str, Any]) -> Section | None:
    """Return the section on attributions; None without any."""
    measures = table(found.get("measures"))
    if not measures:
        return None
    parts: list[Part] = [Words(_sentence(found, measures)), _chart(measures), _table(measures)]
    shown = records(found.get("shown"), "shown", where="audit")
    draw = word_pairs if found.get("method") == "occlusion" else map_pairs
    if draw(shown) is not None:
        note = "Those that agree least first: the input, then what counts for (blue) and against (orange)."
        parts.append(Chart("Examples", drawn(lambda: draw(shown) or Markup("")), note))
    classes = records(found.get("classes"), "classes", where="audit")
    if classes:
        order = sorted(classes, key=lambda row: number(row.get("cosine")) or 0.0)
        cells = [
            (
                named(row.get("class")),
                count(row.get("examples")),
                *(plain(row.get(key), 3) for key in ("cosine", "others")),
                plain(row.get("p"), 2),
            )
            for row in order[:_LISTED]
        ]
        columns = ("predicted class", "examples", "cosine", "others", "p")
        parts.append(Table("Agreement by class", columns, cells))
    return Section("What the networks look at", parts)


def answer(place: float | None) -> str:
    """Return whether both networks look at the same inputs, by the place of their agreement.

    >>> answer(0.96)
    'Both look at the same inputs.'
    """
    if place is None:
        return "Whether both look at the same inputs cannot be told: the method does not agree with itself."
    if place >= _SAME:
        return "Both look at the same inputs."
    return f"Both look {'partly at the same' if place >= _PARTLY else 'at different'} inputs."


def _sentence(found: Mapping[str, Any], measures: Mapping[str, Any]) -> str:
    place = number(table(measures.get("cosine")).get("place"))
    return (
        f"{answer(place)} {named(found.get('method')).capitalize()} of what the network before predicts,"
        f" {count(found.get('examples'))} examples. On the way from unrelated (0) to the same (1) the two networks are"
        f" at {plain(place, 2)}."
    )


def _chart(measures: Mapping[str, Any]) -> Chart:
    rows = [
        Dots(words, [number(table(measures.get(key)).get(part)) for part in _PARTS])
        for key, words in _NAMES.items()
    ]
    svg = drawn(
        lambda: dot_chart(
            _TITLE,
            "Marks: agreement of the attributions of both networks, of unrelated networks (floor), and of the method"
            " with itself (ceiling).",
            ("both networks", "floor: unrelated", "ceiling: the method itself"),
            rows,
            axis=Axis("agreement"),
        )
    )
    return Chart(_TITLE, svg)


def _table(measures: Mapping[str, Any]) -> Table:
    rows = [
        (words, *(plain(table(measures.get(key)).get(part), 3) for part in (*_PARTS, "place")))
        for key, words in _NAMES.items()
    ]
    note = (
        "Floor: an untrained network instead of the small one. Ceiling: the method with half of its steps, or the other"
        " neighbour. Place: 0 at the floor, 1 at the ceiling."
    )
    columns = ("agreement", "both networks", "floor", "ceiling", "place")
    return Table("Agreement", columns, rows, note=note)
