"""Facts from derivatives of the loss: gradients and their squares, on every backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from karikomi.errors import InvalidArgument, NonFinite
from karikomi.keras.facts.layer_calls import Batch, numbers
from karikomi.keras.layers.prunable import Oriented

Loss = Callable[[Any, Any], Any]


class Gradients:
    """Means over batches of ``dL/dw`` and ``(dL/dw)^2``, in double precision."""

    def __init__(
        self, model: Any, wanted: Sequence[Oriented], facts: frozenset[str], loss: Loss
    ) -> None:
        self._model, self._wanted, self._loss = model, wanted, loss
        self._sums: dict[str, dict[str, Any]] = {fact: {} for fact in facts}
        self._count = 0

    def see(self, batch: Batch) -> None:
        """Add one batch."""
        inputs, targets = batch
        if targets is None:
            raise InvalidArgument(
                "a loss takes targets, and this batch has none",
                where="data",
                allowed="(inputs, targets)",
            )
        self._count += 1
        variables = [entry.variable for entry in self._wanted]
        found = gradients(
            self._model, variables, lambda out: loss_value(self._loss, out, targets), inputs
        )
        for item, gradient in zip(self._wanted, found, strict=True):
            own = np.zeros(item.variable.shape) if gradient is None else numbers(gradient)
            if not np.isfinite(own).all():
                raise NonFinite("the gradient is NaN or infinite", where=item.name)
            for fact, sums in self._sums.items():
                sums[item.name] = sums.get(item.name, 0.0) + _TERMS[fact](own)

    def result(self) -> dict[str, dict[str, np.ndarray]]:
        """Return fact -> name -> mean."""
        return {
            fact: {name: total / self._count for name, total in sums.items()}
            for fact, sums in self._sums.items()
        }


def loss_value(loss: Loss, outputs: Any, targets: Any) -> Any:
    """Return a loss of outputs and targets as a scalar tensor; raise `InvalidArgument` if it is not one number."""
    targets = keras.tree.map_structure(keras.ops.convert_to_tensor, targets)
    # Those of Keras take targets first.
    of_keras = isinstance(loss, keras.losses.Loss)
    found = loss(targets, outputs) if of_keras else loss(outputs, targets)
    if int(np.prod(found.shape)) != 1:
        raise InvalidArgument(
            "a loss is one number",
            where="loss",
            got=tuple(found.shape),
            hint="its mean over the batch",
        )
    return keras.ops.reshape(found, ())


_TERMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "gradient": lambda gradient: gradient,
    "squared_gradient": np.square,
}


def gradients(
    model: Any, variables: Sequence[Any], value: Callable[[Any], Any], inputs: Any
) -> list[Any]:
    """Return the gradients of ``value(model(inputs))``, ``None`` for what it does not depend on."""
    by_backend = {"tensorflow": _of_tensorflow, "jax": _of_jax, "torch": _of_torch}
    find = by_backend[keras.config.backend()]
    return find(variables, lambda: value(model(inputs, training=False)))


def _of_tensorflow(variables: Sequence[Any], loss: Callable[[], Any]) -> list[Any]:
    import tensorflow as tf

    with tf.GradientTape(watch_accessed_variables=False) as tape:
        for variable in variables:
            tape.watch(variable.value)
        value = loss()
    found = tape.gradient(value, [variable.value for variable in variables])
    return [None if item is None else tf.convert_to_tensor(item) for item in found]


def _of_jax(variables: Sequence[Any], loss: Callable[[], Any]) -> list[Any]:
    import jax

    def loss_of(values: list[Any]) -> Any:
        with keras.StatelessScope(list(zip(variables, values, strict=True))):
            return loss()

    return jax.grad(loss_of)([variable.value for variable in variables])


def _of_torch(variables: Sequence[Any], loss: Callable[[], Any]) -> list[Any]:
    import torch

    values: Any = [variable.value for variable in variables]
    trained = [entry.requires_grad for entry in values]
    try:
        for item in values:
            item.requires_grad_(True)
        with torch.enable_grad():
            return list(torch.autograd.grad(loss(), values, allow_unused=True))
    finally:
        for item, was in zip(values, trained, strict=True):
            item.requires_grad_(was)
