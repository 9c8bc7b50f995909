"""The array namespaces under which every rule decides, each guarded so that it offers no name more.

That for TensorFlow is the adapter of `karikomi.keras`, which shows the size of one for a new framework.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import numpy as np

from depth import FULL
from karikomi.rule import ARRAY_OPERATIONS


def load_quietly(name: str) -> Any:
    """Import a framework without the warnings of its own import, which are none of our doing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


class Guard:
    """A namespace that refuses names not in `ARRAY_OPERATIONS`, and notes what is used."""

    used: set[str] = set()

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        if name not in ARRAY_OPERATIONS:
            raise AssertionError(f"{name} is not in karikomi.rule.ARRAY_OPERATIONS")
        self.used.add(name)
        return getattr(self._inner, name)


Step = Callable[..., Any]


@dataclass(frozen=True)
class Place:
    """Where a rule decides: a guarded namespace, how to compile, and what surrounds the call.

    `rounding`: by how much a float64 may differ from NumPy's; XLA reorders and fuses operations.
    """

    name: str
    xp: Any
    compiled: Callable[[Step], Step] = field(default=lambda step: step)
    around: Callable[[], Any] = contextlib.nullcontext
    rounding: float = 0.0


INSTALLED = {framework for framework in ("jax", "tensorflow") if find_spec(framework)}
# NumPy, the strict namespace and torch are always there; the others where they can be installed.
NAMES = ["numpy", "array-api-strict", "torch"]
NAMES += ["jax", "jax.jit"] if "jax" in INSTALLED else []
NAMES += ["tensorflow", "tf.function"] if "tensorflow" in INSTALLED else []
COMPILED = {"jax.jit", "tf.function"}


@functools.cache
def place(name: str) -> Place:
    """Return one of `NAMES`, its framework imported only now."""
    if name == "numpy":
        return Place(name, Guard(np))
    if name == "array-api-strict":
        return Place(name, Guard(load_quietly("array_api_strict")))
    if name == "torch":
        return Place(name, Guard(load_quietly("array_api_compat.torch")), rounding=1e-15)
    if name.startswith("jax"):
        jax, jnp = load_quietly("jax"), load_quietly("jax.numpy")
        compiled = jax.jit if name == "jax.jit" else _as_it_is
        return Place(name, Guard(jnp), compiled, lambda: _wide(jax), 1e-15)
    function = functools.partial(load_quietly("tensorflow").function, autograph=FULL)
    compiled = function if name == "tf.function" else _as_it_is
    rounding = (
        1e-15 if name == "tf.function" else 0.0
    )  # its optimizer divides by roots in its own way
    adapter = load_quietly("karikomi.keras.arrays.tensorflow_namespace").TensorFlowNamespace()
    return Place(name, Guard(adapter), compiled, rounding=rounding)


def _as_it_is(step: Step) -> Step:
    return step


def _wide(jax: Any) -> Any:
    enable = getattr(jax, "enable_x64", None)
    return (enable if enable is not None else jax.experimental.enable_x64)(True)
