"""What a compensation holds out, and what of it is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from karikomi.shrink.account import Refit

WHOLE = ""
"""The name under which the outputs of the whole network stand."""
CHANGED = 1e-5
"""Of the largest magnitude: values of two networks that are further apart are others."""
NOISE = 1e-3
"""The relative error that sums in float32 cannot tell from none."""
MOST_INPUTS = 8_192
"""Of one layer (inputs times kernel positions of one group): the products of all pairs are held, and inverted."""
MEMORY = 4 << 30
"""Bytes of activations that are held at a time; at least two batches are."""
HELD_OUT = 5
"""Every so many-th batch is held out."""
NO_BETTER = "the outputs of the whole network were no better"


def held_out(count: int) -> list[bool]:
    """Return for each batch whether it is out of the fit: every fifth, of fewer the last.

    >>> held_out(2), held_out(6)
    ([False, True], [False, False, False, False, True, False])
    """
    return [number % HELD_OUT == min(count, HELD_OUT) - 1 for number in range(count)]


def held_examples(size: int) -> int:
    """Return how many examples of a single batch are held out; 0 of one example.

    >>> held_examples(1), held_examples(2), held_examples(64)
    (0, 1, 12)
    """
    return max(size // HELD_OUT, 1) if size > 1 else 0


def is_kept(before: float, after: float) -> bool:
    """Return whether a re-fit is kept, by the relative errors on what was held out."""
    return NOISE < before > after


def too_wide(inputs: int) -> str:
    """Return why a layer of so many inputs is not re-fitted, empty if it is."""
    return f"it has {inputs:,} inputs, more than {MOST_INPUTS:,}" if inputs > MOST_INPUTS else ""


def outcome(then: float, now: float, layers: Mapping[str, Refit]) -> dict[str, Refit]:
    """Return the outcome of all layers and of the network, whose loss or error was `then` and is `now`.

    Nothing is kept if the network is no better.

    >>> outcome(2.0, 3.0, {"a": Refit(0.5, 0.1, kept=True)})["a"].why
    'the outputs of the whole network were no better'
    """
    kept = now < then
    found = {
        name: refit if kept or not refit.kept else replace(refit, kept=False, why=NO_BETTER)
        for name, refit in layers.items()
    }
    return {WHOLE: Refit(then, now, kept), **found}
