"""Prune by a schedule, in a training loop that holds its weights as arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from karikomi.numpy.arrays import Arrays
from karikomi.numpy.pruning import masked, pruned
from karikomi.prune import Coupled, Layout
from karikomi.prune.schedules.pruning_schedule import PruningSchedule, step_of
from karikomi.selection.array_masks import Beside
from karikomi.selection.request import scheduled

WHERE = "numpy.prune_at"


def prune_at(
    weights: Arrays,
    schedule: PruningSchedule,
    step: int,
    masks: Mapping[str, np.ndarray] | None = None,
    *,
    facts: Mapping[str, Mapping[str, Any]] | None = None,
    layouts: Mapping[str, Layout] | None = None,
    coupled: Sequence[Coupled] | None = None,
) -> tuple[Arrays, dict[str, np.ndarray]]:
    """Return ``(weights, masks)`` after a step: pruned further if the schedule is due, else masked as before.

    To be called after each step, with weights as the step left them. Its whole state are the masks and the
    number of the step: saved and given again, training goes on as if it had not stopped. Gradients are
    masked by `masked`, so that masked weights feed no momentum and no clip.

    `schedule`: such as ``kk.prune.Gradual(0.9, steps=(100, 1_000))``. `step`: a whole number >= 0. `masks`: what
    the last call returned; ``None`` at first. `facts`, `layouts`, `coupled`: see `prune`.

    Raises what `prune` raises, and `Unsupported` for schedules that rewind or regrow weights, which need the
    optimizer.

    >>> import karikomi as kk
    >>> weights, masks = {"w": np.arange(1.0, 11.0)}, None
    >>> rule = kk.prune.Gradual(0.8, steps=(0, 4), every=2)
    >>> for step in range(6):
    ...     weights, masks = prune_at(weights, rule, step, masks)
    ...     print(np.count_nonzero(weights["w"]), end=" ")
    10 10 3 3 2 2

    Source: Zhu and Gupta 2017, "To prune, or not to prune".
    """
    step = step_of(schedule, step, where=WHERE)
    masks = {} if masks is None else masks
    if not schedule.due(step):
        return masked(weights, masks), dict(masks)
    request = scheduled(WHERE, schedule, step, facts=facts)
    earlier = None if schedule.from_all else masks
    return pruned(weights, request, Beside(layouts, coupled, earlier))
