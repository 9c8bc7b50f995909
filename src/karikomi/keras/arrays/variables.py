"""Keras variables and the names that rules and masks use for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import keras
import numpy as np

from karikomi.keras.arrays.library import framework_of
from karikomi.rule import Array


def value_of(variable: Any) -> Array:
    """Return the array that a variable of Keras or TensorFlow holds, or an array itself."""
    if isinstance(variable, keras.Variable):
        variable = variable.value
    if framework_of(variable) == "tensorflow" and hasattr(variable, "assign"):
        return variable.read_value()
    return variable.detach() if framework_of(variable) == "torch" else variable


def on_host(variable: Any) -> np.ndarray:
    """Return the values of a variable or a tensor as an array of NumPy."""
    return np.asarray(keras.ops.convert_to_numpy(variable))


def masked(mask: Any, values: Any) -> Any:
    """Return values with zeros where a mask is false."""
    return keras.ops.where(keras.ops.convert_to_tensor(mask), values, keras.ops.zeros_like(values))


def names_of(variables: Sequence[Any], places: Iterable[object] | None = None) -> list[str]:
    """Return the paths or names of variables, ``#2`` appended to repeated ones, and places for unnamed ones.

    `places`: by default their numbers.
    """
    found: dict[str, None] = {}
    places = range(len(variables)) if places is None else places
    for variable, place in zip(variables, places, strict=True):
        name = str(getattr(variable, "path", None) or _tensorflow_name(variable) or place)
        number = 2
        unique = name
        while unique in found:
            unique, number = f"{name}#{number}", number + 1
        found[unique] = None
    return list(found)


def _tensorflow_name(variable: Any) -> str | None:
    return variable.name.removesuffix(":0") if hasattr(variable, "assign") else None


def as_gradient(grad: Any, variable: Any) -> Any:
    """Return a gradient as a tensor of the backend, of floats; one that is absent, or sparse in TensorFlow, as it is.

    Keras' own steps take arrays and lists as well, and cast them where they are used.
    """
    if grad is None or hasattr(grad, "dense_shape"):
        return grad
    if not keras.ops.is_tensor(grad) or hasattr(grad, "todense"):
        grad = keras.ops.convert_to_tensor(grad, sparse=False)
    if keras.backend.is_float_dtype(keras.backend.standardize_dtype(grad.dtype)):
        return grad
    return keras.ops.cast(grad, keras.backend.standardize_dtype(variable.dtype))


def prepared(array: Any, shape: Any, name: str) -> Array | None:
    """Return a gradient in the form of its library; `shape`: that of its variable, where it is known."""
    if array is None or framework_of(array) != "tensorflow":
        return array
    from karikomi.keras.arrays.indexed_slices import from_tensorflow

    return from_tensorflow(array, shape, where=f"keras.clip: {name}")
