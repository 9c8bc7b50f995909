"""Variables of a model that can be pruned: their layouts, their siblings, and why others are left alone."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
from keras import layers

from karikomi.keras.arrays.variables import names_of, on_host
from karikomi.keras.internals import all_layers
from karikomi.keras.layers.declarations import Declarations, declared_in
from karikomi.keras.layers.unit_axes import (
    CONVOLUTIONS,
    DEPTHWISE,
    SEPARABLE,
    TRANSPOSED,
    Weight,
    weights_of,
)
from karikomi.prune import Layout
from karikomi.prune.protection import PROTECTED, check_protect

KERNELS = (
    *(layers.Dense, layers.EinsumDense),
    *(*CONVOLUTIONS, *TRANSPOSED, *DEPTHWISE, *SEPARABLE),
)
NORMS = (
    *(layers.BatchNormalization, layers.LayerNormalization, layers.GroupNormalization),
    *(layers.RMSNormalization, layers.UnitNormalization),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Oriented:
    """A variable as the selection sees it: axes in the order `axes`, then of shape `shape`.

    `declared`: whether its layer, or the user, declares it as prunable; none where nothing is declared.
    """

    name: str
    variable: Any
    layer: Any
    axes: tuple[int, ...]
    shape: tuple[int, ...]
    layout: Layout | None = None
    declared: bool | None = None

    def place_of(self, axis: int) -> int:
        """Return where an axis of the variable lies as the selection sees it, the number of axes if nowhere alone."""
        rank = len(self.axes)
        alone = self.shape == tuple(int(self.variable.shape[place]) for place in self.axes)
        return self.axes.index(axis % rank) if alone and -rank <= axis < rank else len(self.shape)

    def turned(self, array: np.ndarray) -> np.ndarray:
        """Return an array of the variable's shape as the selection sees it."""
        return array.transpose(self.axes).reshape(self.shape)

    def returned(self, array: np.ndarray) -> np.ndarray:
        """Return an array that the selection made, in the variable's shape."""
        own = [int(self.variable.shape[axis]) for axis in self.axes]
        return np.ascontiguousarray(array.reshape(own).transpose(np.argsort(self.axes)))

    def array(self) -> np.ndarray:
        """Return the entries on the host, in a dtype of NumPy."""
        values = on_host(self.variable)
        known = np.issubdtype(values.dtype, np.floating)
        return self.turned(values if known else values.astype(np.float32))


def oriented(model: Any, *, where: str) -> dict[str, Oriented]:
    """Return name -> variable for all variables of a built model, each once, in the order of the model.

    Names are paths, with ``#2`` appended to repeated ones.
    """
    found = weights_of(model, where=where)
    names = names_of([item.variable for item in found], [""] * len(found))
    own = declared_in([item.layer for item in found], all_layers(model))
    return {
        name: _declared(_oriented(name, item), own) for name, item in zip(names, found, strict=True)
    }


def prunable(
    found: Mapping[str, Oriented], protect: Collection[str], named: Collection[str] = ()
) -> tuple[list[str], dict[str, str]]:
    """Return ``(names of what can be pruned, name -> why a variable cannot)``; statistics are not mentioned.

    `protect`: keys of `PROTECTED`, else `UnknownName`; first and last are meant in the order of the model. `named`:
    variables that can be pruned whatever they are.
    """
    check_protect(protect)
    reasons = {
        name: "" if name in named else _why_not(item, protect)
        for name, item in found.items()
        if is_weight(item)
    }
    chosen = [name for name, reason in reasons.items() if not reason]
    left_alone = {name: reason for name, reason in reasons.items() if reason}
    kernels = [name for name in chosen if not isinstance(found[name].layer, NORMS)]
    for which, place in (("first", 0), ("last", -1)):
        if which in protect and kernels and kernels[place] not in named:
            left_alone[kernels[place]] = PROTECTED[which]
    return [name for name in chosen if name not in left_alone], left_alone


def is_weight(value: Oriented) -> bool:
    """Return whether a variable is a parameter, and no running statistic or seed."""
    floating = keras.backend.is_float_dtype(value.variable.dtype)
    statistic = value.variable.name.startswith("moving_") and isinstance(value.layer, NORMS)
    return floating and not statistic


