"""Models as named NumPy arrays and back, for packed files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import ml_dtypes
import numpy as np

from karikomi.errors import BadFile, InvalidArgument, Unsupported, suggest
from karikomi.keras.arrays.variables import names_of, on_host
from karikomi.keras.internals import all_layers
from karikomi.keras.layers import codes
from karikomi.keras.layers.unit_axes import weights_of
from karikomi.quantize import Coded

WHERE = "keras.fill_"
NOTE = "keras.order"
"""The note with the places of the sorted names in the order of ``model.weights``."""
CONFIG = "keras.config"
"""The note with the configuration of a shrunk model, as JSON: data, from which no code is made."""


def to_arrays(model: Any) -> dict[str, np.ndarray]:
    """Return path -> array for ``model.weights`` of a built model; copies.

    A variable that layers share is returned once; of paths that several variables have, later ones end
    with ``#2``. bfloat16 comes as ml_dtypes has it, which NumPy has not. Raises `InvalidArgument` for a model
    that is not built.

    >>> import keras
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="head")], name="net")
    >>> {name: array.shape for name, array in to_arrays(model).items()}
    {'net/head/kernel': (4, 2), 'net/head/bias': (2,)}
    """
    return {name: as_array(variable, name) for name, variable in _variables(model).items()}


def to_stored(model: Any) -> dict[str, np.ndarray | Coded]:
    """Return path -> codes of the quantized variables of a model, arrays of the others.

    Raises `Unsupported` naming the first variable that changed after `quantize_`.
    """
    variables = _variables(model)
    coded = codes.recall(model)
    return {
        name: coded[name] if name in coded else as_array(variable, name)
        for name, variable in variables.items()
    }


def notes_of(model: Any) -> dict[str, str]:
    """Return what a file has to say about a model beside its variables: their order.

    Files have names in alphabetical order, and Keras numbers layers without a name anew for each model.
    """
    names = list(_variables(model))
    places = {name: str(place) for place, name in enumerate(sorted(names))}
    return {} if names == sorted(names) else {NOTE: " ".join(places[name] for name in names)}


def as_array(variable: Any, name: str) -> np.ndarray:
    """Return a copy of a variable or a tensor as an array; `name` is for the error where that cannot be."""
    try:
        return np.array(on_host(variable), order="C")
    except (TypeError, ValueError) as error:
        raise Unsupported("this cannot be made an array", where=name, got=error) from error


def fill_(
    model: Any,
    tensors: Mapping[str, np.ndarray | Coded],
    notes: Mapping[str, str] | None = None,
) -> Any:
    """Put named arrays (or codes) into a built model, in place, and return it.

    Variables are found by their paths, or, where the paths are others (Keras numbers layers without a name anew
    for each model), by their order, if names and shapes within the layers agree. `notes`: what `notes_of` returned.
    Raises `InvalidArgument` naming the first variable that is missing or unknown, of another shape or kind of
    number, or has values out of range for its type; the model is then as before.
    """
    arrays = {
        name: tensor.decode() if isinstance(tensor, Coded) else np.asarray(tensor)
        for name, tensor in tensors.items()
    }
    variables = _matched(_variables(model), arrays, notes or {})
    arrays = {name: _fitting(name, arrays[name], item) for name, item in variables.items()}
    for name, variable in variables.items():
        tensor = tensors[name]
        if isinstance(tensor, Coded):
            codes.put(variable, tensor)
        else:
            variable.assign(arrays[name])
            codes.forget(variable)
    for layer in all_layers(model):
        if isinstance(layer, keras.layers.Normalization):
            # It computes with numbers that it makes of its weights.
            layer.finalize_state()
    return model


def _variables(model: Any) -> dict[str, Any]:
    found = [item.variable for item in weights_of(model, where="keras.to_arrays")]
    return dict(zip(names_of(found), found, strict=True))


def _matched(
    variables: dict[str, Any], arrays: Mapping[str, np.ndarray], notes: Mapping[str, str]
) -> dict[str, Any]:
    """Return name in the file -> variable."""
    if set(variables) == set(arrays):
        return variables
    stored = _in_order(sorted(arrays), notes.get(NOTE))
    if len(stored) == len(variables) and all(
        _leaf(name) == _leaf(other) and np.shape(arrays[name]) == tuple(variable.shape)
        for name, (other, variable) in zip(stored, variables.items(), strict=True)
    ):
        return dict(zip(stored, variables.values(), strict=True))
    if CONFIG in notes:
        raise InvalidArgument(
            "the file is of a network that was made smaller",
            where=WHERE,
            got=f"a model of {len(variables)} variables, as before",
            hint='keras.models.load_model("model.keras"), the file beside it',
        )
    missing, unknown = sorted(set(variables) - set(arrays)), sorted(set(arrays) - set(variables))
    near = suggest(missing[0], unknown) if missing and unknown else None
    raise InvalidArgument(
        "the file and the model are different networks",
        where=(missing or unknown)[0],
        got=f"only in the file: {_first(unknown)}",
        allowed=f"only in the model: {_first(missing)}",
        hint=f"{len(set(variables) & set(arrays))} names are in both"
        + (f"; {near}" if near else ""),
    )


def _in_order(names: list[str], note: str | None) -> list[str]:
    """Return sorted names in the order of the model that was saved; another order where the note is none."""
    if note is None:
        return names
    places = note.split()
    if sorted(places, key=lambda place: (len(place), place)) != [str(i) for i in range(len(names))]:
        raise BadFile("this is no order of the variables", where=f"note {NOTE!r}", got=note[:80])
    return [names[int(place)] for place in places]


def _fitting(name: str, array: np.ndarray, variable: Any) -> np.ndarray:
    """Return an array in the type of a variable, or raise."""
    if array.shape != tuple(variable.shape):
        raise InvalidArgument(
            "the variable has another shape",
            where=f"{WHERE}: {name}",
            got=array.shape,
            allowed=tuple(variable.shape),
            hint="a model that kk.keras.shrink made smaller is built from its own .keras file",
        )
    where, dtype = f"{WHERE}: {name}", keras.backend.standardize_dtype(variable.dtype)
    if ("float" in array.dtype.name) != keras.backend.is_float_dtype(dtype):
        raise InvalidArgument("another kind of number", where=where, got=array.dtype, allowed=dtype)
    known = codes.as_floats(array) if "float" in dtype else array
    with np.errstate(over="ignore"):
        cast = known.astype(getattr(ml_dtypes, dtype, dtype))
    same = (
        np.isfinite(codes.as_floats(cast)) == np.isfinite(known)
        if "float" in dtype
        else cast == known
    )
    if not np.all(same):
        raise InvalidArgument("values too large for the model's type", where=where, got=dtype)
    return cast


def _leaf(name: str) -> str:
    return name.partition("#")[0].rpartition("/")[2]


def _first(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more if names else "nothing"
