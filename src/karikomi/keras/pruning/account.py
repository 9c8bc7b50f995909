"""The account of masks of a model, with the errors of outputs, measured before they are applied."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np

from karikomi.keras.arrays.variables import masked
from karikomi.keras.facts.layer_calls import batches, numbers, run, watched
from karikomi.keras.internals import all_layers
from karikomi.keras.layers.prunable import Oriented
from karikomi.prune.account import Account, error_ratio, row_of
from karikomi.selection.exact_masks import SelectionResult

BATCHES = 4
"""How many batches the errors are measured on."""


def account_of(
    model: Any,
    found: Mapping[str, Oriented],
    masks: Mapping[str, np.ndarray],
    answer: SelectionResult,
    data: Iterable[Any] | None,
) -> Account:
    """Return one row per masked variable; with `data` also the errors that the masks are about to make."""
    errors: Mapping[str, float] = {}
    if data is not None:
        errors = _errors(
            model, {id(found[name].variable): (name, item) for name, item in masks.items()}, data
        )
    rows = [
        row_of(
            name,
            found[name].turned(mask),
            found[name].layout,
            removed=mask.size - int(np.count_nonzero(mask)),
            why=answer.why.get(name),
            output_error=errors.get(name),
        )
        for name, mask in masks.items()
    ]
    total = sum(math.prod(item.shape) for item in found.values())
    return Account(tuple(rows), errors.get(""), total=total)


def _errors(
    model: Any, masks: Mapping[int, tuple[str, np.ndarray]], data: Iterable[Any]
) -> dict[str, float]:
    """Return name -> ``|f(x) - f'(x)| / |f(x)|`` of its layer for the inputs it has now, "" -> of the model."""
    sums: dict[str, np.ndarray] = {}
    every = {id(variable): variable for variable in model.weights}

    def add(name: str, before: Any, after: Any) -> None:
        # Over all floating outputs together; not where shapes differ.
        first, second = _floats(before), _floats(after)
        if first and [a.shape for a in first] == [b.shape for b in second]:
            pairs = zip(map(numbers, first), map(numbers, second), strict=True)
            parts = [[np.square(a - b).sum(), np.square(a).sum()] for a, b in pairs]
            sums[name] = sums.get(name, np.zeros(2)) + np.sum(parts, axis=0)

    every_layer = all_layers(model)
    # What a cell computes inside of a loop over steps has no values; its layer has.
    cells = {id(cell) for layer in every_layer for cell in _cells(layer)}

    def see(layer: Any, call: Callable[..., Any], args: Any, kwargs: Any, result: Any) -> None:
        if id(layer) in cells:
            return
        own = [layer, *_cells(layer)]
        for identity in {id(v) for part in own for v in vars(part).values()} & masks.keys():
            name, mask = masks[identity]
            if mask.ndim > 1:
                with _masked({identity: every[identity]}, masks):
                    add(name, result, call(*args, **kwargs))

    masked = {identity: every[identity] for identity in masks}
    for number, (inputs, _) in enumerate(batches(data, where="keras.prune_")):
        if number == BATCHES:
            break
        with watched(model, see):
            before = run(model, inputs) if hasattr(model, "call") else None
        with _masked(masked, masks):
            add("", before, run(model, inputs))
    return {name: error_ratio(*map(float, pair)) for name, pair in sums.items()}


def _cells(layer: Any) -> list[Any]:
    """Return the cells that a recurrent layer runs, with all that is inside of them."""
    cell = getattr(layer, "cell", None)
    return all_layers(cell) if isinstance(cell, keras.Layer) else []


def _floats(output: Any) -> list[Any]:
    leaves = [item for item in keras.tree.flatten(output) if hasattr(item, "shape")]
    return [
        leaf
        for leaf in leaves
        if keras.backend.is_float_dtype(keras.backend.standardize_dtype(leaf.dtype))
    ]


@contextmanager
def _masked(
    variables: Mapping[int, Any], masks: Mapping[int, tuple[str, np.ndarray]]
) -> Iterator[None]:
    kept = {identity: keras.ops.copy(item.value) for identity, item in variables.items()}
    try:
        for identity, variable in variables.items():
            variable.assign(masked(masks[identity][1], kept[identity]))
        yield
    finally:
        for identity, variable in variables.items():
            variable.assign(kept[identity])
