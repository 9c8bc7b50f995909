"""Which variables of a model are quantized, as weights or as vectors, and why the others are not."""

from __future__ import annotations

import math
from dataclasses import dataclass

from keras import layers

from karikomi.bound.spared import is_normalisation
from karikomi.keras.arrays.variables import on_host
from karikomi.keras.layers.unit_axes import Weight

LARGEST_VECTOR = 256
"""Entries up to which a variable of a layer that is not known is a vector, whatever its shape."""


@dataclass(frozen=True, slots=True)
class Eligible:
    """Path -> variable: `weights` get the grid that was asked for; `vectors` one that costs no accuracy.

    Vectors are biases, gains of norms and what else is small, and the means of batch norms; `variances` are theirs
    too. `left_alone`: path -> why a variable stays as it is.
    """

    weights: dict[str, Weight]
    vectors: dict[str, Weight]
    variances: dict[str, Weight]
    left_alone: dict[str, str]

    @property
    def all(self) -> dict[str, Weight]:
        """All variables that are quantized."""
        return {**self.weights, **self.vectors, **self.variances}


def eligible(named: dict[str, Weight]) -> Eligible:
    """Return the variables that are quantized, and why the others are not."""
    found = Eligible({}, {}, {}, {})
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
    large = math.prod(shape) > LARGEST_VECTOR and sum(length > 1 for length in shape) > 1
    return "weights" if large else "vectors"
