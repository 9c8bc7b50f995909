"""What a model costs: multiply-accumulates of one example, an unknown size as 1, and milliseconds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import keras

from karikomi.keras.internals import kernel_of
from karikomi.keras.labelling.attention_layers import parts_of
from karikomi.keras.labelling.contractions import channel_axis
from karikomi.keras.labelling.kept import KeptWeights
from karikomi.keras.labelling.label_run import Call, Value, kind_of

Sizes = tuple[int, ...]


def macs_of(kept: KeptWeights) -> int:
    """Return the multiply-accumulates of all layers with weights, and of attention."""
    total = 0
    for call, found in kept.found.calls:
        count = _COUNTED.get(kind_of(call.operation))
        total += 0 if count is None else count(kept, call, found)
    return total


def _out(kept: KeptWeights, found: Value) -> Sizes:
    """Return the sizes of the first result, without the batch."""
    return kept.sizes(found[0] if isinstance(found, list) else found)[1:]


def _places(layer: Any, sizes: Sizes) -> int:
    """Return how many positions there are, of sizes without the batch."""
    channels = 0 if channel_axis(layer) == 1 else len(sizes) - 1
    return math.prod(size for axis, size in enumerate(sizes) if axis != channels)


def _dense(kept: KeptWeights, call: Call, found: Value) -> int:
    return math.prod(_out(kept, found)[:-1]) * math.prod(kept.of(kernel_of(call.operation)))


def _convolution(kept: KeptWeights, call: Call, found: Value) -> int:
    layer = call.operation
    return _places(layer, _out(kept, found)) * math.prod(kept.of(kernel_of(layer)))


def _separable(kept: KeptWeights, call: Call, found: Value) -> int:
    layer = call.operation
    kernels = (layer.depthwise_kernel, layer.pointwise_kernel)
    return _places(layer, _out(kept, found)) * sum(math.prod(kept.of(each)) for each in kernels)


def _transposed(kept: KeptWeights, call: Call, found: Value) -> int:
    layer = call.operation
    sizes = kept.sizes(call.values[0])[1:]
    return _places(layer, sizes) * math.prod(kept.of(kernel_of(layer)))


def _einsum_dense(kept: KeptWeights, call: Call, found: Value) -> int:
    layer = call.operation
    kernel = kept.of(kernel_of(layer))
    sides, _, out = layer.equation.replace(" ", "").partition("->")
    made = [
        size for letter, size in zip(sides.partition(",")[2], kernel, strict=True) if letter in out
    ]
    return math.prod(_out(kept, found)) // math.prod(made) * math.prod(kernel)


def _recurrent(kept: KeptWeights, call: Call, found: Value) -> int:
    steps = kept.sizes(call.values[0])[1]
    matrices = [v for v in call.operation.weights if "kernel" in v.name]
    return steps * sum(math.prod(kept.of(variable)) for variable in matrices)


def _attention(kept: KeptWeights, call: Call, found: Value) -> int:
    parts = parts_of(call.operation)
    query, value = (kept.sizes(call.argument(*place)) for place in ((0, "query"), (1, "value")))
    lengths = {"query": query[1], "gate": query[1], "attention_output": query[1]}
    kernels = {
        name: kept.of(kernel_of(part)) for name, part in parts.items() if hasattr(part, "equation")
    }
    projected = sum(
        lengths.get(name, value[1]) * math.prod(kernel) for name, kernel in kernels.items()
    )
    _, heads, width = kernels["query"]
    return projected + query[1] * value[1] * heads * (width + kernels["value"][-1])


_COUNTED: dict[str, Callable[[KeptWeights, Call, Value], int]] = {
    "layers.Dense": _dense,
    "layers.EinsumDense": _einsum_dense,
    **{f"layers.Conv{axes}D": _convolution for axes in (1, 2, 3)},
    **{f"layers.DepthwiseConv{axes}D": _convolution for axes in (1, 2)},
    **{f"layers.SeparableConv{axes}D": _separable for axes in (1, 2)},
    **{f"layers.Conv{axes}DTranspose": _transposed for axes in (1, 2, 3)},
    **dict.fromkeys(
        ("layers.LSTM", "layers.GRU", "layers.SimpleRNN", "layers.RNN", "layers.Bidirectional"),
        _recurrent,
    ),
    "layers.MultiHeadAttention": _attention,
    "layers.GroupedQueryAttention": _attention,
}


def milliseconds(model: Any, inputs: Any, *, runs: int = 15) -> float:
    """Return the median time of a forward pass of ``predict_on_batch``, after three that are not counted."""
    with _undisturbed(model):
        return median([_once(model, inputs) for _ in range(runs + 3)][3:])


def in_turn(
    before: Any, after: Any, inputs: Any, *, most: int = 15, least: int = 3, seconds: float = 1.0
) -> tuple[float, float]:
    """Return the median milliseconds of a forward pass of two models, measured in turn.

    After one pass each that is not counted; until there are `most`, or after some `seconds`, at least `least`.
    """
    pairs: list[tuple[float, float]] = []
    with _undisturbed(before, after):
        _once(before, inputs), _once(after, inputs)
        start = time.perf_counter()
        while len(pairs) < most and (len(pairs) < least or time.perf_counter() - start < seconds):
            pairs.append((_once(before, inputs), _once(after, inputs)))
    first, second = zip(*pairs, strict=True)
    return median(first), median(second)


def _once(model: Any, inputs: Any) -> float:
    start = time.perf_counter()
    keras.tree.map_structure(keras.ops.convert_to_numpy, model.predict_on_batch(inputs))
    return (time.perf_counter() - start) * 1e3


@contextmanager
def _undisturbed(*models: Any) -> Iterator[None]:
    """Leave the compiled prediction functions of models as they were."""
    before = [model.predict_function for model in models]
    try:
        yield
    finally:
        for model, function in zip(models, before, strict=True):
            model.predict_function = function
