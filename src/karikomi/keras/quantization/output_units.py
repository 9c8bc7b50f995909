"""The output units of variables, as a grid can have them, and which variables are quantized."""

from __future__ import annotations

import math

from karikomi.bound.spared import is_normalisation
from karikomi.keras.layers.unit_axes import Weight
from karikomi.quantize import OutputUnits
from karikomi.quantize.output_units import units_along


def output_units(weight: Weight) -> OutputUnits:
    """Return which weights of a variable have a scale in common, by the type of its layer.

    >>> import keras
    >>> from karikomi.keras.layers.unit_axes import weights_of
    >>> layer = keras.layers.Conv2DTranspose(6, 3)
    >>> layer.build((None, 8, 8, 4))
    >>> output_units(weights_of(layer, where="")[0])
    OutputUnits(axis=2, groups=1)
    """
    return units_along(weight.axes or (), tuple(map(int, weight.variable.shape)))


def why_not(weight: Weight) -> str:
    """Return why a variable is not quantized, nothing for one that is."""
    layer, leaf = weight.layer, weight.variable.name
    if not weight.floating:
        return "not floating"
    if getattr(layer, "quantization_mode", None):
        return f"Keras has quantized this layer ({layer.quantization_mode})"
    if is_normalisation(type(layer)):
        return f"{leaf} of a normalisation"
    if weight.axes is None and "bias" in leaf:
        return "a bias"
    if weight.axes is None and max(weight.variable.shape, default=1) == math.prod(
        weight.variable.shape
    ):
        return f"{leaf} of {type(layer).__name__}: a vector"
    return ""
