"""karikomi for Keras 3 on every backend, and for TensorFlow's own loops."""

from karikomi.keras.bounding.constraint import Bound
from karikomi.keras.bounding.in_place import bound_
from karikomi.keras.callbacks.monitor import Monitor
from karikomi.keras.callbacks.pruning import Pruning
from karikomi.keras.clipping.tape import check, clip, initial_state, outcome
from karikomi.keras.layers.arrays import as_array, fill_, notes_of, to_arrays, to_stored
from karikomi.keras.optimizers.clipping_optimizer import ClippedOptimizer, clipped
from karikomi.keras.optimizers.optimizer_swap import strip_
from karikomi.keras.pruning.in_place import prune_
from karikomi.keras.pruning.masks import Masks
from karikomi.keras.pruning.penalties import Penalty, penalty
from karikomi.keras.quantization.in_place import quantize_
from karikomi.keras.quantization.while_training import QuantizedTraining, quantized_training
from karikomi.keras.shrinking.smaller_copy import shrink
from karikomi.keras.tasks.runner import runner_for
from karikomi.keras.tasks.trained import compiled_of, copies_of, examples, loss_of

__all__ = [
    "runner_for",
    "examples",
    "loss_of",
    "copies_of",
    "compiled_of",
    "Bound",
    "ClippedOptimizer",
    "Masks",
    "Monitor",
    "Penalty",
    "Pruning",
    "QuantizedTraining",
    "as_array",
    "bound_",
    "check",
    "clip",
    "clipped",
    "fill_",
    "initial_state",
    "notes_of",
    "outcome",
    "penalty",
    "prune_",
    "quantize_",
    "quantized_training",
    "shrink",
    "strip_",
    "to_arrays",
    "to_stored",
]
