"""The page of a compress result: savings, accuracy, and how to verify them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from karikomi.report.audit_parts import audit_sections
from karikomi.report.certificate_text import certificate_sentence, missed_sentence
from karikomi.report.page import Code, Page, Part, Points, Section, Table, Tile, Words, render
from karikomi.report.result_checks import named, records, require, table, warning_texts
from karikomi.report.savings import savings_section, sparsity_chart
from karikomi.report.shrink_section import milliseconds, shrink_section, speed
from karikomi.report.training_section import training_section
from karikomi.report.verdict import (
    budget_held,
    budget_sentence,
    candidate_sentences,
    floor_sentence,
    grain_sentence,
    load_lines,
    metric_tile,
    rerun_line,
    verified_sentence,
)
from karikomi.report.wording import amount, change, count, percent, plain, ratio, score, size

NEEDED = ("task", "metric", "metric_before", "metric_after", "bytes_dense", "bytes_packed")
_WHERE = "compress_page"
_LISTED = 100


def compress_page(result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the HTML page of a compress result and the rows of its record.

    The page is one file without scripts, below 300 kB for any number of rows. Missing values
    (None, NaN) read "n/a"; a result without its headline figures raises `InvalidArgument`.

    >>> result = {"task": "digits", "metric": "accuracy", "metric_before": 0.97,
    ...           "metric_after": 0.96, "bytes_dense": 200_000, "bytes_packed": 5_000}
    >>> "96.00 %" in compress_page(result, [])
    True
    """
    result = require(result, NEEDED, where=_WHERE)
    rows = records(rows, "rows", where=_WHERE)
    tensors = records(result.get("tensors"), "tensors", where=_WHERE)
    tried = records(result.get("candidates"), "candidates", where=_WHERE)
    sections = [
        _promise(result),
        savings_section(result, tensors),
        Section("Sparsity", _sparsity(result, tensors)),
        training_section(result, rows),
        _search(result, tried),
        *_front(result),
        shrink_section(result),
    ]
    if isinstance(result.get("audit"), Mapping):
        sections += audit_sections(result["audit"], heading="Audit")
    sections += [_use(result), environment_section(table(result.get("environment")))]
    return render(
        Page(
            f"{named(result['task'])}: compressed {ratio(result.get('ratio'))}",
            f"{named(result.get('network'))} ({named(result.get('framework'))}), seed"
            f" {named(result.get('seed'))}, {plain(result.get('seconds'), 3)} s"
            + (", resumed from an earlier run." if result.get("resumed") is True else "."),
            _tiles(result),
            sections,
            f"Made by karikomi {named(result.get('karikomi'))}.",
            [*warning_texts(result), *warning_texts(table(result.get("audit")))],
        )
    )


def environment_section(environment: Mapping[str, Any]) -> Section:
    """Return the section on the environment of the run."""
    if not environment:
        return Section("Environment", [Words("The environment was not recorded.")])
    rows = [(str(key), named(value)) for key, value in environment.items()]
    note = "The same seed, versions, machine kind and thread count give the same bytes."
    return Section("Environment", [Table("Made with", ("", ""), rows, names=2, note=note)])


def _tiles(result: Mapping[str, Any]) -> list[Tile]:
    verified = result.get("verified") is True
    held = {True: "✓ held", False: "✗ not held", None: "n/a"}[budget_held(result)]
    budget = amount(result.get("max_drop"), named(result["metric"]))
    sizes = f"{size(result['bytes_dense'])} → {size(result['bytes_packed'])}"
    nonzero = (
        f"of prunable weights; {count(result.get('nonzero'))} of"
        f" {count(result.get('parameters'))} numbers are left"
    )
    return [
        Tile("smaller", ratio(result.get("ratio")), sizes),
        metric_tile(result, "on the test split"),
        Tile("sparsity", percent(result.get("sparsity")), nonzero),
        Tile(f"budget of {budget}", held, "on the validation split"),
        Tile("to run", speed(result), milliseconds(result)),
        Tile("verified", "✓ yes" if verified else "✗ no", verified_sentence(result)),
    ]


