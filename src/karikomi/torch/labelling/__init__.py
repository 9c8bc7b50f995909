"""One rule per operator that joins, ends or starts labels; importing this package registers all of them."""

from karikomi.torch.labelling import (
    contractions,
    creation,
    elementwise,
    movement,
    normalizations,
    picking,
    pooling,
    recurrent,
    reductions,
)

__all__ = [
    "contractions",
    "creation",
    "elementwise",
    "movement",
    "normalizations",
    "picking",
    "pooling",
    "recurrent",
    "reductions",
]
