"""The output units of variables, as a grid can have them."""

from __future__ import annotations

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
