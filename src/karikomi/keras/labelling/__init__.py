"""The rules of all layers and operations; importing this package registers them."""

from karikomi.keras.labelling import (
    attention_layers,
    contractions,
    elementwise,
    movement,
    normalizations,
    pooling,
    recurrent,
    reductions,
)

__all__ = [
    "attention_layers",
    "contractions",
    "elementwise",
    "movement",
    "normalizations",
    "pooling",
    "recurrent",
    "reductions",
]
