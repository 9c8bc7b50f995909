"""The account of an `Advice` in words, in 80 columns: regime, limit, cause, order, heat map, replay, doubts."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING

from karikomi.advising.causes.asking import CAUSES, NO_FAULT
from karikomi.advising.limits import REGIMES

if TYPE_CHECKING:
    from karikomi.advising.advice import Advice
    from karikomi.advising.causes.finding import Finding
    from karikomi.advising.onset import HeatMap

WIDTH = 80
SHADES = " .:-=+*#@"
"""From the usual norm to a thousandfold one; ``X`` is not finite."""


def account(advice: Advice) -> str:
    """Return the account as text."""
    blocks = [_head(advice), _limit(advice), _happened(advice)]
    if advice.heat is not None and advice.cause not in NO_FAULT:
        blocks.append(heat_lines(advice.heat))
    if advice.replay:
        blocks.append(_replay(advice))
    blocks.append(_doubts(advice))
    return "\n\n".join("\n".join(map(_printable, block)) for block in blocks if block)


def heat_lines(heat: HeatMap, width: int = WIDTH) -> list[str]:
    """Return the heat map as lines: one per tensor, one letter per row of the record."""
    room = width - heat.ratios.shape[1] - 2
    names = [_short(name, room) for name in heat.tensors]
    widest = max(map(len, names), default=0)
    lines = [f"Gradients over their usual norms, steps {heat.steps[0]:,} to {heat.steps[-1]:,}:"]
    for name, ratios in zip(names, heat.ratios, strict=True):
        lines.append(f"{name.ljust(widest)}  {''.join(map(shade, ratios))}".rstrip())
    step = f"{heat.steps[heat.event]:,}"
    lines.append(f"{' ' * (widest + 2 + heat.event)}^ step {step}")
    lines.append(
        f"'{SHADES[1]}' 2 x, '{SHADES[4]}' 30 x, '{SHADES[8]}' 1,000 x or more, 'X' not finite"
        + (f"; {heat.left_out} other tensors" if heat.left_out else "")
    )
    return lines


def shade(ratio: float) -> str:
    """Return the letter for a base-10 logarithm of a ratio.

    >>> "".join(shade(ratio) for ratio in (-1.0, 0.0, 0.5, 1.5, 3.0, math.inf, math.nan))
    '  .=@X '
    """
    if math.isnan(ratio):
        return " "
    if math.isinf(ratio):
        return "X" if ratio > 0 else " "
    return SHADES[min(max(int(ratio * 8 / 3), 0), 8)]


def _head(advice: Advice) -> list[str]:
    stride = "" if advice.stride == 1 else f", one row in {advice.stride:g}"
    optimizer = f", {advice.optimizer}" if advice.optimizer else ""
    return [
        *_wrap(f"{advice.source}: {advice.format}"),
        f"steps {advice.first_step:,} to {advice.last_step:,}, {advice.rows:,} rows{stride}{optimizer}",
    ]


def _limit(advice: Advice) -> list[str]:
    lines = _wrap(f"Regime: {advice.regime}. {REGIMES[advice.regime].capitalize()}.")
    limit = advice.limit
    if limit is None:
        return [*lines, "No limit: fewer than 8 gradient norms were recorded."]
    lines += _wrap(
        f"Limit: {limit.value:g}, which is {limit.multiple:.2g} x the usual norm of {limit.median:.3g}: "
        f"clip=kk.clip.{limit.rule}. Confidence: {limit.confidence}."
    )
    lines += _wrap(f"Why: {limit.reason}.", indent="  ")
    lines += _wrap(
        f"From {limit.count:,} norms of steps {limit.first:,} to {limit.last:,}; they changed {limit.drift:.2g}-fold "
        "from the first third of the run to its last. Between 0.5 and 10 times the mean norm "
        f"({0.5 * limit.mean:.2g} to {10 * limit.mean:.2g}) trainings usually converge alike (Pascanu et al. 2013).",
        indent="  ",
    )
    if advice.engaged:
        lines += _wrap(
            f"The clip of this run engaged in {advice.engaged:.1%} of the rows.", indent="  "
        )
    return lines


def _happened(advice: Advice) -> list[str]:
    if advice.cause in NO_FAULT:
        lines = ["Nothing exploded: no norm or loss left its usual range without return."]
        if advice.cause == "none" and advice.event_step is None:
            lines = ["Nothing exploded: norm and loss stayed in their usual range."]
    else:
        first, *others = advice.findings
        lines = _wrap(f"Suspected cause: {CAUSES[first.cause]}, step {advice.cause_step:,}.")
        lines += _wrap(first.what, indent="  ")
        if first.tensors:
            lines += _wrap(f"Tensors: {', '.join(first.tensors[:4])}.", indent="  ")
        lines += _wrap(f"Numbers: {_numbers(first)}.", indent="  ") if first.numbers else []
        lines += _wrap(f"Do: {first.advice}", indent="  ")
        for other in others:
            lines += _wrap(f"Also seen: {CAUSES[other.cause]}. {other.what}")
    if advice.findings and advice.cause == "always_clipped":
        lines += _wrap(f"{advice.findings[0].what} {advice.findings[0].advice}")
    lines += _order(advice)
    if advice.largest is not None:
        of = f" of {advice.largest.tensor}" if advice.largest.tensor else " of all tensors together"
        lines += _wrap(
            f"The largest norm was {advice.largest.norm:.3g},{of}, in step {advice.largest.step:,}."
        )
    return lines


def _order(advice: Advice) -> list[str]:
    if not advice.onsets:
        return []
    lines = ["First to leave their usual range (score above 4):"]
    for onset in advice.onsets[:8]:
        score = "not finite" if math.isinf(onset.score) else f"score {onset.score:.1f}"
        lines.append(
            f"  step {onset.step:,}  {_short(onset.tensor, 40)}  {score}{'  (together)' if onset.together else ''}"
        )
    if advice.onsets[8:]:
        lines.append(f"  and {len(advice.onsets) - 8} others")
    return lines


def _replay(advice: Advice) -> list[str]:
    head = ["rule", "engaged", "removed", "varies", "caught", "lead", "false/1000"]
    rows = [
        [
            item.rule,
            f"{item.engaged:.1%}",
            f"{item.removed:.1%}",
            f"{item.variation:.2f}",
            f"{item.caught}/{item.spikes}" if item.spikes else "-",
            "-" if item.lead is None else f"{item.lead:g}",
            f"{item.false_per_1000:.0f}",
        ]
        for item in advice.replay
    ]
    widths = [max(len(row[place]) for row in [head, *rows]) for place in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(size) if place == 0 else cell.rjust(size)
            for place, (cell, size) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [head, *rows]
    ]
    note = (
        "Open loop: each rule's decisions on the recorded norms. Your run would have changed with it, so this shows "
        "how often a rule engages, not where training ends. removed: of the sum of norms. varies: sd over mean of "
        f"the factor. caught: spikes ({advice.spikes}) at which, or up to 8 rows (lead) before which, it engaged."
    )
    return [*lines, *_wrap(note)]


def _doubts(advice: Advice) -> list[str]:
    points = [*(advice.limit.doubts if advice.limit else ()), *advice.caveats]
    points += [f"lost: {text}" for text in advice.lost]
    if advice.missing:
        points.append(f"not recorded: {', '.join(advice.missing)}")
    if not points:
        return []
    return ["Mind:", *(line for text in points for line in _wrap(f"- {text}"))]


def _numbers(finding: Finding) -> str:
    pairs = (f"{key.replace('_', ' ')} {value:.4g}" for key, value in finding.numbers.items())
    return ", ".join(pairs)


def _wrap(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=indent, subsequent_indent=f"{indent}  ", break_on_hyphens=False
    )


def _short(text: str, letters: int) -> str:
    if len(text) <= letters:
        return text
    head = (letters - 2) // 2
    return f"{text[:head]}..{text[len(text) - (letters - 2 - head) :]}"


def _printable(line: str) -> str:
    """Return a line without control characters: names may come from an untrusted file."""
    return "".join(letter if letter.isprintable() else "?" for letter in line)
