"""niwaki for Keras 3 on every backend, and for TensorFlow's own loops."""

from niwaki.keras.clipped_optimizer import ClippedOptimizer, clipped
from niwaki.keras.constraint import Bound
from niwaki.keras.gradients import check, clip, initial_state, outcome
from niwaki.keras.masks import Masks
from niwaki.keras.monitor import Monitor
from niwaki.keras.penalties import Penalty, penalty
from niwaki.keras.pruning import prune_
from niwaki.keras.sparse_training import Pruning
from niwaki.keras.standing_in import strip_
from niwaki.keras.weights import bound_

__all__ = [
    "Bound",
    "ClippedOptimizer",
    "Masks",
    "Monitor",
    "Penalty",
    "Pruning",
    "bound_",
    "check",
    "clip",
    "clipped",
    "initial_state",
    "outcome",
    "penalty",
    "prune_",
    "strip_",
]
