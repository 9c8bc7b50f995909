"""Sizes after each step: one bar per step for the whole network, one row of marks per tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from karikomi.report.bars import Bar, Dots, bar_chart, dot_chart
from karikomi.report.drawing import Axis, drawn
from karikomi.report.page import Chart, Section, Table
from karikomi.report.result_checks import named, shape, table
from karikomi.report.wording import count, number, percent, plain, scaled, size

CAUSES = ("dense", "pruned", "quantized", "packed")
_WORDS = {
    "dense": "dense",
    "pruned": "pruned",
    "quantized": "quantized",
    "packed": "entropy coded",
}
_DRAWN, _LISTED = 30, 100


def savings_section(result: Mapping[str, Any], tensors: Sequence[Mapping[str, Any]]) -> Section:
    """Return the section on sizes: by cause, and by tensor and cause."""
    parts = [_causes_chart(result)]
    ordered = sorted(tensors, key=dense_bytes, reverse=True)
    if ordered:
        parts += [_sizes_chart(ordered), _tensor_table(ordered)]
    return Section("What each step saved", parts)


def sparsity_chart(tensors: Sequence[Mapping[str, Any]]) -> Chart:
    """Return the bars of the sparsity per tensor, the largest tensors first."""
    largest = sorted(tensors, key=dense_bytes, reverse=True)[:_DRAWN]
    bars = [
        Bar(
            named(tensor.get("name")),
            scaled(tensor.get("sparsity"), 100),
            f"{percent(tensor.get('sparsity'))} of {count(tensor.get('elements'))}",
        )
        for tensor in largest
    ]
    svg = drawn(
        lambda: bar_chart(
            "Sparsity per layer",
            "Bars: the share of weights that are zero, for each tensor.",
            bars,
            axis=Axis("weights that are zero, %"),
            high=100.0,
        )
    )
    return Chart("Sparsity per layer", svg, _left_out(len(tensors), _DRAWN))


def dense_bytes(tensor: Mapping[str, Any]) -> float:
    """Return the dense size of a tensor, zero if unknown."""
    return number(table(tensor.get("bytes")).get("dense")) or 0.0


def _causes_chart(result: Mapping[str, Any]) -> Chart:
    sizes = table(result.get("bytes_by_cause"))
    stages = [(_WORDS[cause], number(sizes.get(cause))) for cause in CAUSES]
    stages.append(("the whole file", number(sizes.get("file"))))
    if number(table(result.get("shrink")).get("removed")):
        stages[1] = ("pruned and shrunk", stages[1][1])
    bars, before = [], None
    for name, value in stages:
        bars.append(Bar(name, value, _saved(value, before, stages[0][1]), before))
        before = value if value is not None else before
    svg = drawn(
        lambda: bar_chart(
            "Size after each step",
            "Bars: "
            + "; ".join(f"{name} {size(value)}" for name, value in stages)
            + ". The outline is the size before the step.",
            bars,
            axis=Axis("bytes", wording=_size_tick),
        )
    )
    note = (
        "The outline is what the step saved. Quantized and entropy coded are the same numbers, at fixed"
        " width and coded; the file adds its directory, shapes and checksums."
    )
    return Chart("Size after each step", svg, note)


def _saved(value: float | None, before: float | None, first: float | None) -> str:
    if value is None:
        return "n/a"
    share = f", {percent(value / first)}" if first and value != first else ""
    if before is None:
        return f"{size(value)}{share}"
    word = "saved" if value <= before else "added"
    return f"{size(value)}{share} ({word} {size(abs(before - value))})"


def _sizes_chart(tensors: Sequence[Mapping[str, Any]]) -> Chart:
    rows = [
        Dots(
            named(tensor.get("name")),
            [number(table(tensor.get("bytes")).get(cause)) for cause in CAUSES],
        )
        for tensor in tensors[:_DRAWN]
    ]
    svg = drawn(
        lambda: dot_chart(
            "Size per tensor",
            "Marks: bytes of each tensor when dense, pruned, quantized and entropy coded.",
            [_WORDS[cause] for cause in CAUSES],
            rows,
            axis=Axis("bytes (log scale)", log=True, wording=_size_tick),
        )
    )
    note = "Further left is smaller; each gridline is a multiple of the one before."
    return Chart("Size per tensor", svg, note + _left_out(len(tensors), _DRAWN))


def _tensor_table(tensors: Sequence[Mapping[str, Any]]) -> Table:
    columns = ("tensor", "shape", "quantizer", "codec", "not zero", "sparsity", "bits per weight")
    return Table(
        "Every tensor",
        (*columns, *(_WORDS[cause] for cause in CAUSES)),
        [_tensor_row(tensor) for tensor in tensors[:_LISTED]],
        names=4,
        note=_left_out(len(tensors), _LISTED).strip(),
    )


def _tensor_row(tensor: Mapping[str, Any]) -> tuple[str, ...]:
    sizes = table(tensor.get("bytes"))
    return (
        named(tensor.get("name")),
        shape(tensor.get("shape")),
        named(tensor.get("quantizer")),
        named(tensor.get("codec")),
        count(tensor.get("nonzero")),
        percent(tensor.get("sparsity")),
        plain(tensor.get("bits_per_weight"), 3),
        *(size(sizes.get(cause)) for cause in CAUSES),
    )


def _left_out(tensors: int, shown: int) -> str:
    if tensors <= shown:
        return ""
    return (
        f" The {shown} largest of {tensors} tensors are shown; the other {tensors - shown} are not."
    )


def _size_tick(value: float) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{value / factor:g} {unit}"
    return f"{value:g} B"
