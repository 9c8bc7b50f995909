"""The page and the terminal view of an audit of the smaller model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from karikomi.report.audit_parts import (
    audit_sections,
    by_loss,
    class_rows,
    limits_sentence,
    summary,
)
from karikomi.report.markdown import markdown
from karikomi.report.page import Code, Page, Section, Tile, render
from karikomi.report.population_section import population_sentence
from karikomi.report.result_checks import named, records, require, table, warning_texts
from karikomi.report.terminal import align, printable, text_block, warning_lines, wrap
from karikomi.report.verdict import metric_tile
from karikomi.report.wording import count, percent, plain

_NEEDED = ("metric", "metric_before", "metric_after")


def audit_page(result: Mapping[str, Any]) -> str:
    """Return the HTML page of an audit: classes, changed predictions, noise, warnings.

    Missing values read "n/a"; a result without its headline figures raises `InvalidArgument`.

    >>> page = audit_page({"metric": "accuracy", "metric_before": 0.9, "metric_after": 0.8})
    >>> "-10.00 points" in page
    True
    """
    return render(_page(require(result, _NEEDED, where="audit_page")))


def audit_markdown(result: Mapping[str, Any]) -> str:
    """Return an audit as Markdown, for the comment of a pull request: what the page has, without drawings.

    >>> text = audit_markdown({"metric": "accuracy", "metric_before": 0.9, "metric_after": 0.8})
    >>> "-10.00 points" in text
    True
    """
    return markdown(_page(require(result, _NEEDED, where="audit_markdown"))) + "\n"


def _page(result: Mapping[str, Any]) -> Page:
    sections = audit_sections(result, heading="Classes" if result.get("classes") else "Metric")
    command = result.get("command")
    if command:
        sections.append(Section("Make it again", [Code("Command", named(command))]))
    return Page(
        f"{named(result.get('task'))}: what changed",
        f"{named(result.get('before'))} against {named(result.get('after'))},"
        f" {count(result.get('examples'))} examples.",
        _tiles(result),
        sections,
        warnings=warning_texts(result),
    )


def _tiles(result: Mapping[str, Any]) -> list[Tile]:
    gates, warnings = result.get("gates"), warning_texts(result)
    verdict = named(result.get("verdict"), "no gates")
    judged = "--fail-if sets them"
    if isinstance(gates, list | tuple):
        judged = "1 gate" if len(gates) == 1 else f"{count(len(gates))} gates"
    tiles = [
        Tile("verdict", verdict, judged),
        Tile("examples", count(result.get("examples")), "of the test split"),
        metric_tile(result, "after"),
    ]
    if result.get("agreement") is None:
        low, high = _interval(result.get("drop_interval"))
        between = f"95 %: {plain(low, 3)} to {plain(high, 3)}"
        tiles.append(Tile("drop", plain(result.get("drop")), between))
    else:
        tiles += [
            Tile(
                "agreement", percent(result.get("agreement"), 2), "same prediction for an example"
            ),
            Tile("lost", count(result.get("lost")), "right before, wrong after"),
            Tile("gained", count(result.get("gained")), "wrong before, right after"),
        ]
    raised = "found damage" if warnings else "no check raised one"
    return [*tiles, Tile("warnings", count(len(warnings)), raised)]


def _interval(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) and len(value) == 2 else (None, None)


def _flips(result: Mapping[str, Any]) -> str:
    """Return negative and positive flips and churn, each with its interval; empty without predictions."""
    found = table(result.get("outcomes"))
    said = []
    for name in ("negative_flips", "positive_flips", "churn"):
        low, high = _interval(found.get(f"{name}_interval"))
        between = f"({percent(low, 2)} to {percent(high, 2)})"
        said.append(f"{name.replace('_', ' ')} {percent(found.get(name), 2)} {between}")
    return f"{', '.join(said)}." if found else ""


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
        *wrap(_flips(result)),
        *wrap(limits_sentence(result)),
        *wrap(printable(population_sentence(result, metric))),
    ]
    if classes:
        rows = class_rows(by_loss(classes)[:20], metric)
        lines += ["", *align([("class", "examples", "before", "after", "change"), *rows])]
    if len(classes) > 20:
        lines.append(f"and {len(classes) - 20} classes that changed less")
    return text_block(lines)
