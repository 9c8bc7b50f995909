"""Codes of quantized variables, stored with them, so that a file can contain codes, not floats."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from karikomi.errors import Unsupported
from karikomi.keras.arrays.variables import names_of, on_host
from karikomi.quantize import Coded

_ATTRIBUTE = "_karikomi_coded"


def assign(variable: Any, coded: Coded) -> None:
    """Assign the values of codes to a variable."""
    variable.assign(coded.decode())


def put(variable: Any, coded: Coded) -> None:
    """Assign the values of codes to a variable, and store the codes with it."""
    assign(variable, coded)
    vars(variable)[_ATTRIBUTE] = coded


def forget(variable: Any) -> None:
    """Drop the codes of a variable, if it has any."""
    vars(variable).pop(_ATTRIBUTE, None)


def recall(model: Any) -> dict[str, Coded]:
    """Return path -> codes; raise `Unsupported` naming the first variable that changed since."""
    found = {}
    for name, variable in zip(names_of(model.weights), model.weights, strict=True):
        coded = vars(variable).get(_ATTRIBUTE)
        if coded is None:
            continue
        values, wanted = on_host(variable), decoded(coded, variable)
        if values.shape != wanted.shape or not np.array_equal(values, wanted):
            raise Unsupported(
                "the weights have changed since quantize_",
                where=name,
                hint="call kk.keras.quantize_ again before kk.save",
            )
        found[name] = coded
    return found


def holds_codes(model: Any) -> bool:
    """Return whether a variable of the model was quantized."""
    return any(_ATTRIBUTE in vars(variable) for variable in model.weights)


def decoded(coded: Coded, variable: Any) -> np.ndarray:
    """Return the values of codes in the type of a variable."""
    dtype = keras.backend.standardize_dtype(variable.dtype)
    return on_host(keras.ops.cast(keras.ops.convert_to_tensor(coded.decode()), dtype))


def as_floats(array: np.ndarray) -> np.ndarray:
    """Return an array in a type of NumPy: bfloat16 and float8 as float32."""
    return array if np.issubdtype(array.dtype, np.floating) else array.astype(np.float32)


def floats_of(variable: Any, dtype: type[np.floating] = np.float64) -> np.ndarray:
    """Return the values of a variable or a tensor of any float type as an array of `dtype`."""
    return as_floats(on_host(variable)).astype(dtype)
