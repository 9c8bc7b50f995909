"""Unit axes and fan-ins of variables, by the type of their layer.

The only place with layouts of Keras, which do not follow from the rank: a transposed convolution and a
convolution differ only in their type.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import keras
from keras import layers

from karikomi.bound.spared import is_normalisation
from karikomi.errors import InvalidArgument
from karikomi.functional.norms import Axes
from karikomi.keras.internals import all_layers, child_layers

CONVOLUTIONS = (layers.Conv1D, layers.Conv2D, layers.Conv3D)
TRANSPOSED = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)
DEPTHWISE = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)
SEPARABLE = (layers.SeparableConv1D, layers.SeparableConv2D)
_CELLS = (layers.SimpleRNNCell, layers.LSTMCell, layers.GRUCell)
# The cells of these have no public name.
_WITH_CELLS = (layers.ConvLSTM1D, layers.ConvLSTM2D, layers.ConvLSTM3D)

_LAYOUTS: tuple[tuple[tuple[type, ...], dict[str, Axes]], ...] = (
    ((layers.Dense, *CONVOLUTIONS), {"kernel": (-1,)}),
    (DEPTHWISE, {"kernel": (-2, -1)}),
    (SEPARABLE, {"depthwise_kernel": (-2, -1), "pointwise_kernel": (-1,)}),
    (TRANSPOSED, {"kernel": (-2,)}),
    (_CELLS, {"kernel": (-1,), "recurrent_kernel": (-1,)}),
    ((layers.Embedding,), {"embeddings": (0,), "reverse_embeddings": (-1,)}),
)


class Weight(NamedTuple):
    """One variable of a model.

    `layer`: the innermost one that it belongs to. `axes`: those whose indices together name one output
    unit, ascending. `fan_in`: how many inputs feed one output of the layer. ``None`` for what it has not.
    """

    variable: Any
    layer: Any
    axes: Axes | None
    fan_in: int | None

    @property
    def floating(self) -> bool:
        """Whether its entries are floating-point numbers."""
        return bool(keras.backend.is_float_dtype(self.variable.dtype))

    @property
    def is_gain(self) -> bool:
        """Whether it is the gain of a normalisation layer."""
        own = "beta" not in self.variable.name and "bias" not in self.variable.name
        return own and is_normalisation(type(self.layer))

    @property
    def no_axes(self) -> str:
        """Why it has no unit axis."""
        if not self.floating:
            return "not floating"
        if "bias" in self.variable.name:
            return "a bias"
        return f"{type(self.layer).__name__} declares no unit axis"

    @property
    def no_fan_in(self) -> str:
        """Why it has no fan-in."""
        return f"{type(self.layer).__name__} has no fan-in" if self.floating else "not floating"


def unit_axes(model: Any) -> tuple[dict[str, Axes], dict[str, str]]:
    """Return ``(path -> unit axes, path -> why it has none)`` for the variables of a built model.

    The last axis of Dense, convolutions and recurrent kernels; the two last of depthwise kernels; the one
    before the last of transposed convolutions; the first of embeddings; of EinsumDense, of which attention
    is made, the axes of the kernel that its equation names in the output. Other layers declare none.

    Raises `InvalidArgument` for a model that is not built.

    >>> import keras
    >>> head = keras.layers.Dense(2, name="head")
    >>> model = keras.Sequential([keras.Input((4,)), head], name="net")
    >>> unit_axes(model)
    ({'net/head/kernel': (1,)}, {'net/head/bias': 'a bias'})
    """
    found = weights_of(model, where="keras.unit_axes")
    return (
        {item.variable.path: item.axes for item in found if item.axes is not None},
        {item.variable.path: item.no_axes for item in found if item.axes is None},
    )


def fan_ins(model: Any) -> tuple[dict[str, int], dict[str, str]]:
    """Return ``(path -> fan-in, path -> why it has none)`` for the variables of a built model.

    Counted as Keras' initialisers count it, so that both mean the same range: all axes of a kernel but the
    last (of transposed convolutions, which have the inputs there, and of depthwise ones too), and for
    EinsumDense the axes that are summed over. A bias has the fan-in of its layer's kernel. Embeddings,
    normalisations and unknown layers have none.

    Raises `InvalidArgument` for a model that is not built.

    >>> import keras
    >>> head = keras.layers.Dense(2, name="head")
    >>> model = keras.Sequential([keras.Input((4,)), head], name="net")
    >>> fan_ins(model)
    ({'net/head/kernel': 4, 'net/head/bias': 4}, {})
    """
    found = weights_of(model, where="keras.fan_ins")
    return (
        {item.variable.path: item.fan_in for item in found if item.fan_in is not None},
        {item.variable.path: item.no_fan_in for item in found if item.fan_in is None},
    )


def weights_of(model: Any, *, where: str) -> list[Weight]:
    """Return every variable of a built model or layer once, in the order of ``model.weights``."""
    if not isinstance(model, keras.Layer):
        raise InvalidArgument("not a Keras model", where=where, got=type(model).__name__)
    if not model.weights:
        raise InvalidArgument(
            "the model has no variables yet", where=where, hint="model.build(input_shape) first"
        )
    known: dict[int, Weight] = {}
    every = all_layers(model)  # from the outside in, and the only way into wrappers
    cells = {id(entry.cell) for entry in every if isinstance(entry, _WITH_CELLS)}
    for layer in every:
        for item in _own(layer, _CELLS[0] if id(layer) in cells else type(layer)):
            before = known.get(id(item.variable))
            # A layer that uses a variable of another layer has no layout for it.
            if before is None or item.axes is not None or before.axes is None:
                known[id(item.variable)] = item
    return [known[id(variable)] for variable in model.weights]


def _own(layer: Any, kind: type) -> list[Weight]:
    """Return the variables of a layer that none of the layers inside of it has."""
    inner = child_layers(layer)
    below = {id(variable) for item in inner for variable in item.weights}
    own = [variable for variable in layer.weights if id(variable) not in below]
    axes = {variable.name: _unit_axes(layer, variable, kind) for variable in own}
    shapes = {v.name: tuple(v.shape) for v in own if axes[v.name] is not None}
    fans = {} if isinstance(layer, layers.Embedding) else _fans(layer, shapes, axes)
    return [Weight(v, layer, axes[v.name], fans.get(v.name)) for v in own]


def _unit_axes(layer: Any, variable: Any, kind: type) -> Axes | None:
    if not keras.backend.is_float_dtype(variable.dtype):
        return None
    if isinstance(layer, layers.EinsumDense):
        return _einsum_axes(layer.equation) if variable.name == "kernel" else None
    for kinds, leaves in _LAYOUTS:
        if issubclass(kind, kinds) and variable.name in leaves:
            return tuple(axis % len(variable.shape) for axis in leaves[variable.name])
    return None


def _fans(
    layer: Any, shapes: Mapping[str, tuple[int, ...]], axes: Mapping[str, Axes | None]
) -> dict[str, int]:
    fans = {name: math.prod(shape[:-1]) for name, shape in shapes.items()}
    if isinstance(layer, layers.EinsumDense):
        kept = axes.get("kernel") or ()
        fans = {
            name: math.prod(length for axis, length in enumerate(shape) if axis not in kept)
            for name, shape in shapes.items()
        }
    kernels = [fans[name] for name in ("pointwise_kernel", "kernel") if name in fans]
    return fans | ({"bias": kernels[0]} if kernels else {})


def _einsum_axes(equation: str) -> Axes:
    """Return the axes of the second operand that are axes of the result.

    >>> _einsum_axes("...cd,cde->...ce")
    (0, 2)
    """
    operands, _, result = equation.replace(" ", "").partition("->")
    kernel = operands.partition(",")[2]
    return tuple(axis for axis, letter in enumerate(kernel) if letter in result)
