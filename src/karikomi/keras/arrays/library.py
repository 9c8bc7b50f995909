"""The library of arrays for Keras' backend, or for whatever framework some arrays are of.

Each framework is imported only for its own arrays, so that the other backends need not be installed.
"""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

import keras

from karikomi.errors import InvalidArgument
from karikomi.functional.library import Library

FRAMEWORKS = ("tensorflow", "jax", "torch")


def library() -> Library:
    """Return the library of the backend that Keras runs on."""
    backend = keras.config.backend()
    if backend == "tensorflow":
        return _tensorflow()
    if backend == "jax":
        return _jax()
    if backend == "torch":
        some: Any = keras.ops.zeros(())
        return _torch(some.device)
    raise InvalidArgument(
        "karikomi does not serve this backend of Keras",
        where="keras",
        got=backend,
        allowed=FRAMEWORKS,
    )


def library_for(array: Any) -> Library:
    """Return the library of the framework that an array is of, whatever Keras runs on."""
    name = framework_of(array)
    if name == "tensorflow":
        return _tensorflow()
    return _jax() if name == "jax" else _torch(array.device)


def framework_of(array: object) -> str | None:
    """Return the framework that an array is of, ``None`` for anything else; nothing is imported."""
    for name, found in (
        ("tensorflow", _is_tensorflow),
        ("jax", _is_jax),
        ("torch", _is_torch),
    ):
        if name in sys.modules and found(array):
            return name
    return None


def is_known(array: Any) -> bool:
    """Return whether the values of an array can be read, which is not so while a function is traced."""
    name = framework_of(array)
    if name == "tensorflow":
        return sys.modules["tensorflow"].executing_eagerly()
    if name == "jax":
        return not isinstance(array, sys.modules["jax"].core.Tracer)
    return True


def as_it_is(function: Any) -> Any:
    """Return a function that AutoGraph leaves alone, if TensorFlow is there at all."""
    tf = sys.modules.get("tensorflow")
    return function if tf is None else tf.autograph.experimental.do_not_convert(function)


def readable(array: Any) -> Any:
    """Return arrays for an outcome, which are copied to the host when they are read."""
    if not is_known(array):
        return Untold()
    if framework_of(array) == "torch":
        from karikomi.torch.clipping.device_step import HostView

        return HostView(array.detach())
    return array


class Untold:
    """Values that do not exist while a function is traced; reading them raises an error with a hint."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        """Raise `InvalidArgument`."""
        raise InvalidArgument(
            "numbers are not known inside of a function that is being compiled",
            where="outcome",
            hint="return the state, and read kk.keras.outcome(state) outside",
        )


@functools.cache
def _tensorflow() -> Library:
    return importlib.import_module("karikomi.keras.arrays.tensorflow_library").TensorFlowLibrary()


@functools.cache
def _torch(device: Any) -> Library:
    return importlib.import_module("karikomi.keras.arrays.torch_library").TorchLibrary(device)


def _jax() -> Library:
    # Not kept: its widest float is a setting.
    return importlib.import_module("karikomi.jax.library").library()


def _is_tensorflow(array: object) -> bool:
    tf = sys.modules["tensorflow"]
    return isinstance(array, tf.Tensor | tf.IndexedSlices | tf.Variable)


def _is_jax(array: object) -> bool:
    return isinstance(array, sys.modules["jax"].Array)


def _is_torch(array: object) -> bool:
    return isinstance(array, sys.modules["torch"].Tensor)
