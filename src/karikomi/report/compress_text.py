"""The terminal view of a compress result: a summary for the end of the command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from karikomi.report.certificate_text import certificate_sentence, missed_sentence
from karikomi.report.compress_view import NEEDED
from karikomi.report.result_checks import named, records, require, table, warning_texts
from karikomi.report.savings import dense_bytes
from karikomi.report.terminal import WIDTH, align, printable, text_block, warning_lines, wrap
from karikomi.report.verdict import before_after, budget_held, verified_sentence
from karikomi.report.wording import amount, count, number, percent, plain, ratio, shorten, size

_WHERE = "compress_table"
_LISTED = 8


def compress_table(result: Mapping[str, Any]) -> str:
    """Return figures before and after, the largest tensors, and the paths of the files, in 80 columns.

    Missing values read "n/a"; a result without its headline figures raises `InvalidArgument`.

    >>> result = {"task": "digits", "metric": "accuracy", "metric_before": 0.97,
    ...           "metric_after": 0.96, "bytes_dense": 200_000, "bytes_packed": 5_000}
    >>> print(compress_table(result).splitlines()[2])
    accuracy (test)        97.00 %  96.00 %  -1.00 points
    """
    result = require(result, NEEDED, where=_WHERE)
    tensors = records(result.get("tensors"), "tensors", where=_WHERE)
    task, framework, network, seed = (
        named(result.get(key)) for key in ("task", "framework", "network", "seed")
    )
    lines = [shorten(printable(f"{task} ({framework}, seed {seed}): {network}"), WIDTH, "..")]
    lines += warning_lines(warning_texts(result))
    lines += align(_headline(result))
    lines += ["", *_tensors(tensors)] if tensors else []
    lines += ["", *_remarks(result)] if result.get("left_alone") else []
    tick = "yes: " if result.get("verified") is True else "NO: "
    lines += ["", f"verified  {tick}{verified_sentence(result)}"]
    for key, text in (
        ("budgets", missed_sentence(result)),
        ("evidence", certificate_sentence(result)),
    ):
        lines += wrap(printable(f"{key:<8}  {text}")) if text else []
    for row in records(result.get("exports"), "exports", where=_WHERE):
        lines += wrap(printable(f"form      {_form(row)}"))
    for key in ("file", "report"):
        lines.append(f"{key:<8}  {printable(named(result.get(key)))}")
    return text_block(lines)


def _remarks(result: Mapping[str, Any]) -> list[str]:
    """Return a line for each tensor that pruning left alone, with the reason."""
    alone = list(table(result.get("left_alone")).items())
    lines = [f"not pruned: {named(name)}: {named(reason)}" for name, reason in alone[:_LISTED]]
    more = len(alone) - _LISTED
    lines += [f"and {more} more that were not pruned: see the report"] if more > 0 else []
    return [shown for line in lines for shown in wrap(printable(line))]


def _headline(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    metric = named(result["metric"])
    held = {True: "held", False: "NOT HELD", None: "n/a"}[budget_held(result)]
    rows = [("", "before", "after", "")]
    for split, key in (("test", "metric"), ("validation", "validation")):
        rows.append((f"{metric} ({split})", *before_after(result, metric, f"{key}_")))
    budget = f"{amount(result.get('max_drop'), metric)} {held}"
    smaller = f"{ratio(result.get('ratio'))} smaller"
    parameters, nonzero = count(result.get("parameters")), count(result.get("nonzero"))
    costs = [
        (title, form(result.get(f"{key}_before")), form(result.get(f"{key}_after")), note)
        for title, key, form, note in (
            ("parameters in memory", "parameters", count, ""),
            ("multiply-accumulates", "macs", count, ""),
            ("peak bytes of a pass", "memory", size, ""),
            ("milliseconds a pass", "ms", plain, _faster(result)),
        )
        if result.get(f"{key}_before") is not None
    ]
    return [
        *rows,
        ("budget on validation", "", "", budget),
        ("size", size(result["bytes_dense"]), size(result["bytes_packed"]), smaller),
        ("numbers not zero", parameters, nonzero, ""),
        ("sparsity", "", percent(result.get("sparsity")), "of prunable weights"),
        *costs,
    ]


def _faster(result: Mapping[str, Any]) -> str:
    """Return how many times as fast, with the interval, of the most examples that were timed; or in which engine."""
    timed = records(result.get("timed"), "timed", where=_WHERE)
    if not timed:
        return ""
    last = timed[-1]
    before, after = number(result.get("ms_before")), number(result.get("ms_after"))
    if before and after and last.get("ms_after") != after:
        return f"{plain(before / after, 3)}x as fast, integers in ONNX Runtime"
    low, high = plain(last.get("low"), 3), plain(last.get("high"), 3)
    return f"{plain(last.get('faster'), 3)}x as fast ({low} to {high})"


def _form(row: Mapping[str, Any]) -> str:
    if row.get("reason"):
        return f"{named(row.get('form'))}: not written: {named(row.get('reason'))}"
    apart = plain(row.get("difference"), 2)
    return f"{named(row.get('file'))}, {size(row.get('bytes'))}, difference {apart}"


def _tensors(tensors: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [("tensor", "codec", "sparsity", "bits/weight", "dense", "packed")]
    largest = sorted(tensors, key=dense_bytes, reverse=True)
    for tensor in largest[:_LISTED]:
        sizes = table(tensor.get("bytes"))
        rows.append(
            (
                named(tensor.get("name")),
                named(tensor.get("codec")),
                percent(tensor.get("sparsity")),
                plain(tensor.get("bits_per_weight"), 3),
                size(sizes.get("dense")),
                size(sizes.get("packed")),
            )
        )
    lines = align(rows, left=2)
    more = len(largest) - _LISTED
    return lines + ([f"and {more} smaller tensors: see the report"] if more > 0 else [])
