"""Inputs on which a shrink is proven: random ones, for every input of a model."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from karikomi.errors import InvalidArgument, Unsupported
from karikomi.keras.facts.layer_calls import run
from karikomi.keras.internals import all_layers, graph_of
from karikomi.keras.labelling.kept import WHERE

BATCH = 2
UNKNOWN = 32
"""The size of an axis that a model leaves open."""


def samples_of(model: Any, given: Any = None) -> list[Any]:
    """Return at least two batches of inputs: `given`, if there is one, and random ones."""
    if given is None:
        found = [_random(model, seed) for seed in (0, 1)]
    else:
        given = keras.tree.map_structure(keras.ops.convert_to_tensor, given)
        generator = np.random.default_rng(0)
        other = keras.tree.map_structure(lambda leaf: _random_like(leaf, generator), given)
        found = [given, other]
    try:
        run(model, found[0])
    except Exception as error:
        raise InvalidArgument(
            "the model does not run on the inputs of the proof",
            where=WHERE,
            got=str(error)[:200],
            hint="pass inputs=, a batch of inputs",
        ) from error
    return found


def _random(model: Any, seed: int) -> Any:
    generator = np.random.default_rng(seed)
    places = [
        int(layer.input_dim)
        for layer in all_layers(model)
        if isinstance(layer, keras.layers.Embedding)
    ]
    leaves = [_leaf(tensor, generator, min(places, default=2)) for tensor in model.inputs]
    return keras.tree.pack_sequence_as(graph_of(model).input, leaves)


def _leaf(tensor: Any, generator: np.random.Generator, places: int) -> Any:
    batch, *rest = tensor.shape
    shape = [BATCH if batch is None else batch]
    shape += [UNKNOWN if size is None else size for size in rest]
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    if keras.backend.is_float_dtype(dtype):
        return keras.ops.convert_to_tensor(generator.standard_normal(shape), dtype)
    if "int" not in dtype and dtype != "bool":
        raise Unsupported(
            "there are no random inputs of this type",
            where=f"{WHERE}: {tensor.name}",
            got=dtype,
            hint="pass inputs=, a batch of inputs",
        )
    return keras.ops.convert_to_tensor(generator.integers(0, places, shape), dtype)


def _random_like(leaf: Any, generator: np.random.Generator) -> Any:
    """Return a random tensor like an input: normal for floats, else its entries shuffled."""
    values: Any = keras.ops.convert_to_numpy(leaf)
    if keras.backend.is_float_dtype(keras.backend.standardize_dtype(leaf.dtype)):
        values = generator.standard_normal(values.shape)
    else:
        values = generator.permutation(values.reshape(-1)).reshape(values.shape)
    return keras.ops.convert_to_tensor(values, leaf.dtype)
