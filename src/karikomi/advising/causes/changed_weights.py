"""Weights that jumped: by something other than a step, or by a step that was far too large."""

from __future__ import annotations

import math

import numpy as np

from karikomi.advising.causes.finding import Finding
from karikomi.advising.recorded import Recorded
from karikomi.advising.signals import LN2, Signals
from karikomi.record.log_codes import NONFINITE, PER_OCTAVE

JUMP = 3.0
"""By what factor the norm of a tensor must change from one row to the next."""


def changed_weights(run: Recorded, signals: Signals) -> Finding | None:
    """The norm of a weight jumped by a factor of 3 or more, and the update of that step was too small for it."""
    codes = run.codes.get("weights")
    if codes is None or len(run) < 2:
        return None
    found = _first_jump(codes)
    if found is None:
        return None
    row, place, ratio = found
    update = run.codes.get("updates")
    if update is None:
        return None
    explained = int(update[row, place]) - int(codes[row, place])
    # Written by a step if the change that the step made is about as large as what is there after it.
    if explained > -PER_OCTAVE or update[row, place] == NONFINITE:
        return None
    name = run.names[place]
    return Finding(
        "changed_weights",
        row,
        f"The weights of {name} became {ratio:.3g} times as large between two steps, and no step did it: "
        f"the update of this step was {math.exp(explained / PER_OCTAVE * LN2):.2g} of their norm.",
        "Look for code that writes weights (a checkpoint, an average, a re-initialisation, a tied tensor). "
        "A limit on gradients does not undo it; a bound on the weights (kk.bound.MaxNorm) would have.",
        tensors=(name,),
        numbers={"ratio": ratio, "update_share": math.exp(explained / PER_OCTAVE * LN2)},
    )


def _first_jump(codes: np.ndarray) -> tuple[int, int, float] | None:
    """Return row, tensor and ratio of the first jump between rows that are usual before it."""
    least = math.log2(JUMP) * PER_OCTAVE
    for start in range(1, len(codes), 4096):
        before, after = codes[start - 1 : start + 4095], codes[start : start + 4096]
        before = before[: len(after)].astype(np.int32)
        steps = after.astype(np.int32) - before
        # A bias that begins at zero grows by large factors; it has no usual norm yet.
        steps[(before == 0) | (after == 0) | (before == NONFINITE)] = 0
        wild = steps > least
        if start == 1:
            wild[:8] &= steps[:8] > 3 * least
        if wild.any():
            row = int(np.argmax(wild.any(axis=1)))
            place = int(np.argmax(steps[row]))
            return start + row, place, float(2.0 ** (steps[row, place] / PER_OCTAVE))
    return None
