"""The sections of an audit on many networks and on costs: which flips are chance, and whether it is faster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from karikomi.report.page import Part, Section, Table, Words
from karikomi.report.result_checks import named, records, table
from karikomi.report.wording import change, count, number, percent, plain, size

_LISTED = 20
_FASTER = 0.9
"""The share of the time before, above which a network is not called faster: times vary by that much."""


def population_section(found: Mapping[str, Any], metric: str) -> Section | None:
    """Return the section on a population of small networks; None without one."""
    if not found:
        return None
    parts: list[Part] = [Words(" ".join(_sentences(found, metric)))]
    rows = [
        ("drop", *(_drop(table(found.get("drop")).get(key), metric) for key in _SPREAD)),
        ("churn", *(percent(table(found.get("churn")).get(key), 2) for key in _SPREAD)),
    ]
    rows = rows if found.get("churn") else rows[:1]
    parts.append(Table("Over the population", ("", "mean", "lowest", "highest"), rows))
    examples = records(found.get("examples"), "examples", where="audit")
    if examples:
        cells = [
            (
                *(named(row.get(key)) for key in ("index", "label", "before", "after")),
                percent(row.get("share"), 0),
            )
            for row in examples[:_LISTED]
        ]
        columns = ("index", "label", "before", "after, mostly", "networks that agree")
        note = f"{len(cells)} of {count(found.get('in_all'))}; those that were right before first."
        parts.append(Table(f"{_word(found)} in every network", columns, cells, names=4, note=note))
    return Section("Population", parts)


_SPREAD = ("mean", "min", "max")


def _drop(value: Any, metric: str) -> str:
    return change(value, metric).removeprefix("+")


def _word(found: Mapping[str, Any]) -> str:
    exemplars = found.get("word") == "exemplars"
    return "Compression-identified exemplars" if exemplars else "Flips"


def population_sentence(result: Mapping[str, Any], metric: str) -> str:
    """Return the population in words, for a terminal; empty without one."""
    found = table(result.get("population"))
    return f"Population: {' '.join(_sentences(found, metric))}" if found else ""


def _sentences(found: Mapping[str, Any], metric: str) -> list[str]:
    how = (
        f"{count(found.get('after'))} networks whose rounding errors have other signs"
        if found.get("drawn")
        else f"{count(found.get('after'))} small networks against {count(found.get('before'))} before"
    )
    said = [f"{how}; the file itself drops by {_drop(found.get('drop_of_file'), metric)}."]
    if found.get("in_all") is not None:
        said.append(
            f"Of its {count(found.get('of_file'))} changed predictions"
            f" {count(found.get('of_file_in_all'))} changed in every network; all together"
            f" {count(found.get('in_all'))} examples changed in all ({count(found.get('lost_in_all'))} lost), and"
            f" {count(found.get('in_some'))} in at least one."
        )
    if number(found.get("between")) is not None:
        said.append(
            f"Two networks of the population differ in {percent(found.get('between'), 2)} of the predictions."
        )
    low, own = number(table(found.get("drop")).get("min")), number(found.get("drop_of_file"))
    if found.get("drawn") and low is not None and own is not None and own < low:
        said.append(
            "The file does better than every draw: it was trained or compensated after rounding, so that the draws"
            " do not stand for it."
        )
    return said


def costs_section(found: Mapping[str, Any]) -> Section | None:
    """Return the section on bytes, numbers and milliseconds, and why it is not faster; None without measurements."""
    if not found:
        return None
    rows = [
        ("bytes of the file", *_two(found, "bytes", size)),
        ("numbers", *_two(found, "numbers", count)),
        ("not zero", *_two(found, "nonzero", count)),
        ("milliseconds, up to 64 examples", *_two(found, "milliseconds", lambda v: plain(v, 3))),
        ("most memory at once, up to 64 examples", *_two(found, "memory", size)),
    ]
    cells = [(*row, _ratio(found, key)) for row, key in zip(rows, _KEYS, strict=True)]
    columns = ("", "before", "after", "after / before")
    return Section("Costs", [Words(speed_sentence(found)), Table("Costs", columns, cells)])


_KEYS = ("bytes", "numbers", "nonzero", "milliseconds", "memory")


def speed_sentence(found: Mapping[str, Any]) -> str:
    """Return whether the small network is faster, and why it is not.

    >>> speed_sentence({"milliseconds": [2.0, 2.1], "same_shapes": True})[:43]
    'It is not faster: no tensor became smaller.'
    """
    share = _quotient(found, "milliseconds")
    if share is None:
        return "Whether it is faster was not measured."
    if share <= _FASTER:
        return f"It takes {percent(share, 0)} of the time before."
    if found.get("same_shapes") is True:
        return (
            "It is not faster: no tensor became smaller. Zeros and shared values make the file small; the arithmetic"
            " stays dense. Removing units (karikomi compress --config with widths, kk.torch.shrink) or an int8 runtime"
            " (karikomi export) makes it fast."
        )
    return "It is not faster, although tensors became smaller: so small a network spends its time elsewhere."


def _two(found: Mapping[str, Any], key: str, wording: Any) -> tuple[str, str]:
    first, second = _pair(found, key)
    return wording(first), wording(second)


def _pair(found: Mapping[str, Any], key: str) -> Sequence[Any]:
    values = found.get(key)
    return values if isinstance(values, list | tuple) and len(values) == 2 else (None, None)


def _quotient(found: Mapping[str, Any], key: str) -> float | None:
    first, second = (number(value) for value in _pair(found, key))
    return second / first if first and second is not None else None


def _ratio(found: Mapping[str, Any], key: str) -> str:
    return plain(_quotient(found, key), 3)
