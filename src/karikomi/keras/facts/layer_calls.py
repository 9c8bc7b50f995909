"""Observe the inputs and outputs of the layers of a model while it runs, of any kind of model.

The ``call`` of each layer is replaced meanwhile: each use of subclassed, nested and shared layers is observed
as in a functional model, and everything is restored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np

from karikomi.errors import InvalidArgument
from karikomi.keras.internals import all_layers

Seen = Callable[[Any, Callable[..., Any], tuple[Any, ...], dict[str, Any], Any], None]
"""Called with a layer, its own ``call``, the arguments and the result."""

Batch = tuple[Any, Any]
"""``(inputs, targets)``, the targets ``None`` where there are none."""


@contextmanager
def watched(model: Any, see: Seen) -> Iterator[None]:
    """Call `see` after each call of a layer of the model inside of the block."""
    with stood_in(all_layers(model), lambda layer: _seen(layer, layer.call, see)):
        yield


@contextmanager
def steady(model: Any) -> Iterator[None]:
    """Let batch normalisations that never saw data normalise by each batch meanwhile, and learn nothing.

    What they would use in inference was never estimated: a model scored at initialisation has such.
    """
    fresh = [layer for layer in all_layers(model) if _is_fresh(layer)]

    def in_training(layer: Any) -> Callable[..., Any]:
        call = layer.call
        return lambda inputs, training=None, mask=None: call(inputs, training=True, mask=mask)

    try:
        with stood_in(fresh, in_training):
            yield
    finally:
        for item in fresh:
            item.moving_mean.assign(keras.ops.zeros(item.moving_mean.shape))
            item.moving_variance.assign(keras.ops.ones(item.moving_variance.shape))


def run(model: Any, inputs: Any) -> Any:
    """Return what a model makes of inputs in inference mode, without gradients."""
    return keras.tree.map_structure(keras.ops.stop_gradient, model(inputs, training=False))


def batches(data: Any, *, where: str) -> Iterator[Batch]:
    """Yield ``(inputs, targets)`` for each batch, with ``None`` for targets that are not there.

    Raises `InvalidArgument` as `check_data` does, and for no batch at all.
    """
    check_data(data, where=where)
    known: Any = data
    if isinstance(data, keras.utils.PyDataset):
        known = map(known.__getitem__, range(len(known)))
    count = 0
    for batch in known:
        count += 1
        inputs, *rest = batch if isinstance(batch, tuple | list) else (batch,)
        yield inputs, rest[0] if rest else None
    if not count:
        raise InvalidArgument("data has no batch", where=f"{where}: data")


def check_data(data: Any, *, where: str) -> None:
    """Raise `InvalidArgument` for a single batch, and for data that can be read only once."""
    single = hasattr(data, "shape") or (
        isinstance(data, tuple) and any(hasattr(batch, "shape") for batch in data)
    )
    readable = isinstance(data, Iterable | keras.utils.PyDataset)
    if single or not readable or isinstance(data, dict | str | Iterator):
        raise InvalidArgument(
            "data is an iterable of batches that can be read again",
            where=f"{where}: data",
            got=type(data).__name__,
            allowed="such as [(inputs, targets)] or a tf.data.Dataset",
        )


def numbers(tensor: Any) -> np.ndarray:
    """Return a tensor on the host in double precision."""
    return np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(tensor, "float32")), np.float64)


@contextmanager
def stood_in(every: Iterable[Any], other: Callable[[Any], Callable[..., Any]]) -> Iterator[None]:
    """Let another function stand in for the ``call`` of each of these layers or operations meanwhile."""
    before = [(layer, vars(layer).get("call")) for layer in every]
    try:
        for layer, _ in before:
            # Past Keras' tracking of attributes, and past torch's of modules.
            object.__setattr__(layer, "call", other(layer))
        yield
    finally:
        for layer, own in before:
            vars(layer).pop("call", None)
            if own is not None:
                object.__setattr__(layer, "call", own)


def _is_fresh(layer: Any) -> bool:
    if not isinstance(layer, keras.layers.BatchNormalization) or not layer.trainable:
        return False
    mean, variance = numbers(layer.moving_mean), numbers(layer.moving_variance)
    return not mean.any() and bool((variance == 1).all())


def _seen(layer: Any, call: Callable[..., Any], see: Seen) -> Callable[..., Any]:
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        result = call(*args, **kwargs)
        see(layer, call, args, kwargs, result)
        return result

    return stand_in
