"""Numbers that are not finite: a collapse of the loss scale, bad values in a batch, an overflow backwards."""

from __future__ import annotations

import numpy as np

from karikomi.advising.causes.finding import Finding
from karikomi.advising.recorded import Recorded
from karikomi.advising.signals import Signals
from karikomi.record.log_codes import NONFINITE

HALVINGS, WITHIN = 3, 50
PRECURSOR = 4.0
"""The score of a norm before a non-finite step from which on something was wrong before."""


def loss_scale(run: Recorded, signals: Signals) -> Finding | None:
    """The loss scale of float16 was halved at least three times within 50 steps."""
    scale = run.columns["loss_scale"]
    known = np.flatnonzero(np.isfinite(scale) & (scale > 0))
    if len(known) < 2:
        return None
    logs = np.log2(scale[known])
    fell = np.append(False, np.diff(logs) < -0.5)
    for place in np.flatnonzero(fell):
        inside = run.steps[known] <= run.steps[known[place]] + WITHIN
        inside &= np.arange(len(known)) >= place
        halvings = float(logs[place - 1] - logs[inside].min())
        if fell[inside].sum() >= HALVINGS and halvings >= HALVINGS:
            row = int(known[place])
            return Finding(
                "loss_scale",
                row,
                f"The loss scale of float16 fell {2**halvings:,.0f}-fold within {WITHIN} steps, since gradients "
                "overflowed at every scale that was tried.",
                "Use bfloat16, or keep the layer that overflows in float32; a clip limit acts after the overflow.",
                tensors=_culprits(run, row),
                numbers={"halvings": halvings, "least_scale": float(scale[known][inside].min())},
            )
    return None


def nonfinite(run: Recorded, signals: Signals) -> Finding | None:
    """A step is not finite although nothing was wrong before it."""
    if not (run.bad | run.bad_loss).any():
        return None
    row = int(np.argmax(run.bad | run.bad_loss))
    first = signals.disturbed
    before = slice(max(row - 10, 0), row)
    score = float(signals.norm_z[before].max(initial=0.0))
    if (first is not None and first < row) or score > PRECURSOR:
        return None
    names = _culprits(run, row)
    numbers = {"rows": float((run.bad | run.bad_loss).sum()), "norm_score_before": score}
    if run.bad_loss[row] or not run.has("loss"):
        said = "the loss and the gradients" if run.bad_loss[row] else "the gradients"
        return Finding(
            "nonfinite_batch",
            row,
            f"In this step {said} were not finite, and the steps before it were usual: a batch with NaN or "
            "infinite values, or an operation of the forward pass that overflowed on it.",
            "Look at the inputs of this step. karikomi skips such a step by default; no limit can repair it.",
            tensors=names,
            numbers=numbers,
        )
    return Finding(
        "backward_overflow",
        row,
        "The loss was finite and gradients were not: the backward pass overflowed, or divided by zero "
        "(a square root or norm at zero).",
        "The first non-finite tensor counted from the output is nearest to the source; look at its layer.",
        tensors=names,
        numbers=numbers,
    )


def _culprits(run: Recorded, row: int) -> tuple[str, ...]:
    """Return the non-finite tensors, those nearest to the output first: gradients flow from there."""
    codes = run.codes.get("gradients")
    names: tuple[str, ...] = ()
    if codes is not None:
        names = tuple(run.names[place] for place in np.flatnonzero(codes[row] == NONFINITE))
    names = names or run.culprits.get(row, ())
    return tuple(reversed(names))[:8]
