"""What the dense and the small network cost: parameters, memory, and milliseconds measured in turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from karikomi.search.folder import Folder
from karikomi.search.search_outcome import SearchOutcome
from karikomi.tasks import Runner

EXAMPLES = (1, 64)
"""How many examples a forward pass that is timed has."""
LEVEL = 0.95
_RESAMPLED = 2_000


def measured(
    runner: Runner, outcome: SearchOutcome, folder: Folder, *, most: int
) -> dict[str, Any]:
    """Return parameters, peak memory and milliseconds of the dense and the chosen network.

    `most`: the examples that there are to run at once.
    Measured once for each chosen file, and kept in the run folder, so that a resumed run has the same figures.
    """
    stage = f"measured-{outcome.chosen.stamp}"
    return folder.once(stage, lambda: _measured(runner, outcome, most))


def _measured(runner: Runner, outcome: SearchOutcome, most: int) -> dict[str, Any]:
    outcome.chosen.work.adopt()
    dense, small = outcome.dense.arrays, outcome.chosen.arrays
    counts = sorted({min(count, most) for count in EXAMPLES})
    before, after = (runner.costs(arrays, counts[-1]) for arrays in (dense, small))
    facts: dict[str, Any] = {
        f"{name}_{when}": found[name]
        for name in ("parameters", "memory")
        for when, found in (("before", before), ("after", after))
    }
    facts["timed"] = [
        {"examples": count, **paired_times(runner.times(dense, small, count))} for count in counts
    ]
    # A network for integer kernels has the times of its engine already.
    if "dense_ms" not in outcome.chosen.facts:
        facts |= {key: facts["timed"][-1][key] for key in ("ms_before", "ms_after")}
    return facts


def paired_times(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Return medians of times that were measured in turn, and how many times as fast, with its interval.

    ``faster``: the median of the ratios of the pairs, which met the same load; ``low``, ``high``: its percentile
    bootstrap interval at 95 %, from a fixed seed.

    >>> found = paired_times([(4.0, 2.0), (8.0, 4.0), (5.0, 2.5)])
    >>> found["ms_before"], found["ms_after"], found["faster"], found["low"], found["high"]
    (5.0, 2.5, 2.0, 2.0, 2.0)
    """
    times = np.asarray(pairs, dtype=np.float64)
    ratios = times[:, 0] / np.maximum(times[:, 1], 1e-9)
    draws = np.random.default_rng(0).integers(0, len(ratios), (_RESAMPLED, len(ratios)))
    medians = np.median(ratios[draws], axis=1)
    low, high = np.quantile(medians, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return {
        "ms_before": float(np.median(times[:, 0])),
        "ms_after": float(np.median(times[:, 1])),
        "faster": float(np.median(ratios)),
        "low": float(low),
        "high": float(high),
        "pairs": len(times),
    }


def running(result: Mapping[str, Any]) -> str:
    """Return in words whether the chosen network is faster: what an interval above 1 shows; else the reason.

    >>> timed = paired_times([(4.0, 2.0), (8.0, 4.0), (5.0, 2.5)])
    >>> running({"timed": [timed], "ms_before": 5.0, "ms_after": 2.5, "shrink": {}})
    '2.00x as fast (2.00 to 2.00): 5.00 -> 2.50 ms.'
    >>> same = paired_times([(1.0, 1.0), (2.0, 2.0)])
    >>> why = {"reason": "no unit was removed"}
    >>> running({"timed": [same], "ms_before": 1.5, "ms_after": 1.5, "shrink": why})
    'Not faster, 1.00x as fast (1.00 to 1.00): 1.50 -> 1.50 ms: no unit was removed.'
    """
    timed, before, after = result["timed"][-1], result["ms_before"], result["ms_after"]
    times = f"{_digits(before)} -> {_digits(after)} ms"
    if (before, after) != (timed["ms_before"], timed["ms_after"]):
        return (
            f"{before / after:.2f}x as fast in ONNX Runtime, whose integer kernels run it: {times}."
        )
    ratio = f"{timed['faster']:.2f}x as fast ({timed['low']:.2f} to {timed['high']:.2f})"
    if timed["low"] > 1:
        return f"{ratio}: {times}."
    return f"Not faster, {ratio}: {times}: {result['shrink'].get('reason', 'no unit was removed')}."


def _digits(milliseconds: float) -> str:
    return f"{milliseconds:.3g}" if milliseconds < 1 else f"{milliseconds:.2f}"
