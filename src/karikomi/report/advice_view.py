"""The page of an `Advice`: limit, cause, order of onsets, heat map of tensors over steps, and the replay."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from markupsafe import Markup

from karikomi.advising.causes.asking import CAUSES, NO_FAULT
from karikomi.advising.limits import REGIMES
from karikomi.report.drawing import drawn, frame, is_narrow, label, pixel, text_width, width
from karikomi.report.page import Chart, Page, Part, Points, Section, Table, Tile, Words, render
from karikomi.report.wording import count, percent, plain, shorten

if TYPE_CHECKING:
    from karikomi.advising import Advice
    from karikomi.advising.onset import HeatMap

_CELL, _TOP = 18, 30


def advice_page(advice: Advice) -> str:
    """Return the HTML page of an advice."""
    sections = [Section("What happened", _happened(advice))]
    if advice.heat is not None:
        sections.append(Section("Around the event", [heat_chart(advice.heat)]))
    if advice.replay:
        sections.append(Section("What other rules would have done", [_replay(advice)]))
    doubts = [*(advice.limit.doubts if advice.limit else ()), *advice.caveats]
    doubts += [f"lost: {text}" for text in advice.lost]
    doubts += [f"not recorded: {', '.join(advice.missing)}"] if advice.missing else []
    if doubts:
        sections.append(Section("Mind", [Points(doubts)]))
    lead = f"{advice.source}: {advice.format}, steps {count(advice.first_step)} to {count(advice.last_step)}"
    return render(Page("Advice", lead, _tiles(advice), sections))


def heat_chart(heat: HeatMap) -> Chart:
    """Return the heat map as a drawing: a row per tensor, a column per row of the record."""
    note = "Gradient norm over the usual one: from white (usual) to full (1,000 times); crossed: not finite."
    if heat.left_out:
        note += f" {heat.left_out} other tensors are not shown."
    return Chart("Gradients of tensors", drawn(lambda: _heat(heat)), note)


def _heat(heat: HeatMap) -> Markup:
    # On a phone the names have less room than the cells.
    names, letters = (112, 15) if is_narrow() else (190, 26)
    across = (width() - names - 10) / max(len(heat.steps), 1)
    parts = []
    for row, (name, ratios) in enumerate(zip(heat.tensors, heat.ratios, strict=True)):
        top = _TOP + row * _CELL
        parts.append(label(names - 8, top + 13, shorten(name, letters), "end"))
        for column, ratio in enumerate(ratios):
            parts.append(_cell(names + column * across, top, across, float(ratio)))
    bottom = _TOP + len(heat.tensors) * _CELL
    text = f"step {count(heat.steps[heat.event])}"
    # Centred over its column, but within the picture.
    half = text_width(text) / 2
    at = min(max(names + (heat.event + 0.5) * across, names + half), width() - 10 - half)
    parts.append(label(at, _TOP - 8, text, "mid"))
    parts.append(label(names, bottom + 18, count(heat.steps[0])))
    parts.append(label(width() - 10, bottom + 18, count(heat.steps[-1]), "end"))
    words = "Norms of the tensors over the steps around the event"
    return frame("Gradients of tensors", words, bottom + 28, parts)


def _cell(x: float, y: float, width: float, ratio: float) -> Markup:
    if math.isinf(ratio) and ratio > 0:
        cross = f"M{pixel(x + 1)} {pixel(y + 2)}L{pixel(x + width - 1)} {pixel(y + _CELL - 2)}"
        cross += f"M{pixel(x + width - 1)} {pixel(y + 2)}L{pixel(x + 1)} {pixel(y + _CELL - 2)}"
        return Markup('<path class="axis" d="{}"/>').format(cross)
    strength = 0.0 if math.isnan(ratio) else min(max(ratio / 3.0, 0.0), 1.0)
    shape = Markup('<rect class="heat" x="{}" y="{}" width="{}" height="{}" fill-opacity="{}"/>')
    return shape.format(pixel(x), pixel(y), pixel(width), _CELL - 2, f"{strength:.2f}")


def _tiles(advice: Advice) -> list[Tile]:
    limit = advice.limit
    return [
        Tile("regime", advice.regime, REGIMES[advice.regime]),
        Tile(
            "limit",
            "n/a" if limit is None else f"{limit.value:g}",
            "" if limit is None else f"{limit.multiple:.2g} x the usual norm, {limit.confidence}",
        ),
        Tile("cause", CAUSES[advice.cause]),
    ]


def _happened(advice: Advice) -> list[Part]:
    parts: list[Part] = []
    if advice.limit is not None:
        parts.append(Words(f"clip=kk.clip.{advice.limit.rule}: {advice.limit.reason}."))
    for place, finding in enumerate(advice.findings):
        title = "Suspected" if place == 0 and finding.cause not in NO_FAULT else "Also seen"
        parts.append(
            Words(f"{title}: {CAUSES[finding.cause]}. {finding.what} {finding.advice}", place == 0)
        )
    if not advice.findings:
        parts.append(Words("Nothing exploded: norm and loss stayed in their usual range."))
    if advice.largest is not None:
        of = advice.largest.tensor or "all tensors together"
        text = f"The largest norm was {plain(advice.largest.norm)}, of {of}, in step {count(advice.largest.step)}."
        parts.append(Words(text))
    if advice.onsets:
        rows = [
            [
                onset.tensor,
                count(onset.step),
                "not finite" if math.isinf(onset.score) else f"{onset.score:.1f}",
            ]
            for onset in advice.onsets[:12]
        ]
        columns = ["tensor", "step", "score"]
        parts.append(Table("First to leave their usual range", columns, rows))
    return parts


def _replay(advice: Advice) -> Table:
    rows = [
        [
            item.rule,
            percent(item.engaged),
            percent(item.removed),
            f"{item.variation:.2f}",
            f"{item.caught}/{item.spikes}" if item.spikes else "-",
            "-" if item.lead is None else f"{item.lead:g}",
            f"{item.false_per_1000:.0f}",
        ]
        for item in advice.replay
    ]
    columns = ["rule", "engaged", "removed", "varies", "caught", "lead", "false in 1,000"]
    note = f"Open loop: the run would have changed. Spikes: {advice.spikes}."
    return Table("Decisions of rules on the recorded norms", columns, rows, note=note)
