"""Kernels of custom layers that their class, or the user, declares as prunable."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import keras

from karikomi.errors import InvalidArgument
from karikomi.prune import Layout

METHOD = "get_prunable_weights"
"""The method by which a layer names its prunable variables, as in the TensorFlow Model Optimization Toolkit."""

_KNOWN: dict[type, dict[str, Layout | None]] = {}


class Declarations(NamedTuple):
    """What is declared in one model.

    `variables`: identities of those that layers name by `METHOD`. `speaking`: identities of these layers. `layouts`:
    (identity of a layer, name of its variable) -> axes, from `declare_prunable`.
    """

    variables: set[int]
    speaking: set[int]
    layouts: dict[tuple[int, str], Layout | None]


def declare_prunable(layer: type, *names: str, layout: Layout | None = None) -> None:
    """Let the variables of these names in layers of a class be pruned by default, as kernels of Dense are.

    `layer`: a subclass of ``keras.Layer``; its subclasses are meant too. `names`: of variables, as
    ``add_weight(name=)`` has them; without any, earlier declarations of this class are withdrawn. `layout`: their
    axes of units and inputs, in the variable's own order, for patterns and scores that need them; without it single
    weights can go. A layer may have a method ``get_prunable_weights()`` instead, which returns its prunable
    variables: then no other one of its own is pruned. Raises `InvalidArgument`.

    >>> class Mixing(keras.layers.Layer):
    ...     def build(self, shape):
    ...         self.table = self.add_weight(shape=(shape[-1], shape[-1]), name="table")
    >>> declare_prunable(Mixing, "table", layout=Layout(units=1, inputs=0))

    Source: ``PrunableLayer`` of the TensorFlow Model Optimization Toolkit.
    """
    if not (isinstance(layer, type) and issubclass(layer, keras.Layer)):
        raise InvalidArgument(
            "not a class of layers",
            where="keras.declare_prunable",
            got=repr(layer)[:80],
            allowed="a subclass of keras.Layer",
        )
    if not all(isinstance(name, str) for name in names) or not isinstance(layout, Layout | None):
        raise InvalidArgument(
            "variables go by their names, axes by a layout",
            where="keras.declare_prunable",
            got=f"names={names!r}, layout={layout!r}"[:120],
            allowed='such as "kernel", layout=kk.prune.Layout(units=1, inputs=0)',
        )
    if names:
        _KNOWN[layer] = {**_KNOWN.get(layer, {}), **dict.fromkeys(names, layout)}
    else:
        _KNOWN.pop(layer, None)


def declared_in(owners: Sequence[Any], every: Iterable[Any]) -> Declarations:
    """Return what is declared of these owners of variables, by them and by all layers of their model."""
    speaking = [layer for layer in every if callable(getattr(layer, METHOD, None))]
    variables = {id(variable) for layer in speaking for variable in _named_by(layer)}
    layouts = {
        (id(owner), name): layout
        for owner in owners
        for kind in reversed(type(owner).__mro__)
        for name, layout in _KNOWN.get(kind, {}).items()
    }
    return Declarations(variables, {id(layer) for layer in speaking}, layouts)


def _named_by(layer: Any) -> list[Any]:
    variables = list(getattr(layer, METHOD)())
    own = {id(variable) for variable in layer.weights}
    wrong = [variable for variable in variables if id(variable) not in own]
    if wrong:
        raise InvalidArgument(
            "a layer declares variables of its own",
            where=f"{layer.name}.{METHOD}",
            got=repr(wrong[0])[:80],
            allowed="keras.Variable, out of layer.weights",
        )
    return variables
