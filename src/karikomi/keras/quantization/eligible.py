"""Which variables of a model are quantized, as weights or as vectors, and why the others are not."""

from __future__ import annotations

import math

from keras import layers

from karikomi.bound.spared import is_normalisation
from karikomi.keras.arrays.variables import on_host
from karikomi.keras.layers.unit_axes import Weight
from karikomi.quantize.every_tensor import Eligible, is_large_matrix


def eligible(named: dict[str, Weight]) -> Eligible[Weight]:
    """Return the variables that are quantized, and why the others are not."""
    found: Eligible[Weight] = Eligible()
    for name, item in named.items():
        kind = _kind(item)
        if kind in ("weights", "vectors", "variances"):
            getattr(found, kind)[name] = item
        else:
            found.left_alone[name] = kind
    return found


def _kind(weight: Weight) -> str:
    """Return the field of `Eligible` for a variable, or why it stays."""
    layer, leaf, shape = weight.layer, weight.variable.name, tuple(weight.variable.shape)
    own = f"{leaf} of {type(layer).__name__}"
    if not weight.floating:
        return "not floating"
    if not math.prod(shape):
        return "it is empty"
    if getattr(layer, "quantization_mode", None):
        return f"Keras has quantized this layer ({layer.quantization_mode})"
    if isinstance(layer, layers.Normalization):
        return f"{own}: a statistic of the data"
    if is_normalisation(type(layer)):
        if leaf != "moving_variance":
            return "vectors"
        fits = bool((on_host(weight.variable) >= 0).all())
        return "variances" if fits else f"{own}: negative or NaN"
    if weight.axes is not None:
        return "weights"
    if leaf.startswith("bias"):
        return "vectors"
    if not weight.variable.trainable:
        return f"{own}: not trained, and no rule is known for it"
    return "weights" if is_large_matrix(shape) else "vectors"
