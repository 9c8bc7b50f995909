"""The page and the terminal view of an audit of the smaller model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from karikomi.report.audit_parts import audit_sections, by_loss, class_rows, summary
from karikomi.report.page import Page, Tile, render
from karikomi.report.result_checks import named, records, require, warning_texts
from karikomi.report.terminal import align, printable, text_block, warning_lines, wrap
from karikomi.report.verdict import metric_tile
from karikomi.report.wording import count, percent

_NEEDED = ("metric", "metric_before", "metric_after")


def audit_page(result: Mapping[str, Any]) -> str:
    """Return the HTML page of an audit: classes, changed predictions, noise, warnings.

    Missing values read "n/a"; a result without its headline figures raises `InvalidArgument`.

    >>> page = audit_page({"metric": "accuracy", "metric_before": 0.9, "metric_after": 0.8})
    >>> "-10.00 points" in page
    True
    """
    result = require(result, _NEEDED, where="audit_page")
    tiles = [
        metric_tile(result, "after"),
        Tile("agreement", percent(result.get("agreement"), 2), "same prediction for an example"),
        Tile("lost", count(result.get("lost")), "right before, wrong after"),
        Tile("gained", count(result.get("gained")), "wrong before, right after"),
    ]
    return render(
        Page(
            f"{named(result.get('task'))}: what changed",
            f"{named(result.get('before'))} against {named(result.get('after'))},"
            f" {count(result.get('examples'))} examples.",
            tiles,
            audit_sections(result, heading="Classes"),
            warnings=warning_texts(result),
        )
    )


def audit_table(result: Mapping[str, Any]) -> str:
    """Return the audit as text for a terminal, classes in order of their loss.

    >>> text = audit_table({"metric": "accuracy", "metric_before": 0.9, "metric_after": 0.8,
    ...     "classes": [{"class": "7", "examples": 10, "before": 0.9, "after": 0.8}]})
    >>> print(text.splitlines()[-1])
    7            10  90.00 %  80.00 %  -10.00 points
    """
    result = require(result, _NEEDED, where="audit_table")
    metric = named(result["metric"])
    classes = records(result.get("classes"), "classes", where="audit_table")
    lines = [
        printable(f"{named(result.get('before'))} -> {named(result.get('after'))}"),
        *warning_lines(warning_texts(result)),
        *wrap(printable(summary(result))),
    ]
    if classes:
        rows = class_rows(by_loss(classes)[:20], metric)
        lines += ["", *align([("class", "examples", "before", "after", "change"), *rows])]
    if len(classes) > 20:
        lines.append(f"and {len(classes) - 20} classes that changed less")
    return text_block(lines)
