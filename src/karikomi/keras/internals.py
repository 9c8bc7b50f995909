"""Members private to Keras and TensorFlow, each behind one function; checked with Keras 3.15.1 and TensorFlow 2.21.

A member that a later version lacks raises `Unsupported`, naming the member and the version.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras

from karikomi.errors import Unsupported

WHERE = "karikomi.keras.internals"
AVERAGES = "_model_variables_moving_average"
"""The attribute of the averages of weights that an optimizer keeps under ``use_ema``."""


def all_layers(layer: Any) -> list[Any]:
    """Return a layer and all layers inside of it, wrapped ones too, from the outside in."""
    return _member(layer, "_flatten_layers", "used to find layers")()


def child_layers(layer: Any) -> list[Any]:
    """Return the layers directly inside of a layer."""
    find = _member(layer, "_flatten_layers", "used to find layers")
    return find(include_self=False, recursive=False)


def graph_of(model: Any) -> Any:
    """Return the graph of layers of a functional or sequential model, nothing for any other layer.

    A subclass with a ``call`` of its own has none.
    """
    if isinstance(model, keras.Sequential) and type(model).call is keras.Sequential.call:
        return _member(model, "_functional", "used to follow sequential models")
    functional = importlib.import_module("keras.src.models.functional")
    kind = _member(functional, "Functional", "used to find functional models", functional)
    return model if isinstance(model, kind) and type(model).call is kind.call else None


def nodes_of(graph: Any) -> list[Any]:
    """Return the calls of a graph of layers in the order in which they run, without its inputs."""
    by_depth = _member(graph, "_nodes_by_depth", "used to follow functional models")
    ordered = [node for depth in sorted(by_depth, reverse=True) for node in by_depth[depth]]
    return [node for node in ordered if node.operation is not None and not node.is_input]


def trusted_functions() -> Any:
    """Return a context in which functions of a model that is in memory may be made from configurations."""
    library = importlib.import_module("keras.src.saving.serialization_lib")
    return _member(library, "SafeModeScope", "used to copy layers with functions", library)(False)


def without_autocast() -> Any:
    """Return a context in which variables have the values of their own dtype, as outside of layers."""
    backend = importlib.import_module("keras.src.backend")
    return _member(backend, "AutocastScope", "used to read variables in a call", backend)(None)


def kernel_of(layer: Any) -> Any:
    """Return the stored kernel of a layer, or nothing.

    ``layer.kernel`` is computed where a layer can be adapted or quantized. Of a separable
    convolution it is the pointwise kernel, which makes the outputs.
    """
    for name in ("pointwise_kernel", "_kernel", "kernel"):
        if isinstance(vars(layer).get(name), keras.Variable):
            return vars(layer)[name]
    return getattr(layer, "kernel", None)


def layout_of(variable: Any) -> Any:
    """Return the layout of a variable over devices, or ``None``."""
    return getattr(variable, "_layout", None)


def stored_value(variable: Any) -> Any:
    """Return the backend's value of a variable, ``None`` if an error in a JAX step removed it."""
    return _member(variable, "_value", "used to read variables")


def learning_rate_of(optimizer: Any) -> Any:
    """Return the learning rate of an optimizer as it was given: a schedule, or a variable."""
    return _member(optimizer, "_learning_rate", "used to find schedules")


def apply_count(optimizer: Any) -> Any:
    """Return the variable that counts calls of ``apply``, where ``iterations`` counts updates."""
    return _member(optimizer, "_iterations", "used to count micro-batches")


def trained_variables(optimizer: Any) -> list[Any]:
    """Return the variables that an optimizer was built for."""
    return _member(optimizer, "_trainable_variables", "used to find variables of an optimizer")


def place_of(optimizer: Any, variable: Any) -> int:
    """Return the place of a variable among those that an optimizer was built for."""
    return _member(optimizer, "_get_variable_index", "used to find variables")(variable)


def check_known(optimizer: Any, variables: Sequence[Any]) -> None:
    """Raise `ValueError` for variables that an optimizer was not built for."""
    _member(optimizer, "_check_variables_are_known", "used to check variables")(variables)


def accumulated_gradients(optimizer: Any) -> list[Any]:
    """Return the variables for sums of gradients, one for each variable of an optimizer."""
    return _member(optimizer, "_accumulated_gradients", "used to accumulate gradients")


def moments_of(optimizer: Any, count: int) -> Iterator[list[Any]]:
    """Yield each list in which an optimizer keeps an entry for each of `count` trained variables."""
    trained = trained_variables(optimizer)
    for kept in vars(optimizer).values():
        if isinstance(kept, list) and kept is not trained and len(kept) == count:
            yield kept


def set_saved_optimizer(model: Any) -> None:
    """Put the optimizer of a model into the configuration that is saved, if there is one."""
    if hasattr(model, "_compile_config"):
        model._compile_config.config["optimizer"] = model.optimizer


def build_from_spec(model: Any, spec: Any) -> None:
    """Build a model for batches of a specification, without a batch."""
    _member(model, "_symbolic_build", "used to build models before the first step")(data_batch=spec)


def needs_merge_call() -> bool:
    """Return whether replicas under the strategy of TensorFlow meet in a merge call only."""
    tf = importlib.import_module("tensorflow")
    use = "used to branch under tf.distribute"
    distribute = _member(tf, "__internal__", use, tf).distribute
    return not _member(distribute, "strategy_supports_no_merge_call", use, tf)()


def _member(owner: Any, name: str, use: str, library: Any = keras) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError:
        owner_name = getattr(owner, "__name__", type(owner).__name__)
        raise Unsupported(
            f"{library.__name__} {library.__version__} has no {owner_name}.{name}, {use}",
            where=WHERE,
            hint="Keras 3.15 on TensorFlow 2.21 has it",
        ) from None