def _promise(result: Mapping[str, Any]) -> Section:
    wrong = result.get("verified") is not True or budget_held(result) is False
    examples = table(result.get("examples"))
    names = [name for name in ("train", "validation", "test") if name in examples]
    split = ", ".join(f"{count(examples[name])} {name}" for name in names)
    sentences = [f"Examples: {split}." if split else "", grain_sentence(result)]
    parts: list[Part] = [Words(budget_sentence(result), warning=wrong)]
    if missed := missed_sentence(result):
        parts.append(Words(f"{missed[0].upper()}{missed[1:]}.", warning=True))
    if proof := certificate_sentence(result):
        status = table(result["certificate"]).get("status")
        parts.append(Words(f"Certificate, {proof}.", warning=status == "not certified"))
    if verdict := result.get("running") or table(result.get("shrink")).get("verdict"):
        parts.append(
            Words(f"Running it: {named(verdict)}", warning=not speed(result).startswith("✓"))
        )
    parts += [Words(" ".join(filter(None, sentences)))] if any(sentences) else []
    return Section("What is promised", parts)


def _search(result: Mapping[str, Any], tried: Sequence[Mapping[str, Any]]) -> Section:
    if not tried:
        return Section("Candidates", [Words("No candidates were recorded.")])
    metric = named(result["metric"])
    words: dict[Any, str] = {True: "yes", False: "no"}
    rows = [
        (
            named(candidate.get("stage")),
            named(candidate.get("what")),
            score(candidate.get("validation"), metric),
            "" if candidate.get("bytes") is None else size(candidate.get("bytes")),
            words.get(candidate.get("passed"), "n/a"),
            "✓ chosen" if candidate.get("chosen") is True else "",
        )
        for candidate in tried[:_LISTED]
    ]
    strong = [index for index, candidate in enumerate(tried) if candidate.get("chosen") is True]
    more = len(tried) - len(rows)
    note = f"The first {_LISTED} are listed; {more} more were tried." if more else ""
    columns = ("stage", "tried", f"validation {metric}", "file", "passed", "")
    return Section(
        "Candidates",
        [
            Words(floor_sentence(result)),
            Points(candidate_sentences(result, tried)),
            Table("In the order they were tried", columns, rows, 2, strong, note),
        ],
    )


def _front(result: Mapping[str, Any]) -> list[Section]:
    """Return the section of the files that no other beats in everything, each of which can be taken."""
    points = records(result.get("front"), "front", where=_WHERE)
    if not points:
        return []
    words: dict[Any, str] = {True: "yes", False: "no"}
    rows = [
        (
            count(point.get("number")),
            named(point.get("what")),
            size(point.get("bytes")),
            change(point.get("drop"), named(result["metric"])).removeprefix("+"),
            words.get(point.get("holds"), "n/a"),
        )
        for point in points[:_LISTED]
    ]
    strong = [place for place, point in enumerate(points) if point.get("chosen") is True]
    note = "Any of them is published by --take and its number, without further training."
    columns = ("number", "steps", "file", "validation drop", "within the budgets")
    return [Section("Front", [Table("What no other file beats", columns, rows, 2, strong, note)])]


def _sparsity(result: Mapping[str, Any], tensors: Sequence[Mapping[str, Any]]) -> list[Part]:
    alone = list(table(result.get("left_alone")).items())[:_LISTED]
    lines = [f"{named(name)} was not pruned: {named(reason)}." for name, reason in alone]
    chart: Part = sparsity_chart(tensors) if tensors else Words("No tensors.")
    return [chart, Points(lines)] if lines else [chart]


def _use(result: Mapping[str, Any]) -> Section:
    return Section(
        "Use it, make it again",
        [
            Code("Load the file (NumPy arrays by name)", load_lines(result)),
            Code("Make it again", rerun_line(result)),
        ],
    )
