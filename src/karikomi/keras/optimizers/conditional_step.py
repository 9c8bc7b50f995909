"""Conditional optimizer steps, and writes to variables, per backend of Keras.

Torch branches; JAX does so with functions that return what they would write; TensorFlow branches where a
graph allows it, which under `tf.distribute` is outside of the replicas.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import keras

from karikomi.keras.arrays.library import is_known
from karikomi.keras.optimizers.branching import Step, StepBranching


class StatelessBranching(StepBranching):
    """JAX: a branch assigns nothing, but returns what all variables would be.

    To take both branches and select costs another pass over weights and moments, which XLA does not fuse away.
    """

    def __init__(self, written: Callable[[], list[Any]]) -> None:
        self._written = written

    def either(self, predicate: Any, first: Step, other: Step, arrays: Sequence[Any]) -> None:
        """Call one of two functions with these arrays."""
        if is_known(predicate):
            (first if bool(predicate) else other)(arrays)
            return
        variables = self._written()
        before = [(variable, variable.value) for variable in variables]

        def after(step: Step) -> list[Any]:
            with keras.StatelessScope(before) as scope:
                step(arrays)
            return [scope.get_current_value(variable) for variable in variables]

        found: Any = keras.ops.cond(predicate, lambda: after(first), lambda: after(other))
        self.assign(variables, found)


def branching_for(written: Callable[[], list[Any]]) -> StepBranching:
    """Return the step branching of the backend; `written`: the variables that a step may write."""
    backend = keras.config.backend()
    if backend == "tensorflow":
        return importlib.import_module("karikomi.keras.optimizers.tensorflow_step").Replicated()
    return StatelessBranching(written) if backend == "jax" else StepBranching()
