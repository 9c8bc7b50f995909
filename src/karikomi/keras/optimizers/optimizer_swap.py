"""Replace the optimizer of a compiled model by one with masks, and restore it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras

from karikomi.errors import Unsupported
from karikomi.keras.internals import build_from_spec, set_saved_optimizer
from karikomi.keras.optimizers.masking_optimizer import MaskedOptimizer


@dataclass(frozen=True, slots=True)
class OptimizerSlot:
    """The optimizer of a model, and the step that was compiled with it."""

    model: Any
    optimizer: Any
    train_function: Any

    def restore(self) -> None:
        """Restore the optimizer and the compiled step of the model."""
        scale, now = optimizers(self.model)
        if now is not self.optimizer:
            put(self.model, scale, self.optimizer)
            self.model.train_function = self.train_function


def standing(model: Any) -> OptimizerSlot:
    """Return the optimizer of a compiled model and its compiled step."""
    return OptimizerSlot(model, optimizers(model)[1], model.train_function)


def strip_(model: Any) -> None:
    """Put the optimizer of a compiled model back as it was before `Pruning`; weights stay as they are.

    Nothing holds the masks from then on, and a file of the model needs no karikomi. A model that was not
    pruned in training is left as it is.
    """
    scale, before = optimizers(model)
    if isinstance(before, MaskedOptimizer):
        put(model, scale, before.inner_optimizer)


def optimizers(model: Any) -> tuple[Any, Any]:
    """Return the loss scale of mixed precision, if there is one, and the optimizer inside of it."""
    optimizer = getattr(model, "optimizer", None)
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return optimizer, optimizer.inner_optimizer
    return None, optimizer


def put(model: Any, scale: Any, optimizer: Any) -> None:
    """Give a compiled model another optimizer, and forget the step that was compiled with the one before."""
    if scale is None:
        model.optimizer = optimizer
    else:
        scale.inner_optimizer = optimizer
    model.train_function = None
    set_saved_optimizer(model)


def is_unbuilt(model: Any) -> bool:
    """Return whether TensorFlow will make the variables of a model within its first step; others have by then."""
    lazy = keras.config.backend() == "tensorflow"
    return lazy and not (model.built and model.trainable_variables)


def before_first_step(model: Any, begin: Callable[[], None], *, where: str) -> None:
    """Build a model in `fit` as soon as its first batch can be had, and call `begin` before the step.

    The iterator of TensorFlow tells the shapes of a batch without reading one.
    """

    def first_step(iterator: Any) -> Any:
        spec = getattr(iterator, "element_spec", None)
        if spec is None or any(item.shape.rank is None for item in keras.tree.flatten(spec)):
            raise Unsupported(
                "the model is not built, and the data does not tell its shapes",
                where=where,
                hint="call the model on a batch first",
            )
        build_from_spec(model, spec)
        begin()
        model.make_train_function(force=True)
        return model.train_function(iterator)

    model.train_function = first_step
