"""Proof of a shrink: the smaller model equals the original in which what went is zero.

Zero are the entries of all weights that went. Where a normalisation, a softmax or a mean is taken over
entries of which some went, its statistics change: there both models of the proof use the affine part of
the layer, so that everything else is still compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import cycle
from typing import Any

import keras
import numpy as np

from karikomi.errors import Unsupported
from karikomi.keras.arrays.variables import on_host
from karikomi.keras.facts.layer_calls import numbers, run, stood_in
from karikomi.keras.internals import all_layers, graph_of, nodes_of
from karikomi.keras.labelling.kept import WHERE
from karikomi.keras.labelling.label_run import Propagated, kind_of, without_masks
from karikomi.keras.labelling.normalizations import axes_of
from karikomi.keras.shrinking.rewriting import Copy, Rebuilt, fill_
from karikomi.shrink.label_planes import Labelled, keeps

TOLERANCE = 1e-5
"""Of the largest magnitude of an output; 8 machine epsilons where that is more (half precision)."""

# Products of tensors that no weight is zero in: what goes of them is set to zero instead.
DERIVED = frozenset(("ops.Matmul", "ops.Einsum", "ops.Sum", "layers.Dot", "layers.Attention"))

Numbers = Callable[[Any], np.ndarray]


SOFTMAXES = ("layers.Softmax", "ops.Softmax", "ops.LogSoftmax", "ops.Sparsemax")


class Proof:
    """The two models that are compared."""

    def __init__(self, model: Any, small: Rebuilt) -> None:
        self.model, self.small = model, small
        self.kept = small.changes.kept
        masked = Copy(model)
        self.masked, self.layers = masked.model, masked.layers
        self._last = {id(layer) for layer in last_of(model)}
        self._allowed = _allowed(model)

    def difference(self, samples: Sequence[Any]) -> float:
        """Return the largest difference on these inputs, relative to the largest output.

        Also with random weights where the outputs hardly depend on the inputs, so that nothing would be compared
        (a head that is still zero). Raises `Unsupported` above the tolerance.
        """
        found = []
        if self._is_blind(samples):
            found = [self._compared(sample, randomized) for sample in samples]
            samples = samples[:1]
        found += [self._compared(sample, on_host) for sample in samples]
        worst = float(np.max(found))
        if not worst <= self._allowed:
            raise Unsupported(
                "the smaller model would differ from the original in which what went is zero",
                where=WHERE,
                got=f"a relative difference of {worst:.3g}",
                allowed=f"{self._allowed:.3g}",
                hint="please report the model: a rule of a layer is wrong",
            )
        return worst

    def _is_blind(self, samples: Sequence[Any]) -> bool:
        fill_(self.masked, self.model, on_host)
        with self._without_statistics(keras.ops.copy, self.layers):
            outputs = [run(self.masked, sample) for sample in samples[:2]]
        return apart(*outputs) < 1e-3

    def _compared(self, sample: Any, values: Numbers) -> float:
        fill_(self.masked, self.model, lambda v: self.kept.zeroed(v, values(v)))
        self.small.fill_(self.model, values)
        worst = self._worst(sample, keras.ops.copy)
        if not math.isfinite(worst):
            # Without their statistics, networks that multiply signals diverge: bounded, they do not.
            worst = self._worst(sample, keras.ops.tanh)
        return worst

    def _worst(self, sample: Any, first: Callable[[Any], Any]) -> float:
        found = self.kept.found
        with ExitStack() as stack:
            for layers in (self.layers, self.small.layers):
                stack.enter_context(self._without_statistics(first, layers))
            masks = masks_of(found, self.kept.labels)
            others = {id(self.layers[key]): rows for key, rows in masks.items()}
            chosen = [self.layers[key] for key in masks]
            stack.enter_context(stood_in(chosen, lambda layer: _masked(layer, others[id(layer)])))
            expected, got = run(self.masked, sample), run(self.small.model, sample)
        return apart(expected, got)

    @contextmanager
    def _without_statistics(
        self, first: Callable[[Any], Any], layers: Mapping[int, Any]
    ) -> Iterator[None]:
        """Use the affine part of layers with statistics, and what the last layers make before their activation.

        A softmax that is sure of itself would hide every difference.
        """
        chosen = [layers[key] for key in self.kept.found.statistics]
        last = [layers[key] for key in self._last if key not in self.kept.found.statistics]
        with (
            stood_in(chosen, lambda layer: affine(layer, first)),
            stood_in(last, lambda layer: affine(layer, keras.ops.copy)),
        ):
            yield


def equal(model: Any, small: Any, samples: Sequence[Any]) -> float:
    """Return the largest relative difference of the outputs of two models; `Unsupported` above the tolerance."""
    worst = float(np.max([apart(run(model, sample), run(small, sample)) for sample in samples]))
    if not worst <= _allowed(model):
        raise Unsupported(
            "without its dead units the model would compute something else",
            where=WHERE,
            got=f"a relative difference of {worst:.3g}",
            allowed=f"{_allowed(model):.3g}",
            hint="please report the model: a rule of a layer is wrong",
        )
    return worst


def last_of(model: Any) -> Iterator[Any]:
    """Yield the layers with an activation, and the softmaxes, that make the outputs of a model."""
    graph = graph_of(model)
    outputs = {id(tensor) for tensor in graph.outputs}
    for node in nodes_of(graph):
        operation = node.operation
        if outputs.isdisjoint(map(id, node.outputs)):
            continue
        if graph_of(operation) is not None:
            yield from last_of(operation)
        elif "activation" in vars(operation) or kind_of(operation) in SOFTMAXES:
            yield operation


def apart(expected: Any, got: Any) -> float:
    """Return the largest difference of two outputs, relative to the largest entry of the first; NaN if any is."""
    pairs = zip(keras.tree.flatten(expected), keras.tree.flatten(got), strict=True)
    return float(np.max([_apart(numbers(before), numbers(after)) for before, after in pairs]))


def _apart(before: np.ndarray, after: np.ndarray) -> float:
    if before.shape != after.shape:
        raise Unsupported("the shape of an output would change", where=WHERE, got=after.shape)
    scale = float(np.abs(before).max(initial=0.0)) or 1.0
    return float(np.abs(before - after).max(initial=0.0)) / scale


def randomized(variable: Any) -> np.ndarray:
    """Return random numbers for a variable, at which signals neither vanish nor grow much."""
    own = on_host(variable)
    if not keras.backend.is_float_dtype(keras.backend.standardize_dtype(variable.dtype)):
        return own
    generator = np.random.default_rng([2, *map(ord, variable.path)])
    noise = generator.standard_normal(own.shape)
    if len(own.shape) > 1:
        noise *= math.sqrt(2.0 * own.shape[-1] / own.size)
    elif variable.name in ("bias", "beta", "moving_mean"):
        noise *= 0.1
    else:
        noise = np.abs(noise) * 0.25 + 0.75
    return noise.astype(own.dtype)


def affine(layer: Any, first: Callable[[Any], Any]) -> Callable[..., Any]:
    """Return the call of a layer without its statistics: scale and shift only, or ones for a statistic itself."""
    call, kind = layer.call, kind_of(layer)

    def scaled(inputs: Any, *args: Any, **kwargs: Any) -> Any:
        value: Any = first(inputs)
        for name, combine in (
            ("gamma", keras.ops.multiply),
            ("scale", keras.ops.multiply),
            ("beta", keras.ops.add),
        ):
            part: Any = getattr(layer, name, None)
            if hasattr(part, "shape"):
                part = keras.ops.cast(part, value.dtype)
                value = combine(value, keras.ops.reshape(part, _broadcast(layer, value, part)))
        return value

    if "Normalization" in kind:
        return scaled
    if kind in SOFTMAXES:
        return lambda inputs, *args, **kwargs: first(inputs)
    if "activation" in vars(layer):
        return lambda *args, **kwargs: _with(layer, "activation", first, call, args, kwargs)
    if kind == "layers.Dot":
        return lambda *args, **kwargs: _with(layer, "normalize", False, call, args, kwargs)
    return lambda *args, **kwargs: keras.ops.ones_like(call(*args, **kwargs))


def _broadcast(layer: Any, value: Any, part: Any) -> list[int]:
    """Return the shape of scales so that they lie along the axes of a normalisation."""
    rank = len(value.shape)
    places = [axis % rank for axis in axes_of(layer)]
    sizes = dict(zip(places, part.shape, strict=True))
    return [int(sizes.get(axis, 1)) for axis in range(rank)]


def _with(
    layer: Any,
    name: str,
    other: Any,
    call: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """Return what a call gives while an attribute of the layer is another."""
    before = getattr(layer, name)
    object.__setattr__(layer, name, other)
    try:
        return call(*args, **kwargs)
    finally:
        object.__setattr__(layer, name, before)


def masks_of(found: Propagated, kept: np.ndarray) -> dict[int, list[list[np.ndarray]]]:
    """Return id of an operation -> for each of its calls one array of zeros and ones per tensor."""
    masks: dict[int, list[list[np.ndarray]]] = {}
    for call, _ in found.calls:
        if kind_of(call.operation) in DERIVED:
            rows = [_mask(value, kept) for value in call.values]
            masks.setdefault(id(call.operation), []).append(rows)
    return masks


def _mask(value: Labelled, kept: np.ndarray) -> np.ndarray:
    mask = np.ones((1,) * len(value.shape), np.float32)
    for plane in value.planes:
        mask = mask * keeps(plane, kept)
    return mask


def _masked(layer: Any, rows: Sequence[Sequence[np.ndarray]]) -> Callable[..., Any]:
    call, turns = layer.call, cycle(rows)

    def masked(*args: Any, **kwargs: Any) -> Any:
        left = iter(next(turns))

        def zeroed(leaf: Any) -> Any:
            return (
                leaf * keras.ops.cast(next(left), leaf.dtype) if keras.ops.is_tensor(leaf) else leaf
            )

        masks = {name: kwargs[name] for name in kwargs.keys() - without_masks(kwargs).keys()}
        given: Any = keras.tree.map_structure(zeroed, (args, without_masks(kwargs)))
        return call(*given[0], **given[1], **masks)

    return masked


def _allowed(model: Any) -> float:
    names = {getattr(layer, "compute_dtype", None) or "float32" for layer in all_layers(model)}
    precise = {"float16": 2.0**-10, "bfloat16": 2.0**-7}
    return max(TOLERANCE, *(8 * precise.get(name, 0.0) for name in names))
