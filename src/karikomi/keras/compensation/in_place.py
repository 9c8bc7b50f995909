"""Re-fit what is left of a smaller model to the dense one, layer by layer in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np

# Registers how inputs are read.
import karikomi.keras.reconstruction.calibration  # noqa: F401
from karikomi.keras.arrays.variables import on_host
from karikomi.keras.compensation.batch_norms import Renorm
from karikomi.keras.compensation.held_batches import HeldBatches, held_batches
from karikomi.keras.compensation.kernel_refits import KernelRefit, Side
from karikomi.keras.compensation.recurrent_layers import refit_recurrent_
from karikomi.keras.compensation.successors import Successor, Successors
from karikomi.keras.facts.gradients import loss_value
from karikomi.keras.facts.layer_calls import numbers, run, stood_in
from karikomi.keras.internals import all_layers, without_autocast
from karikomi.keras.labelling.kept import KeptWeights
from karikomi.keras.labelling.label_run import kind_of
from karikomi.keras.layers.codes import floats_of
from karikomi.keras.reconstruction.weight_reads import LayerCall, reader_of
from karikomi.prune.account import error_ratio
from karikomi.shrink.account import Refit
from karikomi.shrink.label_planes import Labelled
from karikomi.shrink.refit_outcome import CHANGED, NOISE, WHOLE, outcome

SEVERAL = "the layer is called several times"


def compensate_(
    model: Any,
    small: Any,
    layers: Mapping[int, Any],
    stays: KeptWeights,
    data: Any,
    loss: Any = None,
) -> dict[str, Refit]:
    """Re-fit the layers of a smaller model, in place; return layer -> its error on held-out data before and after.

    ``min |Y - W X - c|^2 + 0.01 mean(diag(X X^T)) |W - W_0|^2`` over W and c, for each kernel: Y is what it makes in
    the dense model (and what another summand of the same sum lacks by now), X what it multiplies in the smaller one,
    re-fitted up to there. c goes to the bias, or to the mean of the batch normalisation that follows; other batch
    normalisations are re-estimated. What is not better on what is held out is not kept; nothing is, if the loss of the
    whole model (or, without one, the distance of its outputs to the dense ones) is no better; this has the name "".
    `layers`: id of a layer or an operation of the dense model -> the smaller one.
    """
    data = held_batches(model, data)
    before = [on_host(variable) for variable in small.weights]
    then = _judged(model, small, data, loss)
    refits = _Refitting(model, small, layers, stays, data).run_()
    found = outcome(then, _judged(model, small, data, loss), refits)
    if not found[WHOLE].kept:
        for variable, old in zip(small.weights, before, strict=True):
            variable.assign(old)
    return found


def _judged(model: Any, small: Any, data: HeldBatches, loss: Any) -> float:
    """Return the loss on what is held out, or the relative distance of the outputs."""
    inputs, targets = data.of_held()
    outputs = run(small, inputs)
    if loss is not None and targets is not None:
        return float(on_host(loss_value(loss, outputs, targets)))
    pairs = zip(keras.tree.flatten(run(model, inputs)), keras.tree.flatten(outputs), strict=True)
    lost = energy = 0.0
    for dense, found in pairs:
        expected = numbers(dense)
        lost += float(np.square(expected - numbers(found)).sum())
        energy += float(np.square(expected).sum())
    return error_ratio(lost, energy)


class _Refitting:
    """One pass through the dense model, and one through the smaller one, in which its layers change."""

    def __init__(
        self,
        model: Any,
        small: Any,
        others: Mapping[int, Any],
        stays: KeptWeights,
        data: HeldBatches,
    ) -> None:
        self._model, self._small, self._data = model, small, data
        self._stays = stays
        self._successors = Successors(model)
        layers = dict(zip(map(id, all_layers(model)), all_layers(small), strict=True))
        every = {id(each): each for each in (*_watchable(model), *self._successors.operations())}
        self._pairs = [(dense, others.get(key) or layers[key]) for key, dense in every.items()]
        self._values = {
            id(call.operation): value
            for call, value in self._stays.found.calls
            if isinstance(value, Labelled)
        }
        self._calls: dict[int, list[LayerCall]] = {}
        self._dense: dict[int, Any] = {}
        self._now: dict[int, Any] = {}
        self._others = {id(dense): other for dense, other in self._pairs}
        self._settled: set[int] = set()
        self.found: dict[str, Refit] = {}

    def run_(self) -> dict[str, Refit]:
        """Re-fit; return layer -> outcome."""
        for layer in all_layers(self._model):
            if isinstance(layer, keras.layers.TimeDistributed):
                for variable in (v for v in layer.weights if "kernel" in v.name):
                    self.found[_layer(variable)] = Refit(why="inside of TimeDistributed")
        with self._recorded():
            run(self._model, self._data.inputs)
        with stood_in([other for _, other in self._pairs], self._refitting_()):
            run(self._small, self._data.inputs)
        return self.found

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        def watched(layer: Any) -> Callable[..., Any]:
            call = layer.call

            def stand_in(*args: Any, **options: Any) -> Any:
                result = call(*args, **options)
                self._calls.setdefault(id(layer), []).append(_call(args, options))
                self._dense[id(layer)] = result
                return result

            return stand_in

        with stood_in([dense for dense, _ in self._pairs], watched):
            yield

    def _refitting_(self) -> Callable[[Any], Callable[..., Any]]:
        dense = {id(other): own for own, other in self._pairs}

        def watched(layer: Any) -> Callable[..., Any]:
            call, own = layer.call, dense[id(layer)]

            def stand_in(*args: Any, **options: Any) -> Any:
                if id(own) not in self._now:
                    with without_autocast():
                        self._refit_(own, layer, _call(args, options))
                self._now[id(own)] = result = call(*args, **options)
                return result

            return stand_in

        return watched

    def _refit_(self, dense: Any, small: Any, call: LayerCall) -> None:
        """Re-fit a layer that is about to be called."""
        if not isinstance(dense, keras.Layer) or not dense.weights:
            return
        before, kernels = self._calls.get(id(dense), []), _kernels(dense)
        norm = kind_of(dense) == "layers.BatchNormalization"
        if not before or not (kernels or norm):
            return
        both = (dense, before[0]), (small, call)
        if len(before) > 1:
            self.found[str(dense.path) if norm else _layer(kernels[0])] = Refit(why=SEVERAL)
        elif norm:
            self._renorm_(*both)
        elif isinstance(dense, keras.layers.RNN):
            refit = refit_recurrent_(*both, self._stays, self._data.held)
            if refit is not None:
                self._note(_layer(kernels[0]), refit)
        else:
            for variable in kernels:
                self._refit_kernel_(variable, *both)

    def _refit_kernel_(
        self, variable: Any, dense: tuple[Any, LayerCall], small: tuple[Any, LayerCall]
    ) -> None:
        layer, name = dense[0], variable.name
        first = name == "depthwise_kernel" and hasattr(layer, "pointwise_kernel")
        reader, path = reader_of(layer, name), variable.path if first else _layer(variable)
        if reader is None:
            self.found[path] = Refit(why=f"the inputs of {type(layer).__name__} are not read")
            return
        other = small[0].weights[[id(v) for v in layer.weights].index(id(variable))]
        sides = Side(*dense, variable), Side(*small, other)
        refit = KernelRefit(reader, *sides, self._stays, self._data.held)
        after = Successor() if first or not _is_linear(layer) else self._successors.of(layer)
        norm = None if after.norm is None else self._others[id(after.norm)]
        lost = self._lost(layer, after, norm)
        if not refit.changed(_differ) and lost is None:
            return
        result = Refit(why=refit.why) if refit.why else refit.run_(lost, norm=norm)
        self._note(path, result)
        if after.norm is not None and result.kept:
            self._settled.add(id(after.norm))

    def _lost(self, layer: Any, after: Successor, norm: Any) -> np.ndarray | None:
        """Return what the other summand of a sum lacks by now, as (examples, positions, channels), or nothing.

        Before a batch normalisation it is larger by the inverse of its scale.
        """
        added = after.added
        if added is None or id(added) not in self._now or id(added) not in self._values:
            return None
        if getattr(layer, "data_format", None) == "channels_first":
            return None
        expected, got = self._kept(added), floats_of(self._now[id(added)], np.float32)
        if not _differ(expected, got):
            return None
        found = expected - got
        if norm is not None:
            found = found * _inverse_scale(norm)
        return found.reshape(len(found), -1, found.shape[-1])

    def _renorm_(self, dense: tuple[Any, LayerCall], small: tuple[Any, LayerCall]) -> None:
        layer = dense[0]
        before, after = (floats_of(call.inputs, np.float32) for _, call in (dense, small))
        if id(layer) in self._settled or not _differ(before, after):
            return
        if small[1].options.get("mask") is not None:
            self.found[layer.path] = Refit(why="its inputs are masked")
        else:
            renorm = Renorm(small[0], after, self._kept(layer), self._data.held)
            self._note(layer.path, renorm.run_())

    def _note(self, name: str, refit: Refit) -> None:
        """Note an outcome, unless the layer makes what it made though it reads fewer channels."""
        if refit.why or refit.before > NOISE:
            self.found[name] = refit

    def _kept(self, operation: Any) -> np.ndarray:
        """Return what stays of the dense outputs of a layer or an operation."""
        value, labels = (
            floats_of(self._dense[id(operation)], np.float32),
            self._values[id(operation)],
        )
        for axis in sorted(labels.axes):
            value = value.take(self._stays.indices(labels, axis), axis)
        return value


def _is_linear(layer: Any) -> bool:
    """Return whether nothing stands between the products of a layer and what it puts out."""
    return getattr(layer, "activation", None) in (None, keras.activations.linear)


def _watchable(model: Any) -> Iterator[Any]:
    """Yield the layers whose calls are seen: a backend traces those inside of another one that runs step by step."""
    every = all_layers(model)
    inside = {
        id(inner)
        for layer in every
        if isinstance(layer, keras.layers.TimeDistributed | keras.layers.RNN)
        for inner in all_layers(layer)[1:]
    }
    yield from (layer for layer in every if layer is not model and id(layer) not in inside)


def _kernels(layer: Any) -> list[Any]:
    """Return the kernels of a layer, not those of layers inside of it, unless these are the cell of a recurrent one."""
    apart = [] if isinstance(layer, keras.layers.RNN) else all_layers(layer)[1:]
    inner = {id(variable) for other in apart for variable in other.weights}
    own = (variable for variable in layer.weights if id(variable) not in inner)
    return [variable for variable in own if "kernel" in variable.name and len(variable.shape) > 1]


def _layer(variable: Any) -> str:
    return variable.path.rpartition("/")[0] or variable.path


def _call(args: tuple[Any, ...], options: dict[str, Any]) -> LayerCall:
    return LayerCall.of(args, options) if args or options else LayerCall(None, {})


def _differ(before: np.ndarray, after: np.ndarray) -> bool:
    if before.shape != after.shape:
        return True
    scale = float(np.abs(before).max(initial=0.0)) or 1.0
    return bool(np.abs(before - after).max(initial=0.0) > CHANGED * scale)


def _inverse_scale(norm: Any) -> np.ndarray:
    """Return the factor from a difference behind a batch normalisation to the one before it, 0 where none makes it."""
    scale = np.sqrt(floats_of(norm.moving_variance, np.float32) + norm.epsilon)
    if norm.gamma is None:
        return scale
    gain = floats_of(norm.gamma, np.float32)
    return np.divide(scale, gain, out=np.zeros_like(scale), where=gain != 0)
