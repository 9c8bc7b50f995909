"""Quantization while training: a model sees its weights rounded, and its gradients pass the rounding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras

from karikomi.errors import Unsupported
from karikomi.keras.arrays.variables import names_of
from karikomi.keras.internals import without_autocast
from karikomi.keras.layers.unit_axes import Weight, weights_of
from karikomi.keras.quantization.eligible import eligible
from karikomi.keras.quantization.in_place import quantize_
from karikomi.keras.quantization.output_units import output_units
from karikomi.quantize.every_tensor import Codes
from karikomi.quantize.grids import SMALLEST_SCALE, check_bits, split_units
from karikomi.select import NOT_SELECTED, select

WHERE = "keras.quantized_training"


class QuantizedTraining:
    """What `quantized_training` returns: the end of it.

    `rounded`: paths of the variables that the model sees rounded. `left_alone`: path -> why it sees another as it is.
    """

    def __init__(
        self, model: Any, weights: Mapping[str, Weight], bits: int, left_alone: Mapping[str, str]
    ) -> None:
        self.rounded, self.left_alone = list(weights), dict(left_alone)
        self._model, self._bits = model, bits
        self._call = vars(model).get("call")
        self._weights = {id(item.variable): item for item in weights.values()}
        # Past Keras' tracking of attributes, and past torch's of modules.
        object.__setattr__(model, "call", self._seen(model.call))
        _forget_functions(model)

    def finish_(self) -> Codes:
        """Let the model see its weights as they are, and quantize them in place, as `quantize_` does.

        Biases and other vectors get 16 bits. Raises `Unsupported` for a second call.
        """
        if not self._weights:
            raise Unsupported("this training was finished", where=WHERE)
        vars(self._model).pop("call")
        if self._call is not None:
            object.__setattr__(self._model, "call", self._call)
        _forget_functions(self._model)
        self._weights = {}
        others = [name for name, reason in self.left_alone.items() if reason == NOT_SELECTED]
        return quantize_(self._model, bits=self._bits, exclude=others or None)

    def _seen(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def rounded_call(*args: Any, **options: Any) -> Any:
            variables = self._model.variables
            with without_autocast():
                values = [(variable, self._value(variable)) for variable in variables]
                scope: Any = keras.StatelessScope(values, collect_losses=True)
            before = [scope.get_current_value(variable) for variable in variables]
            with scope:
                result = call(*args, **options)
            for variable, value in zip(variables, before, strict=True):
                after = scope.get_current_value(variable)
                # Statistics and seeds, which the call has updated.
                if after is not value:
                    variable.assign(after)
            self._pass_on(scope)
            return result

        return rounded_call

    def _value(self, variable: Any) -> Any:
        weight = self._weights.get(id(variable))
        return variable.value if weight is None else straight_through(weight, self._bits)

    def _pass_on(self, scope: Any) -> None:
        """Let losses that layers added be losses of the model."""
        outer = scope.original_scope
        for loss in scope.losses:
            if outer is None:
                self._model.add_loss(loss)
            elif outer.collect_losses:
                outer.add_loss(loss)


def quantized_training(
    model: Any,
    *,
    bits: int = 4,
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> QuantizedTraining:
    """Let a built model see its weights rounded from now on, in ``fit``, in loops and in ``predict``.

    ``w' = w + stop_gradient(s round(w / s) - w)`` with ``s = max|w| / (2**(bits-1) - 1)`` of each output unit: the
    gradients of the rounded weights train the weights themselves (straight-through estimator). On every backend, for
    functional, subclassed and nested models; the optimizer, its averages and masks of `kk.keras.Pruning` work as
    before, and saved files have the weights as they are trained. `QuantizedTraining.finish_` ends it: the values are
    then those that the model saw, but for ties, and `kk.save` stores codes.

    `bits` (2..16): as for `quantize_`. `only`, `exclude`: globs over paths of what `quantize_` takes for weights. Call
    it on the outermost model; if that was compiled, its functions are traced again.

    Raises `InvalidArgument` for a model that is not built and a width out of range, `UnknownName` for a glob,
    `Unsupported` where nothing can be quantized and for a model that is in such a training already.

    >>> import keras, numpy as np, karikomi as kk
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> model.compile("adam", "mse")
    >>> training = quantized_training(model, bits=3)
    >>> history = model.fit(np.ones((8, 4)), np.ones((8, 2)), verbose=0)
    >>> seen = model.predict(np.ones((1, 4)), verbose=0)
    >>> coded = training.finish_()
    >>> bool(np.allclose(model.predict(np.ones((1, 4)), verbose=0), seen, atol=1e-3))
    True

    Source: Bengio, Léonard and Courville 2013 (straight-through estimator); Jacob et al. 2018 (training with simulated
    quantization). Deviation: the scale is that of the weights at each step, not an average.
    """
    check_bits(bits, WHERE)
    items = weights_of(model, where=WHERE)
    if _is_seen_rounded(model):
        raise Unsupported("this model is in quantized training", where=WHERE, hint="finish_() it")
    named = dict(zip(names_of([item.variable for item in items]), items, strict=True))
    found = eligible(named)
    if not found.weights:
        reasons = [f"{name}: {reason}" for name, reason in found.left_alone.items()]
        raise Unsupported("there is no weight to round", where=WHERE, got="; ".join(reasons[:3]))
    chosen = select(found.weights, only=only, exclude=exclude, where=WHERE)
    reasons = dict.fromkeys({**found.vectors, **found.variances}, "a vector") | found.left_alone
    reasons |= {name: NOT_SELECTED for name in found.weights if name not in chosen}
    return QuantizedTraining(model, {name: found.weights[name] for name in chosen}, bits, reasons)


def straight_through(weight: Weight, bits: int) -> Any:
    """Return the rounded values of a variable, whose gradient passes on to it, in its dtype.

    >>> import keras
    >>> layer = keras.layers.Dense(1, use_bias=False)
    >>> layer.build((None, 2))
    >>> layer.kernel.assign([[1.5], [0.2]]) is None or True
    True
    >>> keras.ops.convert_to_numpy(straight_through(weights_of(layer, where="")[0], 3)).ravel().tolist()
    [1.5, 0.0]
    """
    units, shape = output_units(weight), tuple(map(int, weight.variable.shape))
    split, laid = split_units(shape, units.axis, units.groups)
    value: Any = weight.variable.value
    parts: Any = keras.ops.cast(keras.ops.reshape(value, split), "float32")
    limit = 2 ** (bits - 1) - 1
    others = [axis for axis, length in enumerate(laid) if length == 1]
    peak: Any = keras.ops.max(keras.ops.abs(parts), axis=others, keepdims=True)
    scale = keras.ops.where(peak == 0, 1.0, keras.ops.maximum(peak / limit, SMALLEST_SCALE))
    steps: Any = keras.ops.clip(keras.ops.round(parts / scale), -limit, limit)
    rounded = steps * scale
    passed = parts + keras.ops.stop_gradient(rounded - parts)
    return keras.ops.cast(keras.ops.reshape(passed, shape), weight.variable.dtype)


def _is_seen_rounded(model: Any) -> bool:
    name = getattr(vars(model).get("call"), "__qualname__", "")
    return name.startswith(f"{QuantizedTraining.__name__}.")


def _forget_functions(model: Any) -> None:
    """Have a compiled model trace its functions again."""
    for name in ("train_function", "test_function", "predict_function"):
        if getattr(model, name, None) is not None:
            setattr(model, name, None)
