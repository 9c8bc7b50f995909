"""Batches that are each padded to their own longest example, as data collators make them, at one length."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from karikomi.tasks.metrics import IGNORED

MASK = "attention_mask"
"""The input that says which steps are real: 1, and which are padding: 0."""

Pair = tuple[Any, np.ndarray]


def at_one_length(pairs: Sequence[Pair], *, labels: Collection[str] = ()) -> list[Pair]:
    """Return pairs of inputs and targets with all axes of steps as long as the longest; others as they are.

    Inputs that are mappings with an ``attention_mask`` (n, steps) are padded on the side on which the masks are:
    every array whose second axis has the steps of its batch, the mask by 0, whole-number targets and inputs that are
    `labels` by
    ``-100``, which losses ignore, numbers of tokens by the one that stands in padding already, all others by 0.

    >>> def batch(steps):
    ...     return {"ids": np.full((1, steps), 7), "attention_mask": np.ones((1, steps), int)}, np.array([1])
    >>> [pair[0]["ids"].tolist() for pair in at_one_length([batch(2), batch(3)])]
    [[[7, 7, 0]], [[7, 7, 7]]]
    """
    steps = [_steps(inputs) for inputs, _ in pairs]
    if None in steps or len(set(steps)) == 1:
        return list(pairs)
    lengths = [length for length in steps if length is not None]
    masks = [inputs[MASK] for inputs, _ in pairs]
    before = any((mask[:, 0] < mask[:, -1]).any() for mask in masks)
    longest = max(lengths)

    def longer(arrays: Sequence[np.ndarray], fill: int) -> list[np.ndarray]:
        along = all(a.ndim > 1 and a.shape[1] == n for a, n in zip(arrays, lengths, strict=True))
        return [_padded(a, longest, fill, before) for a in arrays] if along else list(arrays)

    names = [name for name in pairs[0][0] if all(name in inputs for inputs, _ in pairs)]
    columns = {
        name: longer(
            [inputs[name] for inputs, _ in pairs], IGNORED if name in labels else _fill(name, pairs)
        )
        for name in names
    }
    targets = [target for _, target in pairs]
    whole = all(target.dtype.kind in "iu" for target in targets)
    answers = longer(targets, IGNORED if whole else 0)
    return [
        ({**inputs, **{name: column[k] for name, column in columns.items()}}, answers[k])
        for k, (inputs, _) in enumerate(pairs)
    ]


def _steps(inputs: Any) -> int | None:
    mask = inputs.get(MASK) if isinstance(inputs, Mapping) else None
    return None if mask is None or mask.ndim != 2 else int(mask.shape[1])


def _fill(name: str, pairs: Sequence[Pair]) -> int:
    """Return what stands in padding: for tokens what does already, where the masks have zeros."""
    if not name.endswith("ids") or name == "token_type_ids":
        return 0
    for inputs, _ in pairs:
        array, mask = inputs[name], inputs[MASK]
        if array.shape == mask.shape and not mask.all():
            return int(array[mask == 0][0])
    return 0


def _padded(array: np.ndarray, steps: int, fill: int, before: bool) -> np.ndarray:
    more = steps - array.shape[1]
    widths = [(0, 0)] * array.ndim
    widths[1] = (more, 0) if before else (0, more)
    return np.pad(array, widths, constant_values=fill)
