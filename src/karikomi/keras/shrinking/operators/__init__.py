"""The rules of all layers and operations; importing this package registers them."""

from karikomi.keras.shrinking.operators import (
    attention,
    contractions,
    elementwise,
    movement,
    normalizations,
    pooling,
    recurrent,
    reductions,
)

__all__ = [
    "attention",
    "contractions",
    "elementwise",
    "movement",
    "normalizations",
    "pooling",
    "recurrent",
    "reductions",
]
