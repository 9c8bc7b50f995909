"""How much the outputs of a model mind an error of each weight: squared gradients of random sums of the outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import keras
import numpy as np
from tqdm import tqdm

from karikomi.errors import NonFinite
from karikomi.keras.facts.gradients import gradients
from karikomi.keras.facts.layer_calls import batches, numbers
from karikomi.keras.layers.unit_axes import Weight


def squared_gradients(
    model: Any,
    weights: Mapping[str, Weight],
    data: Iterable[Any],
    *,
    draws: int = 2,
    seed: int = 0,
    progress: bool = True,
    where: str,
) -> dict[str, np.ndarray]:
    """Return path -> mean over examples of the squared gradient of ``sum(outputs * noise)``, of the variable's shape.

    With standard normal noise its expectation is the diagonal of ``J^T J``: the change of the outputs. `draws`: passes
    over the data with other noise. A gradient has mean zero in each example, so that the square for a batch is the sum
    of those of its examples. Raises `NonFinite` naming a variable.
    """
    random, examples = np.random.default_rng(seed), 0
    variables = [item.variable for item in weights.values()]
    total = {name: np.zeros(tuple(item.variable.shape)) for name, item in weights.items()}

    def drawn(outputs: Any) -> Any:
        floats = [out for out in keras.tree.flatten(outputs) if _is_floating(out)]
        noise: list[Any] = [
            keras.ops.convert_to_tensor(random.normal(size=tuple(out.shape)).astype(np.float32))
            for out in floats
        ]
        parts: list[Any] = [
            keras.ops.sum(keras.ops.multiply(keras.ops.cast(out, "float32"), more))
            for out, more in zip(floats, noise, strict=True)
        ]
        return sum(parts[1:], start=parts[0])

    hidden = None if progress else True
    for _ in range(draws):
        for inputs, _targets in tqdm(
            batches(data, where=where), "curvature", leave=False, disable=hidden
        ):
            examples += len(keras.tree.flatten(inputs)[0])
            found = gradients(model, variables, drawn, inputs)
            for name, gradient in zip(total, found, strict=True):
                own = 0.0 if gradient is None else np.square(numbers(gradient))
                if not np.isfinite(own).all():
                    raise NonFinite("the gradient is NaN or infinite", where=name)
                total[name] += own
    return {name: square / max(examples, 1) for name, square in total.items()}


def _is_floating(tensor: Any) -> bool:
    return keras.backend.is_float_dtype(keras.backend.standardize_dtype(tensor.dtype))