def siblings(value: Oriented, found: Mapping[str, Oriented], norm: Any = None) -> list[str]:
    """Return the names of the vectors of a kernel's units: its bias, and scale and shift of a `norm`."""
    units = value.shape[value.layout.units] if value.layout else 0
    wanted = [getattr(value.layer, "bias", None)]
    wanted += [getattr(norm, name, None) for name in ("gamma", "beta")]
    known = {id(other.variable): name for name, other in found.items()}
    fitting = [v for v in wanted if v is not None and math.prod(v.shape) == units]
    return [known[id(v)] for v in fitting if id(v) in known]


def _oriented(name: str, weight: Weight) -> Oriented:
    shape = tuple(map(int, weight.variable.shape))
    axes, seen, layout = tuple(range(len(shape))), shape, None
    leaf, layer = weight.variable.name, weight.layer
    spatial = tuple(range(len(shape) - 2))
    if isinstance(layer, DEPTHWISE) and leaf == "kernel" or leaf == "depthwise_kernel":
        axes, layout = (len(shape) - 2, len(shape) - 1, *spatial), Layout(0, 1)
        seen = (shape[-2] * shape[-1], 1, *shape[:-2])
    elif _is_kernel(layer, leaf) or is_recurrent(layer, leaf) and weight.axes == (len(shape) - 1,):
        axes = (len(shape) - 1, len(shape) - 2, *spatial)
        layout = Layout(1, 0) if isinstance(layer, TRANSPOSED) else Layout(0, 1)
        seen = tuple(shape[axis] for axis in axes)
    elif isinstance(layer, layers.EinsumDense) and leaf == "kernel" and weight.axes:
        inputs = tuple(axis for axis in axes if axis not in weight.axes)
        axes, layout = (*weight.axes, *inputs), Layout(0, 1)
        seen = tuple(math.prod(shape[axis] for axis in some) for some in (weight.axes, inputs))
    elif isinstance(layer, layers.Embedding) and leaf == "embeddings":
        layout = Layout(0, 1)
    elif isinstance(layer, (layers.EinsumDense, *NORMS)):
        seen, layout = (math.prod(shape),), Layout(0)
    return Oriented(
        name=name, variable=weight.variable, layer=layer, axes=axes, shape=seen, layout=layout
    )


def _declared(value: Oriented, own: Declarations) -> Oriented:
    """Return the variable with what is declared of it."""
    layout = own.layouts.get((id(value.layer), value.variable.name), None)
    if id(value.layer) in own.speaking:
        return replace(value, declared=id(value.variable) in own.variables)
    if id(value.variable) in own.variables:
        return replace(value, declared=True)
    if (id(value.layer), value.variable.name) not in own.layouts:
        return value
    if layout is None:
        return replace(value, declared=True)
    rank = len(value.variable.shape)
    layout.check(tuple(value.variable.shape), where=value.name)
    front = [axis % rank for axis in (layout.units, layout.inputs) if axis is not None]
    axes = (*front, *(axis for axis in range(rank) if axis not in front))
    shape = tuple(int(value.variable.shape[axis]) for axis in axes)
    turned = Layout(0, None if layout.inputs is None else 1)
    return replace(value, declared=True, axes=axes, shape=shape, layout=turned)


def is_recurrent(layer: Any, leaf: str) -> bool:
    """Return whether this is a kernel of a recurrent cell: of its inputs or of its states."""
    return leaf in ("kernel", "recurrent_kernel") and hasattr(layer, "recurrent_kernel")


def _is_kernel(layer: Any, leaf: str) -> bool:
    plain = isinstance(layer, (layers.Dense, *CONVOLUTIONS, *TRANSPOSED)) and leaf == "kernel"
    return plain or isinstance(layer, SEPARABLE) and leaf == "pointwise_kernel"


def _why_not(value: Oriented, protect: Collection[str]) -> str:
    layer, leaf = value.layer, value.variable.name
    if value.declared is not None:
        return "" if value.declared else f"{type(layer).__name__} does not declare it as prunable"
    if isinstance(layer, NORMS) and leaf == "gamma":
        return PROTECTED["norms"] if "norms" in protect else ""
    if isinstance(layer, layers.Embedding) and leaf == "embeddings":
        return PROTECTED["embeddings"] if "embeddings" in protect else ""
    if "bias" in leaf or leaf == "beta":
        return "a bias"
    if is_recurrent(layer, leaf) and value.layout is not None:
        return PROTECTED["recurrent"] if "recurrent" in protect else ""
    if not isinstance(layer, KERNELS) or value.layout is None:
        return f"{leaf} of {type(layer).__name__}: no kernel of a Dense or Conv layer"
    return ""
