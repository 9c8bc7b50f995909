"""The library of arrays for Keras' backend, or for whatever framework some arrays are of."""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

import keras

from karikomi.errors import InvalidArgument
from karikomi.functional.library import Library

_KINDS = {
    "tensorflow": ("Tensor", "IndexedSlices", "Variable"),
    "jax": ("Array",),
    "torch": ("Tensor",),
}


def library() -> Library:
    """Return the library of the backend that Keras runs on."""
    backend = keras.config.backend()
    if backend not in _KINDS:
        raise InvalidArgument(
            "karikomi does not support this backend of Keras",
            where="keras",
            got=backend,
            allowed=tuple(_KINDS),
        )
    some: Any = keras.ops.zeros(()) if backend == "torch" else None
    return _library_named(backend, getattr(some, "device", None))


def library_for(array: Any) -> Library:
    """Return the library of the framework that an array is of, whatever Keras runs on."""
    name = framework_of(array) or "torch"
    return _library_named(name, array.device if name == "torch" else None)


def framework_of(array: object) -> str | None:
    """Return the framework that an array is of, ``None`` for anything else; nothing is imported."""
    for name, kinds in _KINDS.items():
        framework = sys.modules.get(name)
        if framework is not None and isinstance(
            array, tuple(getattr(framework, kind) for kind in kinds)
        ):
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


def _library_named(framework: str, device: Any) -> Library:
    if framework == "jax":
        # Not kept: its widest float is a setting.
        return importlib.import_module("karikomi.jax.library").library()
    return _kept(framework, device)


@functools.cache
def _kept(framework: str, device: Any) -> Library:
    if framework == "torch":
        return importlib.import_module("karikomi.torch.numerics.library").TorchLibrary(device)
    return importlib.import_module("karikomi.keras.arrays.tensorflow_library").TensorFlowLibrary()
